//! What a stream of events reports, on the real server.

use futures::{FutureExt, StreamExt};
use mongodb::bson::{Binary, DateTime, Document, doc, spec::BinarySubtype};
use tower_sessions::SessionStore;
use tower_sessions_moka_mongodb_store::{
    CachedMongoStore, Coherence, ErrorKind, Event, EventKind, Events, MongoStore, SessionEvent,
    SessionKey, mongodb,
};

use crate::common::{PATIENCE, cache_of, create, other_instance, uri};
use crate::proxy::Proxy;

async fn next(events: &mut Events) -> Event {
    let event = tokio::time::timeout(PATIENCE, events.next()).await;
    event.expect("it is reported").expect("the store is open")
}

async fn next_change(events: &mut Events) -> (EventKind, SessionKey, Option<bool>) {
    match next(events).await {
        Event::Session(SessionEvent { kind, key, by_this_instance, .. }) => {
            (kind, key, by_this_instance)
        }
        other => panic!("{other:?}"),
    }
}

/// A store without a change stream of its own, so that the stream of events is the only one that is
/// opened.
async fn alone(uri: &str) -> CachedMongoStore {
    let mongo = MongoStore::connect(uri).await.unwrap();
    CachedMongoStore::builder(mongo).coherence(Coherence::SoleWriter).build().await.unwrap()
}

#[tokio::test]
async fn events_of_every_kind_reach_both_instances() {
    use EventKind::{Changed, Created, Deleted, Expired, Removed};

    let uri = uri();
    let mongo = other_instance(&uri).await;
    let [here, there] = [cache_of(&mongo).await, cache_of(&other_instance(&uri).await).await];
    let early = create(&here).await;
    let mut all = [here.events().await.unwrap(), there.events().await.unwrap()];
    // A second stream, from a clone of the store, reports the same events.
    let mut again = here.clone().events().await.unwrap();

    let mut one = create(&here).await;
    one.data.insert("more".to_owned(), 1.into());
    here.save(&one).await.unwrap();
    // A save that only prolongs the session is not reported.
    one.expiry_date += time::Duration::minutes(5);
    here.save(&one).await.unwrap();
    let two = create(&there).await;
    here.delete(&one.id).await.unwrap();
    // An operator changes it by hand, so that it expires in the past.
    let documents = here.collection().clone_with_type::<Document>();
    let id = Binary {
        subtype: BinarySubtype::Generic,
        bytes: SessionKey::from(two.id).as_bytes().to_vec(),
    };
    let past = DateTime::from_millis(1_000);
    let edit = doc! { "$set": { "expires": past, "note": "by hand" } };
    documents.update_one(doc! { "_id": id }, edit).await.unwrap();
    there.delete(&two.id).await.unwrap();
    there.delete(&early.id).await.unwrap();
    // Other documents in the same collection are not reported.
    documents.insert_one(doc! { "_id": "another" }).await.unwrap();
    documents.delete_one(doc! { "_id": "another" }).await.unwrap();
    let last = create(&there).await;

    for (events, at_here) in all.iter_mut().zip([true, false]).chain([(&mut again, true)]) {
        for (kind, record, by_here) in [
            (Created, &one, Some(true)),
            (Changed, &one, Some(true)),
            (Created, &two, Some(false)),
            (Deleted, &one, None),
            (Changed, &two, Some(false)),
            (Expired, &two, None),
            (Removed, &early, None),
            (Created, &last, Some(false)),
        ] {
            let by_hand = kind == Changed && record.id == two.id;
            let by_us = by_here.map(|by_here| by_here == at_here && !by_hand);
            let expected = (kind, SessionKey::from(record.id), by_us);
            assert_eq!(next_change(events).await, expected, "{kind:?} on {at_here}");
        }
    }
    let said = format!("{:?} {:?}", all[0], Event::Lagged(3));
    assert!(said.contains("Events") && said.contains('3'));
}

