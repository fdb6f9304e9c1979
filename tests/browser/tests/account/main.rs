//! `examples/account` from end to end, with browsers: several headless Chromiums at one app.
//!
//! If `chromium` and `chromedriver` are not installed (Debian's packages are `chromium` and
//! `chromium-driver`), these tests print that and do nothing, unless `REQUIRE_CHROMIUM` is set.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests, which may panic")]

mod browser;
mod common;
mod pictures;

use axum::Router;
use axum::response::Html;
use axum::routing::get;
use reqwest::{StatusCode, header};
use session_test_support::app::{App, Visitor};
use thirtyfour::prelude::Key;

use self::browser::{Browser, Chromium, IPHONE, LINUX, WINDOWS};
use crate::common::eventually;

const PASSWORD: &str = "correct horse";

const OTHER: &str = "li.device:not(.this) h3";
const REVOKE: &str = "li.device:not(.this) button";
const EVERYWHERE_ELSE: &str = "button.danger";
const ENDED: &str =
    "You are signed out here: your session has ended, or was ended from another device.";

async fn app() -> App {
    App::start("account", &common::uri()).await
}

/// Creates an account in this browser.
async fn sign_up(browser: &Browser, name: &str) {
    browser.open("/sign-up").await;
    browser.submit_credentials(name, PASSWORD).await;
    let welcome = format!("Welcome, {name}! Your account is ready.");
    browser.wait_for(".message", &[&welcome]).await;
}

async fn sign_in(browser: &Browser, name: &str) {
    browser.open("/sign-in").await;
    browser.submit_credentials(name, PASSWORD).await;
    let welcome = format!("Welcome back, {}!", name.to_lowercase());
    browser.wait_for(".message", &[&welcome]).await;
}

#[tokio::test]
async fn revoking_in_one_browser_signs_the_other_out() {
    let Some(chromium) = Chromium::start().await else { return };
    let app = app().await;
    let one = chromium.browser(&app, LINUX).await;
    let other = chromium.browser(&app, IPHONE).await;
    one.open("/").await;
    one.wait_for("h1", &["Sign in"]).await;
    one.wait_for(".message", &[]).await;
    sign_up(&one, "ferris").await;
    one.wait_for("h3", &["Chrome on Linux This device"]).await;
    one.wait_for(".empty", &["You are signed in nowhere else."]).await;

    sign_in(&other, "ferris").await;
    other.wait_for(".this h3", &["Safari on iPhone This device"]).await;
    other.wait_for(OTHER, &["Chrome on Linux"]).await;
    one.open("/devices").await;
    one.wait_for(".message", &[]).await;
    one.wait_for(".this h3", &["Chrome on Linux This device"]).await;
    one.wait_for(OTHER, &["Safari on iPhone"]).await;

    one.press(REVOKE).await;
    one.wait_for(".message", &["The device is signed out."]).await;
    one.wait_for(OTHER, &[]).await;
    other.open("/devices").await;
    other.wait_for("h1", &["Sign in"]).await;
    other.wait_for(".message", &[ENDED]).await;
    one.open("/devices").await;
    one.wait_for(".this h3", &["Chrome on Linux This device"]).await;

    // The browser still shows the old page, so its button can be pressed again.
    sign_in(&other, "ferris").await;
    one.open("/devices").await;
    other.press("header button").await;
    other.wait_for(".message", &["You are signed out."]).await;
    one.press(REVOKE).await;
    one.wait_for(".message", &["That device was signed out already."]).await;
}

