//! Browsers that a test controls: headless Chromium, driven by a chromedriver.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Stdio;
use std::time::Duration;

use serde_json::json;
use thirtyfour::prelude::*;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::{Mutex, MutexGuard};

use crate::common::{PATIENCE, eventually};
use session_test_support::app::App;

/// The `User-Agent`s of the browsers.
pub(crate) const LINUX: &str = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) \
                                Chrome/150.0.0.0 Safari/537.36";
pub(crate) const WINDOWS: &str =
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64; rv:150.0) Gecko/20100101 Firefox/150.0";
pub(crate) const IPHONE: &str = "Mozilla/5.0 (iPhone; CPU iPhone OS 18_6 like Mac OS X) AppleWebKit/605.1.15 \
                                 (KHTML, like Gecko) Version/18.6 Mobile/15E148 Safari/604.1";

/// A chromedriver. When it is dropped, it ends with its browsers.
pub(crate) struct Chromium {
    driver: Child,
    address: String,
    _alone: MutexGuard<'static, ()>,
}

impl Chromium {
    /// Starts one on a free port of loopback. Returns `None` if Chromium is not installed, and
    /// prints that past the test's captured output.
    pub(crate) async fn start() -> Option<Self> {
        // A browser is several processes, so only one test at a time starts browsers.
        static ALONE: Mutex<()> = Mutex::const_new(());
        if !is_there(&["chromium", "google-chrome"]) || !is_there(&["chromedriver"]) {
            return None;
        }
        let alone = ALONE.lock().await;
        let mut driver = Command::new("chromedriver")
            .arg("--port=0")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(driver.stdout.take().unwrap()).lines();
        let listens = async {
            while let Some(line) = lines.next_line().await.unwrap() {
                if let Some((_, port)) = line.split_once("started successfully on port ") {
                    return Some(format!("127.0.0.1:{}", port.trim_end_matches('.')));
                }
            }
            None
        };
        let address = tokio::time::timeout(PATIENCE, listens).await;
        let address = address.expect("chromedriver did not start").expect("it ended at once");
        // Read the rest of the log, so that the chromedriver never blocks on it.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Some(Self { driver, address, _alone: alone })
    }

    /// A browser with its own cookies, with `agent` as its `User-Agent`.
    pub(crate) async fn browser(&self, app: &App, agent: &str) -> Browser {
        self.with(app, agent, json!({})).await
    }

    /// A browser that runs no script of a page.
    pub(crate) async fn browser_without_javascript(&self, app: &App, agent: &str) -> Browser {
        const BLOCK: u32 = 2;
        self.with(
            app,
            agent,
            json!({ "profile.managed_default_content_settings.javascript": BLOCK }),
        )
        .await
    }

    async fn with(&self, app: &App, agent: &str, preferences: serde_json::Value) -> Browser {
        let mut wanted = DesiredCapabilities::chrome();
        for argument in [
            "--headless=new",
            // Chromium's sandbox does not work for root, nor in many containers.
            "--no-sandbox",
            // Containers have little shared memory.
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--disable-background-networking",
            "--no-first-run",
            "--hide-scrollbars",
            "--force-color-profile=srgb",
            "--window-size=1000,900",
            &format!("--user-agent={agent}"),
        ] {
            wanted.add_arg(argument).unwrap();
        }
        wanted.add_experimental_option("prefs", preferences).unwrap();
        let driver = WebDriver::new(format!("http://{}", self.address), wanted).await.unwrap();
        Browser { driver, base: app.url("") }
    }
}

impl Drop for Chromium {
    fn drop(&mut self) {
        // If it were killed at once, it would leave its browsers behind.
        let ended = || -> std::io::Result<()> {
            let mut driver = TcpStream::connect(&self.address)?;
            driver.set_read_timeout(Some(Duration::from_secs(10)))?;
            write!(driver, "GET /shutdown HTTP/1.1\r\nHost: {}\r\n\r\n", self.address)?;
            driver.read_to_end(&mut Vec::new()).map(drop)
        };
        if let Err(error) = ended() {
            eprintln!("chromedriver did not end its browsers: {error}");
        }
        let _ = self.driver.start_kill();
    }
}

