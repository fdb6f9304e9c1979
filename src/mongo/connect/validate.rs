//! The checks of `build` that need no server: the runtime, the limits, and the read and write concerns.

use std::net::Ipv4Addr;
use std::time::Duration;

use bson::Document;
use mongodb::Collection;
use mongodb::options::{
    Acknowledgment, CollectionOptions, ReadConcern, SelectionCriteria, WriteConcern,
};
use tokio::runtime::Handle;

use crate::batching::BatchLimits;
use crate::error::{Error, Result};

/// How many read commands, and how many save commands, may run at a time by default.
const DEFAULT_COMMANDS_IN_FLIGHT: u32 = 4;
/// How many loads, and how many saves, may run or be queued by default.
const DEFAULT_QUEUED_CALLS: u32 = 10_000;

pub(crate) fn limits(commands: Option<u32>, calls: Option<u32>) -> Result<BatchLimits> {
    let commands = commands.unwrap_or(DEFAULT_COMMANDS_IN_FLIGHT);
    let calls = calls.unwrap_or(DEFAULT_QUEUED_CALLS);
    for (option, value) in [("max_commands_in_flight", commands), ("max_queued_calls", calls)] {
        if value == 0 {
            return Err(Error::config(format!(
                "`{option}` is zero, which lets no call through: give at least 1"
            )));
        }
    }
    let number = |value| usize::try_from(value).unwrap_or(usize::MAX);
    Ok(BatchLimits::of(number(commands), number(calls)))
}

/// Returns the runtime that calls will run on, after checking that it has what the driver needs. A runtime without a
/// timer or without I/O panics at their first use, so the check uses both in a task.
pub(crate) async fn runtime() -> Result<Handle> {
    let runtime = Handle::try_current().map_err(|_| {
        Error::config(
            "a session store is built inside of a tokio runtime: call build().await from \
             #[tokio::main], or enter a runtime first",
        )
    })?;
    let probe = runtime.spawn(async {
        tokio::time::sleep(Duration::ZERO).await;
        // Only the panic matters, not whether the system gives a socket.
        let _ = tokio::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await;
    });
    match probe.await {
        Ok(()) => Ok(runtime),
        Err(error) if error.is_panic() => Err(Error::config(
            "the tokio runtime has no timer or no I/O, and a session store needs both: call \
             enable_all() on the tokio::runtime::Builder",
        )),
        Err(_) => Err(Error::closed()),
    }
}

/// Returns the collection with the concerns of the store: a read must include what was acknowledged, and a write must
/// be acknowledged.
pub(crate) fn with_concerns(documents: &Collection<Document>) -> Result<Collection<Document>> {
    let majority = || WriteConcern::builder().w(Acknowledgment::Majority).build();
    let mut writes = documents.write_concern().cloned().unwrap_or_else(majority);
    if writes.w.is_none() {
        writes.w = Some(Acknowledgment::Majority);
    }
    if writes.w == Some(Acknowledgment::Nodes(0)) {
        return Err(Error::config(
            "write concern w=0 does not tell whether a session was stored: take w=majority, or \
             leave it out",
        ));
    }
    let options = CollectionOptions::builder()
        .selection_criteria(SelectionCriteria::ReadPreference(
            mongodb::options::ReadPreference::Primary,
        ))
        .read_concern(ReadConcern::majority())
        .write_concern(writes)
        .build();
    let namespace = documents.namespace();
    let database = documents.client().database(&namespace.db);
    Ok(database.collection_with_options(&namespace.coll, options))
}
