//! What operators ask of the stored documents, and end by it.

use bson::{Bson, Document, doc};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::mongo::codec::{self, DataFormat};
use crate::mongo::collection::SessionCollection;
use crate::mongo::filter::{finds_everything, guarded};
use crate::mongo::ops::list::ListQuery;
use crate::mongo::{DeleteSelection, LiveSessions, MongoStore};
use crate::session::owner::Owner;
use crate::telemetry::spans;

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

/// A filter of the sessions whose data has this value under a key: the keys from the outermost one on, as
/// for [`data_path`]. For values that come from a request, or from anywhere else.
///
/// An attacker who sends a JSON object where a text is expected must not choose the comparison. A handler
/// that ends "the sessions with this device" by `doc! { "data.device": device }`, with a `device` that was
/// parsed from `{"device": {"$ne": ""}}`, ends all sessions of all users (the
/// [NoSQL injection](https://owasp.org/www-project-web-security-testing-guide/stable/4-Web_Application_Security_Testing/07-Input_Validation_Testing/05.6-Testing_for_NoSQL_Injection)
/// of other languages). This compares with `$eq`, and writes the value as the store writes data, so that
/// `{"$ne": ""}` is found only where just that is stored.
///
/// ```
/// use serde_json::json;
/// use tower_sessions_moka_mongodb_store::mongodb::bson::doc;
/// use tower_sessions_moka_mongodb_store::{Result, data_equals};
///
/// # fn main() -> Result<()> {
/// let filter = data_equals(&["cart", "id"], "a")?;
/// assert_eq!(filter, doc! { "data.cart.id": { "$eq": "a" } });
/// let attack = data_equals(&["cart", "id"], json!({ "$ne": "" }))?;
/// assert_eq!(attack, doc! { "data.cart.id": { "$eq": { "%24ne": "" } } });
/// # Ok(())
/// # }
/// ```
///
/// `null` is found only where `null` is stored. As in every filter of MongoDB, a list is found by each
/// value in it too, and an object only if its keys stand in the same order: compare with texts, numbers
/// and booleans. To combine filters put them into a list: `doc! { "$and": [one, other] }`.
///
/// # Errors
///
/// [`Config`](crate::ErrorKind::Config) if there is no key, [`Encode`](crate::ErrorKind::Encode) if the
/// value is none that a session can have.
pub fn data_equals(keys: &[impl AsRef<str>], value: impl Into<Value>) -> Result<Document> {
    if keys.is_empty() {
        return Err(Error::config("a filter by the data needs a key to look under"));
    }
    let path = data_path(keys);
    Ok(match codec::encode_value(&value.into())? {
        // `$eq` would find the sessions that do not have the key at all.
        Bson::Null => doc! { path: { "$type": "null" } },
        value => doc! { path: { "$eq": value } },
    })
}

/// A filter of the sessions of an owner, to combine with others; see [`data_equals`]. All sessions of an
/// owner are ended by [`delete_by_owner`](MongoStore::delete_by_owner).
///
/// ```
/// use tower_sessions_moka_mongodb_store::mongodb::bson::doc;
/// use tower_sessions_moka_mongodb_store::owner_equals;
///
/// assert_eq!(owner_equals(7), doc! { "owner": { "$eq": "7" } });
/// ```
#[must_use]
pub fn owner_equals(owner: impl Into<Owner>) -> Document {
    doc! { "owner": { "$eq": owner.into().as_str() } }
}