#[tokio::test]
async fn sign_out_elsewhere_signs_out_two_of_three_browsers_of_one_user() {
    let Some(chromium) = Chromium::start().await else { return };
    let app = app().await;
    let [one, two, three] = [
        chromium.browser(&app, LINUX).await,
        chromium.browser(&app, IPHONE).await,
        chromium.browser(&app, WINDOWS).await,
    ];
    let corro = Visitor::new();
    let page = corro.post(&app, "/sign-up", &[("name", "corro"), ("password", PASSWORD)]).await;
    assert!(page.contains("Your account is ready."), "{page}");

    sign_up(&one, "ferris").await;
    sign_in(&two, "ferris").await;
    sign_in(&three, "ferris").await;
    one.open("/devices").await;
    one.wait_for(OTHER, &["Firefox on Windows", "Safari on iPhone"]).await;
    one.press(EVERYWHERE_ELSE).await;
    one.wait_for(".message", &["2 other devices are signed out."]).await;
    one.wait_for("h3", &["Chrome on Linux This device"]).await;
    for other in [&two, &three] {
        other.open("/devices").await;
        other.wait_for(".message", &[ENDED]).await;
    }
    assert!(corro.page(&app, "/devices").await.contains("Signed in as <strong>corro"));
}

#[tokio::test]
async fn everything_except_live_figures_works_without_javascript() {
    let Some(chromium) = Chromium::start().await else { return };
    let app = app().await;
    let one = chromium.browser_without_javascript(&app, WINDOWS).await;
    let other = chromium.browser_without_javascript(&app, LINUX).await;
    sign_up(&one, "ferris").await;
    other.open("/sign-up").await;
    other.submit_credentials("Ferris", "another password").await;
    other.wait_for(".message.error", &["This name is taken."]).await;
    other.open("/sign-in").await;
    other.submit_credentials("ferris", "wrong horse").await;
    other.wait_for(".message.error", &["This name and password do not belong together."]).await;
    assert_eq!(other.value("#name").await, "ferris", "it is to be typed again");
    assert_eq!(other.value("#password").await, "");
    other.open("/devices").await;
    other.wait_for("h1", &["Sign in"]).await;
    sign_in(&other, "FERRIS").await;
    other.press(EVERYWHERE_ELSE).await;
    other.wait_for(".message", &["1 other device is signed out."]).await;
    one.open("/devices").await;
    one.wait_for(".message", &[ENDED]).await;

    other.open("/operator").await;
    other.wait_for("#state", &["All is well"]).await;
    other.wait_for("body[data-live]", &[]).await;
    // The element is hidden, and so has no text.
    other.wait_for("#pause", &[""]).await;
    let shows_so_many = async || {
        other.open("/operator").await;
        other.texts("#sessions").await == ["1"]
    };
    eventually("the operator sees the one session that is left", shows_so_many).await;
    assert!(other.texts("#hit-rate").await[0].ends_with(" %"));
}

