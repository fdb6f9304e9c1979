//! What operators ask of the stored documents, and end by it.

use bson::{Bson, Document, doc};

use super::codec::{self, Form};
use super::listing::Listing;
use super::{LiveSessions, MongoStore, Removal, Sessions};
use crate::error::{Error, Result};
use crate::trace;

/// The path of a key of the data, for a filter: the keys from the outermost one on, escaped as they
/// are stored.
///
/// ```
/// use tower_sessions_moka_mongodb_store::data_path;
///
/// assert_eq!(data_path(&["cart", "total"]), "data.cart.total");
/// assert_eq!(data_path(&["axum-login.data", "user_id"]), "data.axum-login%2Edata.user_id");
/// ```
///
/// The data is stored in such a form by a store that is
/// [`queryable`](crate::MongoStoreBuilder::queryable).
#[must_use]
pub fn data_path(keys: &[impl AsRef<str>]) -> String {
    let mut path = "data".to_owned();
    for key in keys {
        path.push('.');
        path.push_str(&codec::escape(key.as_ref()));
    }
    path
}

impl MongoStore {
    /// A stream of the live sessions whose stored document a filter finds, in no particular order;
    /// else as [`all`](Self::all). The filter is MongoDB's, over the fields of
    /// [`StoredSession`](crate::StoredSession); [`data_path`] writes the path of a key of the data.
    ///
    /// Only a store that is [`queryable`](crate::MongoStoreBuilder::queryable) stores data in a form
    /// that a filter can look into; of another one, the only item is a
    /// [`Config`](crate::ErrorKind::Config) error if the filter asks for `data`. A session
    /// that was stored before the store was queryable is not found by its data until it changes.
    ///
    /// ```no_run
    /// use futures::TryStreamExt;
    /// use tower_sessions_moka_mongodb_store::mongodb::bson::doc;
    /// use tower_sessions_moka_mongodb_store::{MongoStore, Result, data_path};
    ///
    /// # async fn run() -> Result<()> {
    /// let store = MongoStore::builder().queryable(true).build().await?;
    /// let large = store.find(doc! { data_path(&["cart", "total"]): { "$gt": 1_000 } });
    /// println!("{} carts", large.try_fold(0, async |sum, _| Ok(sum + 1)).await?);
    /// # Ok(())
    /// # }
    /// ```
    pub fn find(&self, filter: Document) -> LiveSessions {
        let sessions = &self.inner.sessions;
        let filter = match sessions.can_answer(filter) {
            Ok(filter) => filter,
            Err(error) => return LiveSessions::failed(error),
        };
        let wanted = (!filter.is_empty()).then_some(filter);
        sessions.list(&self.inner.tasks, Listing { wanted, order: None })
    }

    /// Ends the live sessions whose stored document a filter finds, and answers with how many those
    /// were. The filter is as in [`find`](Self::find), and must not be empty.
    ///
    /// A session is removed only if the filter still finds it then. One that the filter comes to find
    /// while the call goes on may stay. Works in pages of 1,000 sessions, each under the operation
    /// timeout.
    ///
    /// # Errors
    ///
    /// [`Config`](crate::ErrorKind::Config) for an empty filter, and for one that asks for
    /// `data` in a store that is not queryable; else as [`length`](Self::length), what the server says
    /// of a malformed filter included. Some sessions may have been ended by then.
    ///
    /// # Cancel safety
    ///
    /// Once begun it goes on to its end though the future is dropped.
    pub async fn delete_where(&self, filter: Document) -> Result<u64> {
        let removal = self.inner.sessions.those_of(filter);
        trace::verb!("session_store.delete_where", self.remove(removal))
    }
}

impl Sessions {
    pub(crate) fn those_of(&self, filter: Document) -> Result<Removal> {
        if filter.is_empty() {
            return Err(Error::config(
                "an empty filter finds every session: to end all of them call `clear`",
            ));
        }
        let filter = self.can_answer(filter)?;
        Ok(Removal { filter, kept: None, live_alone: true })
    }

