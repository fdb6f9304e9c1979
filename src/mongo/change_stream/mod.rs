//! The change streams of the sessions' collection: one for invalidations, one for events.

pub(crate) mod cursor;
pub(crate) mod events;
pub(crate) mod invalidations;
pub(crate) mod reader;
