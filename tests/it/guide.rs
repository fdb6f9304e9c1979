//! The guide's page for those who come from another store has each of their options and methods.

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
fn the_page_for_who_is_on_call_names_each_metric_and_each_value_of_its_labels() {
    let mut known = Vec::new();
    for line in TABLE.lines().skip(2) {
        let cells: Vec<_> = line.split(" | ").collect();
        let name = cells[0].trim_matches(['|', ' ', '`']);
        known.push(name);
        assert!(ON_CALL.contains(name), "{name}");
        // `label`: `value` (what it is), `value`; `label`: …
        for label in cells[2].split("; ") {
            for value in label.split('`').skip(3).step_by(2) {
                let named = [format!("`{value}`"), format!("\"{value}\"")];
                assert!(named.iter().any(|text| ON_CALL.contains(text)), "{name}: {value}");
            }
        }
    }
    for word in ON_CALL.split(|character: char| !(character.is_alphanumeric() || character == '_'))
    {
        let is_metric = word.starts_with("session_store_") && word.len() > "session_store_".len();
        assert!(!is_metric || known.contains(&word.trim_end_matches("_bucket")), "{word}");
    }
}
