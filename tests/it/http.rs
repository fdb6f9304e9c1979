//! The life of a session over HTTP, through the layer of tower-sessions, in one process.

use std::sync::Arc;

use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use axum::routing::get;
use axum::{Extension, Router};
use http_body_util::BodyExt;
use tokio::sync::Notify;
use tower::ServiceExt;
use tower_sessions::cookie::Cookie;
use tower_sessions::session::Id;
use tower_sessions::{Expiry, Session};

fn routes() -> Router {
    Router::new()
        .route("/", get(|_: Session| async { "hello" }))
        .route("/set/{value}", get(set))
        .route("/get", get(value))
        .route("/remove", get(async |session: Session| drop(session.remove_value("key").await)))
        .route("/clear", get(async |session: Session| session.clear().await))
        .route("/cycle", get(async |session: Session| session.cycle_id().await.unwrap()))
        .route("/flush", get(async |session: Session| session.flush().await.unwrap()))
        .route("/renew", get(renew))
        .route("/tomorrow", get(tomorrow))
        .route("/fail", get(fail))
}

async fn set(
    axum::extract::Path(value): axum::extract::Path<String>,
    session: Session,
) -> StatusCode {
    match session.insert("key", value).await {
        Ok(()) => StatusCode::OK,
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

async fn value(session: Session) -> (StatusCode, String) {
    match session.get::<String>("key").await {
        Ok(value) => (StatusCode::OK, value.unwrap_or_else(|| "nothing".to_owned())),
        Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, String::new()),
    }
}

/// What an app does at a log-in that must not keep anything of the session before.
async fn renew(session: Session) {
    session.flush().await.unwrap();
    session.insert("key", "renewed").await.unwrap();
}

async fn tomorrow(session: Session) {
    let tomorrow = time::OffsetDateTime::now_utc() + time::Duration::days(1);
    session.set_expiry(Some(Expiry::AtDateTime(tomorrow)));
}

async fn fail(session: Session) -> StatusCode {
    session.insert("key", "never").await.unwrap();
    StatusCode::INTERNAL_SERVER_ERROR
}

/// Holds a request between its load and its save.
#[derive(Clone, Default)]
struct Gate {
    reached: Arc<Notify>,
    opened: Arc<Notify>,
}

impl Gate {
    async fn hold(&self) {
        self.reached.notify_one();
        self.opened.notified().await;
    }
}

async fn slow_read(Extension(gate): Extension<Gate>, session: Session) {
    assert!(session.get_value("key").await.unwrap().is_some());
    gate.hold().await;
}

async fn slow_change(Extension(gate): Extension<Gate>, session: Session) {
    session.insert("key", "late").await.unwrap();
    gate.hold().await;
}

/// A browser: it keeps the cookie that it receives.
#[derive(Clone)]
struct Browser {
    app: Router,
    cookie: Option<Cookie<'static>>,
}

impl Browser {
    fn new(app: Router) -> Self {
        Self { app, cookie: None }
    }

    /// A browser whose cookie was invented.
    fn with(app: &Router, cookie: impl Into<String>) -> Self {
        Self { app: app.clone(), cookie: Some(Cookie::new("id", cookie.into())) }
    }

    async fn get(&mut self, path: &str) -> (StatusCode, String) {
        let mut request = Request::builder().uri(path);
        if let Some(cookie) = &self.cookie {
            request = request.header(header::COOKIE, cookie.stripped().encoded().to_string());
        }
        let request = request.body(Body::empty()).unwrap();
        let response = self.app.clone().oneshot(request).await.unwrap();
        for set in response.headers().get_all(header::SET_COOKIE) {
            let cookie = Cookie::parse_encoded(set.to_str().unwrap().to_owned()).unwrap();
            let removed = cookie.max_age() == Some(time::Duration::ZERO);
            self.cookie = (!removed).then_some(cookie);
        }
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    async fn body(&mut self, path: &str) -> String {
        let (status, body) = self.get(path).await;
        assert_eq!(status, StatusCode::OK, "{path}");
        body
    }

    fn value(&self) -> String {
        self.cookie.as_ref().expect("a cookie").value().to_owned()
    }

    fn id(&self) -> Id {
        self.value().parse().expect("an id")
    }
}

/// Cookies that no store issued and that are not ids.
fn malformed() -> Vec<String> {
    let overlong = "A".repeat(4_000);
    [
        "",
        "malformed",
        "A",
        "=",
        "AAAAAAAAAAAAAAAAAAAAA",
        "AAAAAAAAAAAAAAAAAAAAAAA",
        "!!!!!!!!!!!!!!!!!!!!!!",
    ]
    .into_iter()
    .chain(["ääääääääääääääääääääää", "{\"$gt\":\"\"}", "AAAAAAAAAAAAAAAAAAAAAA\0", &overlong])
    .map(str::to_owned)
    .collect()
}

macro_rules! suite {
    ($suite:ident, $store:expr) => {
        mod $suite {
            use std::time::Instant;

            use time::Duration;
            use tower_sessions::cookie::{Key, SameSite};
            use tower_sessions::{SessionManagerLayer, SessionStore};

            use super::*;
            use crate::common::eventually;

            fn an_hour() -> Expiry {
                Expiry::OnInactivity(Duration::hours(1))
            }

            fn app(store: impl SessionStore + Clone) -> Router {
                routes().layer(SessionManagerLayer::new(store).with_expiry(an_hour()))
            }

            #[tokio::test]
            async fn a_visitor_without_data_gets_no_cookie() {
                let mut browser = Browser::new(app($store));
                for path in ["/", "/get", "/remove", "/flush"] {
                    browser.body(path).await;
                    assert!(browser.cookie.is_none(), "{path}");
                }
            }

            #[tokio::test]
            async fn value_in_the_session_is_set_read_changed_and_removed() {
                let mut browser = Browser::new(app($store));
                browser.body("/set/one").await;
                let cookie = browser.cookie.clone().unwrap();
                assert_eq!((cookie.name(), cookie.path()), ("id", Some("/")));
                assert_eq!((cookie.secure(), cookie.http_only()), (Some(true), Some(true)));
                assert_eq!(cookie.same_site(), Some(SameSite::Strict));
                assert_eq!(cookie.max_age(), Some(Duration::hours(1)));
                let id = browser.id();
                assert_eq!(browser.body("/get").await, "one");
                browser.body("/set/two").await;
                assert_eq!(browser.body("/get").await, "two");
                browser.body("/remove").await;
                assert_eq!(browser.body("/get").await, "nothing");
                assert_eq!(browser.id(), id, "the same session all along");
            }

            #[tokio::test]
            async fn two_visitors_have_two_sessions() {
                let mut a = Browser::new(app($store));
                let mut b = a.clone();
                a.body("/set/a").await;
                b.body("/set/b").await;
                assert_ne!(a.id(), b.id());
                assert_eq!((a.body("/get").await, b.body("/get").await), ("a".into(), "b".into()));
            }

            #[tokio::test]
            async fn session_expires_at_its_expiry_and_not_before() {
                let expiry = Expiry::OnInactivity(Duration::seconds(1));
                let layer = SessionManagerLayer::new($store).with_expiry(expiry);
                let mut browser = Browser::new(routes().layer(layer));
                let start = Instant::now();
                browser.body("/set/short").await;
                let cookie = browser.cookie.clone();
                eventually("the session expires", async || {
                    browser.cookie.clone_from(&cookie);
                    browser.body("/get").await == "nothing"
                })
                .await;
                // The expiry is exact to a millisecond, and the wall clock may be adjusted
                // meanwhile.
                assert!(start.elapsed() >= std::time::Duration::from_millis(990));
                assert!(browser.cookie.is_none(), "the cookie goes too");
            }

            #[tokio::test]
            async fn an_expiry_that_the_app_sets_is_stored() {
                let store = $store;
                let mut browser = Browser::new(app(store.clone()));
                browser.body("/set/long").await;
                browser.body("/tomorrow").await;
                let record = store.load(&browser.id()).await.unwrap().unwrap();
                let left = record.expiry_date - time::OffsetDateTime::now_utc();
                assert!(left > Duration::hours(23) && left <= Duration::days(1), "{left}");
            }

            #[tokio::test]
            async fn cycling_the_id_keeps_the_data_and_ends_the_old_id() {
                let mut browser = Browser::new(app($store));
                browser.body("/set/kept").await;
                let mut thief = browser.clone();
                browser.body("/cycle").await;
                assert_ne!(browser.id(), thief.id());
                assert_eq!(browser.body("/get").await, "kept");
                assert_eq!(thief.body("/get").await, "nothing");
                assert_eq!(browser.body("/get").await, "kept");
            }

            #[tokio::test]
            async fn flush_deletes_the_session_and_removes_the_cookie() {
                let mut browser = Browser::new(app($store));
                browser.body("/set/gone").await;
                let mut thief = browser.clone();
                browser.body("/flush").await;
                assert!(browser.cookie.is_none());
                assert_eq!(thief.body("/get").await, "nothing");
            }

            #[tokio::test]
            async fn malformed_cookie_finds_no_session_and_is_replaced() {
                let app = app($store);
                for cookie in malformed() {
                    let mut browser = Browser::with(&app, cookie.clone());
                    assert_eq!(browser.body("/get").await, "nothing", "{cookie:?}");
                    let mut browser = Browser::with(&app, cookie.clone());
                    browser.body("/set/mine").await;
                    assert_ne!(browser.value(), cookie);
                    assert_eq!(browser.body("/get").await, "mine");
                }
            }

            #[tokio::test]
            async fn invented_id_finds_no_session_and_is_replaced() {
                let store = $store;
                let app = app(store.clone());
                for id in [Id(0), Id(-1), Id(i128::MAX), Id::default()] {
                    for path in ["/get", "/remove", "/flush", "/set/mine", "/cycle"] {
                        let mut browser = Browser::with(&app, id.to_string());
                        browser.body(path).await;
                        assert_ne!(
                            browser.cookie.map(|cookie| cookie.value().to_owned()),
                            Some(id.to_string())
                        );
                        assert_eq!(store.load(&id).await.unwrap(), None, "{path}");
                    }
                }
            }

            #[tokio::test]
            async fn cookie_with_another_name_is_ignored() {
                let mut browser = Browser::new(app($store));
                browser.body("/set/mine").await;
                let mut other = browser.clone();
                other.cookie = Some(Cookie::new("other", browser.value()));
                assert_eq!(other.body("/get").await, "nothing");
            }

            #[tokio::test]
            async fn signed_cookie_is_accepted_and_a_forged_one_is_not() {
                let layer = SessionManagerLayer::new($store).with_expiry(an_hour());
                let mut browser = Browser::new(routes().layer(layer.with_signed(Key::generate())));
                browser.body("/set/signed").await;
                assert_eq!(browser.body("/get").await, "signed");
                let signed = browser.value();
                let bare = &signed[signed.len() - 22..];
                assert!(bare.parse::<Id>().is_ok(), "the signature comes first");
                let mut forged = signed.clone().into_bytes();
                forged[3] = if forged[3] == b'A' { b'B' } else { b'A' };
                for value in [bare.to_owned(), String::from_utf8(forged).unwrap()] {
                    assert_eq!(Browser::with(&browser.app, value).body("/get").await, "nothing");
                }
            }

            #[tokio::test]
            async fn always_save_prolongs_a_session_that_is_only_read() {
                let store = $store;
                let layer = SessionManagerLayer::new(store.clone()).with_expiry(an_hour());
                let mut browser = Browser::new(routes().layer(layer.with_always_save(true)));
                browser.body("/set/kept").await;
                let id = browser.id();
                let first = store.load(&id).await.unwrap().unwrap().expiry_date;
                eventually("a read prolongs the session", async || {
                    assert_eq!(browser.body("/get").await, "kept");
                    store.load(&id).await.unwrap().unwrap().expiry_date > first
                })
                .await;
                assert_eq!(browser.id(), id);
            }

            #[tokio::test]
            async fn read_without_always_save_writes_nothing() {
                let store = $store;
                let mut browser = Browser::new(app(store.clone()));
                browser.body("/set/kept").await;
                let first = store.load(&browser.id()).await.unwrap();
                browser.cookie.as_mut().unwrap().set_path("as it was");
                browser.body("/get").await;
                assert_eq!(browser.cookie.as_ref().unwrap().path(), Some("as it was"));
                assert_eq!(store.load(&browser.id()).await.unwrap(), first);
            }

            #[tokio::test]
            async fn a_request_that_failed_stores_nothing() {
                let mut browser = Browser::new(app($store));
                browser.body("/set/kept").await;
                assert_eq!(browser.get("/fail").await.0, StatusCode::INTERNAL_SERVER_ERROR);
                assert_eq!(browser.body("/get").await, "kept");
            }
        }
    };
}

/// What our stores promise where the layer has a hole: no client chooses an id.
macro_rules! our_suite {
    ($suite:ident, $store:expr) => {
        mod $suite {
            use tower_sessions::{SessionManagerLayer, SessionStore};
            use tower_sessions_moka_mongodb_store::mongodb::bson::doc;

            use super::*;

            #[tokio::test]
            async fn flush_and_insert_gives_a_new_id() {
                let store = $store;
                let mut browser =
                    Browser::new(routes().layer(SessionManagerLayer::new(store.clone())));
                browser.body("/set/before").await;
                let before = browser.id();
                browser.body("/renew").await;
                assert_ne!(browser.id(), before);
                assert_eq!(browser.body("/get").await, "renewed");
                assert_eq!(store.load(&before).await.unwrap(), None);
                assert_eq!(store.length().await.unwrap(), 1);
            }

            #[tokio::test]
            async fn clearing_under_an_invented_id_stores_nothing_under_it() {
                let store = $store;
                let app = routes().layer(SessionManagerLayer::new(store.clone()));
                let id = Id::default();
                for path in ["/clear", "/tomorrow", "/renew"] {
                    Browser::with(&app, id.to_string()).get(path).await;
                    assert_eq!(store.load(&id).await.unwrap(), None, "{path}");
                    assert!(!store.contains(id).await.unwrap(), "{path}");
                }
                // The layer takes the last two for sessions. They received an id from our store.
                assert_eq!(store.collection().count_documents(doc! {}).await.unwrap(), 2);
            }

            // In rack this was CVE-2025-32441, in rack-session CVE-2025-46336:
            //
            //     slow request   load ───────────────────── save
            //     log-out               flush ── answered
            #[tokio::test]
            async fn slow_request_does_not_bring_a_logged_out_session_back() {
                let store = $store;
                let gate = Gate::default();
                // With `always_save` the layer also saves after a request that only reads.
                let sessions = SessionManagerLayer::new(store.clone()).with_always_save(true);
                let app = routes()
                    .route("/slow-read", get(slow_read))
                    .route("/slow-change", get(slow_change))
                    .layer(Extension(gate.clone()))
                    .layer(sessions);
                for path in ["/slow-read", "/slow-change"] {
                    let mut browser = Browser::new(app.clone());
                    browser.body("/set/signed-in").await;
                    let id = browser.id();
                    let mut same = browser.clone();
                    let slow = tokio::spawn(async move { same.body(path).await });
                    gate.reached.notified().await;
                    browser.body("/flush").await;
                    gate.opened.notify_one();
                    slow.await.unwrap();
                    assert_eq!(store.load(&id).await.unwrap(), None, "{path}");
                    assert!(!store.contains(id).await.unwrap(), "{path}");
                    let mut thief = Browser::with(&app, id.to_string());
                    assert_eq!(thief.body("/get").await, "nothing", "{path}");
                }
            }

            #[tokio::test]
            async fn invented_id_leaves_no_document() {
                let store = $store;
                let app = routes().layer(SessionManagerLayer::new(store.clone()));
                for path in ["/", "/get", "/remove", "/clear", "/flush"] {
                    Browser::with(&app, Id::default().to_string()).get(path).await;
                }
                let documents = store.collection().count_documents(doc! {}).await.unwrap();
                assert_eq!(documents, 0);
            }

            #[tokio::test]
            async fn outage_is_an_error_and_logs_no_user_out() {
                let store = $store;
                let mut browser =
                    Browser::new(routes().layer(SessionManagerLayer::new(store.clone())));
                browser.body("/set/kept").await;
                let id = browser.id();
                let mut cold = Browser::with(&browser.app, Id::default().to_string());
                store.shutdown().await;
                let invented = cold.value();
                assert_eq!(cold.get("/get").await.0, StatusCode::INTERNAL_SERVER_ERROR);
                assert_eq!(cold.value(), invented, "the cookie stays");
                assert_eq!(browser.get("/set/other").await.0, StatusCode::INTERNAL_SERVER_ERROR);
                assert_eq!(browser.id(), id, "the cookie stays");
            }
        }
    };
}

suite!(memory, tower_sessions::MemoryStore::default());
suite!(uncached, crate::common::mongo().await);
suite!(cached, crate::common::cached().await);
our_suite!(our_uncached, crate::common::mongo().await);
our_suite!(our_cached, crate::common::cached().await);
