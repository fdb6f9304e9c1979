use bson::doc;

use super::*;

#[test]
fn the_time_of_mongodbs_tokens_is_read_and_that_of_others_is_not() {
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
fn a_batch_vouches_for_no_more_than_it_can() {
    use Waited::{No, OnARouter, OnOneServer};

    let token = doc! { "_data": "8263C1E0A4000000022B0229296E04" };
    let token = time_in(&token);
    let next = Some(ServerTime(0x63C1_E0A4_0000_0003));
    let early = Some(ServerTime(1));
    let late = Some(ServerTime(u64::MAX));
    assert!(early < token && token < late);
    for (at, last, empty, waited, vouched) in [
        // The time of the token, and all that is before it.
        (token, None, true, OnOneServer, (next, false)),
        (token, None, true, OnARouter, (token, false)),
        (token, None, true, No, (token, false)),
        // More may come of the last change's time: a bulk's changes share one.
        (token, token, false, OnOneServer, (token, false)),
        (token, early, false, OnOneServer, (early, false)),
        (token, early, false, OnARouter, (early, false)),
        (token, late, false, No, (token, false)),
        // Without a time in it, an empty batch says that all from before the question is there.
        (None, None, true, OnOneServer, (None, true)),
        (None, None, true, OnARouter, (None, false)),
        (None, None, true, No, (None, false)),
        (None, early, false, OnOneServer, (early, false)),
        (None, early, false, OnARouter, (early, false)),
        // Changes whose times cannot be read, and the end of time.
        (None, None, false, OnOneServer, (None, false)),
        (late, None, true, OnOneServer, (late, false)),
    ] {
        let found = vouched_for(at, last, empty, waited);
        assert_eq!(found, vouched, "{at:?} {last:?} {empty} {waited:?}");
    }
}

#[test]
fn a_report_names_a_session_by_its_key() {
    let key = bson::Binary { subtype: bson::spec::BinarySubtype::Generic, bytes: vec![7; 32] };
    let heard = change(&doc! { "key": key }).unwrap();
    assert_eq!((heard.key.as_bytes(), heard.rev), (&[7; 32], None));
    assert!(change(&doc! { "key": 7 }).is_none());
    assert!(change(&doc! { "ends": true }).is_none());
}