#[tokio::test]
async fn assigned_owners_are_reported_as_own_changes() {
    let uri = uri();
    let plain = other_instance(&uri).await;
    let mut set = create(&plain).await;
    set.data.insert("user".to_owned(), 7.into());
    plain.save(&set).await.unwrap();
    let owner =
        |data: &std::collections::HashMap<String, serde_json::Value>| data.get("user")?.as_i64();
    let mut stores = Vec::new();
    for _ in 0..2 {
        let mongo = MongoStore::builder().uri(&uri).owner(owner).build().await.unwrap();
        stores.push(cache_of(&mongo).await);
    }
    let [here, there] = &stores[..] else { panic!("two stores") };
    let mut all = [here.events().await.unwrap(), there.events().await.unwrap()];
    assert_eq!(here.assign_owners().await.unwrap(), 1);
    // Data without an owner, beside an owner field that does not match it.
    set.data.remove("user");
    plain.save(&set).await.unwrap();
    assert_eq!(there.assign_owners().await.unwrap(), 1);
    for (events, at_here) in all.iter_mut().zip([true, false]) {
        for by_us in [at_here, false, !at_here] {
            let expected = (EventKind::Changed, SessionKey::from(set.id), Some(by_us));
            assert_eq!(next_change(events).await, expected, "at_here: {at_here}");
        }
    }
}

#[tokio::test]
async fn event_shows_no_byte_of_a_key_and_has_the_time() {
    let store = alone(&uri()).await;
    let mut events = store.events().await.unwrap();
    let created = create(&store).await;
    let Event::Session(event) = next(&mut events).await else { panic!("no session") };
    assert!(format!("{event:?}").contains("SessionKey(..)"));
    assert_eq!(event.key, SessionKey::from(created.id));
    let age = time::OffsetDateTime::now_utc() - event.at;
    assert!(age.abs() < time::Duration::minutes(2), "{age}");
}

#[tokio::test]
async fn slow_consumer_receives_the_number_of_missed_events() {
    const WAITING: u64 = 4_096;
    let store = alone(&uri()).await;
    let mut slow = store.events().await.unwrap();
    let mut quick = store.events().await.unwrap();
    let documents = store.collection().clone_with_type::<Document>();
    let later = DateTime::from_millis(4_102_444_800_000);
    let many = WAITING + 904;
    let session = |n: u64| {
        let bytes = [n.to_le_bytes().to_vec(), vec![7; 24]].concat();
        let id = Binary { subtype: BinarySubtype::Generic, bytes };
        doc! { "_id": id, "expires": later }
    };
    documents.insert_many((0..many).map(session)).await.unwrap();
    let key = |event: &Event| match event {
        Event::Session(event) => u64::from_le_bytes(event.key.as_bytes()[..8].try_into().unwrap()),
        other => panic!("{other:?}"),
    };
    for n in 0..many {
        assert_eq!(key(&next(&mut quick).await), n, "in order, and each");
    }
    let Event::Lagged(missed) = next(&mut slow).await else { panic!("it missed some") };
    assert_eq!(missed, many - WAITING);
    for n in missed..many {
        assert_eq!(key(&next(&mut slow).await), n);
    }
    assert!(slow.next().now_or_never().is_none(), "exactly these");
}

#[tokio::test]
async fn broken_connection_loses_no_event() {
    let proxy = Proxy::start().await;
    let store = alone(proxy.uri()).await;
    let past_it = other_instance(proxy.direct()).await;
    let mut events = store.events().await.unwrap();
    let mut expected = Vec::new();
    for at_once in [true, false, true, false, false] {
        let mut held = proxy.hold("getMore");
        held.reached().await;
        expected.push(SessionKey::from(create(&past_it).await.id));
        // Otherwise the first attempt to resume breaks off too.
        let resumes = (!at_once).then(|| proxy.hold("aggregate"));
        held.cut();
        if let Some(mut resumes) = resumes {
            resumes.reached().await;
            expected.push(SessionKey::from(create(&past_it).await.id));
            resumes.cut();
        }
        expected.push(SessionKey::from(create(&past_it).await.id));
    }
    for (nth, key) in expected.iter().enumerate() {
        let (kind, reported, by_us) = next_change(&mut events).await;
        let which = expected.iter().position(|it| *it == reported);
        assert_eq!((kind, which, by_us), (EventKind::Created, Some(nth), Some(false)), "{key:?}");
    }
}

