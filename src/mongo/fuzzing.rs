//! The properties that the fuzzer checks for any document in the collection, any event of a change stream and any
//! connection string.
#![allow(
    clippy::missing_panics_doc,
    clippy::unwrap_used,
    reason = "a panic is what a fuzzer looks for"
)]

use std::pin::pin;
use std::task::{Context, Poll, Waker};

use bson::{Document, RawDocument};
use mongodb::options::ClientOptions;

use crate::error::ErrorKind;
use crate::mongo::change_stream::cursor;
use crate::mongo::change_stream::events;
use crate::mongo::change_stream::reader;
pub(crate) use crate::mongo::codec::fuzzing::comes_back;
#[cfg(feature = "encryption")]
pub use crate::mongo::codec::fuzzing::envelope;
use crate::mongo::codec::fuzzing::formats;
pub use crate::mongo::codec::fuzzing::{native, text};
use crate::mongo::connect::uri;
use crate::mongo::schema;

/// Reads a stored document, whatever types its fields have.
pub fn document(bytes: &[u8]) {
    let Ok(raw) = RawDocument::from_bytes(bytes) else { return };
    for format in formats() {
        let session = schema::session(raw, &format);
        let listed = schema::live_session(raw, &format);
        if let Ok(session) = &session {
            comes_back(&session.data);
        }
        // A list reads more of a document than a load.
        assert!(session.is_ok() || listed.is_err());
        for error in [session.err(), listed.err()].into_iter().flatten() {
            assert_eq!(error.kind(), ErrorKind::Decode);
        }
    }
    #[cfg(feature = "encryption")]
    let _ = schema::stored_data(raw);
    #[cfg(feature = "import")]
    let _ = crate::mongo::ops::import::ImportSteps::claim_on(raw).is_some();
    let now = crate::time::WallTime::from_millis(0);
    let _ = (schema::key(raw), schema::rev(raw), schema::is_live(raw, now));
}

/// Reads an event of a change stream, and a reply with several events.
pub fn report(bytes: &[u8]) {
    let Ok(raw) = RawDocument::from_bytes(bytes) else { return };
    let Ok(event) = Document::try_from(raw) else { return };
    read_event(&event);
    let _ = reader::time_in(&event);
    for batch in ["firstBatch", "nextBatch"] {
        let Some((_, handed)) = cursor::parse_reply(event.clone(), batch) else { continue };
        handed.events.iter().for_each(read_event);
        let _ = handed.after.as_ref().map(reader::time_in);
    }
}

/// The stream of events and that of invalidations take the same documents for sessions.
fn read_event(event: &Document) {
    if let Some(found) = events::session_change(event) {
        assert_eq!(reader::change(event).map(|change| change.key), Some(found.key));
    }
}

/// Reads a connection string. If it has a password, no error has it.
pub fn uri(bytes: &[u8]) {
    const PASSWORD: &str = "hunter2";

    let Ok(uri) = std::str::from_utf8(bytes) else { return };
    let _ = (uri::has_option(uri, "w"), uri::has_option(uri, "authmechanism"));
    let mut errors = Vec::new();
    errors.extend(uri::valid_database(uri).err());
    errors.extend(uri::valid_collection(uri).err());
    match uri::split_collection(uri) {
        // For these, the driver would ask a name server.
        Ok((uri, _)) if uri.to_ascii_lowercase().contains("mongodb+srv:") => {}
        Ok((uri, collection)) => {
            assert!(collection.as_ref().is_none_or(|name| !name.contains('/')));
            let parsed = mongodb::options::ConnectionString::parse(&uri);
            errors.extend(parsed.ok().and_then(|uri| uri::check_hosts(&uri).err()));
            if let Some(Err(error)) = at_once(ClientOptions::parse(&uri).into_future()) {
                errors.push(uri::unusable(&uri, &error));
            }
        }
        Err(error) => errors.push(error),
    }
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(!error.to_string().contains(PASSWORD) && !format!("{error:?}").contains(PASSWORD));
    }
}

/// Calls `write` for each format of this data, with the fuzz target, the name of the format and the stored bytes.
#[cfg(all(test, feature = "encryption"))]
pub(crate) fn seeds(data: &crate::session::Data, write: impl Fn(&str, &str, &[u8])) {
    use bson::Bson;

    use crate::session::id::SessionKey;
    use crate::session::revision::RevSource;
    use crate::time::WallTime;

    let key = SessionKey::from_bytes(&crate::mongo::codec::fuzzing::ID).unwrap();
    let at = WallTime::from_millis(1);
    for (format, name) in formats().iter().zip(["-text", "-native", "-encrypted"]) {
        let rev = RevSource::new().next();
        let Ok(mut stored) = schema::insert_document(key, rev, (data, format), at, at) else {
            continue;
        };
        stored.insert("owner", "7");
        write("document", name, &stored.to_vec().unwrap());
        match stored.remove("data").unwrap() {
            Bson::String(text) => write("text", "", text.as_bytes()),
            Bson::Document(document) => write("native", "", &document.to_vec().unwrap()),
            Bson::Binary(envelope) => write("envelope", "", &envelope.bytes),
            other => panic!("data is stored as {other:?}"),
        }
    }
}

/// The output of a future that is ready at the first poll.
fn at_once<F: Future>(future: F) -> Option<F::Output> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => Some(output),
        Poll::Pending => None,
    }
}
