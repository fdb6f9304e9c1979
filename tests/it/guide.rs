//! The guide's page for those who come from another store has each of their options and methods.

use std::collections::BTreeSet;

const PAGE: &str = include_str!("../../src/guide/coming_from.md");

/// The store, and what its README and its source offer.
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
fn each_option_of_the_other_stores_stands_in_their_section() {
    for (store, theirs) in THEIRS {
        let (_, section) = PAGE.split_once(&format!("\n# {store}\n")).expect(store);
        // Within a program a line that begins with `# ` is a hidden one, and follows another line.
        let section = section.split("\n\n# ").next().unwrap();
        let left = section.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next());
        let left: Vec<_> = left.collect();
        for option in theirs {
            let is_named = left.iter().any(|cell| names(cell, option));
            assert!(is_named, "{store} has `{option}`, of which its section says nothing");
        }
    }
}

/// Whether the option stands in the cell as code, and not within a longer word.
fn names(cell: &str, option: &str) -> bool {
    let is_word = |character: char| character.is_alphanumeric() || character == '_';
    cell.split('`').skip(1).step_by(2).any(|code| {
        code.match_indices(option).any(|(at, _)| {
            !code[..at].ends_with(is_word) && !code[at + option.len()..].starts_with(is_word)
        })
    })
}

const TABLE: &str = include_str!("../../src/metrics.md");
const ON_CALL: &str = include_str!("../../src/guide/metrics.md");

#[test]
fn the_page_for_who_is_on_call_has_a_row_for_each_value_of_each_metrics_labels() {
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

/// The values that have a row: `metric{label="value"}` in its first cell, or the value alone in that of
/// a table of this label, below a paragraph that names `metric{label}` and above the next such.
fn rows<'a>(page: &'a str, metric: &str, label: &str) -> BTreeSet<&'a str> {
    let of_metric = format!("{metric}{{");
    let (mut rows, mut is_here) = (BTreeSet::new(), false);
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
