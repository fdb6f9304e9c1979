use bson::{RawDocumentBuf, doc};
use proptest::prelude::*;
use serde_json::json;

use crate::error::ErrorKind;
use crate::mongo::codec::native::*;
use crate::session::same;
use crate::session::samples::{
    NUMBERS, bomb, data, hollow, hostile, key, nested, on_a_small_stack,
};

fn round_trip(data: &Data) -> Data {
    let raw = RawDocumentBuf::try_from(&encode(data).unwrap().0).unwrap();
    decode(&raw).unwrap()
}

proptest! {
    #[test]
    fn data_is_decoded_unchanged(data in data()) {
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
    fn random_bytes_are_an_error_and_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(raw) = RawDocumentBuf::from_bytes(bytes) {
            let _ = decode(&raw);
        }
    }

    #[test]
    fn a_damaged_document_is_an_error_or_other_data_and_no_panic(data in data(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = encode(&data).unwrap().0.to_vec().unwrap();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Ok(raw) = RawDocumentBuf::from_bytes(bytes) {
            let _ = decode(&raw);
        }
    }
}

#[test]
fn numbers_keep_their_type() {
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

/// With `arbitrary_precision`, to the last digit.
#[test]
fn numbers_are_decoded_unchanged() {
    for text in NUMBERS {
        let number: Number = text.parse().unwrap();
        let data = Data::from([("n".to_owned(), json!([number]))]);
        assert_eq!(round_trip(&data)["n"].to_string(), format!("[{number}]"));
    }
}

#[test]
fn a_number_is_stored_as_a_queryable_type_if_that_loses_nothing() {
    let is_text = "1.10".parse::<Number>().unwrap().to_string() == "1.10";
    for (text, plain, exact) in [
        ("1", "Int64", "Int64"),
        ("-0.0", "Double", "Double"),
        ("5e-324", "Double", "Double"),
        ("1.1", "Double", "Double"),
        ("18446744073709551615", "Decimal128", "Decimal128"),
        ("1.10", "Double", "Decimal128"),
        ("1e5", "Double", "Decimal128"),
        ("100000000000000000000", "Double", "Decimal128"),
        ("12345678901234567890123456789012345", "Double", "Binary"),
        ("1.5e-3", "Double", "Binary"),
    ] {
        let number: Number = text.parse().unwrap();
        let (document, _) = encode(&Data::from([("n".to_owned(), json!(number))])).unwrap();
        let stored = document.get("n").unwrap().element_type();
        let expected = if is_text { exact } else { plain };
        assert_eq!(format!("{stored:?}"), expected, "{text}");
    }
}

#[test]
fn a_decimal_that_an_operator_wrote_is_a_number() {
    for text in ["1.5", "-0.25", "1E+3", "0", "-7", "1E-7"] {
        let raw = doc! { "a": text.parse::<Decimal128>().unwrap() };
        let raw = RawDocumentBuf::try_from(&raw).unwrap();
        let number: Number = text.parse().unwrap();
        assert_eq!(decode(&raw).unwrap()["a"].as_f64(), number.as_f64(), "{text}");
    }
}

#[test]
fn the_private_keys_of_serde_json_are_ordinary_keys() {
    for data in hostile() {
        let back = round_trip(&data);
        assert!(same(&data, &back), "{data:?}\n{back:?}");
    }
    on_a_small_stack("decoding", || assert_eq!(round_trip(&bomb(20)), bomb(20)));
}

#[test]
fn the_deepest_allowed_data_is_read_and_one_level_more_is_refused() {
    on_a_small_stack("decoding", || {
        for of in [nested, hollow] {
            let deepest = of(MAX_DEPTH);
            assert_eq!(round_trip(&deepest), deepest);
            let error = encode(&of(MAX_DEPTH + 1)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Encode);
            assert!(error.to_string().contains("98 levels"), "{error}");
            let (document, _) = encode(&deepest).unwrap();
            let inner = document.get("a").unwrap().clone();
            for deeper in [doc! { "a": [inner.clone()] }, doc! { "a": { "a": inner } }] {
                let raw = RawDocumentBuf::try_from(&deeper).unwrap();
                let error = decode(&raw).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Decode);
                assert!(error.to_string().contains("98 levels"), "{error}");
            }
        }
    });
}

/// The bytes of `levels` nested documents.
fn nest(levels: usize) -> Vec<u8> {
    let mut bytes = vec![5, 0, 0, 0, 0];
    for _ in 0..levels {
        let size = u32::try_from(bytes.len() + 8).unwrap().to_le_bytes();
        bytes = [&size[..], &[3, b'k', 0], &bytes, &[0]].concat();
    }
    bytes
}

#[test]
fn a_deeper_document_of_another_program_is_refused() {
    on_a_small_stack("decoding", || {
        for levels in [MAX_DEPTH + 2, 500, 5_000] {
            let raw = RawDocumentBuf::from_bytes(nest(levels)).unwrap();
            assert_eq!(decode(&raw).unwrap_err().kind(), ErrorKind::Decode);
        }
    });
    let raw = RawDocumentBuf::from_bytes(nest(MAX_DEPTH + 1)).unwrap();
    assert!(decode(&raw).is_err());
    assert!(decode(&RawDocumentBuf::from_bytes(nest(MAX_DEPTH)).unwrap()).is_ok());
}

#[test]
fn the_largest_allowed_data_is_stored_and_one_byte_more_is_refused() {
    let (_, overhead) = encode(&Data::from([("a".to_owned(), json!(""))])).unwrap();
    let fits = |bytes| encode(&Data::from([("a".to_owned(), json!("x".repeat(bytes)))]));
    assert!(fits(MAX_BYTES - overhead).is_ok());
    let error = fits(MAX_BYTES - overhead + 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Encode);
    assert!(!error.to_string().contains("xx"), "{error}");
}

#[test]
fn an_error_names_the_type_that_json_does_not_have() {
    for (document, named) in [
        (doc! {"a": bson::oid::ObjectId::new()}, "ObjectId"),
        (doc! {"a": f64::NAN}, "not finite"),
        (doc! {"a": "NaN".parse::<Decimal128>().unwrap()}, "Decimal128"),
        (doc! {"a": "-Infinity".parse::<Decimal128>().unwrap()}, "Decimal128"),
        (doc! {"a": Binary { subtype: NUMBER_TEXT, bytes: b"01".to_vec() }}, "is no number"),
        (doc! {"a": Binary { subtype: NUMBER_TEXT, bytes: vec![0xff] }}, "is no number"),
        (doc! {"a": Binary { subtype: BinarySubtype::Generic, bytes: b"1".to_vec() }}, "Binary"),
        (doc! {"a%": 1}, "escape"),
        (doc! {"a%2e": 1}, "escape"),
    ] {
        let raw = RawDocumentBuf::try_from(&document).unwrap();
        let error = decode(&raw).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Decode);
        assert!(error.to_string().contains(named), "{error}");
    }
}
