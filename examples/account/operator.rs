//! The operator's page: the state of the store, with figures that a script refreshes.

use std::collections::BTreeMap;
use std::fmt::Write;

use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;
use time::OffsetDateTime;
use tower_sessions_moka_mongodb_store::{Health, LeaseHealth, MongoHealth, StreamHealth};

use crate::chart::{Chart, HEIGHT, WIDTH};
use crate::figures::{Figures, History, Loads, SECONDS};
use crate::pages;

/// The number of seconds that one row of the table adds up.
const ROW: u32 = 10;

pub(crate) fn routes<S: Clone + Send + Sync + 'static>(history: History) -> Router<S> {
    Router::new()
        .route("/operator", get(page))
        .route("/operator/figures", get(figures))
        .with_state(history)
}

/// The parts of the page that change: texts and SVG paths, by the id of their element. The page itself is
/// built from the same parts, so that it shows the same without JavaScript.
#[derive(Serialize)]
struct Changing {
    /// `well`, `degraded` or `down`.
    level: &'static str,
    text: BTreeMap<&'static str, String>,
    paths: BTreeMap<&'static str, String>,
}

async fn figures(State(history): State<History>) -> impl IntoResponse {
    let changing = Changing::of(&history.figures());
    ([(header::CACHE_CONTROL, "no-store")], Json(changing))
}

async fn page(State(history): State<History>) -> impl IntoResponse {
    let figures = history.figures();
    let changing = Changing::of(&figures);
    let text = |id: &str| changing.text.get(id).map_or("", String::as_str);
    let path = |id: &str| changing.paths.get(id).map_or("", String::as_str);
    let tile = |id: &str, name: &str| {
        let bar = changing.paths.get(&*format!("{id}-bar")).map_or_else(String::new, |path| {
            format!(
                r#"
<svg class="bar" viewBox="0 0 100 4" preserveAspectRatio="none" aria-hidden="true"><path id="{id}-bar" d="{path}"/></svg>"#
            )
        });
        format!(
            r#"<div class="tile"><dt>{name}</dt>
<dd><strong id="{id}">{}</strong><span id="{id}-note">{}</span>{bar}</dd></div>
"#,
            text(id),
            text(&format!("{id}-note")),
        )
    };
    let tiles = [
        tile("hit-rate", "Hit rate"),
        tile("sessions", "Sessions online"),
        tile("lag", "Stream lag"),
        tile("bytes", "Memory held"),
    ]
    .concat();
    let main = format!(
        r#"<main id="main">
<h1>The store at work</h1>
<p id="state" class="state" data-level="{level}" role="status">{state}</p>
<dl class="tiles">
{tiles}</dl>
<figure class="card chart">
<figcaption><h2>Sessions asked for, each second</h2>
<ul class="legend"><li class="memory">from memory</li><li class="mongo">from MongoDB</li></ul></figcaption>
<div class="plot">
<span class="top" id="top">{top}</span>
<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" aria-label="The loads of the last two minutes. The table below has the same figures.">
<path class="grid" d="M0 0H{WIDTH}M0 {half}H{WIDTH}M0 {HEIGHT}H{WIDTH}"/>
<path class="memory" id="memory" d="{memory}"/>
<path class="mongo" id="mongo" d="{mongo}"/>
</svg>
<div class="axis"><span>2 minutes ago</span><span>1 minute ago</span><span>now</span></div>
</div>
</figure>
<p class="clock"><span>As of <span id="at">{at}</span></span> <button id="pause" hidden>Pause</button></p>
<details class="card"><summary>The chart as a table</summary>
{table}</details>
</main>
"#,
        level = changing.level,
        state = text("state"),
        top = text("top"),
        half = HEIGHT / 2,
        memory = path("memory"),
        mongo = path("mongo"),
        at = text("at"),
        table = table(&figures),
    );
    pages::html("The store at work", "", &main, "<script src=\"/operator.js\" defer></script>\n")
}

impl Changing {
    fn of(figures: &Figures) -> Self {
        let (level, state) = state(&figures.health);
        let chart = Chart::of(&figures.seconds);
        let mut changing = Self {
            level,
            text: BTreeMap::from([
                ("state", state.to_owned()),
                ("at", clock(figures.at)),
                ("top", chart.top.to_string()),
            ]),
            paths: BTreeMap::from([("memory", chart.memory), ("mongo", chart.mongo)]),
        };
        changing.add_hit_rate(&figures.seconds);
        changing.tile(["sessions", "sessions-note"], number(figures.sessions), "not expired yet");
        changing.add_lag(&figures.health);
        changing.add_memory(&figures.health);
        changing
    }

