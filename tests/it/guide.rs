//! Two pages of the guide are complete. The page for users of another store has a row for each
//! option and method of that store. The page on metrics has a row for each value of each label.
//! The tests that the page on security names exist.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

const PAGE: &str = include_str!("../../src/guide/coming_from.md");

/// Each store, with the options and methods in its README and its source.
const THEIRS: [(&str, &[&str]); 7] = [
    (
        "mongoose-express-session-store",
        &["ttl", "uri", "collection", "clear", "length", "destroy", "get", "set", "new Store"],
    ),
    (
        "session-mongoose",
        &["url", "interval", "model", "model.collection.drop", "maxAge", "require", "Mixed"],
    ),
    (
        "connect-mongoose-session",
        &["lifecheck", "set", "get", "destroy", "count", "length", "clear", "-1", "function"],
    ),
    (
        "koa-session-mongo",
        &[
            "db",
            "collection",
            "host",
            "port",
            "username",
            "password",
            "auto_reconnect",
            "ssl",
            "expirationTime",
            "url",
            "mongoose",
            "create",
            "closeConnections",
        ],
    ),
    ("express-mongodb", &["collection", "clear_interval", "mongoose.model", "collection.find"]),
    (
        "connect-mongo",
        &[
            "mongoUrl",
            "clientPromise",
            "client",
            "collectionName",
            "mongoOptions",
            "dbName",
            "ttl",
            "touchAfter",
            "stringify",
            "createAutoRemoveIdx",
            "autoRemove",
            "autoRemoveInterval",
            "serialize",
            "unserialize",
            "writeOperationOptions",
            "transformId",
            "crypto",
            "secret",
            "algorithm",
            "hashing",
            "encodeas",
            "key_size",
            "iv_size",
            "at_size",
            "cryptoAdapter",
            "fallbackMemory",
            "mongooseConnection",
            "get",
            "set",
            "touch",
            "all",
            "destroy",
            "length",
            "clear",
            "close",
            "update",
        ],
    ),
    (
        "tower-sessions-mongodb-store",
        &[
            "MongoDBStore::new",
            "mongodb",
            "delete_expired",
            "continuously_delete_expired",
            "MongoDBStoreError",
            "expireAt",
        ],
    ),
];

#[test]
fn each_option_of_another_store_has_a_row_in_its_section() {
    for (store, theirs) in THEIRS {
        let (_, section) = PAGE.split_once(&format!("\n# {store}\n")).expect(store);
        // In a program, a line that begins with `# ` is a hidden line. No blank line precedes it.
        let section = section.split("\n\n# ").next().unwrap();
        let first_cell = |line: &'static str| line.strip_prefix("| ")?.split(" | ").next();
        let cells: Vec<_> = section.lines().filter_map(first_cell).collect();
        for option in theirs {
            let is_named = cells.iter().any(|cell| names(cell, option));
            assert!(is_named, "the section on {store} has no row for `{option}`");
        }
    }
}

/// The stores for Node, and the letter of each in the common table.
const NODE: [(&str, &str); 5] = [
    ("M", "mongoose-express-session-store"),
    ("S", "session-mongoose"),
    ("C", "connect-mongoose-session"),
    ("K", "koa-session-mongo"),
    ("E", "express-mongodb"),
];

#[test]
fn each_option_of_a_node_store_has_a_row_in_the_common_table() {
    let (_, section) = PAGE.split_once("\n# All options of the Node stores\n").unwrap();
    let section = section.split("\n\n# ").next().unwrap();
    let rows: Vec<Vec<_>> = section.lines().map(|line| line.split(" | ").collect()).collect();
    for (letter, store) in NODE {
        assert!(section.contains(&format!("**{letter}**")), "{letter}");
        let (_, theirs) = THEIRS.iter().find(|(name, _)| *name == store).unwrap();
        for option in *theirs {
            let is_named = rows.iter().any(|cells| {
                let [_, theirs, stores, _] = cells[..] else { return false };
                let mut stores = stores.split(", ");
                names(theirs, option) && stores.any(|it| it == letter || it == "all")
            });
            assert!(is_named, "the common table has no row for `{option}` of {store}");
        }
    }
}

/// Whether the cell has the option as code, and not as a part of a longer word.
fn names(cell: &str, option: &str) -> bool {
    let is_word = |character: char| character.is_alphanumeric() || character == '_';
    cell.split('`').skip(1).step_by(2).any(|code| {
        code.match_indices(option).any(|(at, _)| {
            !code[..at].ends_with(is_word) && !code[at + option.len()..].starts_with(is_word)
        })
    })
}

