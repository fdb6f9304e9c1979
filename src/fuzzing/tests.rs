//! Replays the corpus of the fuzz targets.

#[cfg(all(feature = "encryption", feature = "import"))]
mod seeds;

use std::path::PathBuf;

use crate::fuzzing::*;
use crate::session::samples::{bomb, hollow, hostile, nested, on_a_small_stack};

type Target = (&'static str, fn(&[u8]));

const TARGETS: &[Target] = &[
    ("compact", compact),
    ("document", document),
    #[cfg(feature = "encryption")]
    ("envelope", envelope),
    #[cfg(feature = "import")]
    ("import", import),
    ("native", native),
    ("report", report),
    ("text", text),
    ("uri", uri),
];

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

#[test]
fn the_corpus_breaks_no_rule() {
    for (name, target) in TARGETS {
        let mut files = 0;
        for file in std::fs::read_dir(folder().join("corpus").join(name)).unwrap() {
            let path = file.unwrap().path();
            let bytes = std::fs::read(&path).unwrap();
            // The thread is named after the file: a panic or a stack overflow prints the name.
            on_a_small_stack(&path.display().to_string(), || target(&bytes));
            files += 1;
        }
        assert!(files > 10, "{name}: {files}");
    }
}

#[test]
fn data_that_serde_json_misreads_comes_back_from_every_form() {
    on_a_small_stack("every form", || {
        let deepest = [nested, hollow].map(|of| of(crate::session::MAX_DEPTH));
        for data in hostile().iter().chain(&[bomb(5), bomb(20)]).chain(&deepest) {
            comes_back(data);
        }
    });
}
