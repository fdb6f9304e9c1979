//! Data to test both forms with.

use proptest::prelude::*;
use serde_json::{Value, json};

use crate::record::Data;

pub(super) fn key() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(String::new()),
        "[$.%\0a-z0-9]{0,8}",
        any::<String>(),
        Just("$oid".to_owned()),
        Just("%2E".to_owned()),
    ]
}

fn number() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>()
            .prop_filter("JSON has finite numbers only", |n| n.is_finite())
            .prop_map(Value::from),
        Just(json!(u64::MAX)),
        Just(json!(i64::MIN)),
        Just(json!(1)),
        Just(json!(1.0)),
        Just(json!(-0.0)),
        Just(json!(5e-324)),
        Just(json!(f64::MAX)),
    ]
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        number(),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 64, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::btree_map(key(), inner, 0..6)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

pub(super) fn data() -> impl Strategy<Value = Data> {
    prop::collection::hash_map(key(), value(), 0..8)
}

/// Equality of JSON that keeps `0.0` and `-0.0` apart, and `1` from `1.0`.
pub(super) fn same(a: &Data, b: &Data) -> bool {
    let text = |data| serde_json::to_string(&sorted(data)).unwrap();
    a == b && text(a) == text(b)
}

fn sorted(data: &Data) -> std::collections::BTreeMap<&String, &Value> {
    data.iter().collect()
}

pub(super) fn nested(levels: usize) -> Data {
    let value = (0..levels)
        .fold(json!(1), |inner, n| if n % 2 == 0 { json!([inner]) } else { json!({"k": inner}) });
    Data::from([("a".to_owned(), value)])
}
