use std::sync::Arc;

use bson::spec::BinarySubtype;
use bson::{Binary, Bson, RawBson};
use proptest::prelude::*;
use serde_json::json;

use crate::error::{Error, ErrorKind};
use crate::mongo::codec::encrypted::*;
use crate::mongo::codec::keys::Key;
use crate::mongo::codec::{DataFormat, decode, encode, reencode};
use crate::session::samples::data;
use crate::session::{Data, same};

const ID: [u8; 32] = [7; 32];

fn key(byte: u8) -> Key {
    Key::from_bytes(&[byte; 32])
}

fn encrypted(keys: Keys) -> DataFormat {
    DataFormat::Encrypted(Arc::new(keys))
}

fn form() -> DataFormat {
    encrypted(Keys::new(1, key(1)))
}

/// What is stored of `data` under [`ID`].
fn stored(data: &Data, form: &DataFormat) -> Vec<u8> {
    match encode(data, form, &ID).unwrap() {
        (Bson::Binary(Binary { bytes, subtype: BinarySubtype::Generic }), counted) => {
            assert_eq!(bytes.len(), counted);
            bytes
        }
        (other, _) => panic!("it is stored as {other:?}"),
    }
}

fn raw(bytes: &[u8]) -> RawBson {
    RawBson::Binary(Binary { subtype: BinarySubtype::Generic, bytes: bytes.to_vec() })
}

fn read(bytes: &[u8], form: &DataFormat, id: &[u8]) -> Result<Data> {
    decode(raw(bytes).as_raw_bson_ref(), form, id)
}

/// That `bytes` are refused, with what is said.
#[track_caller]
fn refused(bytes: &[u8], form: &DataFormat, id: &[u8]) -> Error {
    let error = read(bytes, form, id).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Decode, "{error}");
    error
}

fn sample() -> Data {
    Data::from([("card".to_owned(), json!("4111"))])
}

type Frozen = (u32, [u8; NONCE], [u8; 32], &'static str, &'static str);

/// Made by tests/frozen/envelopes.py with other code: the id of the key, its nonce, the document's
/// `_id`, the text and the envelope. A release that reads these no more loses sessions.
const FROZEN: [Frozen; 3] = [
    (
        1,
        [0; NONCE],
        [0; 32],
        "{}",
        "0100000001000000000000000000000000000000000000000000000000ee7ba7388e4262eb62eed1f351ecb2d9d5e3",
    ),
    (
        2026,
        counting(100),
        counting(200),
        r#"{"user":"Zoë","views":3}"#,
        "01000007ea6465666768696a6b6c6d6e6f707172737475767778797a7b07518cc39a5cabb8a56af2fc0d4d91eb2d\
         d23706970ef083f1f60803fd01bbc8156b39703c3f661f86",
    ),
    (
        u32::MAX,
        [0xff; NONCE],
        [0xff; 32],
        r#"{"long":"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}"#,
        "01ffffffffffffffffffffffffffffffffffffffffffffffffffffffff5a84cf85041e7a6dc05b34a7ea7709719a\
         816d9b49408016dd248c5ed3947f23c7e6399ca98ecf2447e9359d46c5a7378b460f891a47f9ad71f13a3857ddf8\
         6b8fd3952345b761d43b23611c6e16a568cc3af246960049ed62a36a7eeb4b60a1b9",
    ),
];

const fn counting<const N: usize>(from: u8) -> [u8; N] {
    let (mut bytes, mut at, mut next) = ([0; N], 0, from);
    while at < N {
        bytes[at] = next;
        at += 1;
        next = next.wrapping_add(1);
    }
    bytes
}

#[test]
fn frozen_envelopes_are_read_and_written() {
    for (number, nonce, id, text, envelope) in FROZEN {
        let keys = Keys::new(number, Key::from_bytes(&counting(0)));
        let envelope = hex::decode(envelope).unwrap();
        assert_eq!(decrypt(&keys, &id, &envelope).unwrap(), text);
        assert_eq!(encrypt_with(&keys, &id, text.as_bytes(), nonce).unwrap(), envelope);
        let data: Data = serde_json::from_str(text).unwrap();
        assert_eq!(read(&envelope, &encrypted(keys), &id).unwrap(), data);
    }
}

proptest! {
    #[test]
    fn whatever_json_goes_in_comes_out(data in data()) {
        let back = read(&stored(&data, &form()), &form(), &ID).unwrap();
        prop_assert!(same(&data, &back), "{data:?}\n{back:?}");
    }

}

