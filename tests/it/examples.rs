//! The sample apps from end to end: real processes, on one server, asked over HTTP.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests, which may panic")]

use std::io::{Read, Seek, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use reqwest::cookie::{CookieStore, Jar};
use reqwest::redirect::Policy;
use reqwest::{StatusCode, header};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::common;

/// How long an app may take to start or to end; it takes a moment, unless the machine is busy.
const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::test]
async fn the_counter_counts_and_gets_a_new_id_after_ten_views() {
    let app = App::start("counter", &common::uri()).await;
    let visitor = Visitor::new();
    let mut ids = Vec::new();
    for views in 1..=11 {
        let me = visitor.me(&app).await;
        assert_eq!(me["views"], views);
        assert_eq!(me["online"], 1);
        assert_eq!(me["new_id"], views == 10);
        ids.push(visitor.cookie().unwrap());
    }
    assert!(ids[..9].iter().all(|id| *id == ids[0]), "the id changed too early: {ids:?}");
    assert_ne!(ids[9], ids[0], "the tenth view brings a new id");
    assert_eq!(ids[10], ids[9]);
    assert_eq!(Visitor::new().me(&app).await["online"], 2);
    assert!(visitor.page(&app, "/").await.contains("in your session: <strong>12</strong>"));
}

#[tokio::test]
async fn a_message_is_shown_once_and_as_text() {
    let app = App::start("counter", &common::uri()).await;
    let visitor = Visitor::new();
    let text = r#"<script>alert("hi")</script>"#;
    let page = visitor.post(&app, "/message", &[("message", text)]).await;
    assert!(page.contains("&lt;script&gt;alert(&quot;hi&quot;)&lt;/script&gt;"), "{page}");
    assert!(!page.contains("<script"), "{page}");
    let next = visitor.page(&app, "/").await;
    assert!(!next.contains("script"), "shown twice: {next}");

    let long = "é".repeat(300);
    let page = visitor.post(&app, "/message", &[("message", &long)]).await;
    assert_eq!(page.matches('é').count(), 200);
}

#[tokio::test]
async fn a_message_is_answered_with_303() {
    let app = App::start("counter", &common::uri()).await;
    let client = reqwest::Client::builder().redirect(Policy::none()).build().unwrap();
    for (path, form) in [("/message", "message=hello"), ("/logout", "")] {
        let sent = client.post(app.url(path)).body(form);
        let sent = sent.header(header::CONTENT_TYPE, "application/x-www-form-urlencoded");
        let answer = sent.send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::SEE_OTHER);
        assert_eq!(answer.headers()[header::LOCATION], "/");
    }
}

#[tokio::test]
async fn a_log_out_ends_the_session_and_kills_its_cookie() {
    let app = App::start("counter", &common::uri()).await;
    let visitor = Visitor::new();
    visitor.me(&app).await;
    visitor.me(&app).await;
    let old = visitor.cookie().unwrap();
    let page = visitor.post(&app, "/logout", &[]).await;
    assert!(page.contains("in your session: <strong>1</strong>"), "counted on: {page}");
    assert_ne!(visitor.cookie().unwrap(), old);

    let thief = Visitor::with_cookie(&app, &old);
    assert_eq!(thief.me(&app).await["views"], 1);
    assert_ne!(thief.cookie().unwrap(), old, "an ended session's id came to life again");
}

#[tokio::test]
async fn two_apps_share_their_sessions() {
    let uri = common::uri();
    let (first, second) = (App::start("counter", &uri).await, App::start("counter", &uri).await);
    let visitor = Visitor::new();
    for views in 1..=3 {
        assert_eq!(visitor.me(&first).await["views"], views);
    }
    // The second app has not seen this session, so it holds nothing of it that could be old. The
    // first app is not asked again: it may go on from 3 for as long as `max_staleness`.
    for views in 4..=5 {
        assert_eq!(visitor.me(&second).await["views"], views);
    }

    let other = Visitor::new();
    other.me(&first).await;
    let old = other.cookie().unwrap();
    other.post(&first, "/logout", &[]).await;
    assert_eq!(Visitor::with_cookie(&second, &old).me(&second).await["views"], 1);
}

#[tokio::test]
async fn a_log_out_on_one_app_ends_the_session_that_the_other_has_cached() {
    let uri = common::uri();
    let (first, second) = (App::start("counter", &uri).await, App::start("counter", &uri).await);
    let visitor = Visitor::new();
    visitor.me(&first).await;
    assert_eq!(visitor.me(&second).await["views"], 2);
    let cookie = visitor.cookie().unwrap();
    visitor.post(&first, "/logout", &[]).await;
    common::eventually("the second app has heard of it", async || {
        Visitor::with_cookie(&second, &cookie).me(&second).await["views"] == 1
    })
    .await;
}