impl MongoStore {
    /// A stream of the live sessions whose stored document a filter finds, in no particular order;
    /// else as [`all`](Self::all). The filter is MongoDB's, over the fields of
    /// [`StoredSession`](crate::StoredSession); [`data_path`] writes the path of a key of the data.
    ///
    /// Only a store that is [`queryable`](crate::MongoStoreBuilder::queryable) stores data in a form
    /// that a filter can look into; of another one, the only item is a
    /// [`Config`](crate::ErrorKind::Config) error if the filter asks for `data`. A session
    /// that was stored before the store was queryable is not found by its data until it changes, neither
    /// by what that has nor by what it does not have: a condition on its data is unknown, and a filter finds
    /// a session if the filter as a whole is true. So `$or` of an owner and of data finds it by its owner.
    ///
    /// The store sends only a filter of which it knows what it reads; any other is a `Config` error
    /// too. It may have:
    ///
    /// - Paths. Each path must be a field of [`StoredSession`](crate::StoredSession), `data`, or
    ///   begin with `data.`. `reencrypted` may be asked for too.
    /// - Around conditions: `$and`, `$or`, `$nor`, each with a list of filters, and neither the list nor a
    ///   filter in it may be empty; `$expr`, `$comment`. An `$expr` must read a field, and so must each part of the
    ///   outermost `$and`, `$or` and `$not` in it: else it is true of every session, or of none.
    /// - In a condition: `$bitsAllClear`, `$bitsAllSet`, `$bitsAnyClear`, `$bitsAnySet`, `$eq`,
    ///   `$exists`, `$gt`, `$gte`, `$in`, `$lt`, `$lte`, `$mod`, `$ne`, `$nin`, `$options`,
    ///   `$regex`, `$size`, `$type`; `$not`, `$all` and `$elemMatch` with conditions of these. In
    ///   `$elemMatch` also `$and`, `$or`, `$nor`, and the element's own fields.
    /// - In `$expr`, what reads its arguments alone: paths as above (`"$owner"`, `"$$ROOT.owner"`,
    ///   `"$$CURRENT.owner"`), `"$$NOW"`, variables of an expression's own, whose names begin with
    ///   a small letter, `$literal`, and the operators listed below. `$getField`, `$setField` and
    ///   `$unsetField` need an `input`. `"$$ROOT"` and `"$$CURRENT"` as a whole may not be used.
    ///
    /// [`collection`](Self::collection) asks MongoDB itself, by any filter.
    ///
    /// Some operators in `$expr` are an error of the server for a value of another type: `$size` of what is
    /// no list, arithmetic with a text. The store does not evaluate a condition on data that MongoDB cannot look into.
    /// For other data test the type in a `$cond`: `{"$cond": [{"$isArray": "$data.cart"}, …, false]}`. In an `$and` the
    /// test would not help, since MongoDB may evaluate the parts of an `$and` in any order.
    ///
    /// The operators in `$expr`: `$abs`, `$add`, `$allElementsTrue`, `$and`, `$anyElementTrue`,
    /// `$arrayElemAt`, `$arrayToObject`, `$avg`, `$binarySize`, `$bsonSize`, `$ceil`, `$cmp`,
    /// `$concat`, `$concatArrays`, `$cond`, `$convert`, `$dateAdd`, `$dateDiff`, `$dateFromParts`,
    /// `$dateFromString`, `$dateSubtract`, `$dateToParts`, `$dateToString`, `$dateTrunc`,
    /// `$dayOfMonth`, `$dayOfWeek`, `$dayOfYear`, `$divide`, `$eq`, `$exp`, `$filter`, `$first`,
    /// `$firstN`, `$floor`, `$gt`, `$gte`, `$hour`, `$ifNull`, `$in`, `$indexOfArray`,
    /// `$indexOfBytes`, `$indexOfCP`, `$isArray`, `$isNumber`, `$isoDayOfWeek`, `$isoWeek`,
    /// `$isoWeekYear`, `$last`, `$lastN`, `$let`, `$ln`, `$log`, `$log10`, `$lt`, `$lte`, `$ltrim`,
    /// `$map`, `$max`, `$maxN`, `$mergeObjects`, `$millisecond`, `$min`, `$minN`, `$minute`,
    /// `$mod`, `$month`, `$multiply`, `$ne`, `$not`, `$objectToArray`, `$or`, `$pow`, `$range`,
    /// `$reduce`, `$regexFind`, `$regexFindAll`, `$regexMatch`, `$replaceAll`, `$replaceOne`,
    /// `$reverseArray`, `$round`, `$rtrim`, `$second`, `$setDifference`, `$setEquals`,
    /// `$setIntersection`, `$setIsSubset`, `$setUnion`, `$size`, `$slice`, `$sortArray`, `$split`,
    /// `$sqrt`, `$strLenBytes`, `$strLenCP`, `$strcasecmp`, `$substrBytes`, `$substrCP`,
    /// `$subtract`, `$sum`, `$switch`, `$toBool`, `$toDate`, `$toDecimal`, `$toDouble`, `$toInt`,
    /// `$toLong`, `$toLower`, `$toObjectId`, `$toString`, `$toUpper`, `$trim`, `$trunc`, `$type`,
    /// `$week`, `$year`, `$zip`.
    ///
    /// **Values from a request** belong into [`data_equals`] or [`owner_equals`]: as a part of a filter,
    /// `{"$ne": ""}` is an operator.
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
        let sessions = &self.inner.collection;
        let filter = match sessions.guarded(filter) {
            Ok(filter) => filter,
            Err(error) => return LiveSessions::failed(error),
        };
        let wanted = (!filter.is_empty()).then_some(filter);
        sessions.list(&self.inner.tasks, ListQuery { wanted, order: None })
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
    /// [`Config`](crate::ErrorKind::Config) for an empty filter, for one that asks for `data` in a store
    /// that is not queryable, and for one that has what [`find`](Self::find) does not list. Else as
    /// [`length`](Self::length), what the server says of a malformed filter included. Some sessions may
    /// have been ended by then.
    ///
    /// # Cancel safety
    ///
    /// Once begun it goes on to its end though the future is dropped.
    pub async fn delete_where(&self, filter: Document) -> Result<u64> {
        let removal = self.inner.collection.filter_selection(filter);
        spans::verb!("session_store.delete_where", self.remove(removal))
    }
}

impl SessionCollection {
    pub(crate) fn filter_selection(&self, filter: Document) -> Result<DeleteSelection> {
        if finds_everything(&filter) {
            return Err(Error::config(
                "an empty filter finds every session: to end all of them call `clear`",
            ));
        }
        Ok(DeleteSelection { filter: self.guarded(filter)?, kept: None, live_alone: true })
    }

    fn guarded(&self, filter: Document) -> Result<Document> {
        guarded(filter, matches!(self.format, DataFormat::Native))
    }
}

/// A filter that finds what both find: side by side where that can be said, since not every server
/// looks into an `$and` for what it has an index on.
pub(crate) fn and(mut one: Document, other: Document) -> Document {
    if other.keys().any(|key| one.contains_key(key)) {
        return doc! { "$and": [one, other] };
    }
    one.extend(other);
    one
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_filters_none_covers_the_other() {
        let (a, b) = (doc! { "a": 1 }, doc! { "b": 2 });
        assert_eq!(and(a.clone(), b), doc! { "a": 1, "b": 2 });
        let other = doc! { "a": 2, "b": 2 };
        assert_eq!(and(a.clone(), other.clone()), doc! { "$and": [a, other] });
    }

    #[test]
    fn a_path_has_keys_as_they_are_stored() {
        assert_eq!(data_path(&["cart", "total"]), "data.cart.total");
        assert_eq!(data_path(&["a.b".to_owned(), "$c%".to_owned()]), "data.a%2Eb.%24c%25");
        assert_eq!(data_path(&[""; 0]), "data");
    }
}
