use bson::doc;

use crate::mongo::change_stream::events;
use crate::mongo::change_stream::reader::*;

#[test]
fn the_time_in_a_token_of_mongodb_is_read_and_other_tokens_have_none() {
    let token = |data: &str| doc! { "_data": data };
    // A high-water mark of a replica set of MongoDB 6.
    let time = time_in(&token("8263C1E0A4000000022B0229296E04"));
    assert_eq!(time, Some(ServerTime(0x63C1_E0A4_0000_0002)));
    for other in ["", "82", "8263C1E0A40000000", "400000001273000A000000", "82é3C1E0A400000002"] {
        assert_eq!(time_in(&token(other)), None, "{other}");
    }
    assert_eq!(time_in(&doc! {}), None);
}

#[test]
fn an_event_names_a_session_by_its_key() {
    let binary = |subtype| bson::Binary { subtype, bytes: vec![7; 32] };
    let read = change(&doc! { "key": binary(BinarySubtype::Generic) }).unwrap();
    assert_eq!((read.key.as_bytes(), read.rev), (&[7; 32], None));
    assert!(change(&doc! { "key": 7 }).is_none());
    assert!(change(&doc! { "ends": true }).is_none());
    // Another program's `_id` may have 32 bytes too. The event stream must judge it in the same way.
    assert!(change(&doc! { "key": binary(BinarySubtype::UserDefined(0x80)) }).is_none());
    let at = bson::Timestamp { time: 1, increment: 1 };
    for (subtype, is_ours) in
        [(BinarySubtype::Generic, true), (BinarySubtype::UserDefined(0x80), false)]
    {
        let deleted = doc! { "key": binary(subtype), "op": "delete", "at": at };
        assert_eq!(events::session_change(&deleted).is_some(), is_ours, "{subtype:?}");
    }
}