#[tokio::test]
async fn the_count_survives_a_restart_and_sigterm_ends_the_app_well() {
    let uri = common::uri();
    let visitor = Visitor::new();
    for views in 1..=3 {
        let app = App::start("counter", &uri).await;
        assert_eq!(visitor.me(&app).await["views"], views);
        let (status, log) = app.end("TERM").await;
        assert_eq!(status.code(), Some(0), "{status}\n{log}");
    }
    let (status, log) = App::start("counter", &uri).await.end("INT").await;
    assert_eq!(status.code(), Some(0), "{status}\n{log}");
}

#[tokio::test]
async fn half_a_request_does_not_keep_the_app_from_ending() {
    let app = App::start("counter", &common::uri()).await;
    let mut slow = TcpStream::connect(app.base.strip_prefix("http://").unwrap()).unwrap();
    slow.write_all(b"GET / HTTP/1.1\r\nHost: ").unwrap();
    // The app has taken the slow visitor's connection before this one's, which came later.
    Visitor::new().me(&app).await;
    let (status, log) = app.end("TERM").await;
    assert_eq!(status.code(), Some(0), "{status}\n{log}");
}

#[tokio::test]
async fn the_operator_sees_metrics_and_sessions_but_no_ids() {
    let app = App::start("counter", &common::uri()).await;
    let visitors = [Visitor::new(), Visitor::new()];
    visitors[0].me(&app).await;
    for _ in 1..=5 {
        visitors[1].me(&app).await;
    }

    let metrics = visitors[0].page(&app, "/metrics").await;
    let hits = metrics
        .lines()
        .find_map(|line| line.strip_prefix(r#"session_store_loads_total{result="hit"} "#))
        .unwrap_or_else(|| panic!("no hits in {metrics}"));
    assert!((1..=4).contains(&hits.parse().unwrap()), "{hits}");
    assert!(metrics.contains("\nsession_store_cache_limit_bytes 67108864\n"), "{metrics}");

    let text = visitors[0].page(&app, "/sessions").await;
    let list: Value = serde_json::from_str(&text).unwrap();
    let mut views: Vec<_> =
        list["sessions"].as_array().unwrap().iter().map(|session| &session["views"]).collect();
    views.sort_by_key(|views| views.as_u64());
    assert_eq!(views, [1, 5]);
    assert_eq!(list["online"], 2);
    for visitor in &visitors {
        let id = visitor.cookie().unwrap();
        assert!(!text.contains(&id) && !metrics.contains(&id), "{id} is in {text}");
    }
}

#[tokio::test]
async fn an_address_that_cannot_be_had_is_explained() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = listener.local_addr().unwrap().to_string();
    for (address, says) in [(&*taken, "is in use"), ("3000", "such as 127.0.0.1:3000")] {
        let (status, log) = App::spawn("counter", &common::uri(), address).wait().await;
        assert_eq!(status.code(), Some(1), "{log}");
        assert!(log.contains(says) && log.contains(address), "{log}");
        assert_eq!(log.lines().count(), 1, "more than need be: {log}");
    }
}

#[cfg(feature = "tower-sessions-014")]
mod login {
    use super::*;

    const RIGHT: [(&str, &str); 2] = [("name", "ferris"), ("password", "hunter42")];

    #[tokio::test]
    async fn only_who_is_signed_in_sees_the_page() {
        let app = App::start("login", &common::uri()).await;
        let visitor = Visitor::new();
        assert_sign_in_form(&visitor.page(&app, "/").await);
        for wrong in [
            [("name", "ferris"), ("password", "hunter43")],
            [("name", "nobody"), ("password", "hunter42")],
            [("name", "corro"), ("password", "hunter42")],
        ] {
            let page = visitor.post(&app, "/login", &wrong).await;
            assert!(page.contains("do not belong together"), "{page}");
            assert_sign_in_form(&page);
        }
        assert!(!visitor.page(&app, "/login").await.contains("role=\"status\""), "shown twice");

        let page = visitor.post(&app, "/login", &RIGHT).await;
        assert!(page.contains("Welcome, ferris!"), "{page}");
        let page = visitor.page(&app, "/").await;
        assert!(page.contains("signed in as <strong>ferris</strong>"), "{page}");
        assert!(!page.contains("Welcome"), "shown twice: {page}");

        let page = visitor.post(&app, "/logout", &[]).await;
        assert!(page.contains("You are signed out."), "{page}");
        let page = visitor.page(&app, "/").await;
        assert_sign_in_form(&page);
        assert!(!page.contains("signed out"), "shown twice: {page}");
    }

    #[tokio::test]
    async fn sessions_of_before_and_after_are_worth_nothing() {
        let app = App::start("login", &common::uri()).await;
        let visitor = Visitor::new();
        // A message waits for the visitor, so there is a session before there is a user.
        visitor.post(&app, "/login", &[("name", "ferris"), ("password", "")]).await;
        let before = visitor.cookie().unwrap();
        visitor.post(&app, "/login", &RIGHT).await;
        let signed_in = visitor.cookie().unwrap();
        assert_ne!(signed_in, before);
        let fixed = Visitor::with_cookie(&app, &before);
        assert_sign_in_form(&fixed.page(&app, "/").await);
        let twin = Visitor::with_cookie(&app, &signed_in);
        assert!(twin.page(&app, "/").await.contains("ferris"));

        visitor.post(&app, "/logout", &[]).await;
        assert_ne!(visitor.cookie().unwrap(), signed_in);
        assert_sign_in_form(&twin.page(&app, "/").await);
        let (status, log) = app.end("TERM").await;
        assert_eq!(status.code(), Some(0), "{status}\n{log}");
    }

    fn assert_sign_in_form(page: &str) {
        assert!(page.contains("type=\"password\"") && !page.contains("signed in as"), "{page}");
    }
}

/// A browser: it keeps its cookies and follows redirects.
struct Visitor {
    client: reqwest::Client,
    jar: Arc<Jar>,
}

impl Visitor {
    fn new() -> Self {
        let jar = Arc::new(Jar::default());
        let client = reqwest::Client::builder().cookie_provider(jar.clone()).timeout(PATIENCE);
        Self { client: client.build().unwrap(), jar }
    }

    fn with_cookie(app: &App, id: &str) -> Self {
        let visitor = Self::new();
        visitor.jar.add_cookie_str(&format!("{}={id}", app.name), &url("http://127.0.0.1"));
        visitor
    }

    /// The session's id. All apps of a test are one host, so they get the same cookies.
    fn cookie(&self) -> Option<String> {
        let cookies = self.jar.cookies(&url("http://127.0.0.1"))?;
        let (_, id) = cookies.to_str().unwrap().split_once('=').unwrap();
        assert_eq!(id.len(), 22, "more than one cookie: {cookies:?}");
        Some(id.to_owned())
    }

    async fn me(&self, app: &App) -> Value {
        serde_json::from_str(&self.page(app, "/api/me").await).unwrap()
    }

    async fn page(&self, app: &App, path: &str) -> String {
        let answer = self.client.get(app.url(path)).send().await.unwrap();
        answer.error_for_status().unwrap().text().await.unwrap()
    }

    async fn post(&self, app: &App, path: &str, form: &[(&str, &str)]) -> String {
        let answer = self.client.post(app.url(path)).form(form).send().await.unwrap();
        answer.error_for_status().unwrap().text().await.unwrap()
    }
}

fn url(text: &str) -> reqwest::Url {
    text.parse().unwrap()
}

/// A running app. It is killed when this is dropped, and what it logged is shown if the test fails.
struct App {
    name: &'static str,
    child: Child,
    base: String,
    log: std::fs::File,
}

impl App {
    /// Starts the app and waits until it listens.
    async fn start(name: &'static str, uri: &str) -> Self {
        let mut app = Self::spawn(name, uri, "127.0.0.1:0");
        let mut lines = BufReader::new(app.child.stdout.take().unwrap()).lines();
        let listens = async {
            while let Some(line) = lines.next_line().await.unwrap() {
                if let Some(base) = line.strip_prefix("listening on ") {
                    return Some(base.to_owned());
                }
            }
            None
        };
        let base = tokio::time::timeout(PATIENCE, listens).await;
        app.base = base.expect("the app did not start").expect("the app ended at once");
        app
    }

    fn spawn(name: &'static str, uri: &str, address: &str) -> Self {
        let log = tempfile::tempfile().unwrap();
        let child = Command::new(program(name))
            .env("MONGODB_URI", uri)
            .env("ADDR", address)
            .env("RUST_LOG", "info")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log.try_clone().unwrap())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        Self { name, child, base: String::new(), log }
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// Ends the app by a signal.
    async fn end(self, signal: &str) -> (ExitStatus, String) {
        let process = self.child.id().unwrap().to_string();
        let sent = Command::new("kill").args(["-s", signal, &process]).status().await.unwrap();
        assert!(sent.success());
        self.wait().await
    }

    /// Waits until the app ends; answers with how it did, and what it logged.
    async fn wait(mut self) -> (ExitStatus, String) {
        let ended = tokio::time::timeout(PATIENCE, self.child.wait()).await;
        (ended.expect("the app did not end").unwrap(), self.logged())
    }

    fn logged(&mut self) -> String {
        let mut log = String::new();
        self.log.rewind().unwrap();
        self.log.read_to_string(&mut log).unwrap();
        log
    }
}

impl Drop for App {
    fn drop(&mut self) {
        let _ = self.child.start_kill();
        if std::thread::panicking() {
            let log = self.logged();
            eprintln!("--- the log of {} ---\n{log}", self.name);
        }
    }
}

/// The app that cargo built beside this test: `deps/it-…` is this, `examples/counter` is that.
pub(crate) fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let profile = test.ancestors().nth(2).unwrap();
    let path = profile.join("examples").join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    assert!(
        path.is_file(),
        "{} is missing: `cargo test` builds the examples, but with `--test it` they are to be \
         built first, by `cargo build --examples` with the same profile and features",
        path.display()
    );
    path
}
