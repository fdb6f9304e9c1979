//! Counts each visitor's views in a session that MongoDB stores and the cache serves. Parallel views are all
//! counted, also by several instances of this app. A view that overlaps a change of the session's id may be lost.
//!
//! `cargo run --example counter`, then open <http://127.0.0.1:3000>. See `examples/README.md`.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Redirect};
use axum::routing::{get, post};
use axum::{Form, Json, Router};
use futures::StreamExt;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use serde::Deserialize;
use serde_json::{Value, json};
use support::AppError;
use time::format_description::well_known::Rfc3339;
use tower_sessions::cookie::SameSite;
use tower_sessions::{Expiry, Session, SessionManagerLayer};
use tower_sessions_moka_mongodb_store::{
    CachedMongoStore, ErrorKind, LiveSession, RequestScopeLayer,
};

/// The session gets a new id with each view whose number is a multiple of this one.
const VIEWS_PER_ID: u64 = 10;
/// The longest message, in characters. The session stores what a visitor sends, so it needs a limit.
const LONGEST_MESSAGE: usize = 200;
/// The number of sessions on the operator's list.
const LISTED: usize = 100;

#[tokio::main]
async fn main() -> ExitCode {
    support::log();
    support::exit(run().await)
}

async fn run() -> Result<()> {
    let listener = support::listen().await?;
    // Install the recorder before the store: a store uses the recorder that exists when it is built.
    let metrics = prometheus()?;
    let mongo = support::connect("counter", |mongo| mongo.on_conflict(add_up)).await?;
    let store = CachedMongoStore::builder(mongo).build().await?;

    support::serve(listener, app(store.clone(), metrics)).await?;
    store.shutdown().await;
    Ok(())
}

fn app(store: CachedMongoStore, metrics: PrometheusHandle) -> Router {
    let sessions = SessionManagerLayer::new(store.clone())
        .with_name("counter")
        // For http on localhost. Remove this line where the app is served over https.
        .with_secure(false)
        // With `Strict`, a visitor who follows a link from another site would start at 1 again.
        .with_same_site(SameSite::Lax)
        .with_expiry(Expiry::OnInactivity(time::Duration::days(1)));
    Router::new()
        .route("/", get(home))
        .route("/api/me", get(me))
        .route("/message", post(message))
        .route("/logout", post(logout))
        .layer(sessions)
        // Outside of the session layer: parallel requests of one session keep each other's changes.
        .layer(RequestScopeLayer::new())
        // For the operator, without a session. A real app serves these on a port that is not public.
        .route("/sessions", get(list))
        .route("/metrics", get(async move || exposition(&metrics)))
        .with_state(store)
}

/// Merges a value of the session that two requests have changed at the same time. The views of both count. Of
/// other values, the later save wins.
fn add_up(
    key: &str,
    base: Option<&Value>,
    theirs: Option<&Value>,
    ours: Option<&Value>,
) -> Option<Value> {
    let count = |value: Option<&Value>| value.map_or(Some(0), Value::as_u64);
    match (key, count(base), count(theirs), count(ours)) {
        ("views", Some(base), Some(theirs), Some(ours)) => {
            Some(theirs.saturating_add(ours.saturating_sub(base)).into())
        }
        _ => ours.cloned(),
    }
}

/// What the page shows of the session.
struct Visit {
    views: u64,
    online: u64,
    new_id: bool,
}

impl Visit {
    /// Counts one more view. Requests that count at the same time may show the same number: each one shows what
    /// it has loaded, and one more. [`add_up`] stores the sum.
    async fn count(session: &Session, store: &CachedMongoStore) -> Result<Self> {
        let views = session.get("views").await?.unwrap_or(0u64).saturating_add(1);
        session.insert("views", views).await?;
        let new_id = views.is_multiple_of(VIEWS_PER_ID);
        if new_id {
            session.cycle_id().await?;
        }
        // The layer stores a session without an id after this request, but the visitor is online
        // already. The cost of `length` grows with the number of sessions: a busy site uses
        // `estimated_length`.
        let unstored = u64::from(session.id().is_none());
        let online = store.length().await?.saturating_add(unstored);
        Ok(Self { views, online, new_id })
    }
}

async fn home(
    session: Session,
    State(store): State<CachedMongoStore>,
) -> Result<impl IntoResponse, AppError> {
    let visit = Visit::count(&session, &store).await?;
    let flash = session.remove::<String>("flash").await?;
    let flash = flash.map_or_else(String::new, |message| support::status(&message));
    let Visit { views, online, .. } = visit;
    let id = if visit.new_id {
        "Your session has a new id, and has kept its count.".to_owned()
    } else {
        let left = VIEWS_PER_ID - views % VIEWS_PER_ID;
        format!("Your session gets a new id every {VIEWS_PER_ID} views, the next in {left}.")
    };
    Ok(support::page(
        "Counter",
        &format!(
            r#"{flash}<p>Views in your session: <strong>{views}</strong></p>
<p>Sessions online: <strong>{online}</strong></p>
<p>{id}</p>
<form method="post" action="/message">
<label for="message">A message for your next page</label>
<input id="message" name="message" maxlength="{LONGEST_MESSAGE}" required autocomplete="off">
<button>Show it once</button>
</form>
<form method="post" action="/logout">
<button>Log out</button>
</form>
"#
        ),
    ))
}

async fn me(
    session: Session,
    State(store): State<CachedMongoStore>,
) -> Result<impl IntoResponse, AppError> {
    let Visit { views, online, new_id } = Visit::count(&session, &store).await?;
    let body = Json(json!({ "views": views, "online": online, "new_id": new_id }));
    Ok(([(header::CACHE_CONTROL, "no-store")], body))
}

#[derive(Deserialize)]
struct Message {
    message: String,
}

async fn message(session: Session, Form(sent): Form<Message>) -> Result<Redirect, AppError> {
    let message: String = sent.message.trim().chars().take(LONGEST_MESSAGE).collect();
    if !message.is_empty() {
        session.insert("flash", message).await?;
    }
    Ok(Redirect::to("/"))
}

async fn logout(session: Session) -> Result<Redirect, AppError> {
    session.flush().await?;
    Ok(Redirect::to("/"))
}

/// Lists the live sessions. The store returns them without their ids, so nobody can log in with the list.
async fn list(State(store): State<CachedMongoStore>) -> Result<Json<Value>, AppError> {
    let mut all = store.all().take(LISTED);
    let mut sessions = Vec::new();
    while let Some(session) = all.next().await {
        match session {
            Ok(session) => sessions.push(describe(&session)?),
            // Another program has damaged this session, for example. List the others.
            Err(error) if error.kind() == ErrorKind::Decode => {
                sessions.push(json!({ "error": error.to_string() }));
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Json(json!({ "online": store.length().await?, "sessions": sessions })))
}

fn describe(session: &LiveSession) -> Result<Value> {
    Ok(json!({
        "views": session.data.get("views"),
        "created": session.created.format(&Rfc3339)?,
        "updated": session.updated.format(&Rfc3339)?,
        "expires": session.expires.format(&Rfc3339)?,
    }))
}

/// Installs a recorder, which collects every metric of this process from now on.
fn prometheus() -> Result<PrometheusHandle> {
    let handle = PrometheusBuilder::new().install_recorder()?;
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
