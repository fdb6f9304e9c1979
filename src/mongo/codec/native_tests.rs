use bson::{RawDocumentBuf, doc};
use proptest::prelude::*;
use serde_json::json;

use super::super::samples::{data, key, nested, same};
use super::*;
use crate::error::ErrorKind;

fn round_trip(data: &Data) -> Data {
    let raw = RawDocumentBuf::try_from(&encode(data).unwrap().0).unwrap();
    decode(&raw).unwrap()
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
