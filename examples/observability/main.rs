//! Counts each visitor's views, and serves the store's metrics to Prometheus.
//!
//! `cargo run --example observability`, then let a Prometheus scrape it, with the file
//! `prometheus.yml` beside this one, which has rules and alerts. See `examples/README.md`.

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

/// Bounds of the buckets for durations, in seconds: from a server in the same rack to the operation timeout
/// and beyond.
const SECONDS: [f64; 14] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Bounds of the buckets for the number of calls in a batch, which is at most 128.
const CALLS: [f64; 8] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0];

#[tokio::main]
async fn main() -> ExitCode {
    support::log();
    support::exit(run().await)
}

async fn run() -> Result<()> {
    let listener = support::listen().await?;
    // Install the recorder before the store: a store uses the recorder that exists when it is built.
    let metrics = prometheus()?;
    // The dashboard shows the number of live sessions. Each count scans an index.
    let options =
        |mongo: MongoStoreBuilder| mongo.name("visitors").count_every(Duration::from_secs(15));
    let mongo = support::connect("observability", options).await?;
    let store = CachedMongoStore::builder(mongo).max_staleness(max_staleness()?).build().await?;

    support::serve(listener, app(store.clone(), metrics)).await?;
    store.shutdown().await;
    Ok(())
}

/// `MAX_STALENESS` in seconds. With a small value the lag comes near it and the alert fires.
fn max_staleness() -> Result<Duration> {
    let Ok(seconds) = std::env::var("MAX_STALENESS") else { return Ok(Duration::from_secs(5)) };
    let parsed = seconds.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    parsed.with_context(|| format!("MAX_STALENESS={seconds:?} is not a number of seconds"))
}

fn app(store: CachedMongoStore, metrics: PrometheusHandle) -> Router {
    let sessions = SessionManagerLayer::new(store.clone())
        .with_name("observability")
        // For http on localhost. Remove this line where the app is served over https.
        .with_secure(false)
        .with_same_site(SameSite::Lax)
        .with_expiry(Expiry::OnInactivity(time::Duration::days(1)));
    Router::new()
        .route("/", get(home))
        .route("/views", get(views))
        .route("/logout", post(logout))
        .layer(sessions)
        // For the operator, without a session. A real app serves these on a port that is not public.
        .route("/metrics", get(async move || exposition(&metrics)))
        .route("/healthz", get(async move || health(&store)))
}

async fn home(session: Session) -> Result<impl IntoResponse, AppError> {
    let views = session.get("views").await?.unwrap_or(0u64).saturating_add(1);
    session.insert("views", views).await?;
    Ok(support::page(
        "Observability",
        &format!(
            r#"{status}<p>The metrics of the store: <a href="/metrics">/metrics</a></p>
<form method="post" action="/logout">
<button>Log out</button>
</form>
"#,
            status = support::status(&format!("Views in your session: {views}")),
        ),
    ))
}

/// Shows the count: a load and no save.
async fn views(session: Session) -> Result<String, AppError> {
    Ok(format!("{}\n", session.get("views").await?.unwrap_or(0u64)))
}

async fn logout(session: Session) -> Result<impl IntoResponse, AppError> {
    session.flush().await?;
    Ok(axum::response::Redirect::to("/"))
}

/// Answers a readiness probe without I/O, so a probe may ask as often as it likes. A load balancer should
/// send no requests to an instance whose store cannot serve sessions.
fn health(store: &CachedMongoStore) -> impl IntoResponse + use<> {
    let health = store.health();
    let status = if health.is_serving() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(health))
}

/// Installs a recorder with buckets for durations and sizes. Prometheus can compute quantiles over several
/// instances from buckets, but not from the quantiles of each instance.
fn prometheus() -> Result<PrometheusHandle> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)?
        .set_buckets_for_metric(Matcher::Suffix("_size".to_owned()), &CALLS)?
        .install_recorder()?;
    let upkeep = handle.clone();
    tokio::spawn(async move {
        // Without upkeep, durations pile up in memory until the next scrape.
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
