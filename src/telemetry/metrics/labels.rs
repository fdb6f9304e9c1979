//! The labels: what tells the series of one metric apart. What stands above a value here is what the
//! documentation says of it.

/// The values of one label, in the order of their handles.
pub(crate) trait Values {
    /// Each value as the label has it, and what is said of it, if it does not speak for itself.
    const ALL: &'static [(&'static str, &'static str)];
}

macro_rules! values {
    ($(#[doc = $what:literal])+ $name:ident {
        $($(#[doc = $about:literal])* $value:ident = $label:literal,)+
    }) => {
        $(#[doc = $what])+
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum $name {
            $($(#[doc = $about])* $value,)+
        }

        impl Values for $name {
            const ALL: &'static [(&'static str, &'static str)] =
                &[$(($label, concat!($($about,)*))),+];
        }

        #[allow(dead_code, reason = "not each label needs each of them")]
        impl $name {
            pub(crate) const COUNT: usize = Self::ALL.len();

            pub(crate) const fn name(self) -> &'static str {
                Self::ALL[self as usize].0
            }
        }
    };
}

values! {
    /// How a load was answered.
    LoadResult {
        /// from the cache
        Hit = "hit",
        /// by a read of MongoDB, since it was not cached
        Miss = "miss",
        /// from the cache, which knows that there is no such session
        Absent = "absent",
        /// by the read of another load
        Coalesced = "coalesced",
        /// by a read of MongoDB, since what was cached had outlived `max_staleness`
        Expired = "expired",
        /// from the cache past `max_staleness`, as `outage_grace` allows
        Grace = "grace",
    }
}

values! {
    /// What a read from MongoDB left in the cache.
    Fill {
        /// an entry
        Stored = "stored",
        /// no entry: MongoDB has no such session, which is remembered
        Absent = "absent",
        /// nothing: something changed while it was under way
        Overtaken = "overtaken",
        /// nothing: too large for the cache, or expired on the way
        Unfit = "unfit",
        /// nothing: it failed
        Failed = "failed",
    }
}

values! {
    /// Why what was cached became void.
    Invalidation {
        /// a load or save ended after something else had changed the session
        Overtaken = "overtaken",
        /// the session was deleted here
        Delete = "delete",
        /// a save found that the session is gone
        Gone = "gone",
        /// another instance changed it
        Remote = "remote",
        /// a save of this store was reported before it was answered
        OwnWrite = "own_write",
        /// nobody knows what a write has done, or what is stored cannot be read
        UnknownOutcome = "unknown_outcome",
        /// the session has grown too large for the cache, or was saved as expired
        Unfit = "unfit",
        /// the whole cache: `clear` was called
        Clear = "clear",
        /// the whole cache: changes may have gone unheard
        Gap = "gap",
    }
}

values! {
    /// Why the cache let an entry go by itself.
    Eviction {
        /// the bound was reached
        Size = "size",
        /// its session has expired
        Expired = "expired",
    }
}

values! {
    /// An operation on MongoDB.
    Verb {
        Insert = "insert",
        Replace = "replace",
        Touch = "touch",
        Bulk = "bulk",
        Find = "find",
        Remove = "remove",
        Clear = "clear",
        Count = "count",
        List = "list",
        Expire = "expire",
        Index = "index",
        Ping = "ping",
    }
}

values! {
    /// How an operation ended.
    OperationOutcome {
        Ok = "ok",
        /// an id was taken already
        Duplicate = "duplicate",
        /// no answer within the operation timeout
        Timeout = "timeout",
        /// no server was reached, or the connection was lost
        Unreachable = "unreachable",
        /// the server refused it because it is overloaded
        Overloaded = "overloaded",
        /// the server refused, or what it answered cannot be read
        Error = "error",
    }
}

values! {
    /// The operations that hold the calls of several callers.
    BatchVerb {
        /// loads
        Find = "find",
        /// saves
        Bulk = "bulk",
    }
}

values! {
    /// What this crate tries again.
    Retry {
        /// an id that was drawn for a new session was taken
        IdTaken = "id_taken",
        /// the change stream was to be opened after it had failed
        Stream = "stream",
    }
}

values! {
    /// Whose change the stream reports.
    Origin {
        /// by this store
        Own = "own",
        /// by another instance, or by hand
        Other = "other",
    }
}

values! {
    /// Why a stream could not be resumed.
    Gap {
        /// the server has it no more
        HistoryLost = "history_lost",
        /// it was dropped or renamed
        CollectionGone = "collection_gone",
        /// the server would not go on from there, or not within the operation timeout
        Refused = "refused",
    }
}
