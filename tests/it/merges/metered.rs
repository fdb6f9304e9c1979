//! What operators see of merged saves: the metrics and the log. Their spans are in `trace.rs`.

use serde_json::json;
use tower_sessions::SessionStore;

use super::app::{App, Instances, counting, on_two_instances_of_both_tiers};
use crate::common::Log;
use crate::metrics::{assert_count, operations};
use crate::owner::Owned;

on_two_instances_of_both_tiers! {
    saves_are_counted_by_how_they_ended = metrics;
    log_shows_nothing_of_the_session = log;
}

const ATTEMPTS: &str = "session_store_merge_attempts";

async fn metrics<S: Owned>() {
    let app = App::<S>::start(|builder| builder.on_conflict(counting)).await;
    let assert_all = |unchanged, merged, gone, conflicts| {
        app.assert_merges("unchanged", unchanged);
        app.assert_merges("merged", merged);
        app.assert_merges("gone", gone);
        app.assert_merges("failed", 0);
        app.assert_conflicts(conflicts);
        app.assert_dropped(gone);
        // How many values the histogram has: one for each save.
        assert_count(&app.meters, ATTEMPTS, unchanged + merged + gone);
        // Each merge was refused once, and then read the session.
        assert_count(&app.meters, &operations("replace", "changed"), merged);
    };
    let id = app.stored(json!({ "n": 0 })).await;
    let [a, b, c, d, reader] = app.visits(id, Instances::Two).await;
    assert_all(0, 0, 0, 0);
    a.save_with("a", 1).await;
    assert_all(1, 0, 0, 0);
    b.save_with("n", 1).await;
    assert_all(1, 1, 0, 0);
    c.save_with("n", 1).await;
    assert_all(1, 2, 0, 1);
    reader.save().await;
    assert_all(1, 2, 0, 1);
    app.database.delete(&id).await.unwrap();
    d.save_with("n", 1).await;
    assert_all(1, 2, 1, 1);
    // Outside of a scope, nothing of this is counted.
    let mut record = crate::common::create(&app.one).await;
    record.data.insert("a".to_owned(), json!(1));
    app.one.save(&record).await.unwrap();
    assert_all(1, 2, 1, 1);
}

async fn log<S: Owned>() {
    let app = App::<S>::start(|builder| builder.on_conflict(counting)).await;
    let id = app.stored(json!({ "card-number": "4111-1111", "n": 0 })).await;
    let [a, b, c] = app.visits(id, Instances::Two).await;
    let log = Log::default();
    let guard = tracing::subscriber::set_default(log.subscriber());
    b.save_with("secret", "a value").await;
    a.save_with("card-number", "4111-2222").await;
    c.cycle_id().await;
    c.save_with("secret", "a value").await;
    a.save_with("secret", "a value").await;
    drop(guard);
    let log = log.take();
    assert!(log.contains("a save was dropped"), "{log}");
    let new = c.id().unwrap();
    for secret in ["card-number", "4111-", "a value", &id.to_string(), &new.to_string()] {
        assert!(!log.contains(secret), "{secret}: {log}");
    }
}
