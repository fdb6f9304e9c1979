use proptest::prelude::*;
use serde_json::json;

use crate::error::ErrorKind;
use crate::mongo::codec::text::*;
use crate::session::same;
use crate::session::samples::{bomb, data, hollow, hostile, nested, on_a_small_stack};

proptest! {
    #[test]
    fn data_is_decoded_unchanged(data in data()) {
        let back = decode(&encode(&data).unwrap()).unwrap();
        prop_assert!(same(&data, &back), "{data:?}\n{back:?}");
    }

    #[test]
    fn a_part_of_a_text_is_an_error(data in data(), at in any::<prop::sample::Index>()) {
        let text = encode(&data).unwrap();
        let part = text.get(..at.index(text.len())).unwrap_or_default();
        prop_assert_eq!(decode(part).unwrap_err().kind(), ErrorKind::Decode);
    }

    #[test]
    fn a_random_text_is_an_error_or_data_and_no_panic(text in any::<String>()) {
        let _ = decode(&text);
    }

    #[test]
    fn text_with_a_damaged_byte_is_read_as_serde_json_reads_it(
        data in prop::collection::hash_map("[a-z]{0,3}", any::<String>(), 0..4),
        at in any::<prop::sample::Index>(),
        byte in prop::sample::select(&b"{}[]\",:\\u0e.- \n\x01tfn"[..]),
    ) {
        let mut text = serde_json::to_string_pretty(&data).unwrap().into_bytes();
        let at = at.index(text.len());
        text[at] = byte;
        if let Ok(text) = std::str::from_utf8(&text) {
            let theirs: Option<Data> = serde_json::from_str(text).ok();
            prop_assert_eq!(decode(text).ok(), theirs, "{}", text);
        }
    }

    #[test]
    fn a_string_ends_at_the_first_special_character(plain in "[ !#-\\[\\]-~é漢🦀\u{80}-\u{ff}]{0,40}", end in prop::sample::select(&['"', '\\', '\0', '\n', '\u{1f}'][..]), after in any::<String>()) {
        let text = format!("{plain}{end}{after}");
        prop_assert_eq!(plain_bytes(text.as_bytes()), plain.len());
        prop_assert_eq!(plain_bytes(plain.as_bytes()), plain.len());
    }
}

#[test]
fn the_private_keys_of_serde_json_are_ordinary_keys() {
    for data in hostile() {
        let back = decode(&encode(&data).unwrap()).unwrap();
        assert!(same(&data, &back), "{data:?}\n{back:?}");
    }
}

#[test]
fn json_inside_a_string_is_a_string() {
    on_a_small_stack("decoding", || {
        for levels in [5, 20, 40] {
            let data = bomb(levels);
            assert_eq!(decode(&encode(&data).unwrap()).unwrap(), data);
        }
    });
}

#[test]
fn the_deepest_allowed_data_is_read_and_one_level_more_is_refused() {
    on_a_small_stack("decoding", || {
        for of in [nested, hollow] {
            let deepest = of(MAX_DEPTH);
            assert_eq!(decode(&encode(&deepest).unwrap()).unwrap(), deepest);
            let deeper = of(MAX_DEPTH + 1);
            let error = encode(&deeper).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Encode);
            assert!(error.to_string().contains("98 levels"), "{error}");
            let error = decode(&serde_json::to_string(&deeper).unwrap()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Decode);
            assert!(error.to_string().contains("98 levels"), "{error}");
        }
    });
}

#[test]
fn a_text_of_many_brackets_is_refused() {
    on_a_small_stack("decoding", || {
        for (open, close) in [("[", "]"), ("{\"a\":", "}"), ("[{\"a\":", "}]"), ("[[],", "]")] {
            let text = format!("{{\"a\":{}1{}}}", open.repeat(100_000), close.repeat(100_000));
            assert_eq!(decode(&text).unwrap_err().kind(), ErrorKind::Decode);
        }
    });
}

