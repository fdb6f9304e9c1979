//! The server process: an Axum app with the session layer over one of the stores.
//!
//! The load test starts its own program with the argument `server`. It reads its settings as one
//! line of JSON on stdin: the URI may contain a password, and arguments are visible to everyone. It
//! prints the port as one line on stdout. It ends when stdin is closed.

use std::io::{BufRead, Read, Write};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tower_sessions::{Expiry, Session, SessionManagerLayer, SessionStore};
use tower_sessions_moka_mongodb_store::RequestScopeLayer;

use crate::content::Content;
use crate::kind::Kind;
use crate::lost_updates;
use crate::options::StoreOptions;
use crate::stats::{Meters, Stats};
use crate::stores::Store;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Setup {
    pub(crate) kind: Kind,
    pub(crate) uri: String,
    pub(crate) options: StoreOptions,
    pub(crate) size: usize,
    pub(crate) threads: Option<usize>,
    pub(crate) name_commands: bool,
}

/// Serves until stdin is closed. The log goes to stderr if `RUST_LOG` is set.
pub(crate) fn run() -> Result<()> {
    if std::env::var_os("RUST_LOG").is_some() {
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    }
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    let setup: Setup = serde_json::from_str(&line).context("read the settings")?;
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if let Some(threads) = setup.threads {
        runtime.worker_threads(threads);
    }
    runtime.enable_all().build()?.block_on(serve(setup))
}

async fn serve(setup: Setup) -> Result<()> {
    let meters = Meters::install(setup.name_commands)?;
    let store = Store::build(setup.kind, &setup.uri, &setup.options, meters.commands()).await?;
    let app = match store {
        Store::InMemory(store) => app(store, setup.size, meters),
        Store::Mongo(store) => app(store, setup.size, meters),
        Store::Naive(store) => app(store, setup.size, meters),
        Store::Cached(store) => app(store, setup.size, meters),
    };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let port = listener.local_addr()?.port();
    let listener = listener.tap_io(|stream| {
        // An error here only costs time.
        let _ = stream.set_nodelay(true);
    });
    let mut out = std::io::stdout();
    writeln!(out, "port {port}")?;
    out.flush()?;
    tokio::select! {
        served = async { axum::serve(listener, app).await } => served?,
        _ = tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new())) => {}
    }
    // The parent does not read the result, so there is no need for a clean shutdown.
    std::process::exit(0)
}

#[derive(Clone)]
struct Shared {
    content: Arc<Content>,
    meters: Meters,
}

fn app<S: SessionStore + Clone>(store: S, size: usize, meters: Meters) -> Router {
    let layer = SessionManagerLayer::new(store)
        .with_expiry(Expiry::OnInactivity(time::Duration::days(1)))
        .with_secure(false);
    let always =
        Router::new().route("/always/read", get(read)).layer(layer.clone().with_always_save(true));
    let counter = Router::new()
        .route("/views", get(async |session: Session| views(&session).await))
        .route("/views/add", post(add_view))
        .route("/views/rotate", post(rotate_counter))
        .layer(layer.clone());
    let scoped = counter.clone().layer(RequestScopeLayer::new());
    Router::new()
        .route("/read", get(read))
        .route("/write/{version}", post(write))
        .route("/login/{owner}", post(log_in))
        .route("/rotate", post(rotate))
        .layer(layer)
        .merge(always)
        .merge(counter)
        .nest("/scoped", scoped)
        .route("/bare", get(async || "0 0"))
        .route("/stats", get(stats))
        .with_state(Shared { content: Arc::new(Content::new(size)), meters })
}

type Answer = Result<String, StatusCode>;

async fn read(session: Session) -> Answer {
    answer(&session).await
}

async fn write(session: Session, Path(version): Path<u64>) -> Answer {
    // A write must not bring a deleted session back.
    answer(&session).await?;
    session.insert("version", version).await.map_err(failed)?;
    answer(&session).await
}

async fn log_in(session: Session, Path(owner): Path<u64>, State(shared): State<Shared>) -> Answer {
    for (key, value) in shared.content.of(owner) {
        session.insert_value(&key, value).await.map_err(failed)?;
    }
    answer(&session).await
}

async fn rotate(session: Session) -> Answer {
    let said = answer(&session).await?;
    session.cycle_id().await.map_err(failed)?;
    Ok(said)
}

/// How long a view asks something else between the load and the save of its session.
const QUERY: Duration = Duration::from_millis(1);

async fn add_view(session: Session) -> Answer {
    let views = session.get::<u64>(lost_updates::VIEWS).await.map_err(failed)?.unwrap_or(0) + 1;
    tokio::time::sleep(QUERY).await;
    session.insert(lost_updates::VIEWS, views).await.map_err(failed)?;
    Ok(views.to_string())
}

async fn rotate_counter(session: Session) -> Answer {
    let said = views(&session).await?;
    session.cycle_id().await.map_err(failed)?;
    Ok(said)
}

async fn views(session: &Session) -> Answer {
    let views = session.get::<u64>(lost_updates::VIEWS).await.map_err(failed)?;
    views.map(|views| views.to_string()).ok_or(StatusCode::NOT_FOUND)
}

async fn stats(State(shared): State<Shared>) -> Json<Stats> {
    Json(shared.meters.read())
}

/// The owner and the version in the session, which the client checks.
async fn answer(session: &Session) -> Answer {
    let owner = session.get::<u64>("owner").await.map_err(failed)?;
    let version = session.get::<u64>("version").await.map_err(failed)?;
    match (owner, version) {
        (Some(owner), Some(version)) => Ok(format!("{owner} {version}")),
        _ => Err(StatusCode::NOT_FOUND),
    }
}

fn failed(_: tower_sessions::session::Error) -> StatusCode {
    StatusCode::INTERNAL_SERVER_ERROR
}
