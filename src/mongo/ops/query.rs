//! The operations by a filter of the caller: list the sessions that it matches, and end them.

use bson::{Bson, Document, doc};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::mongo::codec::{self, DataFormat};
use crate::mongo::collection::SessionCollection;
use crate::mongo::filter::{guarded, matches_everything};
use crate::mongo::ops::list::ListQuery;
use crate::mongo::{DeleteSelection, LiveSessions, MongoStore};
use crate::session::owner::Owner;
use crate::telemetry::spans;

/// Returns the path of a key of the data, for a filter. `keys` begins with the outermost key. Each is escaped as the
/// store escapes it.
///
/// ```
/// use tower_sessions_moka_mongodb_store::data_path;
///
/// assert_eq!(data_path(&["cart", "total"]), "data.cart.total");
/// assert_eq!(data_path(&["axum-login.data", "user_id"]), "data.axum-login%2Edata.user_id");
/// ```
///
/// Such a path exists only in a store that is [`queryable`](crate::MongoStoreBuilder::queryable).
#[must_use]
pub fn data_path(keys: &[impl AsRef<str>]) -> String {
    let mut path = "data".to_owned();
    for key in keys {
        path.push('.');
        path.push_str(&codec::escape(key.as_ref()));
    }
    path
}

/// Returns a filter that matches the sessions whose data has this value under a key. `keys` is as for [`data_path`].
/// Safe for values that come from a request.
///
/// A caller who sends a JSON object in place of a text must not choose the comparison. Suppose that a handler ends
/// "the sessions with this device" by `doc! { "data.device": device }`, and a request has
/// `{"device": {"$ne": ""}}`. Then the handler ends all sessions of all users. This is
/// [NoSQL injection](https://owasp.org/www-project-web-security-testing-guide/stable/4-Web_Application_Security_Testing/07-Input_Validation_Testing/05.6-Testing_for_NoSQL_Injection).
/// `data_equals` compares with `$eq`, and writes the value as the store writes data. So `{"$ne": ""}` matches only a
/// session that has exactly this object.
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
/// `null` matches only a stored `null`. As in every filter of MongoDB, each value in a list matches the list, and an
/// object matches only if its keys have the same order. So compare with texts, numbers and booleans. To combine
/// filters, put them into a list: `doc! { "$and": [one, other] }`.
///
/// # Errors
///
/// [`Config`](crate::ErrorKind::Config) if `keys` is empty; [`Encode`](crate::ErrorKind::Encode) if a session cannot
/// have this value.
pub fn data_equals(keys: &[impl AsRef<str>], value: impl Into<Value>) -> Result<Document> {
    if keys.is_empty() {
        return Err(Error::config("a filter by the data needs a key to look under"));
    }
    let path = data_path(keys);
    Ok(match codec::encode_value(&value.into())? {
        // `$eq` with null would match the sessions that do not have the key at all.
        Bson::Null => doc! { path: { "$type": "null" } },
        value => doc! { path: { "$eq": value } },
    })
}

