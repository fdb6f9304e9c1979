//! The parts by themselves: the key, the codec of what is stored, the cache and the rules by which an
//! entry may stand there.
//!
//! `cargo bench --bench parts -- [FILTER]`
//!
//! These are private, so their files are compiled in here as they ship; nothing runs that needs a
//! server.

#[allow(dead_code, unreachable_pub, unused_imports, reason = "a part of it is used, and here")]
#[path = "../src/backend.rs"]
mod backend;
#[allow(dead_code, unreachable_pub, unused_imports, reason = "a part of it is used, and here")]
#[path = "../src/cache/mod.rs"]
mod cache;
#[allow(dead_code, unreachable_pub, unused_imports, reason = "a part of it is used, and here")]
#[path = "../src/clock.rs"]
mod clock;
#[allow(dead_code, unreachable_pub, unused_imports, reason = "a part of it is used, and here")]
#[path = "../src/mongo/codec/mod.rs"]
mod codec;
#[allow(dead_code, unreachable_pub, unused_imports, reason = "a part of it is used, and here")]
#[path = "../src/error.rs"]
mod error;
#[allow(dead_code, unused_imports, reason = "a part of it is used")]
#[allow(clippy::duplicate_mod, reason = "the cache keeps its own to itself")]
#[path = "../src/cache/freshness.rs"]
mod freshness;
#[allow(dead_code, unreachable_pub, unused_imports, reason = "a part of it is used, and here")]
#[path = "../src/key.rs"]
mod key;
#[allow(dead_code, unreachable_pub, unused_imports, reason = "a part of it is used, and here")]
#[path = "../src/metrics/mod.rs"]
mod metrics;
#[allow(unused_imports, reason = "its tests are not run here")]
#[path = "../src/number.rs"]
mod number;
#[allow(dead_code, unreachable_pub, unused_imports, reason = "a part of it is used, and here")]
#[path = "../src/record.rs"]
mod record;
#[cfg(test)]
#[allow(dead_code, reason = "the tests of what is compiled in here are not run")]
#[path = "../src/samples.rs"]
mod samples;
#[allow(dead_code, unused_imports, reason = "a part of it is used")]
#[path = "../src/sync.rs"]
mod sync;

use std::hint::black_box;
use std::time::Duration;

use bson::RawBson;
use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use serde_json::json;

use crate::cache::{Cache, EvictionPolicy, Limits, Lookup};
use crate::clock::Clock;
use crate::codec::Form;
use crate::freshness::Freshness;
use crate::key::SessionKey;
use crate::metrics::Series;
use crate::record::{Data, Session};

const KEYS: [usize; 3] = [1, 5, 20];

/// As the sessions of `cargo bench --bench ratios`.
fn data(keys: usize) -> Data {
    let small = |key: usize| json!({ "id": key, "name": "a visitor's name", "at": [key, 1.5] });
    (0..keys).map(|key| (format!("key_{key:02}"), small(key))).collect()
}

fn session(keys: usize) -> Session {
    let now = Clock::system().wall();
    Session { data: data(keys), expires: now.after(Duration::from_secs(3_600)) }
}

fn empty_cache(compact: bool) -> Cache {
    let limits = Limits {
        max_bytes: 64 << 20,
        max_entries: None,
        max_absent: 10_000,
        policy: EvictionPolicy::Lru,
        max_staleness: Duration::from_secs(5),
        exclusive: true,
        outage_grace: Duration::ZERO,
        compact,
    };
    Cache::new(&limits, Clock::system(), &Series::default())
}

fn key(criterion: &mut Criterion) {
    criterion.bench_function("key/of", |bencher| {
        bencher.iter(|| SessionKey::of(black_box(42)));
    });
}

fn stored(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec");
    let forms = [
        ("text", Form::Text),
        ("native", Form::Native),
        #[cfg(feature = "encryption")]
        ("encrypted", {
            let key = codec::Key::from_bytes(&[7; 32]);
            Form::Encrypted(std::sync::Arc::new(codec::Keys::new(1, key)))
        }),
    ];
    for (name, form) in forms {
        for keys in KEYS {
            let data = data(keys);
            let encode = || codec::encode(black_box(&data), &form, &[7; 32]);
            let raw = encode().ok().and_then(|(stored, _)| RawBson::try_from(stored).ok());
            let Some(raw) = raw else { panic!("the data cannot be encoded") };
            let decode = || codec::decode(black_box(raw.as_raw_bson_ref()), &form, &[7; 32]);
            assert!(decode().is_ok_and(|decoded| decoded == data), "the codec is broken");
            let id = |what: &str| BenchmarkId::new(format!("{what}_{name}"), keys);
            group.bench_function(id("encode"), |bencher| bencher.iter(encode));
            group.bench_function(id("decode"), |bencher| bencher.iter(decode));
        }
    }
    group.finish();
}

fn cached(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("cache");
    for (form, compact) in [("plain", false), ("compact", true)] {
        for keys in KEYS {
            let (cache, key) = (empty_cache(compact), SessionKey::of(1));
            cache.ticket(key).publish(session(keys));
            let hit = || match cache.get(black_box(key)) {
                Lookup::Hit(entry) => Some(entry.session()),
                _ => None,
            };
            assert!(hit().is_some(), "it was just published");
            group.bench_function(BenchmarkId::new(format!("hit_{form}"), keys), |bencher| {
                bencher.iter(hit);
            });
            group.bench_function(BenchmarkId::new(format!("publish_{form}"), keys), |bencher| {
                let publish = |session| cache.ticket(black_box(key)).publish(session);
                bencher.iter_batched(|| session(keys), publish, BatchSize::SmallInput);
            });
        }
    }
    let cache = empty_cache(false);
    assert!(matches!(cache.get(SessionKey::of(1)), Lookup::Miss), "it is empty");
    group.bench_function("miss", |bencher| {
        bencher.iter(|| cache.get(black_box(SessionKey::of(1))));
    });
    group.finish();
}

fn rules(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("freshness");
    let (freshness, key) = (Freshness::<()>::new(), SessionKey::of(1));
    group.bench_function("stamp_and_finish", |bencher| {
        bencher.iter(|| {
            let stamp = freshness.stamp(black_box(key), true);
            freshness.finish(stamp, |current| current)
        });
    });
    group.bench_function("void", |bencher| bencher.iter(|| freshness.void(black_box(key), || ())));
    group.bench_function("epoch", |bencher| bencher.iter(|| freshness.epoch()));
    group.finish();
}

/// What counting a hit costs by itself, with no recorder installed: as a hit does it.
fn counted(criterion: &mut Criterion) {
    let metrics = metrics::CacheMetrics::new(&Series::default());
    criterion.bench_function("metrics/hit", |bencher| {
        bencher.iter(|| black_box(&metrics).hits.increment(1));
    });
}

criterion_group!(parts, key, stored, cached, rules, counted);
criterion_main!(parts);
