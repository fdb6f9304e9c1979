//! The server process: an Axum app with the session layer over one of the stores.
//!
//! The load test starts its own program with the argument `server`. Settings come in as one line of
//! JSON on stdin (the URI may hold a password, which the arguments would show to everyone), the port
//! goes out as one line on stdout, and the process ends when stdin does.

use std::io::{BufRead, Read, Write};
use std::net::Ipv4Addr;
use std::sync::Arc;

use anyhow::{Context, Result};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tower_sessions::{Expiry, Session, SessionManagerLayer, SessionStore};

use crate::args::StoreOptions;
use crate::content::Content;
use crate::stats::{Meters, Stats};
use crate::stores::{Kind, Store};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Setup {
    pub(crate) kind: Kind,
    pub(crate) uri: String,
    pub(crate) options: StoreOptions,
    pub(crate) size: usize,
    pub(crate) threads: Option<usize>,
    pub(crate) name_commands: bool,
}

/// Serves until stdin ends. What is logged, with `RUST_LOG` set, goes to stderr.
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
        // It only costs time where it cannot be set.
        let _ = stream.set_nodelay(true);
    });
    let mut out = std::io::stdout();
    writeln!(out, "port {port}")?;
    out.flush()?;
    tokio::select! {
        served = async { axum::serve(listener, app).await } => served?,
        _ = tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new())) => {}
    }
    // Nobody is left to be told of anything, so nothing is to be put in order either.
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
    Router::new()
        .route("/read", get(read))
        .route("/write/{version}", post(write))
        .route("/login/{owner}", post(log_in))
        .route("/rotate", post(rotate))
        .layer(layer)
        .merge(always)
        .route("/bare", get(async || "0 0"))
        .route("/stats", get(stats))
        .with_state(Shared { content: Arc::new(Content::new(size)), meters })
}

type Answer = Result<String, StatusCode>;

async fn read(session: Session) -> Answer {
    answer(&session).await
}

async fn write(session: Session, Path(version): Path<u64>) -> Answer {
    // A session that is gone is not to come back by a write.
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

async fn stats(State(shared): State<Shared>) -> Json<Stats> {
    Json(shared.meters.read())
}

/// What the session holds, for the client to check: its owner and its version.
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
