//! The corpus: checks that it is complete, and writes its first files.

use std::collections::BTreeSet;
use std::path::PathBuf;

use bson::{RawBson, doc};
use serde_json::json;

use crate::fuzzing::tests::{TARGETS, folder};
use crate::session::Data;
use crate::session::samples::{bomb, hollow, hostile, nested};

/// The names of the files in a folder, without their extensions.
fn names(folder: PathBuf) -> BTreeSet<String> {
    let files = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path());
    files.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect()
}

#[test]
fn each_target_has_a_program_and_a_corpus() {
    let targets: BTreeSet<_> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(names(folder().join("fuzz_targets")), targets);
    assert_eq!(names(folder().join("corpus")), targets);
}

/// Writes the first files of the corpus. The fuzzer has found the other ones.
#[test]
#[ignore = "writes into fuzz/corpus: run it only to change the seeds"]
fn write_the_seeds() {
    let write = |target: &str, name: &str, bytes: &[u8]| {
        let folder = folder().join("corpus").join(target);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(name), bytes).unwrap();
    };
    let mut samples: Vec<Data> = hostile().into_iter().step_by(11).collect();
    samples.extend([bomb(1), bomb(5), nested(97), hollow(98)]);
    samples.push(Data::from([
        (
            "user".to_owned(),
            json!({ "name": "Zoë \u{0}\u{1F980}", "admin": false, "tags": ["a", null, []] }),
        ),
        ("$set.%2E".to_owned(), json!([u64::MAX, i64::MIN, -0.0, 1.5, 64, -1])),
    ]));
    for (nth, data) in samples.iter().enumerate() {
        let name = format!("seed-{nth:03}");
        crate::mongo::fuzzing::seeds(data, |target, form, bytes| {
            write(target, &format!("{name}{form}"), bytes);
        });
        if let Some(compact) = crate::cache::compact::encode(data) {
            write("compact", &name, compact.as_bytes());
        }
        let record = (crate::import::fuzzing::NUMBER, data, json!([2026, 1, 0, 0, 0, 0, 0, 0, 0]));
        write("import", &name, &rmp_serde::to_vec(&record).unwrap());
    }
    for levels in [98, 99, 1_000] {
        let name = format!("seed-deep-{levels}");
        write(
            "text",
            &name,
            format!("{{\"a\":{}{}}}", "[".repeat(levels), "]".repeat(levels)).as_bytes(),
        );
        write(
            "import",
            &name,
            &[&[0x93, 7, 0x81, 0xa1, b'a'][..], &vec![0x91; levels], &[0xc0, 0xc0]].concat(),
        );
        write("compact", &name, format!("\u{1}!a{}\0", "\u{b}".repeat(levels)).as_bytes());
        let deep = (0..levels).fold(RawBson::Int32(1), |inner, _| {
            let mut document = bson::RawDocumentBuf::new();
            document.append(bson::cstr!("k"), inner);
            RawBson::Document(document)
        });
        write("native", &name, deep.as_document().unwrap().as_bytes());
    }
    for (nth, uri) in URIS.iter().enumerate() {
        write("uri", &format!("seed-{nth:03}"), uri.as_bytes());
    }
    let key = bson::Binary { subtype: bson::spec::BinarySubtype::Generic, bytes: vec![7; 32] };
    let rev = bson::Binary { subtype: bson::spec::BinarySubtype::Generic, bytes: vec![7; 16] };
    let at = bson::Timestamp { time: 1, increment: 1 };
    let date = bson::DateTime::from_millis(1);
    let token = doc! { "_data": "82680000000000000129" };
    let mut events = Vec::new();
    for op in ["insert", "update", "replace", "delete", "drop", "invalidate"] {
        for (changed, removed) in [
            (vec!["expires", "updated"], vec![]),
            (vec!["data", "reencrypted"], vec![]),
            (vec!["rev"], vec!["importing"]),
        ] {
            events.push(doc! {
                "_id": token.clone(), "op": op, "key": key.clone(), "at": at, "rev": rev.clone(), "expires": date,
                "removed": removed, "cut": [], "changed": changed, "ends": false,
            });
        }
    }
    let reply = doc! { "cursor": { "id": 1_i64, "nextBatch": events.clone(), "postBatchResumeToken": token }, "ok": 1.0 };
    for (nth, event) in events.iter().chain([&reply]).enumerate() {
        write("report", &format!("seed-{nth:03}"), &event.to_vec().unwrap());
    }
}

const URIS: &[&str] = &[
    "mongodb://localhost/app",
    "mongodb://localhost/app/sessions",
    "mongodb://user:hunter2@localhost:27017,[::1]:1/app?replicaSet=rs0&w=majority&authSource=admin",
    "mongodb://user:hunter2@localhost/a%20b/%c3%bc?authMechanism=SCRAM-SHA-256&readPreferenceTags=dc:ny",
    "mongodb+srv://user:hunter2@cluster.example/app?retryWrites=true",
    "mongodb://admin:hunter2SECRET/app",
    "mongodb://user:7712?hunter2=x&hunter2@127.0.0.1:1/app",
    "mongodb://user:hunter%2@127.0.0.1:1/app",
    "mongodb://h/a/%zz",
    "mongodb://h/a?&w=1&&journal=x",
    "mongodb://h/a?authMechanismProperties=AWS_SESSION_TOKEN:abc,hunter2",
    "mongodb://%2Ftmp%2Fmongodb.sock/app?directConnection=true",
    "mongodb://h1,mongodb://h2/app",
    "hunter2://localhost",
    "",
];