#[test]
fn all_that_json_allows_is_read() {
    for (text, data) in [
        (" \n\t\r{ \"a\" : [ 1 , 2 ] , \"b\" : { } } \n", json!({"a": [1, 2], "b": {}})),
        ("{}", json!({})),
        (
            r#"{"\u0061\"\\\/\b\f\n\r\t\ud83e\udd80\u00E9":null}"#,
            json!({"a\"\\/\u{8}\u{c}\n\r\t🦀é": null}),
        ),
        (r#"{"a":1,"a":{"b":1,"b":2}}"#, json!({"a": {"b": 2}})),
        (
            r#"{"a":[-1,-0.0,1E2,18446744073709551615]}"#,
            json!({"a": [-1, -0.0, "1E2".parse::<serde_json::Number>().unwrap(), u64::MAX]}),
        ),
    ] {
        let data: Data = data.as_object().unwrap().clone().into_iter().collect();
        assert!(same(&decode(text).unwrap(), &data), "{text}");
    }
}

#[test]
fn an_error_says_what_is_wrong_with_a_text() {
    for (text, said) in [
        ("", "truncated"),
        (" ", "truncated"),
        ("{", "truncated"),
        (r#"{"a"#, "truncated"),
        (r#"{"a":"#, "truncated"),
        (r#"{"a":tru"#, "truncated"),
        (r#"{"a":"\"#, "truncated"),
        (r#"{"a":"\u12"#, "truncated"),
        (r#"{"a":1"#, "truncated"),
        (r#"{"a":-"#, "truncated"),
        ("[]", "no object"),
        ("null", "no object"),
        ("\"a\"", "no object"),
        ("1", "no object"),
        ("\u{feff}{}", "no object"),
        ("{}{}", "malformed"),
        ("{} x", "malformed"),
        (r#"{"a":1,}"#, "malformed"),
        (r"{,}", "malformed"),
        (r#"{"a":[1,]}"#, "malformed"),
        (r#"{"a":[,]}"#, "malformed"),
        (r#"{"a" 1}"#, "malformed"),
        (r#"{"a":1]"#, "malformed"),
        (r#"{"a":[1}"#, "malformed"),
        (r"{1:1}", "malformed"),
        (r#"{"a":01}"#, "malformed"),
        (r#"{"a":-}"#, "malformed"),
        (r#"{"a":1.}"#, "malformed"),
        (r#"{"a":+1}"#, "malformed"),
        (r#"{"a":NaN}"#, "malformed"),
        (r#"{"a":nul}"#, "malformed"),
        (r#"{"a":True}"#, "malformed"),
        (r"{'a':1}", "malformed"),
        ("{\"a\":\"\n\"}", "malformed"),
        ("{\"a\":\"\0\"}", "malformed"),
        (r#"{"a":"\x"}"#, "malformed"),
        (r#"{"a":"\u12g4"}"#, "malformed"),
        (r#"{"a":"\ud800"}"#, "malformed"),
        (r#"{"a":"\udc00\ud800"}"#, "malformed"),
        (r#"{"a":"\ud800\u0041"}"#, "malformed"),
        (r#"{"a":1 2}"#, "malformed"),
        (r#"{"a":1/*c*/}"#, "malformed"),
        (r#"{"a":"\ud800x"}"#, "malformed"),
    ] {
        let error = decode(text).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Decode);
        assert!(error.to_string().contains(said), "{text}: {error}");
    }
}

#[test]
fn the_largest_allowed_data_is_stored_and_one_byte_more_is_refused() {
    let of = |bytes: usize| Data::from([("a".to_owned(), json!("x".repeat(bytes)))]);
    let overhead = encode(&of(0)).unwrap().len();
    assert!(encode(&of(MAX_BYTES - overhead)).is_ok());
    let error = encode(&of(MAX_BYTES - overhead + 1)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Encode);
    assert!(!error.to_string().contains("xx"), "{error}");
}

#[test]
fn an_error_quotes_no_data() {
    for text in [r#"{"card":"4111"#, r#""4111""#, r#"{"card":4111x}"#, r#"{"card":4111.}"#] {
        let error = decode(text).unwrap_err().to_string();
        assert!(!error.contains("4111") && error.contains("JSON"), "{error}");
    }
}
