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
//! `DESIGN.md` in the repository.

/// A section with the two plots of a scenario.
macro_rules! plot {
    ($scenario:literal, $title:literal) => {
        concat!(
            "\n# ",
            $title,
            "\n\n<div style=\"overflow-x: auto\">\n",
            include_str!(concat!("plots/", $scenario, "-throughput.svg")),
            include_str!(concat!("plots/", $scenario, "-latency.svg")),
            "</div>\n"
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
    #![doc = plot!("bare", "No session at all: what HTTP and the clients allow at most")]
    #![doc = plot!("read", "Each request reads a session")]
    #![doc = plot!("read-zipf", "The same, some sessions far more often than others")]
    #![doc = plot!("read-mostly", "95 requests read, 5 change a session")]
    #![doc = plot!("write", "Each request changes a session")]
    #![doc = plot!("always-save", "Each request reads, and the layer saves: `touch_after` of a minute")]
    #![doc = plot!("log-in", "Log-ins: a session is created, then its id cycled")]
    #![doc = plot!("stampede", "Cold start: all clients at once ask for the same session")]
    #![doc = plot!("tenfold", "Tenfold: ten times as many sessions as the cache holds")]
    #![doc = plot!("tenfold-zipf", "Tenfold, some sessions far more often than others")]
    #![doc = plot!("flood", "A flood: nine of ten requests with invented ids")]
    #![doc = plot!("two-instances", "Two instances: one in ten changes a session on one, both read")]
    //!
    //! # What was run
    //!
    #![doc = include_str!("plots/run.md")]
}