proptest! {
    // Each case decrypts as often as its envelope has bytes.
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn what_was_altered_anywhere_is_refused(data in data(), flip in 1..=u8::MAX) {
        let mut envelope = stored(&data, &form());
        for at in 0..envelope.len() {
            envelope[at] ^= flip;
            refused(&envelope, &form(), &ID);
            envelope[at] ^= flip;
        }
        prop_assert!(read(&envelope, &form(), &ID).is_ok());
    }

    #[test]
    fn what_was_cut_or_grew_is_refused(data in data(), more in any::<u8>()) {
        let envelope = stored(&data, &form());
        for end in 0..envelope.len() {
            refused(&envelope[..end], &form(), &ID);
            refused(&envelope[envelope.len() - end..], &form(), &ID);
        }
        refused(&[&envelope[..], &[more]].concat(), &form(), &ID);
    }
}

proptest! {
    #[test]
    fn another_documents_data_is_refused(at in 0..32_usize, flip in 1..=u8::MAX, short in 0..32_usize) {
        let envelope = stored(&sample(), &form());
        let mut id = ID;
        id[at] ^= flip;
        refused(&envelope, &form(), &id);
        refused(&envelope, &form(), &ID[..short]);
    }

    #[test]
    fn what_nobody_encrypted_is_an_error_and_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        refused(&bytes, &form(), &ID);
        refused(&bytes, &DataFormat::Text, &ID);
        refused(&[&[VERSION, 0, 0, 0, 1], &bytes[..]].concat(), &form(), &ID);
    }
}

#[test]
fn a_header_of_another_key_does_not_open_though_that_key_is_the_same() {
    let twice = encrypted(Keys::new(1, key(1)).and_old(2, key(1)));
    let mut envelope = stored(&sample(), &twice);
    assert_eq!(read(&envelope, &twice, &ID).unwrap(), sample());
    envelope[4] = 2;
    refused(&envelope, &twice, &ID);
}

#[test]
fn no_two_envelopes_are_alike_and_none_shows_the_text() {
    let (one, other) = (stored(&sample(), &form()), stored(&sample(), &form()));
    assert_ne!(one[5..HEADER], other[5..HEADER]);
    assert_ne!(one[HEADER..], other[HEADER..]);
    assert!(!one.windows(4).any(|window| window == b"4111" || window == b"card"));
}

#[test]
fn what_a_store_cannot_open_says_which_key_and_no_data() {
    let envelope = stored(&sample(), &encrypted(Keys::new(2026, key(9))));
    let newer = [&[VERSION + 1], &envelope[1..]].concat();
    for (bytes, form, said) in [
        (
            &envelope,
            DataFormat::Text,
            "encrypted with key 2026, and this store was built without keys",
        ),
        (&envelope, DataFormat::Native, "built without keys"),
        (&envelope, form(), "key 2026, which is none of this store's keys"),
        (&envelope, encrypted(Keys::new(2026, key(1))), "does not open with key 2026"),
        (&newer, form(), "of version 2"),
        (&Vec::new(), form(), "too short"),
        (&envelope[..20].to_vec(), DataFormat::Text, "too short"),
    ] {
        let error = refused(bytes, &form, &ID).to_string();
        assert!(error.contains(said), "{error}");
        assert!(!error.contains("4111") && !error.contains("card"), "{error}");
    }
}

#[test]
fn plain_data_is_read_unless_it_is_refused() {
    let picky = encrypted(Keys::new(1, key(1)).require_encrypted());
    assert_eq!(read(&stored(&sample(), &picky), &picky, &ID).unwrap(), sample());
    for plain in [DataFormat::Text, DataFormat::Native] {
        let plain = RawBson::try_from(encode(&sample(), &plain, &ID).unwrap().0).unwrap();
        assert_eq!(decode(plain.as_raw_bson_ref(), &form(), &ID).unwrap(), sample());
        let error = decode(plain.as_raw_bson_ref(), &picky, &ID).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Decode);
        assert!(error.to_string().contains("refuses plain"), "{error}");
    }
}

#[test]
fn what_is_encrypted_anew_is_the_same_data_under_the_newest_key() {
    let keys = Arc::new(Keys::new(2, key(2)).and_old(1, key(1)));
    let newest = encrypted(Keys::new(2, key(2)));
    for old in [form(), DataFormat::Text, DataFormat::Native] {
        let old = RawBson::try_from(encode(&sample(), &old, &ID).unwrap().0).unwrap();
        let anew = reencode(old.as_raw_bson_ref(), &keys, &ID).unwrap().unwrap();
        let anew = RawBson::try_from(anew).unwrap();
        assert_eq!(decode(anew.as_raw_bson_ref(), &newest, &ID).unwrap(), sample());
        assert!(reencode(anew.as_raw_bson_ref(), &keys, &ID).unwrap().is_none());
    }
    // What cannot be trusted is not made trustworthy.
    let picky = Arc::new(Keys::new(2, key(2)).and_old(1, key(1)).require_encrypted());
    let plain = RawBson::String("{}".to_owned());
    assert!(reencode(plain.as_raw_bson_ref(), &picky, &ID).is_err());
    let moved = raw(&stored(&sample(), &form()));
    assert!(reencode(moved.as_raw_bson_ref(), &picky, &[8; 32]).is_err());
}
