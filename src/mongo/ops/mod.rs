//! The operations on the collection, grouped by what they do.

pub(crate) mod batch;
mod count;
pub(crate) mod delete;
#[cfg(feature = "import")]
pub(crate) mod import;
pub(crate) mod list;
pub(crate) mod owner;
pub(crate) mod query;
pub(crate) mod read_write;
pub(crate) mod scan;
pub(crate) mod session_limit;
