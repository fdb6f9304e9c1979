//! Data as JSON text: the shortest way to and from a session, one field to the server, and readable
//! by whoever looks into the collection.

use serde_json::Value;

use super::{MAX_BYTES, MAX_DEPTH, too_deep, too_large, unreadable, unstorable};
use crate::error::Result;
use crate::record::Data;

pub(super) fn encode(data: &Data) -> Result<String> {
    // Both this look and the encoding recurse, so this one comes first.
    if !data.values().all(|value| fits(value, MAX_DEPTH)) {
        return Err(too_deep());
    }
    let text =
        serde_json::to_string(data).map_err(|_| unstorable("a value in it has no form in JSON"))?;
    if text.len() > MAX_BYTES { Err(too_large("JSON")) } else { Ok(text) }
}

/// Of the library's error only what it is about is told: its text may quote data.
pub(super) fn decode(text: &str) -> Result<Data> {
    serde_json::from_str(text).map_err(|error| {
        let what = match error.classify() {
            serde_json::error::Category::Eof => "its JSON is truncated",
            serde_json::error::Category::Data => "its JSON is no object",
            _ => "its JSON is malformed, or nested too deeply",
        };
        unreadable(what)
    })
}

fn fits(value: &Value, levels: usize) -> bool {
    match value {
        Value::Array(items) => levels > 0 && items.iter().all(|item| fits(item, levels - 1)),
        Value::Object(map) => levels > 0 && map.values().all(|value| fits(value, levels - 1)),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::super::samples::{data, nested, same};
    use super::*;
    use crate::error::ErrorKind;

    proptest! {
        #[test]
        fn whatever_json_goes_in_comes_out(data in data()) {
            let back = decode(&encode(&data).unwrap()).unwrap();
            prop_assert!(same(&data, &back), "{data:?}\n{back:?}");
        }

        #[test]
        fn a_part_of_it_is_an_error(data in data(), at in any::<prop::sample::Index>()) {
            let text = encode(&data).unwrap();
            let part = text.get(..at.index(text.len())).unwrap_or_default();
            prop_assert_eq!(decode(part).unwrap_err().kind(), ErrorKind::Decode);
        }

        #[test]
        fn what_nobody_encoded_is_an_error_or_data_and_no_panic(text in any::<String>()) {
            drop(decode(&text));
        }
    }

    #[test]
    fn the_deepest_that_is_stored_is_read_and_one_deeper_is_refused() {
        let deepest = nested(MAX_DEPTH);
        assert_eq!(decode(&encode(&deepest).unwrap()).unwrap(), deepest);
        let error = encode(&nested(MAX_DEPTH + 1)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Encode);
        assert!(error.to_string().contains("98 levels"), "{error}");
    }

    #[test]
    fn a_text_deeper_than_ours_is_refused() {
        let text = format!("{{\"a\":{}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(decode(&text).unwrap_err().kind(), ErrorKind::Decode);
    }

    #[test]
    fn the_largest_that_is_stored_fits_and_a_byte_more_is_refused() {
        let of = |bytes: usize| Data::from([("a".to_owned(), json!("x".repeat(bytes)))]);
        let overhead = encode(&of(0)).unwrap().len();
        assert!(encode(&of(MAX_BYTES - overhead)).is_ok());
        let error = encode(&of(MAX_BYTES - overhead + 1)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Encode);
        assert!(!error.to_string().contains("xx"), "{error}");
    }

    #[test]
    fn an_error_quotes_no_data() {
        for text in [r#"{"card":"4111"#, r#""4111""#, r#"{"card":4111x}"#] {
            let error = decode(text).unwrap_err().to_string();
            assert!(!error.contains("4111") && error.contains("JSON"), "{error}");
        }
    }
}
