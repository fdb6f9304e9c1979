//! The operations on the sessions of an owner: list them, end them, and assign owners.

use std::sync::Arc;

use bson::{Document, doc};

use crate::backend::delete_pages::delete_pages;
use crate::error::{Error, Result};
use crate::mongo::collection::SessionCollection;
use crate::mongo::ops::list::ListQuery;
use crate::mongo::owner_field::{OwnerFn, OwnerUpdate, owned_by};
use crate::mongo::{DeleteSelection, LiveSessions, MongoStore, MongoStoreBuilder};
use crate::session::Data;
use crate::session::handle::SessionHandle;
use crate::session::id::SessionKey;
use crate::session::owner::Owner;
use crate::session::revision::RevSource;
use crate::telemetry::spans;

impl MongoStoreBuilder {
    /// The function that derives the owner of a session from its data, for example the id of the user who is
    /// logged in. Default: none, and no owners are stored. With owners, you can
    /// [list](MongoStore::find_by_owner) and [end](MongoStore::delete_by_owner) the sessions of a user.
    ///
    /// The store calls the function on each write, and stores the result in the field `owner` beside the data.
    /// An index covers the sessions that have an owner. If the function returns `None`, the session has no owner
    /// from then on. Give the same function to all instances: a store without one leaves the stored owner as it is.
    ///
    /// Sessions that were stored without this function get an owner when their data changes.
    /// [`assign_owners`](MongoStore::assign_owners) gives all of them an owner.
    ///
    /// ```no_run
    /// # async fn run() -> tower_sessions_moka_mongodb_store::Result<()> {
    /// use tower_sessions_moka_mongodb_store::{CachedMongoStore, MongoStore};
    ///
    /// let mongo = MongoStore::builder()
    ///     .uri("mongodb://localhost/app")
    ///     .owner(|data| data.get("user_id")?.as_i64())
    ///     .build()
    ///     .await?;
    /// let store = CachedMongoStore::builder(mongo).build().await?;
    /// let ended = store.delete_by_owner(7).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// For axum-login, use [`Owner::from_axum_login`].
    ///
    /// If the function panics, the call fails with [`Panic`](crate::ErrorKind::Panic), and nothing is sent.
    pub fn owner<F, O>(mut self, owner: F) -> Self
    where
        F: Fn(&Data) -> Option<O> + Send + Sync + 'static,
        O: Into<Owner>,
    {
        self.owner = Some(OwnerFn(Arc::new(move |data| owner(data).map(Into::into))));
        self
    }
}

impl MongoStore {
    /// Returns a stream of the live sessions of an owner, the most recently written first. Otherwise as
    /// [`all`](Self::all). Each session has a [handle](crate::LiveSession::handle), by which you can
    /// [end](Self::revoke_owned) it.
    ///
    /// If the store was built without [`owner`](MongoStoreBuilder::owner), the only item is a
    /// [`Config`](crate::ErrorKind::Config) error.
    ///
    /// ```no_run
    /// # use tower_sessions_moka_mongodb_store::{MongoStore, Result, SessionHandle};
    /// # use tower_sessions::Session;
    /// use futures::TryStreamExt;
    ///
    /// async fn devices(store: &MongoStore, user: i64, here: &Session) -> Result<String> {
    ///     let this_one = here.id().map(SessionHandle::of);
    ///     let mut page = String::new();
    ///     let mut sessions = store.find_by_owner(user);
    ///     while let Some(session) = sessions.try_next().await? {
    ///         let marked = if Some(session.handle) == this_one { " (this one)" } else { "" };
    ///         page += &format!("last seen {}{marked}\n", session.updated);
    ///     }
    ///     Ok(page)
    /// }
    /// ```
    pub fn find_by_owner(&self, owner: impl Into<Owner>) -> LiveSessions {
        let sessions = &self.inner.collection;
        if let Err(error) = sessions.require_owner_option() {
            return LiveSessions::failed(error);
        }
        let listing = ListQuery {
            wanted: Some(owned_by(&owner.into())),
            // The server sorts them in memory: see the index on the owner.
            order: Some(doc! { "updated": -1, "_id": 1 }),
        };
        sessions.list(&self.inner.tasks, listing)
    }

    /// Deletes every session of an owner, and returns the number of live ones: "sign out everywhere".
    ///
    /// Each session that belonged to the owner before the call is gone after it, and a running save does not bring
    /// it back. Exceptions:
    ///
    /// - If a save gives a session to another owner, or to none, before MongoDB removes it, the session stays: it
    ///   does not belong to this owner any longer.
    /// - A session that is created, or becomes the owner's, during the call may stay.
    ///
    /// The store works in pages of 1,000 sessions, each under the operation timeout.
    ///
    /// # Errors
    ///
    /// [`Config`](crate::ErrorKind::Config) if the store was built without
    /// [`owner`](MongoStoreBuilder::owner); otherwise as [`length`](Self::length). Some sessions may have been
    /// ended by then: call it again.
    ///
    /// # Cancel safety
    ///
    /// Once the call has begun, it runs to completion, even if the future is dropped.
    pub async fn delete_by_owner(&self, owner: impl Into<Owner> + Send) -> Result<u64> {
        let selection = self.inner.collection.owner_selection(&owner.into(), None);
        spans::verb!("session_store.delete_by_owner", self.delete_selected(selection))
    }

