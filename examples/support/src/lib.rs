//! The code that the examples share around their routes: store, listener, shutdown, errors and pages.

use std::io::{ErrorKind, IsTerminal};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tower_sessions_moka_mongodb_store::{MongoStore, MongoStoreBuilder};
use tracing_subscriber::EnvFilter;

/// How long an app waits for open requests when it ends. A visitor may send half a request and stop.
const PATIENCE: Duration = Duration::from_secs(5);

/// The exit code of an app. After an error it is 1, and one line on stderr says why.
#[must_use]
pub fn exit(ended: Result<()>) -> ExitCode {
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Logs to stderr at the level of `RUST_LOG`, by default `info`.
pub fn log() {
    let filter =
        EnvFilter::builder().with_default_directive(tracing::Level::INFO.into()).from_env_lossy();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
}

/// Listens on `ADDR`, by default `127.0.0.1:3000`. Port 0 takes any free port.
///
/// # Errors
///
/// If the address cannot be listened on. The message says what to change.
pub async fn listen() -> Result<TcpListener> {
    let address = std::env::var("ADDR").unwrap_or_else(|_| "127.0.0.1:3000".to_owned());
    match TcpListener::bind(&address).await {
        Ok(listener) => Ok(listener),
        Err(error) if error.kind() == ErrorKind::AddrInUse => Err(error).context(format!(
            "{address} is in use: end the program that listens there, or choose another port, such \
             as ADDR=127.0.0.1:3001 (ADDR=127.0.0.1:0 takes any free port)"
        )),
        Err(error) => Err(error).context(format!(
            "cannot listen on ADDR={address:?}: give an address of this machine and a port, such \
             as 127.0.0.1:3000"
        )),
    }
}

/// Builds a store with `options`, on the server of `MONGODB_URI`. Without that variable, it starts a
/// server that ends with the app.
///
/// # Errors
///
/// If `MONGODB_URI` cannot be used, or if no server can be started.
pub async fn connect(
    database: &'static str,
    options: impl FnOnce(MongoStoreBuilder) -> MongoStoreBuilder,
) -> Result<MongoStore> {
    if std::env::var("MONGODB_URI").is_ok_and(|uri| !uri.trim().is_empty()) {
        let store = options(MongoStore::builder().uri_from_env()).build().await;
        return store.context("MONGODB_URI cannot be used");
    }
    tracing::info!("MONGODB_URI is not set: the app starts a server, which ends with the app");
    // This blocks its thread, for minutes if it must install a server first.
    let uri = tokio::task::spawn_blocking(move || {
        session_test_server::shared().map(|server| server.uri_for(database))
    });
    Ok(options(MongoStore::builder().uri(uri.await??)).build().await?)
}

/// Serves `app` until Ctrl-C or SIGTERM. Then it waits for the open requests, but not longer than
/// `PATIENCE`.
///
/// # Errors
///
/// If the signals cannot be handled, or if the listener fails.
#[allow(clippy::print_stdout, reason = "where the app listens is its one line of output")]
pub async fn serve(listener: TcpListener, app: Router) -> Result<()> {
    let asked = asked_to_end()?;
    let end = CancellationToken::new();
    println!("listening on http://{}", listener.local_addr()?);
    let served = axum::serve(listener, app).with_graceful_shutdown(end.clone().cancelled_owned());
    let out_of_patience = async {
        asked.await;
        end.cancel();
        tokio::time::sleep(PATIENCE).await;
    };
    tokio::select! {
        served = served.into_future() => served?,
        () = out_of_patience => tracing::warn!("shutdown closed requests that took too long"),
    }
    Ok(())
}

/// Installs the signal handlers at once. The future completes at the first signal.
#[cfg(unix)]
fn asked_to_end() -> std::io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};

    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        tracing::info!("ending");
    })
}

#[cfg(not(unix))]
#[allow(clippy::unnecessary_wraps, reason = "the signature is the one for Unix")]
fn asked_to_end() -> std::io::Result<impl Future<Output = ()>> {
    Ok(async { drop(tokio::signal::ctrl_c().await) })
}

/// Any error of a handler. The log gets the error, the visitor gets a plain 500.
#[derive(Debug)]
pub struct AppError(anyhow::Error);

impl<E: Into<anyhow::Error>> From<E> for AppError {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl IntoResponse for AppError {
    fn into_response(self) -> Response {
        tracing::error!(error = format!("{:#}", self.0), "a request failed");
        (StatusCode::INTERNAL_SERVER_ERROR, "Something went wrong here. Please try again later.\n")
            .into_response()
    }
}

/// An HTML page. No cache may store it, because it shows one visitor's data. `main` is already HTML.
#[must_use]
pub fn page(title: &str, main: &str) -> impl IntoResponse + use<> {
    let page = format!(
        r#"<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 1.1rem/1.5 system-ui, sans-serif }}
main {{ max-width: 34rem; margin: 8vh auto; padding: 0 1rem }}
form {{ margin: 1.5rem 0 }}
label {{ display: block }}
input, button {{ font: inherit; padding: .4rem .7rem; margin: .3rem 0 }}
[role=status] {{ border-left: .3rem solid #2a7; padding: .4rem .8rem; overflow-wrap: anywhere }}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
{main}</main>
</body>
</html>
"#,
        title = escape(title),
    );
    ([(header::CACHE_CONTROL, "no-store")], Html(page))
}

/// Formats a message that is shown once.
#[must_use]
pub fn status(message: &str) -> String {
    format!("<p role=\"status\">{}</p>\n", escape(message))
}

/// Escapes `text` for HTML, attributes included, so that a browser finds no tag in it.
#[must_use]
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}
