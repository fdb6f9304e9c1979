//! The stored field `owner`: the app's function that derives it from the data, and what an update does to it.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use bson::{Document, doc};

use crate::error::{Error, ErrorKind, Result};
use crate::session::Data;
use crate::session::owner::Owner;

/// The app's function that derives a session's owner from its data.
#[derive(Clone)]
pub(crate) struct OwnerFn(pub(crate) Arc<Derive>);

pub(crate) type Derive = dyn Fn(&Data) -> Option<Owner> + Send + Sync;

impl OwnerFn {
    /// # Errors
    ///
    /// [`Panic`](ErrorKind::Panic) if the app's function panics.
    pub(crate) fn derive(&self, data: &Data) -> Result<Option<Owner>> {
        catch_unwind(AssertUnwindSafe(|| (self.0)(data))).map_err(|_| panicked("a session"))
    }
}

/// The error of an `owner` function that panicked on the data of `what`.
pub(crate) fn panicked(what: &str) -> Error {
    Error::new(
        ErrorKind::Panic,
        format!(
            "the `owner` function panicked on the data of {what}: make it return None for data \
             that it does not expect. The app's panic hook has the panic's message"
        ),
    )
}

impl fmt::Debug for OwnerFn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OwnerFn(..)")
    }
}

/// What an update does to the stored owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OwnerUpdate {
    /// The update stores the owner that is among its fields. If it has none, the stored owner stays.
    Set,
    /// The session has no owner any longer.
    Clear,
}

/// Matches the sessions of an owner.
pub(crate) fn owned_by(owner: &Owner) -> Document {
    doc! { "owner": owner.as_str() }
}