    /// Deletes every session of an owner except one, and returns the number of live ones: "sign out
    /// everywhere else". `kept` is the id or the handle of the session to keep. See
    /// [`delete_by_owner`](Self::delete_by_owner).
    ///
    /// A session that gets a new id meanwhile (`cycle_id`, a log-in) is another session.
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
        let selection = self.inner.collection.owner_selection(&owner.into(), Some(kept.into()));
        spans::verb!("session_store.delete_by_owner_except", self.delete_selected(selection))
    }

    /// Deletes one session of any owner, and returns whether it was live. For operators: a page for users
    /// calls [`revoke_owned`](Self::revoke_owned).
    ///
    /// # Errors
    ///
    /// As [`length`](Self::length).
    ///
    /// # Cancel safety
    ///
    /// Once the call has begun, it runs to completion, even if the future is dropped.
    pub async fn revoke(&self, handle: SessionHandle) -> Result<bool> {
        let revoke = self.inner.collection.clone().revoke(handle.into(), None);
        spans::verb!("session_store.revoke", self.run(revoke))
    }

    /// Deletes one session if it belongs to this owner, and returns whether such a session was live. So a user
    /// cannot end another user's session with a handle from elsewhere.
    ///
    /// # Errors
    ///
    /// [`Config`](crate::ErrorKind::Config) if the store was built without
    /// [`owner`](MongoStoreBuilder::owner); otherwise as [`length`](Self::length).
    ///
    /// # Cancel safety
    ///
    /// Once the call has begun, it runs to completion, even if the future is dropped.
    pub async fn revoke_owned(
        &self,
        owner: impl Into<Owner> + Send,
        handle: SessionHandle,
    ) -> Result<bool> {
        let sessions = self.inner.collection.clone();
        let owner = owner.into();
        let revoke = async {
            sessions.require_owner_option()?;
            self.run(sessions.revoke(handle.into(), Some(owner))).await
        };
        spans::verb!("session_store.revoke_owned", revoke)
    }

    /// Stores the owner of each live session whose stored owner differs from the one that its data has, and returns
    /// the number of changed sessions. For sessions that were stored before [`owner`](MongoStoreBuilder::owner) was
    /// given, or with another function. Call it once all instances of the app have the new function. You may call
    /// it again at any time.
    ///
    /// The store reads all sessions, 64 at a time, and writes those that change one by one. Each step is under the
    /// operation timeout. Caches read the changed sessions again.
    ///
    /// These sessions are left unchanged: one that cannot be read, one whose owner is too long, and one whose `rev`
    /// has a deprecated BSON type, which no store writes. A warning says how many there were. A session on whose
    /// data the `owner` function panics is left unchanged too.
    ///
    /// # Errors
    ///
    /// As [`delete_by_owner`](Self::delete_by_owner); some owners may have been stored by then.
    /// [`Panic`](crate::ErrorKind::Panic) if the `owner` function panicked; the owners of all other sessions
    /// have been stored by then.
    ///
    /// # Cancel safety
    ///
    /// Once the call has begun, it runs to completion, even if the future is dropped.
    pub async fn assign_owners(&self) -> Result<u64> {
        let call = self.assign_owners_as(self.inner.revs.clone());
        spans::verb!("session_store.assign_owners", call)
    }

    /// As [`assign_owners`](Self::assign_owners), for a store that takes its revs from another source.
    pub(crate) async fn assign_owners_as(&self, revs: RevSource) -> Result<u64> {
        let call = self.inner.collection.clone().assign_owners(revs);
        self.inner.tasks.run_paged(call, |outcome| outcome).await
    }

    pub(crate) async fn delete_selected(&self, selection: Result<DeleteSelection>) -> Result<u64> {
        let pages = self.inner.collection.delete_cursor(selection?);
        let call = delete_pages(pages, |_| || ());
        self.inner.tasks.run_paged(call, |outcome| outcome).await
    }
}

impl SessionCollection {
    /// Adds the owner that the data has to the fields of a write.
    pub(crate) fn add_owner(&self, data: &Data, fields: &mut Document) -> Result<OwnerUpdate> {
        let Some(owner_of) = &self.owner else { return Ok(OwnerUpdate::Set) };
        let Some(owner) = owner_of.derive(data)? else { return Ok(OwnerUpdate::Clear) };
        owner.check_length()?;
        fields.insert("owner", owner.as_str());
        Ok(OwnerUpdate::Set)
    }

    /// Fails if the store stores no owners. If it returned "0 sessions ended" instead, the caller would believe that
    /// the user is signed out.
    pub(crate) fn require_owner_option(&self) -> Result<()> {
        if self.owner.is_some() {
            return Ok(());
        }
        Err(Error::config(
            "this store does not know whose sessions it stores: give MongoStoreBuilder::owner",
        ))
    }

    /// Selects the sessions of an owner, expired ones too: by another instance's clock they may be live.
    pub(crate) fn owner_selection(
        &self,
        owner: &Owner,
        kept: Option<SessionKey>,
    ) -> Result<DeleteSelection> {
        self.require_owner_option()?;
        Ok(DeleteSelection { filter: owned_by(owner), kept, only_live: false })
    }
}
