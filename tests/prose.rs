//! Looks for the phrases and the old names that this project does not use, in code, documents and
//! file names.
//!
//! `cargo test -p session-tests --test prose` checks the rules themselves, and then the whole tree.
//! Each hit is printed as `file:line`, with the words found and what to write in their place. If a
//! hit is correct English, or a name of another crate, add it to [`ALLOWED`] with the reason.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use regex::Regex;

/// The folders of the repository to check. Of the files in its root, the Markdown files are checked.
const CHECKED: [&str; 8] =
    [".ci", ".github", "benches", "docs", "examples", "fuzz", "src", "tests"];
/// Folders with data: nobody wrote it for a reader.
const NOT_CHECKED: [&str; 4] = ["corpus", "found", "frozen", "target"];
/// This file, which has to quote what it looks for.
const THIS_FILE: &str = "tests/prose.rs";
/// The ends of the names of files with code or prose. `run` is a script without an extension.
const ENDINGS: [&str; 8] = [".html", ".js", ".md", ".rs", ".toml", ".yaml", ".yml", "/run"];

/// How a rule looks for its words.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// A phrase, in small or capital letters. Each space also matches a line break in a comment.
    Phrase,
    /// An old name: as a word, in the plural, and as a part of `snake_case` or `CamelCase`.
    Name,
    /// A regular expression, as it is.
    Code,
}

struct Rule {
    kind: Kind,
    pattern: &'static str,
    instead: &'static str,
    /// A text that the rule must find.
    example: &'static str,
}

const fn phrase(pattern: &'static str, instead: &'static str, example: &'static str) -> Rule {
    Rule { kind: Kind::Phrase, pattern, instead, example }
}

const fn name(pattern: &'static str, instead: &'static str, example: &'static str) -> Rule {
    Rule { kind: Kind::Name, pattern, instead, example }
}

const fn code(pattern: &'static str, instead: &'static str, example: &'static str) -> Rule {
    Rule { kind: Kind::Code, pattern, instead, example }
}

