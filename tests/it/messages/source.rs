//! Extracts the messages of errors and warnings from the source.

use std::path::Path;

const CALLS: [&str; 5] = [
    "Error::config(",
    "Error::new(",
    "Error::server_overloaded(",
    "tracing::warn!(",
    "tracing::error!(",
];

/// Each message with its file, and with `…` in place of the filled-in parts. Messages with fewer
/// than three words of their own are left out: they only join others.
pub(super) fn messages() -> Vec<(String, String)> {
    let mut messages = Vec::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("../src")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if path.is_dir() && !["fuzzing", "simulation", "tests"].contains(&name.as_str()) {
                folders.push(path);
            } else if path.extension().is_some_and(|it| it == "rs") && !name.contains("tests") {
                let code = std::fs::read_to_string(path).unwrap();
                let code = code.split("#[cfg(test)]\nmod tests").next().unwrap();
                let found = messages_of(code).into_iter();
                messages.extend(found.map(|message| (name.clone(), message)));
            }
        }
    }
    messages
}

fn messages_of(code: &str) -> Vec<String> {
    let is_comment = |line: &&str| line.trim_start().starts_with("//");
    let code = code.lines().filter(|line| !is_comment(line)).collect::<Vec<_>>().join("\n");
    let starts = CALLS.iter().flat_map(|call| code.match_indices(call));
    let texts = starts.flat_map(|(at, call)| texts_of(&code[at + call.len()..]));
    texts.filter(|text| text.replace('…', " ").split_whitespace().count() >= 3).collect()
}

/// The string literals between here and the parenthesis that ends the call.
fn texts_of(arguments: &str) -> Vec<String> {
    let mut texts = Vec::new();
    let mut depth = 1;
    let mut rest = arguments.chars();
    while depth > 0 {
        match rest.next().expect("the call ends") {
            '(' => depth += 1,
            ')' => depth -= 1,
            '"' => texts.push(text(&mut rest)),
            _ => {}
        }
    }
    texts
}

/// The text up to its closing quotation mark.
fn text(rest: &mut std::str::Chars<'_>) -> String {
    let mut text = String::new();
    loop {
        match rest.next().expect("the text ends") {
            '"' => return super::in_one_line(&text),
            '\\' => match rest.next() {
                Some('\n') => *rest = rest.as_str().trim_start().chars(),
                Some('n') => text.push(' '),
                other => text.extend(other),
            },
            '{' if rest.as_str().starts_with('{') => text.extend(rest.next()),
            '}' => text.extend(rest.next().filter(|next| *next == '}')),
            '{' => {
                rest.by_ref().find(|it| *it == '}');
                text.push('…');
            }
            other => text.push(other),
        }
    }
}