    /// Sets the two texts of a tile.
    fn tile(&mut self, [id, note_id]: [&'static str; 2], value: String, note: impl Into<String>) {
        self.text.insert(id, value);
        self.text.insert(note_id, note.into());
    }

    /// Sets the bar of a tile. Without a share the bar is empty.
    fn bar(&mut self, id: &'static str, share: Option<f64>) {
        let width = share.map(|share| 100.0 * share.clamp(0.0, 1.0));
        self.paths
            .insert(id, width.map_or_else(String::new, |width| format!("M0 0H{width:.1}V4H0Z")));
    }

    fn add_hit_rate(&mut self, seconds: &[Loads]) {
        let memory = sum(seconds, |it| it.memory);
        let all = sum(seconds, |it| it.all());
        let note = format!("of {} in 2 minutes", number(all));
        let share = share(memory, all);
        self.tile(["hit-rate", "hit-rate-note"], percent(share), note);
        self.bar("hit-rate-bar", share);
    }

    fn add_lag(&mut self, health: &Health) {
        let (lag, note) = match health.stream {
            StreamHealth::Open { lag, .. } => (Some(lag), "behind MongoDB"),
            StreamHealth::Lost { lag, .. } => (Some(lag), "and the stream is lost"),
            StreamHealth::Opening { .. } => (None, "the stream is being opened"),
            StreamHealth::Unavailable { .. } => (None, "this MongoDB has no change streams"),
            _ => (None, "no change stream"),
        };
        let value = lag.map_or_else(nothing, |lag| format!("{:.1} s", lag.as_secs_f64()));
        // The lag and the time that is left of the lease add up to `max_staleness`.
        let share = match (lag, health.lease) {
            (Some(lag), Some(LeaseHealth::Fresh { left, .. })) => {
                Some(lag.as_secs_f64() / (lag + left).as_secs_f64())
            }
            (lag, _) => lag.map(|_| 1.0),
        };
        self.tile(["lag", "lag-note"], value, note);
        self.bar("lag-bar", share);
    }

    fn add_memory(&mut self, health: &Health) {
        let Some(cache) = health.cache else { return };
        let note =
            format!("of {}, {}", bytes(cache.limit_bytes), counted(cache.entries, "session"));
        self.tile(["bytes", "bytes-note"], bytes(cache.bytes), note);
        self.bar("bytes-bar", share(cache.bytes, cache.limit_bytes));
    }
}

/// The state of the store, as a level and as a sentence.
fn state(health: &Health) -> (&'static str, &'static str) {
    if !health.is_serving() {
        return ("down", "Sessions cannot be served: MongoDB does not answer");
    }
    if !health.is_degraded() {
        return ("well", "All is well");
    }
    let sentence = match (health.mongo, health.stream) {
        (MongoHealth::Unresponsive { .. }, _) => {
            "MongoDB does not answer; cached sessions are served"
        }
        (_, StreamHealth::Opening { .. }) => "The change stream is being opened",
        (_, StreamHealth::Lost { .. }) => "The change stream is lost; reopening it",
        _ => "Cached sessions are too old and are read again",
    };
    ("degraded", sentence)
}

/// The figures of the chart as a table, for screen readers and for exact values.
fn table(figures: &Figures) -> String {
    let mut rows = String::new();
    let mut until = figures.at;
    for seconds in figures.seconds.rchunks(ROW as usize) {
        let memory = sum(seconds, |it| it.memory);
        let mongo = sum(seconds, |it| it.mongo);
        let rate = percent(share(memory, memory + mongo));
        let _ = writeln!(
            rows,
            "<tr><th scope=\"row\">{}</th><td>{}</td><td>{}</td><td>{rate}</td></tr>",
            clock(until),
            number(memory),
            number(mongo),
        );
        until -= time::Duration::seconds(ROW.into());
    }
    format!(
        r#"<table>
<caption>Sessions asked for in the last {SECONDS} seconds, as they were when this page was loaded</caption>
<thead><tr><th scope="col">{ROW} s until</th><th scope="col">From memory</th><th scope="col">From MongoDB</th><th scope="col">Hit rate</th></tr></thead>
<tbody>
{rows}</tbody>
</table>
"#
    )
}

fn sum(seconds: &[Loads], of: impl Fn(&Loads) -> u64) -> u64 {
    seconds.iter().map(of).sum()
}

#[allow(clippy::cast_precision_loss, reason = "a share that is shown with four digits at most")]
fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

fn percent(share: Option<f64>) -> String {
    share.map_or_else(nothing, |share| format!("{:.1} %", 100.0 * share))
}

/// The sign for a missing figure.
fn nothing() -> String {
    "–".to_owned()
}

fn counted(count: u64, what: &str) -> String {
    format!("{} {what}{}", number(count), if count == 1 { "" } else { "s" })
}

/// Formats a number, with spaces between thousands.
fn number(value: u64) -> String {
    let digits = value.to_string();
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push('\u{202f}');
        }
        grouped.push(digit);
    }
    grouped
}

#[allow(clippy::cast_precision_loss, reason = "a size that is shown with one decimal")]
fn bytes(value: u64) -> String {
    let value = value as f64;
    if value >= 1_048_576.0 {
        format!("{:.1} MiB", value / 1_048_576.0).replace(".0 ", " ")
    } else if value >= 102_400.0 {
        format!("{:.0} KiB", value / 1_024.0)
    } else {
        format!("{:.1} KiB", value / 1_024.0)
    }
}

fn clock(at: OffsetDateTime) -> String {
    format!("{:02}:{:02}:{:02} UTC", at.hour(), at.minute(), at.second())
}