const RULES: &[Rule] = &[
    // Phrases that a reader has to read twice.
    phrase(r"\bwere (?:it|they|there)\b", "if it were", "/// Were\n/// it moved regardless."),
    phrase(
        // Not `there is none`, which is plain English.
        r"(?:[^r]e|[^e]) (?:is|are) none\b",
        "is not a, does not exist",
        "/// It is none.",
    ),
    phrase(r"\bthe one told last\b", "the last reported one", "of which the one told last is seen"),
    phrase(r"\banew\b", "again", "// Sessions are read anew."),
    phrase(
        // Not `stands for`, which is plain English.
        r"\bstands\b(?: (?:[^f\s]|f[^o])|[^\s\w])",
        "is",
        "// Where the server stands.",
    ),
    phrase(r"\btold\b", "reported, notified, returned", "// The other instances are told."),
    phrase(r"\bso many\b", "the number itself, or its name", "// Once so\n// many are waiting."),
    phrase(
        r"\bgoes on to its end\b",
        "runs to completion",
        "/// Once begun it goes on to its end.",
    ),
    phrase(r"\basks nobody\b", "does no I/O", "It asks nobody, so call it often."),
    phrase(r"\bnobody waits\b", "a call waits at most", "Nobody waits longer than 5 ms."),
    phrase(r"\b(?:leaves?|left) together\b", "is sent as one batch", "Misses leave together."),
    phrase(
        // Not `no more than`, which is plain English.
        r"\bno more\b(?: (?:[^t\s]|t[^h])|[^\s\w])",
        "no longer",
        "// Sizes count no more.",
    ),
    phrase(r"\btried again and again\b", "retried", "It is tried again and again."),
    code(
        // Not a question, and not a relative clause, which is written small. `What` and `How long`
        // are not looked for: most sentences that begin with them are correct.
        r"(?m)(?:^|[.:;] )(?:Who|Whoever|Which) [^.:?!]{1,200}\.(?:\s|$)",
        "name the actor or the thing, then its job",
        "/// Which removals are under way.",
    ),
    // Old names, with a standard term for each.
    name("void", "invalidation, invalidate", "fn void_all()"),
    name("freshness", "coherence, VersionTable", "struct Freshness"),
    name("stamp", "version", "fn take_stamp()"),
    name("ticket", "fill guard", "tickets"),
    name("boarding", "Flight", "enum Boarding"),
    name("boarded", "joined", "let boarded = 1;"),
    name("flying", "InFlight", "struct Flying"),
    name("departed", "started_at", "flying.departed"),
    name("landing", "Leader, complete", "struct Landing"),
    name("lands", "result, completes", "// The flight lands."),
    name("landed", "is acknowledged, is complete", "// The save has landed."),
    name("echo", "own write", "enum Report { Echo }"),
    name("fence", "checkpoint, watermark", "struct Fences"),
    name("hear", "apply_change, receive", "fn hear()"),
    name("heard", "received", "// It has heard of everything."),
    name("follower", "InvalidationListener", "struct Follower"),
    name("freight", "BatchExecutor", "trait Freight"),
    name("seat", "AdmissionPermit", "struct Seat"),
    name("era", "epoch", "state.era"),
    name("lane", "WriteQueue", "struct Lanes"),
    name("standing", "stats, snapshot", "struct LeaseStanding"),
    name("teller", "Publisher", "struct Teller"),
    name("news", "EventSource", "struct NewsSource"),
    name("pulse", "Availability", "mod pulse;"),
    name("takeover", "import::steps", "struct Takeover"),
    name("packed", "compact", "mod packed;"),
    name("sealed", "encrypted", "sealed: Vec<u8>"),
    name("tidy", "sweep", "fn tidy()"),
    name("lapsed", "expired", "result=\"lapsed\""),
    name("crew", "Scheduler", "struct Crew"),
    name("errand", "PendingCalls", "struct Errands"),
    name("manners", "FaultConfig", "struct Manners"),
    name("weather", "FaultPlan", "struct Weather"),
    code(r"\bHub\b|\bhub:", "EventBroadcaster", "Arc<Hub>"),
    code(r"\bBREATH\b", "OWN_WRITES_DEBOUNCE", "const BREATH: Duration"),
    code(r"\bSECOND_THOUGHTS\b", "UNSUPPORTED_RETRY", "const SECOND_THOUGHTS: Duration"),
    code(r"\bDRAWS\b", "MAX_ID_ATTEMPTS", "const DRAWS: usize"),
    code(r"\bSHARE\b", "MAX_LIFETIME_LOSS, MAX_CPU_SHARE", "const SHARE: u32"),
    code(r"\blet_go\b|\blets_go\b", "try_flush, check_in", "fn let_go()"),
    code(r"\bleave_with_all\b", "flush_all", "fn leave_with_all()"),
    code(r"\bturn_away\b", "discard", "fn turn_away()"),
    code(r"\bsynced_at\b", "synced_through", "fn synced_at()"),
    code(r"\bis_settled\b", "has_pending_write", "fn is_settled()"),
    code(r"\bUnderWay\b", "DeleteGuard, Sent", "struct UnderWay"),
    code(
        r"\b(?:struct|enum|trait|type|impl) (?:Beat|Dispatch|Edge|Held|Place|Question|Removals|Sessions|Touching|Watch)\b",
        "the name in the architecture's glossary",
        "impl Sessions {",
    ),
    code(r"\bAsFieldsSay\b|\bByNobody\b", "OwnerUpdate::{Set, Clear}", "Owned::ByNobody"),
    code(r"\bOfTrouble\b|\bOfLife\b", "Liveness", "Sign::OfTrouble"),
    code(r"\bTouch::No\b", "Touch::FullReplace", "Touch::No => {}"),
    // Old public names.
    code(r"\bmax_absent\b", "max_absent_ids", ".max_absent(10)"),
    code(r"\bmax_waiting\b", "max_queued_calls", ".max_waiting(10)"),
    code(r"\bmax_in_flight\b", "max_commands_in_flight", ".max_in_flight(10)"),
    code(r"\bexclusive\(\)|`exclusive`", "coherence(Coherence::SoleWriter)", ".exclusive()"),
    code(
        r"\bchange_stream\((?:true|false|bool)?\)",
        "coherence(Coherence::TimeBound)",
        ".change_stream(false)",
    ),
    code(r"\brevoke_of\b", "revoke_owned", "store.revoke_of(user, handle)"),
    code(r"\bEvent::Missed\b", "Event::Lagged", "Event::Missed(3)"),
    code(r"\bEventKind::Ended\b", "EventKind::Removed", "EventKind::Ended => {}"),
    code(r"\brefuse_plain\b", "require_encrypted", "keys.refuse_plain()"),
    code(r"\bMongoHealth::Silent\b", "MongoHealth::Unresponsive", "MongoHealth::Silent { .. }"),
    code(r"_together_size\b", "_batch_size", "session_store_mongo_together_size"),
    code(r#"result="shared""#, "coalesced", "result=\"shared\""),
    code(r#"cause="doubt"|"doubt"|\bdoubts\b"#, "unknown_outcome", "cause=\"doubt\""),
    // One binding on a line.
    code(
        r"\blet \([\w\s,]+\) =\s*\([^;(){}]*,[^;]*\);",
        "one `let` for each name",
        "let (a, mut b) = (1, 2);",
    ),
    // File names that say how a test came about, not what it tests.
    code(r"\bsabotage\b|\bfirst_minutes\b|/seen\.rs", "the name of the feature", "mod sabotage;"),
];

/// True uses: the end of a file's name, a part of the line, and the reason.
const ALLOWED: &[(&str, &str, &str)] = &[
    (".ci/run", "echo", "the command of the shell"),
    ("CHANGELOG.md", "no more often than", "correct English"),
    ("CHANGELOG.md", "| `", "the table of the names that changed"),
    ("CONTRIBUTING.md", "`let (a, b) = (x, y);`", "the rule itself"),
    ("tests/server/src/install.rs", "echo", "the command of the shell"),
    ("tests/server/src/shell.rs", "echo", "the command of the shell"),
    ("tests/server/tests/install.rs", "echo", "the command of the shell"),
];

/// Correct text in which no rule may find anything.
const CORRECT: [&str; 19] = [
    "/// If it were paused, it would miss the change.",
    "// The stream is behind, or there is none.",
    "// `$$ROOT` stands for the whole document.",
    "// It takes no more than 5 ms.",
    "/// What does a save do whose connection drops?",
    "/// The entry, which is what the load returns.",
    "/// How long a call may take.",
    "/// What all tasks of a run share.",
    "// Whatever the network does, the bound holds.",
    "## What you need: Rust and a C compiler",
    "let timestamp = OffsetDateTime::now_utc();",
    "let planet = Planet::default();",
    "// An outstanding command of the general queue. Seattle.",
    "// GitHub and its islands, with wavoid opera.",
    "let (request, body) = response.into_parts();",
    "let (sender, receiver) = oneshot::channel::<(u8, u8)>();",
    "/// The share of requests that fail.",
    "use tracing::Dispatch;",
    ".max_absent_ids(10_000).max_commands_in_flight(4)",
];

impl Rule {
    fn regex(&self) -> Result<Regex, regex::Error> {
        // Boundaries of ASCII words, since those of Unicode words take 20 times as long.
        let pattern = &self.pattern.replace(r"\b", r"(?-u:\b)");
        match self.kind {
            Kind::Phrase => Regex::new(&format!("(?i){}", pattern.replace(' ', r"\s+"))),
            Kind::Name => {
                let first = &pattern[..1];
                let rest = &pattern[1..];
                let camel = format!("{}{rest}(?:e?s)?", first.to_uppercase());
                let edge = r"(?-u:\b)";
                let word = format!("(?:{edge}|_)(?i:{pattern}(?:e?s)?)(?:{edge}|_)");
                Regex::new(&format!("{word}|{edge}{camel}[A-Z]|[a-z]{camel}(?:[A-Z]|{edge})"))
            }
            Kind::Code => Regex::new(pattern),
        }
    }
}

#[derive(Debug, PartialEq)]
struct Hit {
    rule: usize,
    line: usize,
    found: String,
}

fn regexes() -> Vec<Regex> {
    let compile = |rule: &Rule| match rule.regex() {
        Ok(regex) => regex,
        Err(error) => panic!("{}: {error}", rule.pattern),
    };
    RULES.iter().map(compile).collect()
}

/// The lines without indentation and comment signs, so that a phrase is found across a line break.
fn without_comment_signs(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for line in text.lines() {
        let line = line.trim_start();
        let marker = ["///", "//!", "//", ">", "# ", "- "].iter();
        let line = marker.fold(line, |line, sign| line.strip_prefix(sign).unwrap_or(line));
        plain.push_str(line.trim());
        plain.push('\n');
    }
    plain
}

fn search(regexes: &[Regex], text: &str) -> Vec<Hit> {
    let plain = without_comment_signs(text);
    let mut hits = Vec::new();
    for (rule, regex) in regexes.iter().enumerate() {
        for found in regex.find_iter(&plain) {
            let line = plain[..found.start()].matches('\n').count() + 1;
            let found = found.as_str().trim().replace('\n', " ");
            hits.push(Hit { rule, line, found });
        }
    }
    hits
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// All files to check, by their path from the root, with `/` on every system.
fn files() -> Vec<(String, PathBuf)> {
    let mut found = Vec::new();
    let mut folders = vec![(String::new(), root())];
    while let Some((prefix, folder)) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) => panic!("{}: {error}", folder.display()),
        };
        for entry in entries.flatten() {
            let file_name = entry.file_name().to_string_lossy().into_owned();
            let relative = format!("{prefix}{file_name}");
            let path = entry.path();
            if path.is_dir() {
                let is_in_checked = !prefix.is_empty() || CHECKED.contains(&file_name.as_str());
                if is_in_checked && !NOT_CHECKED.contains(&file_name.as_str()) {
                    folders.push((format!("{relative}/"), path));
                }
                continue;
            }
            let endings: &[_] = if prefix.is_empty() { &[".md"] } else { &ENDINGS };
            if relative != THIS_FILE && endings.iter().any(|ending| relative.ends_with(ending)) {
                found.push((relative, path));
            }
        }
    }
    found.sort();
    found
}

