//! How a process ends in which a store lives: without a word.

use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use tower_sessions_moka_mongodb_store::{CachedMongoStore, MongoStore};

use crate::common::{create, uri};

const CHILD: &str = "SESSION_STORE_PROCESS_END_CHILD";
/// Runtimes that end in one process. What went wrong here once did so in 5 of 320.
const ENDS: usize = 60;

/// A runtime that ends with a store in it, as that of a `main` does which returns.
#[test]
fn a_runtime_that_ends_with_its_stores_causes_no_panic() {
    for role in ["dropped before", "dropped with it", "stream given up before"] {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "process_end::in_a_process_of_its_own", "--nocapture"]);
        child.env(CHILD, role).env("SESSION_STORE_PROCESS_END_URI", uri());
        let output = child.output().unwrap();
        let all = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(output.status.success(), "{role}: {all}");
        let (_, said) = all.split_once("panics: ").expect("the child has counted them");
        assert_eq!(said.lines().next(), Some("0"), "{role}: {all}");
    }
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
        // More workers than processors: one may stand still at any point while the others end.
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