#[tokio::test]
async fn operators_figures_refresh_until_paused() {
    let Some(chromium) = Chromium::start().await else { return };
    let app = app().await;
    let operator = chromium.browser(&app, LINUX).await;
    operator.open("/operator").await;
    operator.wait_for("#state", &["All is well"]).await;
    operator.wait_for("#sessions", &["0"]).await;
    operator.wait_for("#hit-rate", &["–"]).await;

    let visitor = Visitor::new();
    visitor.post(&app, "/sign-up", &[("name", "ferris"), ("password", PASSWORD)]).await;
    for _ in 0..19 {
        visitor.page(&app, "/devices").await;
    }
    operator.wait_for("#sessions", &["1"]).await;
    operator.wait_for("#hit-rate-note", &["of 20 in 2 minutes"]).await;
    // If the stream reports a change before its reply arrives, one more load reads from MongoDB.
    let hit_rate = operator.texts("#hit-rate").await.concat();
    assert!(["100.0 %", "95.0 %", "90.0 %"].contains(&&*hit_rate), "{hit_rate}");
    operator.wait_for("#bytes-note", &["of 64 MiB, 1 session"]).await;

    operator.press("#pause").await;
    operator.wait_for("#pause", &["Go on"]).await;
    let halted_at = operator.texts("#at").await;
    Visitor::new().post(&app, "/sign-up", &[("name", "corro"), ("password", PASSWORD)]).await;
    let counted =
        async || visitor.page(&app, "/operator/figures").await.contains(r#""sessions":"2""#);
    eventually("the app has counted the second session", counted).await;
    operator.wait_for("#sessions", &["1"]).await;
    assert_eq!(operator.texts("#at").await, halted_at);
    operator.press("#pause").await;
    operator.wait_for("#sessions", &["2"]).await;

    app.end("TERM").await;
    operator.wait_for("#state", &["This app does not answer; the figures are old"]).await;
}

#[tokio::test]
async fn request_from_another_site_is_rejected() {
    let Some(chromium) = Chromium::start().await else { return };
    let app = app().await;
    let browser = chromium.browser(&app, LINUX).await;
    sign_up(&browser, "ferris").await;
    let other = Visitor::new();
    other.post(&app, "/sign-in", &[("name", "ferris"), ("password", PASSWORD)]).await;

    // For a cookie, another port is the same site, so the browser sends the cookie with this form.
    let form = format!(
        r#"<form method="post" action="{}"><button class="danger">Win</button></form>"#,
        app.url("/devices/sign-out-others")
    );
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let elsewhere = format!("http://{}/", listener.local_addr().unwrap());
    let site = Router::new().route("/", get(async move || Html(form)));
    tokio::spawn(async move { axum::serve(listener, site).await });
    browser.go_to(&elsewhere).await;
    browser.press(EVERYWHERE_ELSE).await;
    browser.wait_for("body", &["This was sent from another site, so nothing was done."]).await;
    browser.open("/devices").await;
    browser.wait_for("h2 .count", &["1"]).await;
    assert!(other.page(&app, "/devices").await.contains("Signed in as <strong>ferris"));
}

#[tokio::test]
async fn keyboard_alone_signs_a_device_out() {
    let Some(chromium) = Chromium::start().await else { return };
    let app = app().await;
    let browser = chromium.browser(&app, LINUX).await;
    sign_up(&browser, "ferris").await;
    let other = Visitor::new();
    other.post(&app, "/sign-in", &[("name", "ferris"), ("password", PASSWORD)]).await;
    browser.open("/devices").await;
    browser.wait_for("h2 .count", &["1"]).await;
    // The link to the content, the name of the site and the button at the top come first.
    for focused in [".skip", ".brand", "header button", REVOKE] {
        browser.keys(Key::Tab + "").await;
        let has_the_focus = format!("{focused}:focus-visible");
        let so = async || browser.texts(&has_the_focus).await.len() == 1;
        eventually(&has_the_focus, so).await;
    }
    browser.keys(Key::Enter + "").await;
    browser.wait_for(".message", &["The device is signed out."]).await;
    assert!(other.page(&app, "/devices").await.contains(ENDED));
}

#[tokio::test]
async fn foreign_handle_and_foreign_origin_end_no_session() {
    let app = app().await;
    let [ferris, corro] = [Visitor::new(), Visitor::new()];
    ferris.post(&app, "/sign-up", &[("name", "ferris"), ("password", PASSWORD)]).await;
    corro.post(&app, "/sign-up", &[("name", "corro"), ("password", PASSWORD)]).await;
    let again = Visitor::new();
    again.post(&app, "/sign-in", &[("name", "corro"), ("password", PASSWORD)]).await;
    let page = again.page(&app, "/devices").await;
    let (_, handle) = page.split_once("name=\"session\" value=\"").unwrap();
    let (handle, _) = handle.split_once('"').unwrap();
    let page = ferris.post(&app, "/devices/sign-out", &[("session", handle)]).await;
    assert!(page.contains("That device was signed out already."), "{page}");
    assert!(corro.page(&app, "/devices").await.contains("Signed in as <strong>corro"));

    let client = reqwest::Client::new();
    for (name, value) in [
        ("sec-fetch-site", "cross-site"),
        ("sec-fetch-site", "same-site"),
        ("origin", "https://elsewhere.example"),
        ("origin", "null"),
    ] {
        let sent = client.post(app.url("/devices/sign-out-others")).header(name, value);
        let sent = sent.header(header::COOKIE, format!("account={}", again.cookie().unwrap()));
        assert_eq!(sent.send().await.unwrap().status(), StatusCode::FORBIDDEN, "{name}: {value}");
    }
    assert!(corro.page(&app, "/devices").await.contains("Signed in as <strong>corro"));
}