#[test]
fn each_rule_finds_its_example() {
    let regexes = regexes();
    for (rule, regex) in RULES.iter().zip(&regexes) {
        let plain = without_comment_signs(rule.example);
        assert!(regex.is_match(&plain), "{} does not find: {}", rule.pattern, rule.example);
    }
}

#[test]
fn no_rule_finds_correct_text() {
    let regexes = regexes();
    for text in CORRECT {
        let hits = search(&regexes, text);
        let patterns: Vec<_> = hits.iter().map(|hit| RULES[hit.rule].pattern).collect();
        assert!(hits.is_empty(), "{text}: {patterns:?}");
    }
}

#[test]
fn old_name_is_found_in_every_form() {
    let regexes = regexes();
    for form in ["echo", "Echoes", "own_echoes", "echo_of", "EchoTable", "OwnEcho", "ECHO"] {
        let hits = search(&regexes, &format!("fn one() {{}}\nlet it = {form};\n"));
        let lines: Vec<_> = hits.iter().map(|hit| hit.line).collect();
        assert_eq!(lines, [2], "{form}");
    }
}

#[test]
fn phrase_is_found_across_lines_of_a_comment() {
    let hits = search(&regexes(), "let a = 1;\n    /// Waits until so\n    /// many are there.\n");
    let lines: Vec<_> = hits.iter().map(|hit| hit.line).collect();
    assert_eq!(lines, [2], "{hits:?}");
}