/// Returns a filter that matches the sessions of an owner, to combine with others; see [`data_equals`]. To end all
/// sessions of an owner, call [`delete_by_owner`](MongoStore::delete_by_owner).
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
    /// Returns a stream of the live sessions that match a filter, in no particular order. Otherwise as
    /// [`all`](Self::all). The filter is a MongoDB filter over the fields of
    /// [`StoredSession`](crate::StoredSession). [`data_path`] returns the path of a key of the data.
    ///
    /// A filter can read `data` only in a store that is [`queryable`](crate::MongoStoreBuilder::queryable). In any
    /// other store, such a filter gives a single item: a [`Config`](crate::ErrorKind::Config) error.
    ///
    /// A session may have been stored before the store was queryable. Until it changes, a condition on its data is
    /// unknown: neither true nor false. A filter matches a session if the filter as a whole is true. So
    /// `data.role != "admin"` alone does not match the session, but an `$or` with its owner does.
    ///
    /// The store sends a filter only if it knows what the filter reads. Any other filter is a `Config` error too. A
    /// filter may have:
    ///
    /// - Paths. Each path must be a field of [`StoredSession`](crate::StoredSession), `reencrypted`, `data`, or begin
    ///   with `data.`.
    /// - Around conditions: `$and`, `$or` and `$nor`, each with a list of filters; `$expr`; `$comment`. Neither the
    ///   list nor a filter in it may be empty. An `$expr` must read a field, and so must each part of the outermost
    ///   `$and`, `$or` and `$not` in it: otherwise it is true for every session, or for none.
    /// - In a condition: `$bitsAllClear`, `$bitsAllSet`, `$bitsAnyClear`, `$bitsAnySet`, `$eq`,
    ///   `$exists`, `$gt`, `$gte`, `$in`, `$lt`, `$lte`, `$mod`, `$ne`, `$nin`, `$options`,
    ///   `$regex`, `$size`, `$type`; `$not`, `$all` and `$elemMatch` with conditions of these. In
    ///   `$elemMatch` also `$and`, `$or`, `$nor`, and the element's own fields.
    /// - In `$expr`: paths as above (`"$owner"`, `"$$ROOT.owner"`, `"$$CURRENT.owner"`), `"$$NOW"`, `$literal`, the
    ///   variables that an expression defines (their names begin with a small letter), and the operators listed
    ///   below. `$getField`, `$setField` and `$unsetField` need an `input`. `"$$ROOT"` and `"$$CURRENT"` as a whole
    ///   are not allowed.
    ///
    /// For any other filter, use [`collection`](Self::collection), which queries MongoDB directly.
    ///
    /// Some operators in `$expr` make the server fail for a value of another type: `$size` of something that is not a
    /// list, or arithmetic with a text. The server does not evaluate a condition on data that it cannot look into.
    /// For other data, test the type in a `$cond`: `{"$cond": [{"$isArray": "$data.cart"}, …, false]}`. A test in
    /// an `$and` does not help, because MongoDB may evaluate the parts of an `$and` in any order.
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
    /// **Values from a request** belong into [`data_equals`] or [`owner_equals`]. In a filter, `{"$ne": ""}` is an
    /// operator.
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

    /// Deletes the live sessions that match a filter, and returns their number. The filter is as in
    /// [`find`](Self::find), and must not be empty.
    ///
    /// A session is removed only if it still matches at that moment. A session that begins to match during the call
    /// may stay. The store works in pages of 1,000 sessions, each under the operation timeout.
    ///
    /// # Errors
    ///
    /// [`Config`](crate::ErrorKind::Config) for an empty filter, for a filter that reads `data` in a store that is
    /// not queryable, and for a filter with anything that [`find`](Self::find) does not list. Otherwise as
    /// [`length`](Self::length), or an error of the server about a malformed filter. Some sessions may have been
    /// ended by then.
    ///
    /// # Cancel safety
    ///
    /// Once the call has begun, it runs to completion, even if the future is dropped.
    pub async fn delete_where(&self, filter: Document) -> Result<u64> {
        let selection = self.inner.collection.filter_selection(filter);
        spans::verb!("session_store.delete_where", self.delete_selected(selection))
    }
}

impl SessionCollection {
    pub(crate) fn filter_selection(&self, filter: Document) -> Result<DeleteSelection> {
        if matches_everything(&filter) {
            return Err(Error::config(
                "an empty filter finds every session: to end all of them call `clear`",
            ));
        }
        Ok(DeleteSelection { filter: self.guarded(filter)?, kept: None, only_live: true })
    }

    fn guarded(&self, filter: Document) -> Result<Document> {
        guarded(filter, matches!(self.format, DataFormat::Native))
    }
}

/// Returns a filter that matches what both match. It merges them where they have no key in common, because some
/// servers use no index for a condition inside an `$and`.
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
    fn two_filters_with_a_common_key_are_not_merged() {
        let a = doc! { "a": 1 };
        let b = doc! { "b": 2 };
        assert_eq!(and(a.clone(), b), doc! { "a": 1, "b": 2 });
        let other = doc! { "a": 2, "b": 2 };
        assert_eq!(and(a.clone(), other.clone()), doc! { "$and": [a, other] });
    }

    #[test]
    fn a_path_escapes_keys_as_the_store_does() {
        assert_eq!(data_path(&["cart", "total"]), "data.cart.total");
        assert_eq!(data_path(&["a.b".to_owned(), "$c%".to_owned()]), "data.a%2Eb.%24c%25");
        assert_eq!(data_path(&[""; 0]), "data");
    }
}
