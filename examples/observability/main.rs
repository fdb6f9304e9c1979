//! Counts each visitor's views, and shows Prometheus what the store does meanwhile.
//!
//! `cargo run --example observability`, then point a Prometheus at it: `prometheus.yml` beside this
//! file does, with rules and alerts. See `examples/README.md`.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::{get, post};
use axum::{Json, Router};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use support::AppError;
use tower_sessions::cookie::SameSite;
use tower_sessions::{Expiry, Session, SessionManagerLayer};
use tower_sessions_moka_mongodb_store::{CachedMongoStore, MongoStoreBuilder};

/// Bounds of the durations' buckets, in seconds: from a server next door to the operation timeout.
const SECONDS: [f64; 14] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Bounds of the buckets of how many calls left as one command, which are 128 at most.
const CALLS: [f64; 8] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0];

#[tokio::main]
async fn main() -> ExitCode {
    support::log();
    support::exit(run().await)
}

async fn run() -> Result<()> {
    let listener = support::listen().await?;
    // Before the store, which takes the recorder that is there when it is built.
    let metrics = prometheus()?;
    // A figure for a dashboard is worth a count of the index now and then.
    let options =
        |mongo: MongoStoreBuilder| mongo.name("visitors").count_every(Duration::from_secs(15));
    let mongo = support::connect("observability", options).await?;
    let store = CachedMongoStore::builder(mongo).max_staleness(max_staleness()?).build().await?;

    support::serve(listener, app(store.clone(), metrics)).await?;
    store.shutdown().await;
    Ok(())
}

/// `MAX_STALENESS` in seconds. With a small one, see the lag come near it and the alert fire.
fn max_staleness() -> Result<Duration> {
    let Ok(seconds) = std::env::var("MAX_STALENESS") else { return Ok(Duration::from_secs(5)) };
    let parsed = seconds.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    parsed.with_context(|| format!("MAX_STALENESS={seconds:?} is no number of seconds"))
}

fn app(store: CachedMongoStore, metrics: PrometheusHandle) -> Router {
    let sessions = SessionManagerLayer::new(store.clone())
        .with_name("observability")
        // For plain http on loopback. Leave it out where there is https.
        .with_secure(false)
        .with_same_site(SameSite::Lax)
        .with_expiry(Expiry::OnInactivity(time::Duration::days(1)));
    Router::new()
        .route("/", get(home))
        .route("/views", get(views))
        .route("/logout", post(logout))
        .layer(sessions)
        // For the operator, without a session. A real app has these on a port that is not public.
        .route("/metrics", get(async move || exposition(&metrics)))
        .route("/healthz", get(async move || health(&store)))
}

async fn home(session: Session) -> Result<impl IntoResponse, AppError> {
    let views = session.get("views").await?.unwrap_or(0u64).saturating_add(1);
    session.insert("views", views).await?;
    Ok(support::page(
        "Observability",
        &format!(
            r#"{status}<p>What the store does meanwhile: <a href="/metrics">/metrics</a></p>
<form method="post" action="/logout">
<button>Log out</button>
</form>
"#,
            status = support::status(&format!("Views in your session: {views}")),
        ),
    ))
}

/// The count as it is, which is a load and no save.
async fn views(session: Session) -> Result<String, AppError> {
    Ok(format!("{}\n", session.get("views").await?.unwrap_or(0u64)))
}

async fn logout(session: Session) -> Result<impl IntoResponse, AppError> {
    session.flush().await?;
    Ok(axum::response::Redirect::to("/"))
}

/// Asks nobody, so a probe may come as often as it likes. An instance whose store cannot serve sessions
/// is to be left alone until it can.
fn health(store: &CachedMongoStore) -> impl IntoResponse + use<> {
    let health = store.health();
    let status = if health.is_serving() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(health))
}

/// Collects every metric of this process from now on, durations and sizes in buckets: quantiles of
/// several instances can be computed from those, and from nothing that one instance computes.
fn prometheus() -> Result<PrometheusHandle> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)?
        .set_buckets_for_metric(Matcher::Suffix("_size".to_owned()), &CALLS)?
        .install_recorder()?;
    let upkeep = handle.clone();
    tokio::spawn(async move {
        // Else the durations that nobody comes to read pile up.
        let mut every = tokio::time::interval(Duration::from_secs(5));
        loop {
            every.tick().await;
            upkeep.run_upkeep();
        }
    });
    Ok(handle)
}

fn exposition(metrics: &PrometheusHandle) -> impl IntoResponse + use<> {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], metrics.render())
}
