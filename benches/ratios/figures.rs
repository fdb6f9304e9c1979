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
    load_hit_1 AtMost(1.5) "time of a hit with 1 key / SHA-256, a moka look-up and a clone"
        = |bench| hits::against_floor(bench, 1, false);
    load_hit_5 AtMost(1.10) "time of a hit with 5 keys / SHA-256, a moka look-up and a clone"
        = |bench| hits::against_floor(bench, 5, false);
    load_hit_20 AtMost(1.05) "time of a hit with 20 keys / SHA-256, a moka look-up and a clone"
        = |bench| hits::against_floor(bench, 20, false);
    load_hit_vs_naive_5 AtMost(1.0) "time of a hit / a hit of CachingSessionStore with a naive moka store"
        = hits::against_naive;
    load_hit_compact_5 AtMost(2.2) "time of a compact hit with 5 keys / SHA-256, a moka look-up and a clone"
        = |bench| hits::against_floor(bench, 5, true);
    load_hit_scoped_5 AtMost(1.10) "time of a hit with 5 keys in a request scope / without a scope"
        = hits::scoped;
    load_miss_idle AtMost(1.05) "time of a miss, one at a time / the driver's find_one"
        = idle::load;
    load_miss_busy AtLeast(3.0) "throughput of misses of 128 tasks / find_one of 128 tasks"
        = busy::load;
    save_idle AtMost(1.05) "time of a save, one at a time / the driver's update_one"
        = idle::save;
    save_scoped_idle AtMost(1.05) "time of a hit and a save, one request at a time, in a request scope / without"
        = idle::save_scoped;
    save_busy AtLeast(1.7) "throughput of saves of 128 tasks / update_one of 128 tasks"
        = busy::save;
    merge_busy AtLeast(1.0) "throughput of 128 tasks that change keys of 8 sessions, in request scopes / without"
        = busy::merge;
    create_idle AtMost(1.05) "time of a create, one at a time / the driver's insert_one"
        = idle::create;
    stampede_finds Exactly(1.0) "number of finds for 1,000 loads of one session that is not cached"
        = counts::stampede;
    touch_writes AtMost(0.02) "writes for each request, with always_save and a touch_after of 60 s"
        = touch::writes;
    flood_hit_rate AtLeast(0.99) "hit rate of live sessions among invented ids / without invented ids"
        = flood::hit_rate;
    memory_weighed Within(0.9, 1.1) "bytes of the cache that the store reports / growth of the process"
        = memory::weighed;
    memory_compact AtMost(1.05) "resident bytes of a compact session / its encoded data plus 450"
        = million::memory;
    hit_at_1m AtMost(2.5) "time of a hit among 1,000,000 compact sessions / among 1,000"
        = million::hit;
}
