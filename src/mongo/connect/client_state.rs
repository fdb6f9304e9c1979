//! The state of a client that the app handed in: the size of its pool, and whether the app is shutting it down.
//!
//! The driver (mongodb 3.9.1) shows both only in the `Debug` output of a client, so this file reads that output. The
//! other ways do not work. A probe that times overlapping commands would take a busy or a far server for a small
//! pool. `Client::shutdown` [waits](https://docs.rs/mongodb/3.9/mongodb/struct.Client.html#method.shutdown) for the
//! driver session of each change stream, and every command succeeds meanwhile, so no command shows that it waits.
//!
//! If a later driver has another output, both are unknown. Then nothing is refused, and the app's `Client::shutdown`
//! waits until the store is shut down.

use std::time::Duration;

use mongodb::Client;
use tokio::time::sleep;

use crate::runtime::Tasks;

/// The driver's pool size if the options of a client have none.
const DEFAULT_POOL: u32 = 10;

/// How often the client is checked. A check takes a fraction of a millisecond.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// How long a client is kept if its last store was dropped without a shutdown. The driver sends a last command when
/// the last handle of a client is dropped. A process that drops its stores often ends right after, and a command in
/// a runtime that ends may panic in the driver (mongodb 3.9.1 unwraps the reply of a pool task that the runtime has
/// cancelled).
pub(crate) const KILL_CURSORS_DELAY: Duration = Duration::from_millis(100);

/// Starts the task that keeps a handle of the client until the store has ended. If the app
/// [`handed in`](crate::mongo::MongoStoreBuilder::client) the client, the task also notices when the app shuts it
/// down, and makes the store release it.
pub(crate) fn watch_client(client: Client, is_handed_in: bool, tasks: &Tasks) {
    let watched = tasks.clone();
    tasks.spawn(async move {
        let closed = watched.closed();
        if is_handed_in {
            while closed.run_until_cancelled(sleep(CHECK_INTERVAL)).await.is_some() {
                if is_shutting_down(&client) {
                    watched.client_closed().cancel();
                    return;
                }
            }
        }
        closed.cancelled().await;
        if !watched.is_shut_down() {
            sleep(KILL_CURSORS_DELAY).await;
        }
        drop(client);
    });
}

/// The most connections that the client opens to one server; `None` if that is unknown.
pub(crate) fn pool_size(client: &Client) -> Option<u32> {
    pool_size_in(&debug_text(client))
}

/// Whether the app has called `Client::shutdown`. The call may still wait.
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
    // `Client::shutdown` begins by closing the tracker of what it waits for.
    let tracker = shown.split_once(" pending_drops: ").map(|(_, tracker)| tracker);
    let state = tracker.and_then(|tracker| tracker.split_once(" is_closed: "));
    state.is_some_and(|(_, state)| state.starts_with("true"))
}

/// The `Debug` output of the client, without quoted texts: one of them, such as the app's name, could look like a
/// field. The output stays in this file. The driver leaves passwords out of it.
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
    async fn the_pool_size_is_read_from_the_debug_output() {
        for (given, expected) in [(None, 10), (Some(1), 1), (Some(250), 250)] {
            for name in ["app", r#", max_pool_size: Some(7), ""#, r#"\", max_pool_size: Some(7)"#] {
                assert_eq!(pool_size(&client(given, name)), Some(expected), "{given:?} {name}");
            }
        }
    }

    #[tokio::test]
    async fn a_shutdown_is_noticed_while_it_waits_for_a_session_and_after_it() {
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
    fn an_unknown_debug_output_gives_no_state() {
        let texts = ["", "Client { .. }", " max_pool_size", " max_pool_size: Some(many)"];
        for shown in texts.into_iter().chain([" pending_drops: Many", " is_closed: true"]) {
            assert_eq!(pool_size_in(shown), None, "{shown}");
            assert!(!is_shutting_down_in(shown), "{shown}");
        }
    }

    #[tokio::test]
    async fn the_debug_output_has_no_password() {
        let uri = "mongodb://ferris:s3cret-0f-mine@localhost:1/app";
        let client = Client::with_uri_str(uri).await.unwrap();
        assert!(!format!("{client:?}").contains("s3cret-0f-mine"));
    }
}