#[test]
fn search_reaches_every_kind_of_file() {
    let files: Vec<_> = files().into_iter().map(|(relative, _)| relative).collect();
    for expected in [
        ".ci/run",
        ".github/workflows/ci.yml",
        "README.md",
        "docs/RELEASE.md",
        "fuzz/run",
        "src/guide/security.md",
        "src/lib.rs",
        "tests/Cargo.toml",
        "tests/it/main.rs",
    ] {
        assert!(files.iter().any(|file| file == expected), "{expected} is not checked");
    }
    let unwanted = files.iter().find(|file| file.contains("target/") || *file == THIS_FILE);
    assert_eq!(unwanted, None);
}

#[test]
fn tree_has_no_banned_phrase_and_no_old_name() {
    let regexes = regexes();
    let mut used = vec![false; ALLOWED.len()];
    let mut counts = BTreeMap::new();
    let mut report = String::new();
    for (relative, path) in files() {
        let Ok(text) = fs::read_to_string(&path) else { continue };
        let lines: Vec<_> = text.lines().collect();
        let in_name = search(&regexes, &relative).into_iter().map(|hit| Hit { line: 0, ..hit });
        for Hit { rule, line, found } in in_name.chain(search(&regexes, &text)) {
            let context = line.checked_sub(1).map_or(relative.as_str(), |index| lines[index]);
            let is_allowed = |(end, part, _): &(&str, &str, &str)| {
                relative.ends_with(end) && context.contains(part)
            };
            if let Some(index) = ALLOWED.iter().position(is_allowed) {
                used[index] = true;
                continue;
            }
            let Rule { pattern, instead, .. } = &RULES[rule];
            *counts.entry(*pattern).or_insert(0) += 1;
            let _ = writeln!(report, "{relative}:{line}: `{found}`; write: {instead}");
        }
    }
    for (pattern, count) in &counts {
        let _ = writeln!(report, "{count:5} × {pattern}");
    }
    let unused: Vec<_> =
        ALLOWED.iter().zip(&used).filter(|(_, used)| !**used).map(|(entry, _)| entry).collect();
    assert!(counts.is_empty(), "banned phrases and old names:\n{report}");
    assert!(unused.is_empty(), "no line needs these entries of ALLOWED any more: {unused:?}");
}
