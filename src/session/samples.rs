//! Session data for the tests of all data formats.

use proptest::prelude::*;
use serde_json::{Number, Value, json};

use crate::session::Data;

/// Keys that `serde_json` uses internally, with some of its features.
pub(crate) const PRIVATE_KEYS: [&str; 3] = [
    "$serde_json::private::RawValue",
    "$serde_json::private::Number",
    "$serde_json::private::Value",
];

pub(crate) fn key() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(String::new()),
        "[$.%\0a-z0-9]{0,8}",
        any::<String>(),
        Just("$oid".to_owned()),
        Just("%2E".to_owned()),
        prop::sample::select(&PRIVATE_KEYS[..]).prop_map(str::to_owned),
    ]
}

fn number() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>()
            .prop_filter("JSON has finite numbers only", |n| n.is_finite())
            .prop_map(Value::from),
        any::<f32>()
            .prop_filter("JSON has finite numbers only", |n| n.is_finite())
            .prop_map(Value::from),
        "-?(0|[1-9][0-9]{0,60})(\\.[0-9]{1,40})?([eE][+-]?[0-9]{1,4})?"
            .prop_filter_map("it is beyond a 64-bit float", |text| text.parse().ok())
            .prop_map(Value::Number),
        prop::sample::select(NUMBERS).prop_map(|text| Value::Number(text.parse().unwrap())),
    ]
}

/// Numbers as they can be written in JSON. The features of `serde_json` decide which of them keep their text.
pub(crate) const NUMBERS: &[&str] = &[
    "0",
    "-0",
    "1",
    "1.0",
    "-0.0",
    "0.0",
    "1.10",
    "1e5",
    "1E5",
    "1e-5",
    "1.5e-3",
    "1.50e+3",
    "0e10",
    "0.00",
    "5e-324",
    "2e-324",
    "1.7976931348623157e308",
    "1e300",
    "0.1",
    "100000000000000000000",
    "18446744073709551615",
    "18446744073709551616",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775808",
    "-9223372036854775809",
    "9007199254740993",
    "9007199254740993.0",
    "12345678901234567890123456789012345678901234567890",
    "0.12345678901234567890123456789012345678901234567890",
    "9999999999999999999999999999999999",
    "-1234567890123456789012345678901234",
    "12345678901234567890123456789012345",
];

fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<String>(),
        // Texts that are JSON themselves, or its beginning.
        prop::sample::select(
            &["[1]", "{\"a\": 1", "1", "not a number", "null", "[[", "\"\\ud800"][..]
        )
        .prop_map(str::to_owned),
        "[\"\\\\/\u{0}-\u{20}\u{7f}é漢🦀a]{0,20}",
    ]
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        number(),
        text().prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 64, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::btree_map(key(), inner, 0..6)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

pub(crate) fn data() -> impl Strategy<Value = Data> {
    prop::collection::hash_map(key(), value(), 0..8)
}

/// Data that is not the same after `serde_json` has written and read it as a `Value`, with some of its
/// features.
pub(crate) fn hostile() -> Vec<Data> {
    let mut all = Vec::new();
    for key in PRIVATE_KEYS {
        for value in [
            json!("[1]"),
            json!("{\"a\": 1"),
            json!("1"),
            json!("not a number"),
            json!(1),
            json!(null),
            json!([]),
            json!({}),
        ] {
            let object = json!({ key: value });
            all.push(Data::from([(key.to_owned(), value)]));
            all.push(Data::from([("a".to_owned(), object.clone())]));
            all.push(Data::from([("a".to_owned(), json!([[object], "x"]))]));
            all.push(Data::from([("a".to_owned(), json!({ "first": 1, key: "[1]" }))]));
            all.push(Data::from([("a".to_owned(), json!({ key: "[1]", "x": null }))]));
            all.push(Data::from([("a".to_owned(), json!({ key: object }))]));
        }
    }
    for text in NUMBERS {
        let number: Number = text.parse().unwrap();
        all.push(Data::from([("n".to_owned(), json!([number, { "n": number }]))]));
    }
    all
}

/// JSON text inside JSON text, under a key whose text `serde_json` may parse again. A parser that did so at
/// each level would overflow its stack.
pub(crate) fn bomb(levels: usize) -> Data {
    let mut text = "1".to_owned();
    for _ in 0..levels {
        let object = json!({ PRIVATE_KEYS[0]: text }).to_string();
        text = format!("{}{object}{}", "[".repeat(90), "]".repeat(90)).replace("\\\\", "\\u005c");
    }
    Data::from([("a".to_owned(), json!("first")), (PRIVATE_KEYS[0].to_owned(), json!(text))])
}

pub(crate) fn nested(levels: usize) -> Data {
    let value = (0..levels)
        .fold(json!(1), |inner, n| if n % 2 == 0 { json!([inner]) } else { json!({"k": inner}) });
    Data::from([("a".to_owned(), value)])
}

/// Data whose value is `levels` levels of arrays, the innermost of them empty.
pub(crate) fn hollow(levels: usize) -> Data {
    let value = (1..levels).fold(json!([]), |inner, _| json!([inner]));
    Data::from([("a".to_owned(), value)])
}

/// Runs `run` in a thread of this name, with a stack as small as that of tokio's worker threads.
pub(crate) fn on_a_small_stack(name: &str, run: impl FnOnce() + Send) {
    let thread = std::thread::Builder::new().name(name.to_owned()).stack_size(2 << 20);
    std::thread::scope(|scope| thread.spawn_scoped(scope, run).unwrap().join().unwrap());
}
