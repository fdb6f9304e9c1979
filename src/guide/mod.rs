//! The guide: one page for each question, in any order. It is documentation only and has nothing to call.
//!
//! | page | answers |
//! |---|---|
//! | [`getting_started`] | How do I get from nothing to an app with sessions? |
//! | [`choosing`] | Which value do I give to each option? |
//! | [`instances`] | What changes when the app runs on more than one instance? |
//! | [`parallel_requests`] | One visitor sends several requests at once: how is no change lost? |
//! | [`deployments`] | What do a replica set, a standalone server, a sharded cluster, Atlas and containers need? |
//! | [`outages`] | MongoDB is down or slow: what do users see, and what can I choose? |
//! | [`security`] | What is stored, who may attack it, and how do I log in and out safely? |
//! | [`metrics`] | A figure has moved: what does it mean, and what do I do? |
//! | [`coming_from`] | I know another store: where is its option here? |
//! | [`troubleshooting`] | Something does not work: why? |
//! | [`plots`] | How fast is the store beside other stores? |
//!
//! [Known limits](crate#known-limits) lists what does not work. `ARCHITECTURE.md` in the repository explains the
//! design, and `docs/decisions` gives its reasons.

/// The two plots of a scenario. The blank lines around the `div` end the Markdown before and after it.
macro_rules! plot {
    ($scenario:literal) => {
        concat!(
            "<div style=\"overflow-x: auto\">\n",
            include_str!(concat!("plots/", $scenario, "-throughput.svg")),
            include_str!(concat!("plots/", $scenario, "-latency.svg")),
            "</div>"
        )
    };
}

pub mod getting_started {
    #![doc = include_str!("getting_started.md")]
}

#[doc(alias = "coherence")]
#[doc(alias = "touchAfter")]
pub mod choosing {
    #![doc = include_str!("choosing.md")]
}

#[doc(alias = "invalidation")]
#[doc(alias = "backplane")]
pub mod instances {
    #![doc = include_str!("instances.md")]
}

#[doc(alias = "lost update")]
#[doc(alias = "optimistic locking")]
#[doc(alias = "merge")]
pub mod parallel_requests {
    #![doc = include_str!("parallel_requests.md")]
}

pub mod deployments {
    #![doc = include_str!("deployments.md")]
}

#[doc(alias = "stale-if-error")]
#[doc(alias = "fail-safe")]
pub mod outages {
    #![doc = include_str!("outages.md")]
}

#[doc(alias = "csrf")]
#[doc(alias = "fixation")]
pub mod security {
    #![doc = include_str!("security.md")]
}

pub mod metrics {
    #![doc = include_str!("metrics.md")]
}

#[doc(alias = "migrate")]
#[doc(alias = "migration")]
#[doc(alias = "maxAge")]
#[doc(alias = "express-session")]
#[doc(alias = "connect-mongo")]
#[doc(alias = "with_table_name")]
#[doc(alias = "with_prefix")]
#[doc(alias = "continuously_delete_expired")]
pub mod coming_from {
    #![doc = include_str!("coming_from.md")]
}

pub mod troubleshooting {
    #![doc = include_str!("troubleshooting.md")]
}

pub mod plots {
    #![doc = include_str!("plots.md")]
    //!
    //! # No session at all: the most that HTTP and the clients allow
    #![doc = plot!("bare")]
    //!
    //! # Each request reads a session
    #![doc = plot!("read")]
    //!
    //! # Each request reads a session, and some sessions get most of the requests
    #![doc = plot!("read-zipf")]
    //!
    //! # Of 100 requests, 95 read and 5 change a session
    #![doc = plot!("read-mostly")]
    //!
    //! # Each request changes a session
    #![doc = plot!("write")]
    //!
    //! # Each request reads, and the layer saves: `touch_after` of a minute
    #![doc = plot!("always-save")]
    //!
    //! # Log-ins: a session is created, and then gets a new id
    #![doc = plot!("log-in")]
    //!
    //! # Cold start: all clients at once ask for the same session
    #![doc = plot!("stampede")]
    //!
    //! # Tenfold: ten times as many sessions as the cache holds
    #![doc = plot!("tenfold")]
    //!
    //! # Tenfold, and some sessions get most of the requests
    #![doc = plot!("tenfold-zipf")]
    //!
    //! # A flood: nine of ten requests have invented ids
    #![doc = plot!("flood")]
    //!
    //! # Two instances: both read, and one in ten requests changes a session on one of them
    #![doc = plot!("two-instances")]
    //!
    //! # Machine, versions and figures of this run
    //!
    #![doc = include_str!("plots/run.md")]
}
