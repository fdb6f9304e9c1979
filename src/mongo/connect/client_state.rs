//! What can be learned of a client that the app handed in: how many connections it may have, and
//! whether the app is shutting it down.
//!
//! The driver (mongodb 3.9.1) shows both in a client's `Debug` output and nowhere else, so that is what
//! is read here. A probe that times overlapping commands would take a busy or a far server for a small
//! pool. And `Client::shutdown`
//! [waits](https://docs.rs/mongodb/3.9/mongodb/struct.Client.html#method.shutdown) for the driver session
//! of each change stream, while every command succeeds as before: nobody else tells that it waits.
//!
//! Should the output have another form one day, nothing is known, nothing is refused, and a client is
//! shut down once its stores are.

use std::time::Duration;

use mongodb::Client;
use tokio::time::sleep;

use crate::runtime::Tasks;

/// What the driver takes where a client's options say nothing.
const DEFAULT_POOL: u32 = 10;

/// How often the client is looked at, which takes a fraction of a millisecond.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// How long a client is kept after its last store was dropped and not shut down. The driver sends a
/// last command when the last handle of a client goes. A process that drops its stores often ends right
/// after that, and a command in a runtime that ends may panic in the driver (mongodb 3.9.1 unwraps what
/// a task of the pool answers, which the runtime has cancelled).
pub(crate) const KILL_CURSORS_DELAY: Duration = Duration::from_millis(100);

/// Keeps a handle of the client until the store has ended. Of a client that the app
/// [`handed in`](crate::mongo::MongoStoreBuilder::client) it notices when the app shuts it down, and has the
/// store let go of it.
pub(crate) fn watch_client(client: Client, is_handed_in: bool, tasks: &Tasks) {
    let attended = tasks.clone();
    tasks.spawn(async move {
        let ends = attended.closed();
        if is_handed_in {
            while ends.run_until_cancelled(sleep(CHECK_INTERVAL)).await.is_some() {
                if is_shutting_down(&client) {
                    attended.client_closed().cancel();
                    return;
                }
            }
        }
        ends.cancelled().await;
        if !attended.is_shut_down() {
            sleep(KILL_CURSORS_DELAY).await;
        }
        drop(client);
    });
}

/// The most connections that the client opens to one server; `None` if that is unknown.
pub(crate) fn pool_size(client: &Client) -> Option<u32> {
    pool_size_in(&debug_text(client))
}

/// Whether somebody has called `Client::shutdown`, which may be waiting yet.
fn is_shutting_down(client: &Client) -> bool {
    is_shutting_down_in(&debug_text(client))
}

fn pool_size_in(shown: &str) -> Option<u32> {
    let (_, value) = shown.split_once(" max_pool_size: ")?;
    if value.starts_with("None") {
        return Some(DEFAULT_POOL);
    }
    value.strip_prefix("Some(")?.split(')').next()?.parse().ok()
}

fn is_shutting_down_in(shown: &str) -> bool {
    // It closes the tracker of what it waits for first.
    let tracker = shown.split_once(" pending_drops: ").map(|(_, tracker)| tracker);
    let state = tracker.and_then(|tracker| tracker.split_once(" is_closed: "));
    state.is_some_and(|(_, state)| state.starts_with("true"))
}

/// The client's `Debug` output, without every quoted text, which may be anything: an app's name, say.
/// Nobody else gets to see it. The driver leaves passwords out of it.
fn debug_text(client: &Client) -> String {
    without_quotes(&format!("{client:?}"))
}

fn without_quotes(shown: &str) -> String {
    let mut kept = String::with_capacity(shown.len());
    let mut characters = shown.chars();
    let mut is_quoted = false;
    while let Some(character) = characters.next() {
        match character {
            '"' => is_quoted = !is_quoted,
            '\\' if is_quoted => {
                let _ = characters.next();
            }
            _ if is_quoted => {}
            _ => kept.push(character),
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use mongodb::options::{ClientOptions, ServerAddress};

    use super::*;

    fn client(pool_size: Option<u32>, app_name: &str) -> Client {
        let host = ServerAddress::parse("localhost:1").unwrap();
        let mut options = ClientOptions::builder().hosts(vec![host]).build();
        options.max_pool_size = pool_size;
        options.app_name = Some(app_name.to_owned());
        Client::with_options(options).unwrap()
    }

    #[tokio::test]
    async fn the_pool_of_a_client_is_as_large_as_its_options_say() {
        for (given, expected) in [(None, 10), (Some(1), 1), (Some(250), 250)] {
            for name in ["app", r#", max_pool_size: Some(7), ""#, r#"\", max_pool_size: Some(7)"#] {
                assert_eq!(pool_size(&client(given, name)), Some(expected), "{given:?} {name}");
            }
        }
    }

    #[tokio::test]
    async fn a_shutdown_is_seen_while_it_waits_for_a_session_and_after_it() {
        let client = client(None, " pending_drops: T { is_closed: true");
        assert!(!is_shutting_down(&client));
        let session = client.start_session().await.unwrap();
        let mut shutdown = client.clone().shutdown().into_future();
        assert!(futures::poll!(&mut shutdown).is_pending());
        assert!(is_shutting_down(&client));
        drop(session);
        shutdown.await;
        assert!(is_shutting_down(&client));
    }

    #[test]
    fn a_text_of_another_form_says_nothing() {
        let texts = ["", "Client { .. }", " max_pool_size", " max_pool_size: Some(many)"];
        for shown in texts.into_iter().chain([" pending_drops: Many", " is_closed: true"]) {
            assert_eq!(pool_size_in(shown), None, "{shown}");
            assert!(!is_shutting_down_in(shown), "{shown}");
        }
    }

    #[tokio::test]
    async fn no_password_is_in_the_text_that_is_read() {
        let uri = "mongodb://ferris:s3cret-0f-mine@localhost:1/app";
        let client = Client::with_uri_str(uri).await.unwrap();
        assert!(!format!("{client:?}").contains("s3cret-0f-mine"));
    }
}