    /// The filter, if MongoDB can see what it asks for. By their data only those are found that it can
    /// look into: of the others, from before the store was queryable, it would find all by what they
    /// have *not*.
    fn can_answer(&self, filter: Document) -> Result<Document> {
        if !names_data(&filter) {
            return Ok(filter);
        }
        if matches!(self.form, Form::Native) {
            return Ok(both(filter, doc! { "data": { "$type": "object" } }));
        }
        Err(Error::config(
            "the filter asks for `data`, and this store keeps data as a text, or \
             encrypted, so that MongoDB sees no keys: build it with MongoStoreBuilder::queryable(true)",
        ))
    }
}

/// A filter that finds what both find: side by side where that can be said, since not every server
/// looks into an `$and` for what it has an index on.
pub(super) fn both(mut one: Document, other: Document) -> Document {
    if other.keys().any(|key| one.contains_key(key)) {
        return doc! { "$and": [one, other] };
    }
    one.extend(other);
    one
}

/// Whether a filter asks for `data`, or a path below it.
fn names_data(filter: &Document) -> bool {
    filter.iter().any(|(key, value)| match (key.as_str(), value) {
        ("$and" | "$or" | "$nor", Bson::Array(filters)) => {
            filters.iter().any(|filter| filter.as_document().is_some_and(names_data))
        }
        ("$expr", expression) => reads_data(expression),
        (path, _) => path == "data" || path.starts_with("data."),
    })
}

/// Whether an aggregation expression reads a path below `data`.
fn reads_data(expression: &Bson) -> bool {
    match expression {
        Bson::String(text) => {
            let path = text.strip_prefix("$$ROOT.").or_else(|| text.strip_prefix("$$CURRENT."));
            path.or_else(|| text.strip_prefix('$')).is_some_and(|path| path.starts_with("data."))
        }
        Bson::Array(items) => items.iter().any(reads_data),
        Bson::Document(document) => {
            document.iter().any(|(key, value)| key != "$literal" && reads_data(value))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_below_the_data_is_seen_wherever_it_stands() {
        for filter in [
            doc! { "data.a": 1 },
            doc! { "owner": "x", "data.a.b": { "$gt": 1 } },
            doc! { "data.a": { "$not": { "$gt": 1 } } },
            doc! { "$or": [{ "owner": "x" }, { "$and": [{ "data.a": 1 }] }] },
            doc! { "$nor": [{ "data.a": 1 }] },
            doc! { "$expr": { "$gt": ["$data.a", 1] } },
            doc! { "$and": [{ "$expr": { "$not": [{ "$eq": [1, "$$ROOT.data.a"] }] } }] },
            doc! { "$expr": { "$let": { "vars": { "a": "$$CURRENT.data.a" }, "in": "$$a" } } },
        ] {
            assert!(names_data(&filter), "{filter}");
        }
        for filter in [
            doc! {},
            doc! { "owner": "data.a", "database": 1 },
            doc! { "$expr": { "$eq": ["$owner", { "$literal": "$data.a" }] } },
            doc! { "$expr": { "$eq": ["data.a", "$created"] } },
            doc! { "$comment": "$data.a", "$where": "this.data.a" },
        ] {
            assert!(!names_data(&filter), "{filter}");
        }
    }

    #[test]
    fn of_two_filters_none_covers_the_other() {
        let (a, b) = (doc! { "a": 1 }, doc! { "b": 2 });
        assert_eq!(both(a.clone(), b), doc! { "a": 1, "b": 2 });
        let other = doc! { "a": 2, "b": 2 };
        assert_eq!(both(a.clone(), other.clone()), doc! { "$and": [a, other] });
    }

    #[test]
    fn a_path_has_keys_as_they_are_stored() {
        assert_eq!(data_path(&["cart", "total"]), "data.cart.total");
        assert_eq!(data_path(&["a.b".to_owned(), "$c%".to_owned()]), "data.a%2Eb.%24c%25");
        assert_eq!(data_path(&[""; 0]), "data");
    }
}
