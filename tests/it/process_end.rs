//! A process that has a store ends without a panic or a message.
//!
//! The driver panics if the runtime ends while it runs a command. So a dropped store sends nothing
//! at once: a process that drops its stores often ends right after that.

use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mongodb::Client;
use mongodb::event::EventHandler;
use mongodb::event::command::CommandEvent;
use mongodb::options::ClientOptions;
use tower_sessions::SessionStore;
use tower_sessions_moka_mongodb_store::{CachedMongoStore, MongoStore, mongodb};

use crate::common::{cache_of, create, eventually, uri};

/// The commands that a client has sent, and the time of each one.
type Sent = Arc<Mutex<Vec<(String, Instant)>>>;

async fn client(sent: &Sent) -> Client {
    let mut options = ClientOptions::parse(uri()).await.unwrap();
    let sent = Arc::clone(sent);
    options.command_event_handler = Some(EventHandler::callback(move |event| {
        if let CommandEvent::Started(event) = event {
            sent.lock().unwrap().push((event.command_name, Instant::now()));
        }
    }));
    Client::with_options(options).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropped_store_closes_its_cursors_after_a_pause() {
    let sent = Sent::default();
    let mongo = MongoStore::builder().client(client(&sent).await).build().await.unwrap();
    let store = cache_of(&mongo).await;
    let record = create(&store).await;
    mongo.load(&record.id).await.unwrap();
    let dropped = Instant::now();
    drop((store, mongo));
    for name in ["killCursors", "endSessions"] {
        let when = || {
            let sent = sent.lock().unwrap();
            sent.iter().find(|(command, _)| command == name).map(|(_, when)| *when)
        };
        eventually(name, async || when().is_some()).await;
        let after = when().unwrap().duration_since(dropped);
        assert!(after >= Duration::from_millis(100), "{name} was sent {after:?} after the drop");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shutdown_closes_the_cursor_before_it_returns() {
    let sent = Sent::default();
    let mongo = MongoStore::builder().client(client(&sent).await).build().await.unwrap();
    let store = cache_of(&mongo).await;
    store.shutdown().await;
    let kills = sent.lock().unwrap().iter().filter(|(name, _)| name == "killCursors").count();
    assert_eq!(kills, 1);
}

const CHILD: &str = "SESSION_STORE_PROCESS_END_CHILD";
/// The number of runtimes that end in one process.
const ENDS: usize = 60;

/// Ends many runtimes under their stores. Run it by hand: a worker that pauses in the middle of a
/// command still panics, and no store can rule that out while a change stream sends a command.
#[test]
#[ignore = "counts what happens now and then"]
fn runtime_that_ends_under_its_store_rarely_panics() {
    let mut panics = 0;
    for role in ["dropped before", "dropped with it", "stream given up before"] {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "process_end::in_a_process_of_its_own", "--nocapture"]);
        child.env(CHILD, role).env("SESSION_STORE_PROCESS_END_URI", uri());
        let output = child.output().unwrap();
        assert!(output.status.success(), "{role}: {output:?}");
        let said = String::from_utf8_lossy(&output.stdout);
        let (_, said) = said.split_once("panics: ").expect("the child has counted them");
        println!("{role}: {}", said.lines().next().unwrap());
        panics += said.lines().next().unwrap().parse::<usize>().unwrap();
    }
    assert!(panics <= 1, "{panics} in {} ends", 3 * ENDS);
}

#[test]
fn in_a_process_of_its_own() {
    static PANICS: AtomicUsize = AtomicUsize::new(0);

    let Ok(role) = std::env::var(CHILD) else { return };
    let uri = std::env::var("SESSION_STORE_PROCESS_END_URI").unwrap();
    let shown = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        PANICS.fetch_add(1, Ordering::SeqCst);
        shown(panic);
    }));
    for _ in 0..ENDS {
        // More workers than processors, so that one may pause at any point while the others end.
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(8).enable_all().build().unwrap();
        let lives = runtime.block_on(async {
            let mongo = MongoStore::connect(&uri).await.unwrap();
            let store = CachedMongoStore::builder(mongo.clone()).build().await.unwrap();
            let events = store.events().await.unwrap();
            create(&store).await;
            match &*role {
                "dropped before" => None,
                "dropped with it" => Some((Some(store), mongo, events)),
                _ => {
                    drop(store);
                    Some((None, mongo, events))
                }
            }
        });
        drop(runtime);
        drop(lives);
    }
    println!("panics: {}", PANICS.load(Ordering::SeqCst));
}
