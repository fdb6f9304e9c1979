//! The guide, to be read in any order. Documentation only: there is nothing to call in here.
//!
//! | page | for the question |
//! |---|---|
//! | [`getting_started`] | how do I get from nothing to an app with sessions? |
//! | [`choosing`] | which `max_staleness`, `touch_after`, size, eviction policy, and `compact` or not? |
//! | [`instances`] | what changes when the app runs more than once? |
//! | [`deployments`] | replica set, standalone server, sharded cluster, Atlas, containers: what does each need? |
//! | [`outages`] | MongoDB is down or slow: what do users see, and what can I choose? |
//! | [`security`] | what is stored, what do cookies hold, how do I log in and out safely? |
//! | [`metrics`] | a figure has moved: what does it mean, and what do I do? |
//! | [`coming_from`] | I know another store: where is its option here? |
//! | [`troubleshooting`] | something does not work: why? |
//! | [`plots`] | how fast is it beside other stores? |
//!
//! What is known not to work stands under [known limits](crate#known-limits), the reasons for the design in
//! `docs/decisions` in the repository.

/// The two plots of a scenario. Blank lines around it end what stands before and behind.
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

pub mod choosing {
    #![doc = include_str!("choosing.md")]
}

pub mod instances {
    #![doc = include_str!("instances.md")]
}

pub mod deployments {
    #![doc = include_str!("deployments.md")]
}

pub mod outages {
    #![doc = include_str!("outages.md")]
}

pub mod security {
    #![doc = include_str!("security.md")]
}

pub mod metrics {
    #![doc = include_str!("metrics.md")]
}

pub mod coming_from {
    #![doc = include_str!("coming_from.md")]
}

pub mod troubleshooting {
    #![doc = include_str!("troubleshooting.md")]
}

pub mod plots {
    #![doc = include_str!("plots.md")]
    //!
    //! # No session at all: what HTTP and the clients allow at most
    #![doc = plot!("bare")]
    //!
    //! # Each request reads a session
    #![doc = plot!("read")]
    //!
    //! # The same, some sessions far more often than others
    #![doc = plot!("read-zipf")]
    //!
    //! # 95 requests read, 5 change a session
    #![doc = plot!("read-mostly")]
    //!
    //! # Each request changes a session
    #![doc = plot!("write")]
    //!
    //! # Each request reads, and the layer saves: `touch_after` of a minute
    #![doc = plot!("always-save")]
    //!
    //! # Log-ins: a session is created, then its id cycled
    #![doc = plot!("log-in")]
    //!
    //! # Cold start: all clients at once ask for the same session
    #![doc = plot!("stampede")]
    //!
    //! # Tenfold: ten times as many sessions as the cache holds
    #![doc = plot!("tenfold")]
    //!
    //! # Tenfold, some sessions far more often than others
    #![doc = plot!("tenfold-zipf")]
    //!
    //! # A flood: nine of ten requests with invented ids
    #![doc = plot!("flood")]
    //!
    //! # Two instances: one in ten changes a session on one, both read
    #![doc = plot!("two-instances")]
    //!
    //! # What was run
    //!
    #![doc = include_str!("plots/run.md")]
}
