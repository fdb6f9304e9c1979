//! Writes of requests that change nothing, with a layer that saves on each request.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use axum::Router;
use axum::body::Body;
use axum::http::{HeaderValue, Request, StatusCode, header};
use axum::routing::get;
use tokio::task::JoinSet;
use tower::ServiceExt;
use tower_sessions::{Expiry, Session, SessionManagerLayer};
use tower_sessions_moka_mongodb_store::CachedMongoStore;

use crate::bench::{Bench, Measured};
use crate::fixtures::Commands;

const BROWSERS: usize = 32;

/// All requests after the log-ins, through the session layer of tower-sessions and a router of
/// axum.
#[allow(clippy::cast_precision_loss, reason = "a figure to read")]
pub(crate) async fn writes(bench: Bench) -> Result<Measured> {
    let uri = bench.uri();
    let commands = Commands::default();
    let mongo = commands.mongo(&uri).await?;
    let touch_after = Duration::from_secs(60);
    let ours = CachedMongoStore::builder(mongo).touch_after(touch_after).build().await?;
    let two_weeks = Expiry::OnInactivity(time::Duration::days(14));
    let layer =
        SessionManagerLayer::new(ours.clone()).with_always_save(true).with_expiry(two_weeks);
    let app = Router::new().route("/", get(view)).route("/log-in", get(log_in)).layer(layer);
    let mut cookies = Vec::new();
    for _ in 0..bench.size(1_000, 100) {
        cookies.push(visit(&app, "/log-in", None).await?.context("a log-in sets a cookie")?);
    }
    let before = commands.writes();
    let seconds = bench.size(30, 5) as u64;
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut browsers = JoinSet::new();
    for share in cookies.chunks(cookies.len().div_ceil(BROWSERS)) {
        let app = app.clone();
        let share = share.to_vec();
        browsers.spawn(async move {
            let mut requests = 0_usize;
            while Instant::now() < end {
                for cookie in &share {
                    visit(&app, "/", Some(cookie)).await?;
                    requests += 1;
                }
            }
            anyhow::Ok(requests)
        });
    }
    let mut requests = 0;
    while let Some(made) = browsers.join_next().await {
        requests += made??;
    }
    let writes = commands.writes() - before;
    eprintln!("  {requests} requests in {seconds} s, {writes} writes");
    ours.shutdown().await;
    Ok(Measured::Value(writes as f64 / requests as f64))
}

async fn log_in(session: Session) -> Result<(), StatusCode> {
    session.insert("user", 17).await.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
}

async fn view(session: Session) -> Result<String, StatusCode> {
    let user = session.get::<u64>("user").await.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    Ok(user.map_or_else(String::new, |user| user.to_string()))
}

/// Makes a request and returns the cookie that the response sets.
async fn visit(
    app: &Router,
    path: &str,
    cookie: Option<&HeaderValue>,
) -> Result<Option<HeaderValue>> {
    let mut request = Request::builder().uri(path);
    if let Some(cookie) = cookie {
        request = request.header(header::COOKIE, cookie);
    }
    let answer = app.clone().oneshot(request.body(Body::empty())?).await?;
    ensure!(answer.status().is_success(), "a request failed with {}", answer.status());
    if path == "/" {
        let body = axum::body::to_bytes(answer.into_body(), 1_024).await?;
        ensure!(body == "17", "a session was lost");
        return Ok(None);
    }
    let set = answer.headers().get(header::SET_COOKIE).map(HeaderValue::to_str).transpose()?;
    let cookie = set.and_then(|set| set.split(';').next());
    Ok(cookie.map(HeaderValue::from_str).transpose()?)
}
