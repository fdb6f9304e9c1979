//! The sessions of an owner, and those that a filter finds, in both tiers.

use bson::Document;

use crate::error::Result;
use crate::mongo::{DeleteSelection, LiveSessions};
use crate::session::handle::SessionHandle;
use crate::session::id::SessionKey;
use crate::session::owner::Owner;
use crate::store::CachedMongoStore;
use crate::telemetry::spans;

impl CachedMongoStore {
    /// A stream of the live sessions of an owner, as MongoDB has them; see
    /// [`MongoStore::find_by_owner`](crate::MongoStore::find_by_owner).
    pub fn find_by_owner(&self, owner: impl Into<Owner>) -> LiveSessions {
        self.mongo.find_by_owner(owner)
    }

    /// Ends every session of an owner, and answers with how many live ones those were: "sign out
    /// everywhere"; see [`MongoStore::delete_by_owner`](crate::MongoStore::delete_by_owner).
    ///
    /// As after `delete`, no later `load` here returns one that was ended, nor one that another call here
    /// has ended just before, nor one as it was before a save here gave it to another owner: sessions
    /// that are being written are not served from the cache any more, though MongoDB's answer is still on
    /// its way. The other instances are told by the change stream. What another instance has changed a
    /// moment before is seen here as soon as this one is told of it.
    ///
    /// # Errors
    ///
    /// As [`MongoStore::delete_by_owner`](crate::MongoStore::delete_by_owner). What may have been ended
    /// is not cached any more.
    ///
    /// # Cancel safety
    ///
    /// Once begun it goes on to its end, cache included, though the future is dropped.
    pub async fn delete_by_owner(&self, owner: impl Into<Owner> + Send) -> Result<u64> {
        let removal = self.mongo.session_collection().owner_selection(&owner.into(), None);
        spans::verb!("session_store.delete_by_owner", self.remove(removal))
    }

    /// Ends every session of an owner but this one, given by its id or its handle, and answers with
    /// how many live ones those were: "sign out everywhere else"; see
    /// [`delete_by_owner`](Self::delete_by_owner).
    ///
    /// ```no_run
    /// # use tower_sessions::Session;
    /// # use tower_sessions_moka_mongodb_store::{CachedMongoStore, Result};
    /// async fn sign_out_elsewhere(store: &CachedMongoStore, user: i64, here: &Session) -> Result<u64> {
    ///     match here.id() {
    ///         Some(id) => store.delete_by_owner_except(user, id).await,
    ///         None => store.delete_by_owner(user).await,
    ///     }
    /// }
    /// ```
    ///
    /// A session that is given a new id meanwhile (`cycle_id`, a log-in) is another one.
    ///
    /// # Errors
    ///
    /// As [`delete_by_owner`](Self::delete_by_owner).
    ///
    /// # Cancel safety
    ///
    /// As [`delete_by_owner`](Self::delete_by_owner).
    pub async fn delete_by_owner_except(
        &self,
        owner: impl Into<Owner> + Send,
        kept: impl Into<SessionKey> + Send,
    ) -> Result<u64> {
        let removal =
            self.mongo.session_collection().owner_selection(&owner.into(), Some(kept.into()));
        spans::verb!("session_store.delete_by_owner_except", self.remove(removal))
    }

    /// Ends one session, whosever it is, and answers whether there was a live one. For operators: a
    /// page for users takes [`revoke_owned`](Self::revoke_owned).
    ///
    /// # Errors
    ///
    /// As [`MongoStore::length`](crate::MongoStore::length). What may have been ended is not cached any
    /// more.
    ///
    /// # Cancel safety
    ///
    /// Once begun it goes on to its end, cache included, though the future is dropped.
    pub async fn revoke(&self, handle: SessionHandle) -> Result<bool> {
        let key = handle.into();
        let sessions = self.mongo.session_collection().clone();
        let revoke = self.tiers.remove(key, || sessions.revoke(key, None));
        spans::verb!("session_store.revoke", revoke)
    }

    /// Ends one session if it is this owner's, and answers whether there was such a live one. So
    /// nobody can end another one's session with a handle from elsewhere.
    ///
    /// ```no_run
    /// # use tower_sessions_moka_mongodb_store::{CachedMongoStore, Result};
    /// /// `field` is what the form's hidden field held.
    /// async fn sign_out(store: &CachedMongoStore, user: i64, field: &str) -> Result<bool> {
    ///     store.revoke_owned(user, field.parse()?).await
    /// }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`MongoStore::revoke_owned`](crate::MongoStore::revoke_owned).
    ///
    /// # Cancel safety
    ///
    /// As [`revoke`](Self::revoke).
    pub async fn revoke_owned(
        &self,
        owner: impl Into<Owner> + Send,
        handle: SessionHandle,
    ) -> Result<bool> {
        let (key, sessions) = (handle.into(), self.mongo.session_collection().clone());
        let owner = Some(owner.into());
        let revoke = async {
            sessions.require_owner_option()?;
            self.tiers.remove(key, || sessions.revoke(key, owner)).await
        };
        spans::verb!("session_store.revoke_owned", revoke)
    }

    /// Stores the owner of each live session whose stored one is not what its data tells; see
    /// [`MongoStore::assign_owners`](crate::MongoStore::assign_owners).
    ///
    /// # Errors
    ///
    /// As [`MongoStore::assign_owners`](crate::MongoStore::assign_owners).
    ///
    /// # Cancel safety
    ///
    /// Once begun it goes on to its end though the future is dropped.
    pub async fn assign_owners(&self) -> Result<u64> {
        let call = self.mongo.assign_owners_as(self.tiers.revs.clone());
        spans::verb!("session_store.assign_owners", call)
    }

    /// A stream of the live sessions whose stored document a filter finds; see
    /// [`MongoStore::find`](crate::MongoStore::find).
    pub fn find(&self, filter: Document) -> LiveSessions {
        self.mongo.find(filter)
    }

    /// Ends the live sessions whose stored document a filter finds, and answers with how many those
    /// were; see [`MongoStore::delete_where`](crate::MongoStore::delete_where).
    ///
    /// # Errors
    ///
    /// As [`MongoStore::delete_where`](crate::MongoStore::delete_where). What may have been ended is
    /// not cached any more.
    ///
    /// # Cancel safety
    ///
    /// As [`delete_by_owner`](Self::delete_by_owner).
    pub async fn delete_where(&self, filter: Document) -> Result<u64> {
        let removal = self.mongo.session_collection().filter_selection(filter);
        spans::verb!("session_store.delete_where", self.remove(removal))
    }

    async fn remove(&self, removal: Result<DeleteSelection>) -> Result<u64> {
        self.tiers.delete_pages(self.mongo.session_collection().delete_cursor(removal?)).await
    }
}
