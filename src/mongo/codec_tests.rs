use bson::{RawDocumentBuf, doc};
use proptest::prelude::*;
use serde_json::json;

use super::*;

fn round_trip(data: &Data) -> Data {
    let raw = RawDocumentBuf::try_from(&encode(data).unwrap().0).unwrap();
    decode(&raw).unwrap()
}

fn key() -> impl Strategy<Value = String> {
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

fn data() -> impl Strategy<Value = Data> {
    prop::collection::hash_map(key(), value(), 0..8)
}

/// Equality of JSON that keeps `0.0` and `-0.0` apart, and `1` from `1.0`.
fn same(a: &Data, b: &Data) -> bool {
    let text = |data| serde_json::to_string(&sorted(data)).unwrap();
    a == b && text(a) == text(b)
}

fn sorted(data: &Data) -> std::collections::BTreeMap<&String, &Value> {
    data.iter().collect()
}

proptest! {
    #[test]
    fn whatever_json_goes_in_comes_out(data in data()) {
        let back = round_trip(&data);
        prop_assert!(same(&data, &back), "{data:?}\n{back:?}");
    }

    #[test]
    fn the_counted_size_is_the_size_of_the_bson(data in data()) {
        let (document, counted) = encode(&data).unwrap();
        prop_assert_eq!(counted, document.to_vec().unwrap().len());
    }

    #[test]
    fn escaped_keys_are_plain_to_every_server(key in key()) {
        let escaped = escape(&key);
        prop_assert!(!escaped.contains(['.', '\0']) && !escaped.starts_with('$'));
        prop_assert_eq!(unescape(&escaped).unwrap(), key);
    }

    #[test]
    fn bytes_that_are_no_session_are_an_error_and_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(raw) = RawDocumentBuf::from_bytes(bytes) {
            drop(decode(&raw));
        }
    }

    #[test]
    fn a_damaged_document_is_an_error_or_other_data_and_no_panic(data in data(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = encode(&data).unwrap().0.to_vec().unwrap();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Ok(raw) = RawDocumentBuf::from_bytes(bytes) {
            drop(decode(&raw));
        }
    }
}

#[test]
fn numbers_keep_their_kind() {
    for value in [json!(u64::MAX), json!(i64::MIN), json!(1), json!(1.0), json!(-0.0), json!(1e300)]
    {
        let data = Data::from([("n".to_owned(), value.clone())]);
        assert_eq!(round_trip(&data)["n"].to_string(), value.to_string());
    }
}

#[test]
fn a_wide_number_is_readable_as_a_decimal() {
    assert_eq!(decimal(u64::MAX).to_string(), u64::MAX.to_string());
}

#[test]
fn extended_json_is_not_interpreted() {
    let data = Data::from([("a".to_owned(), json!({"$oid": "65f0c0ffee65f0c0ffee65f0"}))]);
    assert!(encode(&data).unwrap().0.get_document("a").unwrap().contains_key("%24oid"));
    assert_eq!(round_trip(&data), data);
}

fn nested(levels: usize) -> Data {
    let value = (0..levels)
        .fold(json!(1), |inner, n| if n % 2 == 0 { json!([inner]) } else { json!({"k": inner}) });
    Data::from([("a".to_owned(), value)])
}

#[test]
fn the_deepest_that_is_stored_is_read_and_one_deeper_is_refused() {
    let deepest = nested(MAX_DEPTH);
    assert_eq!(round_trip(&deepest), deepest);
    let error = encode(&nested(MAX_DEPTH + 1)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Encode);
    assert!(error.to_string().contains("98 levels"), "{error}");
}

#[test]
fn a_document_deeper_than_ours_is_refused() {
    let deep = (0..500).fold(doc! {"k": 1}, |inner, _| doc! {"k": inner});
    let raw = RawDocumentBuf::try_from(&deep).unwrap();
    assert_eq!(decode(&raw).unwrap_err().kind(), ErrorKind::Decode);
}

#[test]
fn the_largest_that_is_stored_fits_and_a_byte_more_is_refused() {
    let (_, overhead) = encode(&Data::from([("a".to_owned(), json!(""))])).unwrap();
    let fits = |bytes| encode(&Data::from([("a".to_owned(), json!("x".repeat(bytes)))]));
    assert!(fits(MAX_BYTES - overhead).is_ok());
    let error = fits(MAX_BYTES - overhead + 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Encode);
    assert!(!error.to_string().contains("xx"), "{error}");
}

#[test]
fn what_json_does_not_have_is_named() {
    for (document, named) in [
        (doc! {"a": bson::oid::ObjectId::new()}, "ObjectId"),
        (doc! {"a": f64::NAN}, "not finite"),
        (doc! {"a": "1.5".parse::<Decimal128>().unwrap()}, "Decimal128"),
        (doc! {"a%": 1}, "escape"),
        (doc! {"a%2e": 1}, "escape"),
    ] {
        let raw = RawDocumentBuf::try_from(&document).unwrap();
        let error = decode(&raw).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Decode);
        assert!(error.to_string().contains(named), "{error}");
    }
}