#[tokio::test]
async fn lost_history_is_reported_as_a_gap() {
    let proxy = Proxy::start().await;
    let store = alone(proxy.uri()).await;
    let past_it = other_instance(proxy.direct()).await;
    let mut events = store.events().await.unwrap();
    let known = create(&past_it).await;
    assert_eq!(next_change(&mut events).await.0, EventKind::Created);
    let mut held = proxy.hold("getMore");
    held.reached().await;
    // ChangeStreamHistoryLost.
    held.refuse(286);
    assert_eq!(next(&mut events).await, Event::Gap);
    // After a gap, what was known before is not used.
    past_it.delete(&known.id).await.unwrap();
    assert_eq!(next_change(&mut events).await.0, EventKind::Removed);
    // A dropped collection reports no event for each session either.
    store.collection().drop().await.unwrap();
    assert_eq!(next(&mut events).await, Event::Gap);
    let after = create(&past_it).await;
    assert_eq!(next_change(&mut events).await.1, SessionKey::from(after.id));
}

#[tokio::test]
async fn events_without_a_change_stream_are_an_error() {
    let mongo = other_instance(&uri()).await;
    let without =
        CachedMongoStore::builder(mongo).coherence(Coherence::TimeBound).build().await.unwrap();
    let error = without.events().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("Coherence::TimeBound"), "{error}");

    let small = MongoStore::builder().uri(uri()).max_pool_size(2).build().await.unwrap();
    let error = cache_of(&small).await.events().await.unwrap_err();
    assert!(error.to_string().contains("at least 3"), "{error}");

    let proxy = Proxy::start().await;
    let store = alone(proxy.uri()).await;
    let mut held = proxy.hold("aggregate");
    let asks = tokio::spawn({
        let store = store.clone();
        async move { store.events().await.map(drop) }
    });
    held.reached().await;
    // The error of a standalone server.
    held.refuse(40573);
    let error = asks.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("has no change streams"), "{error}");
    // The next attempt may find that the server has change streams.
    let mut events = store.events().await.unwrap();
    create(&store).await;
    assert_eq!(next_change(&mut events).await.0, EventKind::Created);

    let shut = alone(&uri()).await;
    let mut events = shut.events().await.unwrap();
    shut.shutdown().await;
    assert_eq!(tokio::time::timeout(PATIENCE, events.next()).await.unwrap(), None);
    assert_eq!(shut.events().await.unwrap_err().kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn stream_of_events_is_open_only_while_a_receiver_exists() {
    use crate::common::{Commands, eventually};

    let uri = uri();
    let commands = Commands::default();
    let mongo = commands.mongo(&uri).await;
    let store =
        CachedMongoStore::builder(mongo).coherence(Coherence::SoleWriter).build().await.unwrap();
    assert_eq!(commands.sent("aggregate"), 0);
    let events = [store.events().await.unwrap(), store.events().await.unwrap()];
    assert_eq!(commands.sent("aggregate"), 1, "one for all");
    drop(events);
    eventually("the cursor is closed", async || commands.sent("killCursors") == 1).await;
    let mut events = store.events().await.unwrap();
    let created = create(&other_instance(&uri).await).await;
    assert_eq!(next_change(&mut events).await.1, SessionKey::from(created.id));
    assert_eq!(commands.sent("aggregate"), 2);
}
