//! Indexes that are dropped while a store runs.

use std::time::Duration;

use futures::TryStreamExt;
use mongodb::bson::doc;
use mongodb::{Database, IndexModel};
use tower_sessions_moka_mongodb_store::{MongoStore, MongoStoreBuilder, mongodb};

use crate::common::{Commands, Log, PATIENCE, create, uri};

/// A store with an owner, its database by another client, and the commands that the store has sent.
async fn store(
    with: impl Fn(MongoStoreBuilder) -> MongoStoreBuilder,
) -> (MongoStore, Database, Commands) {
    let uri = uri();
    let commands = Commands::default();
    let builder = MongoStore::builder().client(commands.client(&uri).await);
    let store = with(builder.owner(|_| Some("ferris"))).build().await.unwrap();
    create(&store).await;
    let other = Commands::default().client(&uri).await;
    let database = other.database(&store.collection().namespace().db);
    (store, database, commands)
}

async fn fields(database: &Database) -> Vec<String> {
    let sessions = database.collection::<mongodb::bson::Document>("sessions");
    let Ok(indexes) = sessions.list_indexes().await else { return Vec::new() };
    let indexes: Vec<IndexModel> = indexes.try_collect().await.unwrap();
    let mut fields: Vec<_> =
        indexes.iter().filter_map(|index| index.keys.keys().next().cloned()).collect();
    fields.sort();
    fields
}

/// Advances the time minute by minute, and waits for the calls of each minute, until `is_so`
/// returns true.
pub(crate) async fn by_the_minute(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let start = std::time::Instant::now();
    loop {
        tokio::time::pause();
        tokio::time::advance(Duration::from_secs(61)).await;
        tokio::time::resume();
        for _ in 0..200 {
            if is_so().await {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
    }
}

#[tokio::test]
async fn dropped_index_is_created_again_within_a_minute() {
    for dropped in ["the database", "the collection", "the indexes", "one index"] {
        let log = Log::default();
        let _logs = tracing::subscriber::set_default(log.subscriber());
        let (store, database, _) = store(|builder| builder).await;
        assert_eq!(fields(&database).await, ["_id", "expires", "owner"]);
        match dropped {
            "the database" => database.drop().await.unwrap(),
            "the collection" => {
                database.run_command(doc! { "drop": "sessions" }).await.map(drop).unwrap();
            }
            "the indexes" => {
                let drop_all = doc! { "dropIndexes": "sessions", "index": "*" };
                database.run_command(drop_all).await.map(drop).unwrap();
            }
            _ => {
                let drop_one = doc! { "dropIndexes": "sessions", "index": "expires_1" };
                database.run_command(drop_one).await.map(drop).unwrap();
            }
        }
        create(&store).await;
        assert!(!fields(&database).await.contains(&"expires".to_owned()), "{dropped}");
        by_the_minute(dropped, async || fields(&database).await == ["_id", "expires", "owner"])
            .await;
        assert!(log.take().contains("was created again"), "{dropped}");
    }
}

#[tokio::test]
async fn dropped_collection_without_writes_is_not_created_again() {
    let (_store, database, commands) = store(|builder| builder).await;
    database.drop().await.unwrap();
    let looked = commands.sent("listIndexes");
    by_the_minute("two looks", async || commands.sent("listIndexes") >= looked + 2).await;
    assert!(database.list_collection_names().await.unwrap().is_empty());
}

#[tokio::test]
async fn store_that_creates_no_indexes_does_not_check_them() {
    let (with, _, looks) = store(|builder| builder).await;
    let (without, database, commands) = store(|builder| builder.create_indexes(false)).await;
    let looked = looks.sent("listIndexes");
    by_the_minute("three looks", async || looks.sent("listIndexes") >= looked + 3).await;
    assert_eq!(commands.sent("listIndexes"), 0);
    assert_eq!(fields(&database).await, ["_id"]);
    drop((with, without));
}

#[tokio::test]
async fn changed_index_is_logged_once_and_left() {
    let log = Log::default();
    let _logs = tracing::subscriber::set_default(log.subscriber());
    let (_store, database, commands) = store(|builder| builder).await;
    let drop_one = doc! { "dropIndexes": "sessions", "index": "expires_1" };
    database.run_command(drop_one).await.unwrap();
    let theirs = doc! { "key": { "expires": 1 }, "name": "theirs" };
    let create = doc! { "createIndexes": "sessions", "indexes": [theirs] };
    database.run_command(create).await.unwrap();
    let looked = commands.sent("listIndexes");
    by_the_minute("three looks", async || commands.sent("listIndexes") >= looked + 3).await;
    let said = log.take();
    assert_eq!(said.matches("an index was changed while the store runs: ").count(), 1, "{said}");
    assert!(said.contains("is no TTL index") && said.contains("dropIndex"), "{said}");
    assert_eq!(fields(&database).await, ["_id", "expires", "owner"]);
}

#[tokio::test]
async fn index_checks_end_with_the_store() {
    for by_drop in [true, false] {
        let (store, _, commands) = store(|builder| builder).await;
        let looked = commands.sent("listIndexes");
        by_the_minute("a look", async || commands.sent("listIndexes") > looked).await;
        if by_drop {
            drop(store);
        } else {
            store.shutdown().await;
        }
        let (_other, _, looks) = self::store(|builder| builder).await;
        let ended = commands.sent("listIndexes");
        let looked = looks.sent("listIndexes");
        by_the_minute("others look", async || looks.sent("listIndexes") >= looked + 2).await;
        assert!(commands.sent("listIndexes") <= ended + 1, "by drop: {by_drop}");
    }
}
