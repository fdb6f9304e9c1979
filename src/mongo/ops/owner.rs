//! The owner of a session: derived from its data on each write, stored beside it, and what can be
//! asked and ended by it.

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
    /// Whose session it is, as its data tells: say, the id of the user who is logged in. Default: no
    /// owners are stored. With it the sessions of a user can be
    /// [listed](MongoStore::find_by_owner) and [ended](MongoStore::delete_by_owner).
    ///
    /// Asked on each write, and stored as `owner` beside the data, with an index of the sessions that
    /// have one. A session that is saved with data of which this answers `None` has no owner any more.
    /// Give the same to all instances: a store without one leaves the owner that it finds.
    ///
    /// Sessions that were stored before this was given have no owner until their data changes.
    /// [`assign_owners`](MongoStore::assign_owners) gives it to all of them.
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
    /// For axum-login there is [`Owner::from_axum_login`].
    ///
    /// If the function panics, the call that asked it fails with [`Panic`](ErrorKind::Panic), and
    /// nothing is sent.
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
    /// A stream of the live sessions of an owner, the one that was written last first; else as
    /// [`all`](Self::all). Each has a [handle](crate::LiveSession::handle) by which it can be
    /// [ended](Self::revoke_owned).
    ///
    /// Its only item is a [`Config`](crate::ErrorKind::Config) error if the store was built without
    /// [`owner`](MongoStoreBuilder::owner).
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
            // The few of one owner, which the server sorts: see the index.
            order: Some(doc! { "updated": -1, "_id": 1 }),
        };
        sessions.list(&self.inner.tasks, listing)
    }

    /// Ends every session of an owner, and answers with how many live ones those were: "sign out
    /// everywhere".
    ///
    /// Each session that was the owner's before the call is gone after it, and no save under way brings
    /// it back. An exception: if a save gives a session to another owner, or to none, before MongoDB comes to
    /// remove it, it is not ended, since it is not this owner's any more. A session that is created, or
    /// becomes the owner's, while the call goes on may stay. Works in pages of 1,000 sessions, each
    /// under the operation timeout.
    ///
    /// # Errors
    ///
    /// [`Config`](crate::ErrorKind::Config) if the store was built without
    /// [`owner`](MongoStoreBuilder::owner); else as [`length`](Self::length), and some sessions may
    /// have been ended by then: call it again.
    ///
    /// # Cancel safety
    ///
    /// Once begun it goes on to its end though the future is dropped.
    pub async fn delete_by_owner(&self, owner: impl Into<Owner> + Send) -> Result<u64> {
        let removal = self.inner.collection.owner_selection(&owner.into(), None);
        spans::verb!("session_store.delete_by_owner", self.remove(removal))
    }

    /// Ends every session of an owner but this one, given by its id or its handle, and answers with
    /// how many live ones those were: "sign out everywhere else". See
    /// [`delete_by_owner`](Self::delete_by_owner).
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
        let removal = self.inner.collection.owner_selection(&owner.into(), Some(kept.into()));
        spans::verb!("session_store.delete_by_owner_except", self.remove(removal))
    }

    /// Ends one session, whosever it is, and answers whether there was a live one. For operators: a
    /// page for users takes [`revoke_owned`](Self::revoke_owned).
    ///
    /// # Errors
    ///
    /// As [`length`](Self::length).
    ///
    /// # Cancel safety
    ///
    /// Once begun it goes on to its end though the future is dropped.
    pub async fn revoke(&self, handle: SessionHandle) -> Result<bool> {
        let revoke = self.inner.collection.clone().revoke(handle.into(), None);
        spans::verb!("session_store.revoke", self.run(revoke))
    }

    /// Ends one session if it is this owner's, and answers whether there was such a live one. So
    /// nobody can end another one's session with a handle from elsewhere.
    ///
    /// # Errors
    ///
    /// [`Config`](crate::ErrorKind::Config) if the store was built without
    /// [`owner`](MongoStoreBuilder::owner); else as [`length`](Self::length).
    ///
    /// # Cancel safety
    ///
    /// Once begun it goes on to its end though the future is dropped.
    pub async fn revoke_owned(
        &self,
        owner: impl Into<Owner> + Send,
        handle: SessionHandle,
    ) -> Result<bool> {
        let (sessions, owner) = (self.inner.collection.clone(), owner.into());
        let revoke = async {
            sessions.require_owner_option()?;
            self.run(sessions.revoke(handle.into(), Some(owner))).await
        };
        spans::verb!("session_store.revoke_owned", revoke)
    }

    /// Stores the owner of each live session whose stored one is not what its data tells, and answers
    /// with how many those were. For sessions from before
    /// [`owner`](MongoStoreBuilder::owner) was given, or was given otherwise: call it once all
    /// instances of the app have it. May be called again at any time.
    ///
    /// Reads all sessions, 64 at a time, and writes those that it changes one by one; each step is
    /// under the operation timeout. Caches read anew what it has changed. A session that cannot be read
    /// or whose owner is too long is left as it is, and a warning tells how many there were. So is one whose
    /// `rev` has a deprecated type of BSON, which no store writes, and one on whose data the `owner`
    /// function panics.
    ///
    /// # Errors
    ///
    /// As [`delete_by_owner`](Self::delete_by_owner); some owners may have been stored by then.
    /// [`Panic`](ErrorKind::Panic) if the `owner` function panicked; the owners of all other sessions
    /// have been stored by then.
    ///
    /// # Cancel safety
    ///
    /// Once begun it goes on to its end though the future is dropped.
    pub async fn assign_owners(&self) -> Result<u64> {
        let call = self.assign_owners_as(self.inner.revs.clone());
        spans::verb!("session_store.assign_owners", call)
    }

    /// The same for a store whose writes have other revs.
    pub(crate) async fn assign_owners_as(&self, revs: RevSource) -> Result<u64> {
        let call = self.inner.collection.clone().assign_owners(revs);
        self.inner.tasks.run_paged(call, |outcome| outcome).await
    }

    pub(crate) async fn remove(&self, removal: Result<DeleteSelection>) -> Result<u64> {
        let pages = self.inner.collection.pages(removal?);
        let call = delete_pages(pages, |_| || ());
        self.inner.tasks.run_paged(call, |outcome| outcome).await
    }
}

impl SessionCollection {
    /// Adds its owner to the fields that are stored of a session with this data.
    pub(crate) fn add_owner(&self, data: &Data, fields: &mut Document) -> Result<OwnerUpdate> {
        let Some(owner_of) = &self.owner else { return Ok(OwnerUpdate::Set) };
        let Some(owner) = owner_of.derive(data)? else { return Ok(OwnerUpdate::Clear) };
        owner.fits()?;
        fields.insert("owner", owner.as_str());
        Ok(OwnerUpdate::Set)
    }

    /// Whether owners are stored. An answer of "none" from a store that stores no owner would be taken
    /// for a log-out that has happened.
    pub(crate) fn require_owner_option(&self) -> Result<()> {
        if self.owner.is_some() {
            return Ok(());
        }
        Err(Error::config(
            "this store does not know whose sessions it stores: give MongoStoreBuilder::owner",
        ))
    }

    /// Those of an owner, whether they have expired or not: this clock is not the only one.
    pub(crate) fn owner_selection(
        &self,
        owner: &Owner,
        kept: Option<SessionKey>,
    ) -> Result<DeleteSelection> {
        self.require_owner_option()?;
        Ok(DeleteSelection { filter: owned_by(owner), kept, live_alone: false })
    }
}
