//! The calls of [`CachedMongoStore`] for the sessions of an owner, and for those that match a filter.

use bson::Document;

use crate::error::Result;
use crate::mongo::{DeleteSelection, LiveSessions};
use crate::session::handle::SessionHandle;
use crate::session::id::SessionKey;
use crate::session::owner::Owner;
use crate::store::CachedMongoStore;
use crate::telemetry::spans;

impl CachedMongoStore {
    /// Returns a stream of the live sessions of an owner, as MongoDB has them; see
    /// [`MongoStore::find_by_owner`](crate::MongoStore::find_by_owner).
    pub fn find_by_owner(&self, owner: impl Into<Owner>) -> LiveSessions {
        self.mongo.find_by_owner(owner)
    }

    /// Deletes every session of an owner, and returns the number of live ones: "sign out everywhere"; see
    /// [`MongoStore::delete_by_owner`](crate::MongoStore::delete_by_owner).
    ///
    /// After it has returned, no later `load` on this instance returns:
    ///
    /// - a session that it deleted, or that another call here deleted just before;
    /// - a session in a state before a save here gave it to another owner. Sessions with a pending write
    ///   leave the cache, even if MongoDB has not answered the write yet.
    ///
    /// The change stream notifies the other instances. A change that another instance made just before is
    /// seen here as soon as the change stream reports it.
    ///
    /// # Errors
    ///
    /// As [`MongoStore::delete_by_owner`](crate::MongoStore::delete_by_owner). Sessions that may have been
    /// deleted are no longer cached.
    ///
    /// # Cancel safety
    ///
    /// Once begun it runs to completion, cache included, even if the future is dropped.
    pub async fn delete_by_owner(&self, owner: impl Into<Owner> + Send) -> Result<u64> {
        let selection = self.mongo.session_collection().owner_selection(&owner.into(), None);
        spans::verb!("session_store.delete_by_owner", self.delete_selection(selection))
    }

    /// Deletes every session of an owner except one, and returns the number of live ones: "sign out
    /// everywhere else"; see [`delete_by_owner`](Self::delete_by_owner). `kept` is the id or the handle of
    /// the session that stays.
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
    /// If the kept session gets a new id meanwhile (`cycle_id`, a log-in), it counts as another session.
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
        let kept = Some(kept.into());
        let selection = self.mongo.session_collection().owner_selection(&owner.into(), kept);
        spans::verb!("session_store.delete_by_owner_except", self.delete_selection(selection))
    }

    /// Deletes one session of any owner, and returns whether it was live. For operators. A page for users
    /// calls [`revoke_owned`](Self::revoke_owned).
    ///
    /// # Errors
    ///
    /// As [`MongoStore::length`](crate::MongoStore::length). A session that may have been deleted is no
    /// longer cached.
    ///
    /// # Cancel safety
    ///
    /// Once begun it runs to completion, cache included, even if the future is dropped.
    pub async fn revoke(&self, handle: SessionHandle) -> Result<bool> {
        let key = handle.into();
        let sessions = self.mongo.session_collection().clone();
        let revoke = self.tiers.remove_by(key, || sessions.revoke(key, None));
        spans::verb!("session_store.revoke", revoke)
    }

    /// Deletes one session if it belongs to this owner, and returns whether such a session was live. So a
    /// user cannot end the session of another user with a handle from elsewhere.
    ///
    /// ```no_run
    /// # use tower_sessions_moka_mongodb_store::{CachedMongoStore, Result};
    /// /// `field` is the value of the form's hidden field.
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
        let key = handle.into();
        let sessions = self.mongo.session_collection().clone();
        let owner = Some(owner.into());
        let revoke = async {
            sessions.require_owner_option()?;
            self.tiers.remove_by(key, || sessions.revoke(key, owner)).await
        };
        spans::verb!("session_store.revoke_owned", revoke)
    }

    /// Stores the owner of each live session whose stored owner differs from what the `owner` function
    /// returns for its data; see [`MongoStore::assign_owners`](crate::MongoStore::assign_owners).
    ///
    /// # Errors
    ///
    /// As [`MongoStore::assign_owners`](crate::MongoStore::assign_owners).
    ///
    /// # Cancel safety
    ///
    /// Once begun it runs to completion, even if the future is dropped.
    pub async fn assign_owners(&self) -> Result<u64> {
        let call = self.mongo.assign_owners_as(self.tiers.revs.clone());
        spans::verb!("session_store.assign_owners", call)
    }

    /// Returns a stream of the live sessions whose stored document matches a filter; see
    /// [`MongoStore::find`](crate::MongoStore::find).
    pub fn find(&self, filter: Document) -> LiveSessions {
        self.mongo.find(filter)
    }

    /// Deletes the live sessions whose stored document matches a filter, and returns their number; see
    /// [`MongoStore::delete_where`](crate::MongoStore::delete_where).
    ///
    /// # Errors
    ///
    /// As [`MongoStore::delete_where`](crate::MongoStore::delete_where). Sessions that may have been
    /// deleted are no longer cached.
    ///
    /// # Cancel safety
    ///
    /// As [`delete_by_owner`](Self::delete_by_owner).
    pub async fn delete_where(&self, filter: Document) -> Result<u64> {
        let selection = self.mongo.session_collection().filter_selection(filter);
        spans::verb!("session_store.delete_where", self.delete_selection(selection))
    }

    async fn delete_selection(&self, selection: Result<DeleteSelection>) -> Result<u64> {
        let pages = self.mongo.session_collection().delete_cursor(selection?);
        Box::pin(self.tiers.delete_pages(pages)).await
    }
}
