//! `Owner`: whose session it is.

use std::fmt;

use serde_json::Value;

use crate::error::{Error, ErrorKind, Result};
use crate::session::Data;

/// Whose session it is: usually a user's id, as text.
///
/// Make it from a text or from a whole number. A number becomes its digits, so `7` and `"7"` are the same
/// owner. For ids of other types, use [`from_value`](Self::from_value). A session whose owner is
/// longer than 1,024 bytes cannot be stored.
///
/// ```
/// use tower_sessions_moka_mongodb_store::Owner;
///
/// assert_eq!(Owner::from(7), Owner::from("7"));
/// assert_eq!(Owner::from(7).as_str(), "7");
/// ```
///
/// `Debug` does not show the owner.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Owner(String);

impl Owner {
    /// More than any id has. A longer text is not an id, and would fill the index.
    const MAX_BYTES: usize = 1_024;

    /// The owner that a value in a session stands for:
    ///
    /// | value | owner |
    /// |---|---|
    /// | text | the text |
    /// | number | its digits |
    /// | null | `None` |
    /// | anything else, such as an `ObjectId` or bytes | its compact JSON |
    ///
    /// To find the sessions of an owner whose id is not a text or a number, convert the id with
    /// `serde_json::to_value`, and call this with the result.
    #[must_use]
    pub fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::Null => None,
            Value::String(text) => Some(Self(text.clone())),
            other => Some(Self(other.to_string())),
        }
    }

    /// The user whom [axum-login](https://docs.rs/axum-login) 0.18 has logged in, if it uses its default data
    /// key.
    ///
    /// ```no_run
    /// # async fn run() -> tower_sessions_moka_mongodb_store::Result<()> {
    /// use tower_sessions_moka_mongodb_store::{MongoStore, Owner};
    ///
    /// let mongo = MongoStore::builder().owner(Owner::from_axum_login).build().await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// With another data key:
    /// `.owner(|data| Owner::from_value(data.get("my key")?.get("user_id")?))`.
    #[must_use]
    pub fn from_axum_login(data: &Data) -> Option<Self> {
        Self::from_value(data.get("axum-login.data")?.get("user_id")?)
    }

    /// The owner as the store writes it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub(crate) fn check_length(&self) -> Result<()> {
        if self.0.len() <= Self::MAX_BYTES {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Encode,
            format!(
                "the session cannot be stored: its owner is longer than {} bytes",
                Self::MAX_BYTES
            ),
        ))
    }
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Owner(..)")
    }
}

impl From<String> for Owner {
    fn from(owner: String) -> Self {
        Self(owner)
    }
}

impl From<&String> for Owner {
    fn from(owner: &String) -> Self {
        Self(owner.clone())
    }
}

impl From<&str> for Owner {
    fn from(owner: &str) -> Self {
        Self(owner.to_owned())
    }
}

impl From<&Owner> for Owner {
    fn from(owner: &Owner) -> Self {
        owner.clone()
    }
}

macro_rules! from_whole_numbers {
    ($($number:ty)*) => { $(
        impl From<$number> for Owner {
            fn from(owner: $number) -> Self {
                Self(owner.to_string())
            }
        }
    )* };
}

from_whole_numbers!(i8 i16 i32 i64 i128 u8 u16 u32 u64 u128);

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_value_and_the_id_it_was_made_from_are_the_same_owner() {
        for (value, owner) in [
            (json!("ferris"), "ferris"),
            (json!(7), "7"),
            (json!(u64::MAX), "18446744073709551615"),
            (json!(true), "true"),
            (json!({ "$oid": "65f0c0ffee" }), r#"{"$oid":"65f0c0ffee"}"#),
            (json!([1, 2]), "[1,2]"),
        ] {
            assert_eq!(Owner::from_value(&value), Some(Owner::from(owner)));
        }
        assert_eq!(Owner::from_value(&Value::Null), None);
        assert_eq!(Owner::from(u64::MAX), Owner::from("18446744073709551615"));
    }

    #[test]
    fn a_session_without_an_axum_login_user_has_no_owner() {
        let data = |value| Data::from([("axum-login.data".to_owned(), value)]);
        let of = |value| Owner::from_axum_login(&data(value));
        assert_eq!(of(json!({ "user_id": 7, "auth_hash": [1] })), Some(Owner::from(7)));
        assert_eq!(of(json!({ "user_id": null, "auth_hash": null })), None);
        assert_eq!(of(json!("something else")), None);
        assert_eq!(Owner::from_axum_login(&Data::new()), None);
    }

    #[test]
    fn an_owner_is_not_shown_and_its_length_is_bounded() {
        assert_eq!(format!("{:?}", Owner::from("ferris")), "Owner(..)");
        assert!(Owner::from("x".repeat(1_024)).check_length().is_ok());
        let error = Owner::from("x".repeat(1_025)).check_length().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Encode);
        assert!(!error.to_string().contains("xx"), "{error}");
    }
}
