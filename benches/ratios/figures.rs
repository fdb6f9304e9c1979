//! The list of figures, with their goals.

use futures::future::BoxFuture;

use crate::bench::{Bench, Goal, Measured};
use crate::{busy, counts, flood, hits, idle, memory, million, touch};

/// One figure.
pub(crate) struct Figure {
    pub(crate) name: &'static str,
    pub(crate) what: &'static str,
    pub(crate) goal: Goal,
    pub(crate) measure: fn(Bench) -> BoxFuture<'static, anyhow::Result<Measured>>,
}

macro_rules! figures {
    ($($name:ident $goal:ident($($bound:literal),+) $what:literal = $measure:expr;)*) => {
        pub(crate) static ALL: &[Figure] = &[$(Figure {
            name: stringify!($name),
            what: $what,
            goal: Goal::$goal($($bound),+),
            measure: |bench| Box::pin($measure(bench)),
        }),*];
    };
}

figures! {
    load_hit_1 AtMost(1.5) "`load` of a cached session of 1 key, against SHA-256, moka and a clone"
        = |bench| hits::against_floor(bench, 1, false);
    load_hit_5 AtMost(1.10) "the same of 5 keys"
        = |bench| hits::against_floor(bench, 5, false);
    load_hit_20 AtMost(1.05) "the same of 20 keys"
        = |bench| hits::against_floor(bench, 20, false);
    load_hit_vs_naive_5 AtMost(1.0) "against CachingSessionStore over a naive moka store"
        = hits::against_naive;
    load_hit_compact_5 AtMost(2.2) "a compact cache of 5 keys against SHA-256, moka and a clone"
        = |bench| hits::against_floor(bench, 5, true);
    load_miss_idle AtMost(1.05) "one miss at a time against the driver's find_one"
        = idle::load;
    load_miss_busy AtLeast(3.0) "throughput of misses of 128 tasks against find_one of 128 tasks"
        = busy::load;
    save_idle AtMost(1.05) "one save at a time against the driver's update_one"
        = idle::save;
    save_busy AtLeast(1.7) "throughput of saves of 128 tasks against update_one of 128 tasks"
        = busy::save;
    create_idle AtMost(1.05) "one create at a time against the driver's insert_one"
        = idle::create;
    stampede_finds Exactly(1.0) "finds that 1,000 loads of one cold session send"
        = counts::stampede;
    touch_writes AtMost(0.02) "writes for each request with always_save and a touch_after of 60 s"
        = touch::writes;
    flood_hit_rate AtLeast(0.99) "hit rate of live sessions under invented ids, against none"
        = flood::hit_rate;
    memory_weighed Within(0.9, 1.1) "bytes that the store says it holds, against resident growth"
        = memory::weighed;
    memory_compact AtMost(1.05) "resident bytes of a compact session, against encoded plus 450"
        = million::memory;
    hit_at_1m AtMost(2.5) "a hit on one of 1,000,000 compact sessions, against one of 1,000"
        = million::hit;
}
