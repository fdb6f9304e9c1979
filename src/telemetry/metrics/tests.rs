//! The catalogue equals the registered series, and the documentation.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use metrics::Unit;
use metrics_util::MetricKind;
use metrics_util::debugging::DebuggingRecorder;

use crate::telemetry::metrics::catalogue::{CATALOGUE, Kind, Label, Metric};
use crate::telemetry::metrics::*;
use crate::time::Clock;

const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/metrics.md");

/// The table of `src/metrics.md`, which is part of the crate's documentation.
fn table() -> String {
    let mut table = "| metric | kind | labels | what |\n|---|---|---|---|\n".to_owned();
    for Metric { name, kind, unit, labels, help } in CATALOGUE {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        let unit = match unit {
            Unit::Count => "",
            unit => &format!(", {}", unit.as_str()),
        };
        let labels: Vec<_> = labels.iter().map(cell).collect();
        let labels = labels.join("; ");
        let help = marked(help);
        writeln!(table, "| `{name}` | {kind}{unit} | {labels} | {help} |").unwrap();
    }
    table
}

/// A text with the names of options in backticks.
fn marked(text: &str) -> String {
    let mark = |word: &str| {
        let name = word.trim_end_matches([',', ';']);
        if name.contains('_') { word.replace(name, &format!("`{name}`")) } else { word.to_owned() }
    };
    text.split(' ').map(mark).collect::<Vec<_>>().join(" ")
}

fn cell(Label { name, values }: &Label) -> String {
    let values = values.iter().map(|(value, about)| match about.trim() {
        "" => format!("`{value}`"),
        about => format!("`{value}` ({about})"),
    });
    format!("`{name}`: {}", values.collect::<Vec<_>>().join(", "))
}

#[test]
fn the_documented_table_is_the_catalogue() {
    let table = table();
    if std::env::var_os("UPDATE_METRICS").is_some() {
        std::fs::write(DOCUMENT, &table).unwrap();
    }
    let written = std::fs::read_to_string(DOCUMENT).unwrap_or_default();
    assert!(
        written == table,
        "src/metrics.md differs from the catalogue in src/telemetry/metrics. This command updates it: \
         UPDATE_METRICS=1 cargo test --lib the_documented_table"
    );
}

type Found = BTreeSet<(String, Vec<(String, String)>)>;

/// The series that the catalogue promises.
fn promised(store: Option<&str>) -> Found {
    let mut promised = Found::new();
    for metric in CATALOGUE {
        let mut all = vec![Vec::new()];
        for label in metric.labels {
            let with = |labels: &Vec<(String, String)>| {
                let labels = labels.clone();
                label.values.iter().map(move |(value, _)| {
                    let label = (label.name.to_owned(), (*value).to_owned());
                    labels.iter().cloned().chain([label]).collect()
                })
            };
            all = all.iter().flat_map(with).collect();
        }
        let store = store.map(|store| ("store".to_owned(), store.to_owned()));
        for mut labels in all {
            labels.extend(store.clone());
            promised.insert((metric.name.to_owned(), labels));
        }
    }
    promised
}

#[test]
fn a_new_store_registers_every_series_of_the_catalogue_and_no_other() {
    for store in [None, Some("shop")] {
        let recorder = DebuggingRecorder::new();
        metrics::with_local_recorder(&recorder, || {
            let series = Series::of(store);
            let clock = Clock::system();
            let mongo = MongoMetrics::new(series.clone());
            let retries = mongo.retries(Retry::Stream).clone();
            CacheMetrics::new(&series);
            StreamMetrics::new(&series, retries, clock);
        });
        let mut found = Found::new();
        let mut described = BTreeMap::new();
        for (key, unit, help, _) in recorder.snapshotter().snapshot().into_vec() {
            let (kind, key) = key.into_parts();
            let pair = |label: &metrics::Label| (label.key().to_owned(), label.value().to_owned());
            found.insert((key.name().to_owned(), key.labels().map(pair).collect()));
            described.insert(key.name().to_owned(), (kind, unit, help));
        }
        assert_eq!(found, promised(store));
        for metric in CATALOGUE {
            let kind = match metric.kind {
                Kind::Counter => MetricKind::Counter,
                Kind::Gauge => MetricKind::Gauge,
                Kind::Histogram => MetricKind::Histogram,
            };
            let help = Some(metric.help.into());
            assert_eq!(described[metric.name], (kind, Some(metric.unit), help), "{}", metric.name);
        }
    }
}

#[test]
fn names_follow_the_conventions_of_prometheus() {
    let names: BTreeSet<_> = CATALOGUE.iter().map(|metric| metric.name).collect();
    assert_eq!(names.len(), CATALOGUE.len(), "each name once");
    for metric in CATALOGUE {
        let name = metric.name;
        assert!(name.starts_with("session_store_"), "{name}");
        assert_eq!(name.ends_with("_total"), metric.kind == Kind::Counter, "{name}");
        assert_eq!(name.ends_with("_seconds"), metric.unit == Unit::Seconds, "{name}");
        assert_eq!(name.ends_with("_bytes"), metric.unit == Unit::Bytes, "{name}");
        assert!(!metric.help.is_empty() && !metric.help.ends_with('.'), "{name}");
        for Label { name: label, values } in metric.labels {
            let different: BTreeSet<_> = values.iter().map(|(value, _)| value).collect();
            assert!(*label != "store" && different.len() == values.len(), "{name} {label}");
        }
    }
}

#[test]
fn a_dropped_portion_of_a_gauge_is_subtracted() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let value = || {
        let all = snapshotter.snapshot().into_vec();
        let live = all.into_iter().find(|(key, ..)| key.key().name().ends_with("live_sessions"));
        match live.unwrap().3 {
            metrics_util::debugging::DebugValue::Gauge(value) => value.into_inner(),
            other => panic!("{other:?}"),
        }
    };
    let (one, other) = metrics::with_local_recorder(&recorder, || {
        let metrics = || MongoMetrics::new(Series::default());
        (metrics(), metrics())
    });
    let mut mine = one.live();
    let mut yours = other.live();
    mine.set(5);
    yours.set(3);
    mine.set(4);
    // A snapshot sets the gauge to zero, so the next one shows what was added since.
    assert!((value() - 7.0).abs() < 0.1);
    drop(mine);
    assert!((value() + 4.0).abs() < 0.1);
}
