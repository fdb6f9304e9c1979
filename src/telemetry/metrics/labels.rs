//! The labels of the metrics, and their values. The comment above a value is also its text in `metrics.md`.

/// The values of one label. Their order is that of the metric's handles.
pub(crate) trait Values {
    /// Each value, and its text in the documentation. The text is empty if the value needs none.
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

        #[allow(dead_code, reason = "not every label needs both")]
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
        /// by a read from MongoDB, because the session was not cached
        Miss = "miss",
        /// from the cache, which remembers that there is no such session
        Absent = "absent",
        /// by the read of another load, which both share
        Coalesced = "coalesced",
        /// by a read from MongoDB, because the cached entry was older than `max_staleness`
        Expired = "expired",
        /// from the cache past `max_staleness`, within `outage_grace`
        Grace = "grace",
    }
}

values! {
    /// What a read from MongoDB left in the cache.
    Fill {
        /// an entry
        Stored = "stored",
        /// the absence: MongoDB has no such session
        Absent = "absent",
        /// nothing: the session changed during the read
        Overtaken = "overtaken",
        /// nothing: the session is too large for the cache, or expired during the read
        Unfit = "unfit",
        /// nothing: the read failed
        Failed = "failed",
    }
}

values! {
    /// Why entries were invalidated.
    Invalidation {
        /// a load or save ended after another call had changed the session
        Overtaken = "overtaken",
        /// the session was deleted here
        Delete = "delete",
        /// a save found no session
        Gone = "gone",
        /// another instance changed it
        Remote = "remote",
        /// the change stream reported a save of this store before MongoDB had answered it
        OwnWrite = "own_write",
        /// a write failed without an answer, or the stored session cannot be read
        UnknownOutcome = "unknown_outcome",
        /// the session is too large for the cache, or was saved as expired
        Unfit = "unfit",
        /// the whole cache: `clear` was called
        Clear = "clear",
        /// the whole cache: the change stream may have missed changes
        Gap = "gap",
    }
}

values! {
    /// Why the cache evicted an entry.
    Eviction {
        /// the cache was full
        Size = "size",
        /// the session has expired
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
        /// the id was taken
        Duplicate = "duplicate",
        /// the session had changed since the request loaded it, so the store merges and tries again
        Changed = "changed",
        /// no answer within the operation timeout
        Timeout = "timeout",
        /// no server could be reached, or the connection was lost
        Unreachable = "unreachable",
        /// the server rejected it because of overload
        Overloaded = "overloaded",
        /// the server answered with another error, or its reply cannot be read
        Error = "error",
    }
}

values! {
    /// How a save in a request scope ended.
    MergeResult {
        /// stored, and nobody else had changed the session since the request loaded it
        Unchanged = "unchanged",
        /// stored, with what others had changed meanwhile
        Merged = "merged",
        /// dropped, because the session was deleted or has expired
        Gone = "gone",
        /// an error
        Failed = "failed",
    }
}

values! {
    /// The operations that can carry a batch of calls.
    BatchVerb {
        /// loads
        Find = "find",
        /// saves
        Bulk = "bulk",
    }
}

values! {
    /// What this crate retries.
    Retry {
        /// the random id of a new session was taken
        IdTaken = "id_taken",
        /// the change stream was opened again after a failure
        Stream = "stream",
    }
}

values! {
    /// What happened to a session beyond `max_sessions_per_owner`.
    OverLimit {
        /// an old session was deleted
        Evicted = "evicted",
        /// a new session was not created
        Refused = "refused",
    }
}

values! {
    /// The origin of a change that the stream reports.
    Origin {
        /// this store
        Own = "own",
        /// another instance, or an edit by hand
        Other = "other",
    }
}

values! {
    /// Why a stream could not be resumed.
    Gap {
        /// the server no longer has the changes after the last position
        HistoryLost = "history_lost",
        /// the collection was dropped or renamed
        CollectionGone = "collection_gone",
        /// the server refused the last position, or did not reach it within the operation timeout
        Refused = "refused",
    }
}
