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

fn one_key() -> DataFormat {
    encrypted(Keys::new(1, key(1)))
}

/// The envelope of `data`, for the document with [`ID`].
fn stored(data: &Data, format: &DataFormat) -> Vec<u8> {
    match encode(data, format, &ID).unwrap() {
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

fn read(bytes: &[u8], format: &DataFormat, id: &[u8]) -> Result<Data> {
    decode(raw(bytes).as_raw_bson_ref(), format, id)
}

/// Asserts that `bytes` are refused, and returns the error.
#[track_caller]
fn refused(bytes: &[u8], format: &DataFormat, id: &[u8]) -> Error {
    let error = read(bytes, format, id).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Decode, "{error}");
    error
}

fn sample() -> Data {
    Data::from([("card".to_owned(), json!("4111"))])
}

type Frozen = (u32, [u8; NONCE], [u8; 32], &'static str, &'static str);

/// The id of the key, the nonce, the `_id` of the document, the text and the envelope. Made by
/// tests/frozen/envelopes.py, with other code. A release that cannot read these loses sessions.
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
    let mut bytes = [0; N];
    let mut at = 0;
    let mut next = from;
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
    fn data_is_decrypted_unchanged(data in data()) {
        let back = read(&stored(&data, &one_key()), &one_key(), &ID).unwrap();
        prop_assert!(same(&data, &back), "{data:?}\n{back:?}");
    }
}

proptest! {
    // Each case decrypts once for each byte of its envelope.
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn an_envelope_with_one_altered_byte_is_refused(data in data(), flip in 1..=u8::MAX) {
        let mut envelope = stored(&data, &one_key());
        for at in 0..envelope.len() {
            envelope[at] ^= flip;
            refused(&envelope, &one_key(), &ID);
            envelope[at] ^= flip;
        }
        prop_assert!(read(&envelope, &one_key(), &ID).is_ok());
    }

    #[test]
    fn a_cut_or_longer_envelope_is_refused(data in data(), more in any::<u8>()) {
        let envelope = stored(&data, &one_key());
        for end in 0..envelope.len() {
            refused(&envelope[..end], &one_key(), &ID);
            refused(&envelope[envelope.len() - end..], &one_key(), &ID);
        }
        refused(&[&envelope[..], &[more]].concat(), &one_key(), &ID);
    }
}

proptest! {
    #[test]
    fn another_documents_data_is_refused(at in 0..32_usize, flip in 1..=u8::MAX, short in 0..32_usize) {
        let envelope = stored(&sample(), &one_key());
        let mut id = ID;
        id[at] ^= flip;
        refused(&envelope, &one_key(), &id);
        refused(&envelope, &one_key(), &ID[..short]);
    }

    #[test]
    fn random_bytes_are_an_error_and_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        refused(&bytes, &one_key(), &ID);
        refused(&bytes, &DataFormat::Text, &ID);
        refused(&[&[VERSION, 0, 0, 0, 1], &bytes[..]].concat(), &one_key(), &ID);
    }
}

#[test]
fn the_number_of_the_key_is_authenticated() {
    let twice = encrypted(Keys::new(1, key(1)).and_old(2, key(1)));
    let mut envelope = stored(&sample(), &twice);
    assert_eq!(read(&envelope, &twice, &ID).unwrap(), sample());
    envelope[4] = 2;
    refused(&envelope, &twice, &ID);
}

#[test]
fn two_envelopes_of_the_same_data_differ_and_do_not_show_it() {
    let one = stored(&sample(), &one_key());
    let other = stored(&sample(), &one_key());
    assert_ne!(one[5..HEADER], other[5..HEADER]);
    assert_ne!(one[HEADER..], other[HEADER..]);
    assert!(!one.windows(4).any(|window| window == b"4111" || window == b"card"));
}

#[test]
fn an_error_of_decryption_names_the_key_and_no_data() {
    let envelope = stored(&sample(), &encrypted(Keys::new(2026, key(9))));
    let newer = [&[VERSION + 1], &envelope[1..]].concat();
    for (bytes, format, said) in [
        (
            &envelope,
            DataFormat::Text,
            "encrypted with key 2026, and this store was built without keys",
        ),
        (&envelope, DataFormat::Native, "built without keys"),
        (&envelope, one_key(), "key 2026, which this store does not have"),
        (&envelope, encrypted(Keys::new(2026, key(1))), "cannot be decrypted with key 2026"),
        (&newer, one_key(), "of version 2"),
        (&Vec::new(), one_key(), "too short"),
        (&envelope[..20].to_vec(), DataFormat::Text, "too short"),
    ] {
        let error = refused(bytes, &format, &ID).to_string();
        assert!(error.contains(said), "{error}");
        assert!(!error.contains("4111") && !error.contains("card"), "{error}");
    }
}

#[test]
fn plain_data_is_read_unless_encryption_is_required() {
    let strict = encrypted(Keys::new(1, key(1)).require_encrypted());
    assert_eq!(read(&stored(&sample(), &strict), &strict, &ID).unwrap(), sample());
    for plain in [DataFormat::Text, DataFormat::Native] {
        let plain = RawBson::try_from(encode(&sample(), &plain, &ID).unwrap().0).unwrap();
        assert_eq!(decode(plain.as_raw_bson_ref(), &one_key(), &ID).unwrap(), sample());
        let error = decode(plain.as_raw_bson_ref(), &strict, &ID).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Decode);
        assert!(error.to_string().contains("refuses plain"), "{error}");
    }
}

#[test]
fn reencoded_data_is_the_same_under_the_newest_key() {
    let keys = Arc::new(Keys::new(2, key(2)).and_old(1, key(1)));
    let newest = encrypted(Keys::new(2, key(2)));
    for old in [one_key(), DataFormat::Text, DataFormat::Native] {
        let old = RawBson::try_from(encode(&sample(), &old, &ID).unwrap().0).unwrap();
        let reencoded = reencode(old.as_raw_bson_ref(), &keys, &ID).unwrap().unwrap();
        let reencoded = RawBson::try_from(reencoded).unwrap();
        assert_eq!(decode(reencoded.as_raw_bson_ref(), &newest, &ID).unwrap(), sample());
        assert!(reencode(reencoded.as_raw_bson_ref(), &keys, &ID).unwrap().is_none());
    }
    // Data that a load would refuse is not encrypted with the newest key.
    let strict = Arc::new(Keys::new(2, key(2)).and_old(1, key(1)).require_encrypted());
    let plain = RawBson::String("{}".to_owned());
    assert!(reencode(plain.as_raw_bson_ref(), &strict, &ID).is_err());
    let moved = raw(&stored(&sample(), &one_key()));
    assert!(reencode(moved.as_raw_bson_ref(), &strict, &[8; 32]).is_err());
}
