//! After the faults: checks what the database holds in the end, and that every instance works
//! again.

use std::collections::HashMap;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use mongodb::Client;
use mongodb::bson::doc;
use tower_sessions::SessionStore;
use tower_sessions::session::{Id, Record};
use tower_sessions_moka_mongodb_store::{SessionKey, StoredSession, mongodb};

use crate::actions::Run;
use crate::checker::{Expected, Violation};
use crate::cluster::Cluster;
use crate::history::{Seen, name};
use crate::ledger::{Judged, JudgedShared, lines};
use crate::shared;

/// How long an instance may take to work again after all faults have ended.
const RECOVERY: Duration = Duration::from_secs(20);
/// How many sessions are loaded through each instance in the end: the latest ones.
const ASKED: usize = 150;
const SHARED_ASKED: usize = 30;

/// Waits until no operation can be in progress, and until no cache may serve an entry that is older
/// than the last write.
pub(crate) async fn settle(run: &Run) {
    let settings = &run.settings;
    let longest = (2 * settings.timeout).max(settings.max_staleness);
    tokio::time::sleep(longest + Duration::from_millis(300)).await;
}

/// Compares all judged sessions with the database, and the latest ones with what the instances
/// return.
pub(crate) async fn check(run: &Run, cluster: &Cluster) -> Result<usize, String> {
    let documents = documents(cluster).await.map_err(|error| error.to_string())?;
    let judged = {
        let mut findings = run.ledger.findings.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut findings.judged)
    };
    for session in &judged {
        let document = documents.get(SessionKey::from(session.id).as_bytes().as_slice());
        let found =
            document.map_or(Seen::Absent, |document| run.script.stored(session.number, document));
        note(run, session, None, session.expected.check(found, false));
    }
    let shared = {
        let mut findings = run.ledger.findings.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut findings.shared)
    };
    for session in &shared {
        let found = |id: &Id| {
            let document = documents.get(SessionKey::from(*id).as_bytes().as_slice());
            document.map_or(shared::Seen::Absent, |document| {
                run.script.shared_stored(session.number, document)
            })
        };
        let found: Vec<_> = session.ids.iter().map(found).collect();
        for (expected, found) in session.expected.ids.iter().zip(&found) {
            note_shared(run, session, None, expected.check(*found));
        }
        note_shared(run, session, None, session.expected.check_renewals(&found));
    }
    let latest = &judged[judged.len().saturating_sub(ASKED)..];
    let latest_shared = &shared[shared.len().saturating_sub(SHARED_ASKED)..];
    let instances = 0..run.settings.instances;
    let asked = instances.map(|instance| ask_for_all(run, instance, latest, latest_shared));
    futures::future::try_join_all(asked).await?;
    Ok(judged.len() + shared.len())
}

/// Loads sessions through an instance, and judges them.
async fn ask_for_all(
    run: &Run,
    instance: u8,
    sessions: &[Judged],
    shared: &[JudgedShared],
) -> Result<(), String> {
    for session in sessions {
        let record = ask(run, instance, &session.id).await?;
        let found = record
            .map_or(Seen::Absent, |record| run.script.seen(session.number, session.id, &record));
        note(run, session, Some(instance), agree(&session.expected, found));
    }
    for session in shared {
        let ids = session.ids.iter().zip(&session.expected.ids);
        // Most ids are gone. During the run, loads have shown that.
        for (id, expected) in ids.filter(|(_, expected)| expected.may_live()) {
            let record = ask(run, instance, id).await?;
            let found = record.map_or(shared::Seen::Absent, |record| {
                run.script.shared_seen(session.number, *id, &record)
            });
            note_shared(run, session, Some(instance), expected.check(found));
        }
    }
    Ok(())
}

fn agree(expected: &Expected, found: Seen) -> Result<(), Violation> {
    // If a write of unknown outcome may just have been carried out, the cache may hold the state
    // before it.
    if expected.is_decided() { expected.check(found, true) } else { Ok(()) }
}

fn note(run: &Run, session: &Judged, instance: Option<u8>, outcome: Result<(), Violation>) {
    if let Err(violation) = outcome {
        let story = lines(&session.story);
        run.ledger.broken(session.number, witnessed(violation, instance), &story);
    }
}

fn note_shared(
    run: &Run,
    session: &JudgedShared,
    instance: Option<u8>,
    outcome: Result<(), Violation>,
) {
    if let Err(violation) = outcome {
        run.ledger.broken(session.number, witnessed(violation, instance), &session.story);
    }
}

/// Adds to a violation who shows it.
fn witnessed(mut violation: Violation, instance: Option<u8>) -> Violation {
    let witness = match instance {
        Some(instance) => format!("says instance {}", name(instance)),
        None => "says the database".to_owned(),
    };
    violation.text = format!("{}, {witness}", violation.text);
    violation
}

/// Everything that is stored, read without the store and the proxies.
async fn documents(cluster: &Cluster) -> mongodb::error::Result<HashMap<Vec<u8>, StoredSession>> {
    let client = Client::with_uri_str(&cluster.direct).await?;
    let sessions = client.database(&cluster.database).collection::<StoredSession>("sessions");
    let mut all = sessions.find(doc! {}).await?;
    let mut documents = HashMap::new();
    while let Some(document) = all.try_next().await? {
        documents.insert(document.key.bytes.clone(), document);
    }
    Ok(documents)
}

/// Loads until there is a result, as a user retries after an error.
async fn ask(run: &Run, instance: u8, id: &Id) -> Result<Option<Record>, String> {
    let store = &run.instances[usize::from(instance)];
    let start = Instant::now();
    loop {
        match store.load(id).await {
            Ok(found) => return Ok(found),
            Err(error) if start.elapsed() > RECOVERY => {
                return Err(format!(
                    "instance {} does not work again {RECOVERY:?} after the last fault: {error}",
                    name(instance)
                ));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Drops the database if the server stays, and shuts the instances down.
pub(crate) async fn clean_up(run: &Run, cluster: &Cluster) -> Result<(), String> {
    const PATIENCE: Duration = Duration::from_secs(30);

    if cluster.victims.server.is_none() {
        let client = Client::with_uri_str(&cluster.direct).await;
        let client = client.map_err(|error| error.to_string())?;
        let dropped = client.database(&cluster.database).drop().await;
        dropped.map_err(|error| error.to_string())?;
    }
    for (store, instance) in run.instances.iter().zip(0..) {
        let shutdown = tokio::time::timeout(PATIENCE, store.shutdown()).await;
        shutdown.map_err(|_| format!("instance {} does not shut down", name(instance)))?;
    }
    Ok(())
}