/// Whether one of these programs can be run.
fn is_there(names: &[&str]) -> bool {
    let runs = |name: &&str| {
        let said = std::process::Command::new(name).arg("--version").stderr(Stdio::null()).output();
        said.is_ok_and(|said| said.status.success())
    };
    if names.iter().any(runs) {
        return true;
    }
    let missing = names.join(" and no ");
    let how = "to install it: apt-get install chromium chromium-driver (Debian)";
    assert!(std::env::var_os("REQUIRE_CHROMIUM").is_none(), "there is no {missing}; {how}");
    let mut stderr = std::io::stderr();
    writeln!(stderr, "there is no {missing}, so a test was skipped; {how}").unwrap();
    false
}

/// One browser with one window, which shows one app.
pub(crate) struct Browser {
    driver: WebDriver,
    base: String,
}

impl Browser {
    pub(crate) async fn open(&self, path: &str) {
        self.go_to(&format!("{}{path}", self.base)).await;
    }

    pub(crate) async fn go_to(&self, url: &str) {
        self.driver.goto(url).await.unwrap();
    }

    /// Presses the element that a selector finds.
    pub(crate) async fn press(&self, selector: &str) {
        self.driver.find(By::Css(selector)).await.unwrap().click().await.unwrap();
    }

    /// Replaces the text of the field with this id.
    pub(crate) async fn fill(&self, id: &str, text: &str) {
        let field = self.driver.find(By::Id(id)).await.unwrap();
        field.clear().await.unwrap();
        field.send_keys(text).await.unwrap();
    }

    /// Fills in the form on the page, and submits it.
    pub(crate) async fn submit_credentials(&self, name: &str, password: &str) {
        self.fill("name", name).await;
        self.fill("password", password).await;
        self.press("button.primary").await;
    }

    /// Presses the keys of a text. The focused element receives them.
    pub(crate) async fn keys(&self, keys: impl Into<TypingData>) {
        self.driver.active_element().await.unwrap().send_keys(keys).await.unwrap();
    }

    /// The text of each element that a selector finds. While a page is loaded, some may be missing.
    pub(crate) async fn texts(&self, selector: &str) -> Vec<String> {
        let mut texts = Vec::new();
        for element in self.driver.find_all(By::Css(selector)).await.unwrap_or_default() {
            texts.extend(element.text().await);
        }
        texts
    }

    /// The value property of a field.
    pub(crate) async fn value(&self, selector: &str) -> String {
        let field = self.driver.find(By::Css(selector)).await.unwrap();
        field.prop("value").await.unwrap().unwrap_or_default()
    }

    /// Waits until the elements that a selector finds have exactly these texts.
    pub(crate) async fn wait_for(&self, selector: &str, texts: &[&str]) {
        let mut seen = Vec::new();
        let what = format!("{selector} shows {texts:?}");
        let so = async || {
            seen = self.texts(selector).await;
            seen == texts
        };
        if tokio::time::timeout(PATIENCE / 2, eventually(&what, so)).await.is_err() {
            let page = self.driver.source().await.unwrap_or_default();
            panic!("{selector} shows {seen:?} and not {texts:?} in\n{page}");
        }
    }

    /// A picture of the page with this width. Its height is that of the content.
    pub(crate) async fn picture(&self, width: u32) -> Vec<u8> {
        let ask = async |script| {
            let answer = self.driver.execute(script, Vec::new()).await.unwrap();
            answer.json().as_f64().unwrap()
        };
        // A page is at least as high as its window.
        self.driver.set_window_rect(0, 0, width, 300).await.unwrap();
        let bars = ask("return window.outerHeight - window.innerHeight").await;
        let shown = ask("return document.documentElement.scrollHeight").await;
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "whole pixels")]
        let height = (bars + shown) as u32;
        self.driver.set_window_rect(0, 0, width, height).await.unwrap();
        self.driver.screenshot_as_png().await.unwrap()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // It ends with its chromedriver. If the driver were dropped, it would end the browser here
        // by a call that blocks this thread for two minutes: the same thread serves the connection
        // to the chromedriver.
        let _ = self.driver.clone().leak();
    }
}
