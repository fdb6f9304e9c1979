//! The example apps from end to end: real processes on one server, called over HTTP.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests, which may panic")]

use std::io::Write;
use std::net::{TcpListener, TcpStream};

use reqwest::redirect::Policy;
use reqwest::{StatusCode, header};
use serde_json::Value;

use crate::app::{App, Visitor};
use crate::common;

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
async fn log_out_ends_the_session_and_its_cookie() {
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
    assert_ne!(thief.cookie().unwrap(), old, "the id of an ended session is in use again");
}

#[tokio::test]
async fn two_apps_share_their_sessions() {
    let uri = common::uri();
    let first = App::start("counter", &uri).await;
    let second = App::start("counter", &uri).await;
    let visitor = Visitor::new();
    for views in 1..=3 {
        assert_eq!(visitor.me(&first).await["views"], views);
    }
    // The second app has not loaded this session, so it has no old entry of it. The first app is
    // not called again: it may show 3 and one more for as long as `max_staleness`.
    for views in 4..=5 {
        assert_eq!(visitor.me(&second).await["views"], views);
    }

    let other = Visitor::new();
    other.me(&first).await;
    let old = other.cookie().unwrap();
    other.post(&first, "/logout", &[]).await;
    assert_eq!(Visitor::with_cookie(&second, &old).me(&second).await["views"], 1);
}

/// A round is eight views at the same time, by turns on two apps, and two more until the session has a new id.
/// `LOST_UPDATES_ROUNDS` sets another number of rounds than 10.
#[tokio::test]
async fn two_apps_lose_no_view_of_eight_parallel_ones() {
    let rounds = std::env::var("LOST_UPDATES_ROUNDS").map_or(10, |rounds| rounds.parse().unwrap());
    let uri = common::uri();
    let first = App::start("counter", &uri).await;
    let second = App::start("counter", &uri).await;
    let visitor = Visitor::new();
    for _ in 1..=10 {
        visitor.me(&first).await;
    }
    for round in 1..=rounds {
        let id = visitor.cookie().unwrap();
        let parallel = (0..8).map(|nth| visitor.me(if nth % 2 == 0 { &first } else { &second }));
        futures::future::join_all(parallel).await;
        assert_eq!(visitor.cookie().unwrap(), id, "the id changed too early");
        let ninth = visitor.me(&first).await;
        let tenth = visitor.me(&first).await;
        assert_eq!(
            (ninth["new_id"].as_bool(), tenth["new_id"].as_bool()),
            (Some(false), Some(true))
        );
        assert_eq!(tenth["views"], 10 + 10 * round);
        let list: Value = serde_json::from_str(&visitor.page(&second, "/sessions").await).unwrap();
        let views: Vec<_> =
            list["sessions"].as_array().unwrap().iter().map(|it| &it["views"]).collect();
        assert_eq!(views, [10 + 10 * round], "round {round}");
    }
}

#[tokio::test]
async fn log_out_on_one_app_ends_the_session_cached_by_the_other() {
    let uri = common::uri();
    let first = App::start("counter", &uri).await;
    let second = App::start("counter", &uri).await;
    let visitor = Visitor::new();
    visitor.me(&first).await;
    assert_eq!(visitor.me(&second).await["views"], 2);
    let cookie = visitor.cookie().unwrap();
    visitor.post(&first, "/logout", &[]).await;
    common::eventually("the second app has received the change", async || {
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
async fn app_ends_despite_half_a_request() {
    let app = App::start("counter", &common::uri()).await;
    let mut slow = TcpStream::connect(app.url("").strip_prefix("http://").unwrap()).unwrap();
    slow.write_all(b"GET / HTTP/1.1\r\nHost: ").unwrap();
    // The app has accepted the slow visitor's connection before this one, which came later.
    Visitor::new().me(&app).await;
    let (status, log) = app.end("TERM").await;
    assert_eq!(status.code(), Some(0), "{status}\n{log}");
}

#[tokio::test]
async fn operator_sees_metrics_and_sessions_but_no_ids() {
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
async fn unusable_address_is_explained() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = listener.local_addr().unwrap().to_string();
    for (address, says) in [(&*taken, "is in use"), ("3000", "such as 127.0.0.1:3000")] {
        let (status, log) = App::spawn("counter", &common::uri(), address, &[]).wait().await;
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
    async fn only_a_signed_in_user_sees_the_page() {
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
    async fn session_ids_from_before_the_log_in_and_after_the_log_out_are_invalid() {
        let app = App::start("login", &common::uri()).await;
        let visitor = Visitor::new();
        // A message is stored for the visitor, so the session exists before a user logs in.
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