const SECURITY: &str = include_str!("../../src/guide/security.md");

/// The tables for audits name tests, in their last column, as `file.rs`: `name`, `name`; `file.rs`: `name`.
#[test]
fn the_tests_that_the_page_on_security_names_exist() {
    let (_, tables) = SECURITY.split_once("# OWASP ASVS").unwrap();
    let mut named = 0;
    for line in tables.lines().filter(|line| line.starts_with("| ")) {
        let tests = line.trim_end_matches('|').rsplit(" | ").next().unwrap();
        let mut code = String::new();
        for it in codes(tests) {
            if it.ends_with(".rs") {
                code = code_of(it);
                continue;
            }
            named += 1;
            // A test of both tiers is `name = function;`.
            let is_there = [format!("fn {it}("), format!("{it} = ")];
            assert!(is_there.iter().any(|form| code.contains(form)), "{it} in {line}");
        }
    }
    assert!(named > 20, "{named}");
}

/// The code of a file of this folder, and of the files in the folder of its name.
fn code_of(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("it").join(file);
    let mut code = fs::read_to_string(&path).unwrap_or_default();
    for entry in fs::read_dir(path.with_extension("")).into_iter().flatten() {
        code += &fs::read_to_string(entry.unwrap().path()).unwrap_or_default();
    }
    assert!(!code.is_empty(), "{file}");
    code
}

const TABLE: &str = include_str!("../../src/metrics.md");
const ON_CALL: &str = include_str!("../../src/guide/metrics.md");

#[test]
fn the_page_on_metrics_has_a_row_for_each_value_of_each_label() {
    let mut known = Vec::new();
    for line in TABLE.lines().skip(2) {
        let cells: Vec<_> = line.split(" | ").collect();
        let name = cells[0].trim_matches(['|', ' ', '`']);
        known.push(name);
        assert!(metrics_in(ON_CALL).any(|named| named == name), "{name}");
        // `label`: `value` (what it is), `value`; `label`: …
        for label in cells[2].split("; ").filter(|label| !label.is_empty()) {
            let (label, values) = label.split_once(": ").unwrap();
            let label = label.trim_matches('`');
            let without_asides = values.split(['(', ')']).step_by(2);
            let values: BTreeSet<_> = without_asides.flat_map(codes).collect();
            assert!(!values.is_empty(), "{name}: {label}");
            assert_eq!(rows(ON_CALL, name, label), values, "{name}: {label}");
        }
    }
    for metric in metrics_in(ON_CALL) {
        assert!(known.contains(&metric.trim_end_matches("_bucket")), "{metric}");
    }
}

fn metrics_in(page: &str) -> impl Iterator<Item = &str> {
    let words = page.split(|it: char| !(it.is_alphanumeric() || it == '_'));
    words.filter(|word| word.strip_prefix("session_store_").is_some_and(|rest| !rest.is_empty()))
}

fn codes(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The values of a label that have a row in the page. A row counts if its first cell has
/// `metric{label="value"}`. It also counts if its first cell has the value alone, and it is in a table
/// whose first column is the label, below a paragraph that names `metric{label}`.
fn rows<'a>(page: &'a str, metric: &str, label: &str) -> BTreeSet<&'a str> {
    let of_metric = format!("{metric}{{");
    let mut rows = BTreeSet::new();
    let mut is_here = false;
    for block in page.split("\n\n") {
        let mut lines = block.lines();
        let Some(cells) = lines.next().and_then(|head| head.strip_prefix("| ")) else {
            let named = || codes(block).filter(|code| code.contains('{'));
            if block.starts_with('#') || named().next().is_some() {
                let labels =
                    named().filter_map(|it| it.strip_prefix(&*of_metric)?.strip_suffix('}'));
                is_here = labels.flat_map(|labels| labels.split(',')).any(|it| it == label);
            }
            continue;
        };
        let is_table = is_here && cells.split(" | ").next() == Some(label);
        for row in lines.skip(1) {
            let first = row.split(" | ").next().unwrap();
            let exact = format!("{of_metric}{label}=\"");
            let literal = |code: &'a str| code.strip_prefix(&*exact)?.strip_suffix("\"}");
            rows.extend(codes(first).filter_map(|code| {
                literal(code).or_else(|| (is_table && !code.contains('{')).then_some(code))
            }));
        }
    }
    rows
}
