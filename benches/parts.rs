//! The parts of the store: the key, the codec of the stored data, the cache, and the versions that
//! decide whether an entry may be inserted.
//!
//! `cargo bench --bench parts -- [FILTER]`
//!
//! These parts are private: the feature `internals` exports them. This bench needs no server.

use std::hint::black_box;

use bson::RawBson;
use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use serde_json::json;
use tower_sessions_moka_mongodb_store::internals::{self, Cache, HitCounter, Rules, StoredForm};

type Data = std::collections::HashMap<String, serde_json::Value>;

const KEYS: [usize; 3] = [1, 5, 20];

/// The same data as in `cargo bench --bench ratios`.
fn data(keys: usize) -> Data {
    let small = |key: usize| json!({ "id": key, "name": "a visitor's name", "at": [key, 1.5] });
    (0..keys).map(|key| (format!("key_{key:02}"), small(key))).collect()
}

fn key(criterion: &mut Criterion) {
    criterion.bench_function("key/of", |bencher| {
        bencher.iter(|| internals::key(black_box(42)));
    });
}

fn stored(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec");
    let forms = [
        ("text", StoredForm::text()),
        ("native", StoredForm::native()),
        #[cfg(feature = "encryption")]
        ("encrypted", StoredForm::encrypted()),
    ];
    for (name, form) in forms {
        for keys in KEYS {
            let data = data(keys);
            let encode = || form.encode(black_box(&data));
            let raw = encode().and_then(|stored| RawBson::try_from(stored).ok());
            let Some(raw) = raw else { panic!("the data cannot be encoded") };
            let decode = || form.decode(black_box(&raw));
            assert!(decode().is_some_and(|decoded| decoded == data), "the codec is broken");
            let id = |what: &str| BenchmarkId::new(format!("{what}_{name}"), keys);
            group.bench_function(id("encode"), |bencher| bencher.iter(encode));
            group.bench_function(id("decode"), |bencher| bencher.iter(decode));
        }
    }
    group.finish();
}

fn cached(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("cache");
    let key = internals::key(1);
    for (form, compact) in [("plain", false), ("compact", true)] {
        for keys in KEYS {
            let cache = Cache::new(compact);
            cache.publish(key, data(keys));
            let hit = || cache.hit(black_box(key));
            assert!(hit().is_some(), "it was just published");
            group.bench_function(BenchmarkId::new(format!("hit_{form}"), keys), |bencher| {
                bencher.iter(hit);
            });
            group.bench_function(BenchmarkId::new(format!("publish_{form}"), keys), |bencher| {
                let publish = |data| cache.publish(black_box(key), data);
                bencher.iter_batched(|| data(keys), publish, BatchSize::SmallInput);
            });
        }
    }
    let cache = Cache::new(false);
    assert!(cache.hit(key).is_none(), "it is empty");
    group.bench_function("miss", |bencher| {
        bencher.iter(|| cache.hit(black_box(key)));
    });
    group.finish();
}

fn rules(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("versions");
    let rules = Rules::default();
    let key = internals::key(1);
    group.bench_function("take_and_finish", |bencher| {
        bencher.iter(|| rules.take_and_finish(black_box(key)));
    });
    group.bench_function("invalidate", |bencher| bencher.iter(|| rules.invalidate(black_box(key))));
    group.bench_function("epoch", |bencher| bencher.iter(|| rules.epoch()));
    group.finish();
}

/// The cost of counting a hit, with no recorder installed.
fn counted(criterion: &mut Criterion) {
    let counter = HitCounter::default();
    criterion.bench_function("metrics/hit", |bencher| {
        bencher.iter(|| black_box(&counter).increment());
    });
}

criterion_group!(parts, key, stored, cached, rules, counted);
criterion_main!(parts);
