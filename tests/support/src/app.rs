//! The example apps as processes, and visitors who use them.

use std::io::{Read, Seek};
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;

use reqwest::cookie::{CookieStore, Jar};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::PATIENCE;

/// A browser: it keeps its cookies and follows redirects.
pub struct Visitor {
    client: reqwest::Client,
    jar: Arc<Jar>,
}

impl Visitor {
    pub fn new() -> Self {
        let jar = Arc::new(Jar::default());
        let client = reqwest::Client::builder().cookie_provider(jar.clone()).timeout(PATIENCE);
        Self { client: client.build().unwrap(), jar }
    }

    pub fn with_cookie(app: &App, id: &str) -> Self {
        let visitor = Self::new();
        visitor.jar.add_cookie_str(&format!("{}={id}", app.name), &url("http://127.0.0.1"));
        visitor
    }

    /// The session's id. All apps of a test have one host, so they share cookies.
    pub fn cookie(&self) -> Option<String> {
        let cookies = self.jar.cookies(&url("http://127.0.0.1"))?;
        let (_, id) = cookies.to_str().unwrap().split_once('=').unwrap();
        assert_eq!(id.len(), 22, "more than one cookie: {cookies:?}");
        Some(id.to_owned())
    }

    pub async fn me(&self, app: &App) -> Value {
        serde_json::from_str(&self.page(app, "/api/me").await).unwrap()
    }

    pub async fn page(&self, app: &App, path: &str) -> String {
        let answer = self.client.get(app.url(path)).send().await.unwrap();
        answer.error_for_status().unwrap().text().await.unwrap()
    }

    pub async fn post(&self, app: &App, path: &str, form: &[(&str, &str)]) -> String {
        let answer = self.client.post(app.url(path)).form(form).send().await.unwrap();
        answer.error_for_status().unwrap().text().await.unwrap()
    }
}

fn url(text: &str) -> reqwest::Url {
    text.parse().unwrap()
}

/// A running app. When it is dropped, it is killed. If the test fails, its log is printed.
pub struct App {
    name: &'static str,
    child: Child,
    base: String,
    log: std::fs::File,
}

impl App {
    /// Starts the app and waits until it listens.
    pub async fn start(name: &'static str, uri: &str) -> Self {
        Self::start_with(name, uri, &[]).await
    }

    /// [`start`](Self::start) with more variables of the environment.
    pub async fn start_with(name: &'static str, uri: &str, variables: &[(&str, &str)]) -> Self {
        let mut app = Self::spawn(name, uri, "127.0.0.1:0", variables);
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

    pub fn spawn(name: &'static str, uri: &str, address: &str, variables: &[(&str, &str)]) -> Self {
        let log = tempfile::tempfile().unwrap();
        let child = Command::new(program(name))
            .env("MONGODB_URI", uri)
            .env("ADDR", address)
            .env("RUST_LOG", "info")
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log.try_clone().unwrap())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        Self { name, child, base: String::new(), log }
    }

    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// Ends the app by a signal.
    pub async fn end(self, signal: &str) -> (ExitStatus, String) {
        let process = self.child.id().unwrap().to_string();
        let sent = Command::new("kill").args(["-s", signal, &process]).status().await.unwrap();
        assert!(sent.success());
        self.wait().await
    }

    /// Waits until the app ends. Returns its exit status and its log.
    pub async fn wait(mut self) -> (ExitStatus, String) {
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

/// The app that cargo built beside this test: the test is `deps/it-…`, the app is
/// `examples/counter`.
pub fn program(name: &str) -> PathBuf {
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
