//! Parallel requests through the real layers, on two instances of an app. A browser has one cookie jar.

use std::sync::{Arc, Mutex};

use axum::body::Body;
use axum::extract::Request as Parts;
use axum::http::{Request, StatusCode, header};
use axum::middleware::{Next, from_fn};
use axum::response::{AppendHeaders, Response};
use axum::routing::get;
use axum::{Extension, Router};
use futures::future::{BoxFuture, join_all};
use serde_json::{Value, json};
use tokio::sync::{Barrier, Notify};
use tower::ServiceExt;
use tower_sessions::cookie::{Cookie, Key};
use tower_sessions::session::Id;
use tower_sessions::{Session, SessionManagerLayer, SessionStore};
use tower_sessions_moka_mongodb_store::{
    CachedMongoStore, MongoStoreBuilder, RequestScopeLayer, in_request_scope,
};

use super::app::{App, counting};
use crate::common::{Log, create, mongo};

/// The body of a handler, which the test gives to the request.
#[derive(Clone)]
struct Handler(Arc<dyn Fn(Session) -> BoxFuture<'static, ()> + Send + Sync>);

impl Handler {
    fn of<F>(handle: impl Fn(Session) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        Self(Arc::new(move |session| Box::pin(handle(session))))
    }
}

/// A handler that sets its own cookie too.
async fn handle(
    Extension(handler): Extension<Handler>,
    session: Session,
) -> AppendHeaders<[(header::HeaderName, &'static str); 1]> {
    (handler.0)(session).await;
    AppendHeaders([(header::SET_COOKIE, "theme=dark")])
}

fn sessions<S: SessionStore + Clone>(store: &S) -> SessionManagerLayer<S> {
    SessionManagerLayer::new(store.clone()).with_always_save(true)
}

fn routes() -> Router {
    Router::new().route("/", get(handle))
}

/// An instance of an app, as the documents of the layer describe it.
fn site<S: SessionStore + Clone>(store: &S) -> Router {
    routes().layer(sessions(store)).layer(RequestScopeLayer::new())
}

/// A browser. Clones share its cookie jar, as the tabs of a browser do.
#[derive(Clone, Default)]
struct Browser(Arc<Mutex<Option<Cookie<'static>>>>);

impl Browser {
    fn of(id: Id) -> Self {
        Self(Arc::new(Mutex::new(Some(Cookie::new("id", id.to_string())))))
    }

    fn cookie(&self) -> Option<Cookie<'static>> {
        self.0.lock().unwrap().clone()
    }

    fn id(&self) -> Option<Id> {
        self.cookie().map(|cookie| cookie.value().parse().unwrap())
    }

    /// Sends a request, and keeps the cookie of the response.
    async fn request<F>(
        &self,
        site: &Router,
        handler: impl Fn(Session) -> F + Send + Sync + 'static,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        let mut request = Request::get("/").extension(Handler::of(handler));
        if let Some(cookie) = self.cookie() {
            request = request.header(header::COOKIE, cookie.stripped().encoded().to_string());
        }
        let request = request.body(Body::empty()).unwrap();
        let response = site.clone().oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let mut themes = 0;
        for set in response.headers().get_all(header::SET_COOKIE) {
            let cookie = Cookie::parse_encoded(set.to_str().unwrap().to_owned()).unwrap();
            if cookie.name() == "theme" {
                themes += 1;
                continue;
            }
            let removed = cookie.max_age() == Some(time::Duration::ZERO);
            *self.0.lock().unwrap() = (!removed).then_some(cookie);
        }
        assert_eq!(themes, 1, "a cookie of the app");
    }

    async fn value(&self, site: &Router, key: &'static str) -> Option<Value> {
        let found = Arc::new(Mutex::new(None));
        let shared = Arc::clone(&found);
        self.request(site, move |session| {
            let found = Arc::clone(&shared);
            async move { *found.lock().unwrap() = session.get_value(key).await.unwrap() }
        })
        .await;
        found.lock().unwrap().take()
    }
}

async fn set(session: &Session, key: &str, value: impl Into<Value>) {
    session.insert_value(key, value.into()).await.unwrap();
}

async fn number(session: &Session, key: &str) -> i64 {
    session.get(key).await.unwrap().unwrap_or(0)
}

/// A request that has loaded its session waits here until the test opens.
#[derive(Clone, Default)]
struct Gate(Arc<(Notify, Notify)>);

impl Gate {
    async fn pass(&self) {
        self.0.0.notify_one();
        self.0.1.notified().await;
    }

    async fn reached(&self) {
        self.0.0.notified().await;
    }

    fn open(&self) {
        self.0.1.notify_one();
    }
}

/// The number of rounds; `PARALLEL_ROUNDS` sets another one.
fn rounds(default: usize) -> usize {
    std::env::var("PARALLEL_ROUNDS").map_or(default, |rounds| rounds.parse().unwrap())
}

fn options(builder: MongoStoreBuilder) -> MongoStoreBuilder {
    builder.on_conflict(counting).owner(|data| data.get("user")?.as_i64())
}

async fn start() -> (App<CachedMongoStore>, [Router; 2]) {
    let app = App::start(options).await;
    let sites = [site(&app.one), site(&app.two)];
    (app, sites)
}

const PARALLEL: usize = 64;

/// 64 requests on two instances. Each one has loaded the session before any of them saves.
async fn in_parallel<F>(
    browser: &Browser,
    sites: &[Router; 2],
    handler: impl Fn(usize, Session) -> F + Clone + Send + Sync + 'static,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let all_loaded = Arc::new(Barrier::new(PARALLEL));
    let requests = (0..PARALLEL).map(|nth| {
        let browser = browser.clone();
        let site = sites[nth % 2].clone();
        let handler = handler.clone();
        let all_loaded = Arc::clone(&all_loaded);
        tokio::spawn(async move {
            let handler = move |session: Session| {
                let all_loaded = Arc::clone(&all_loaded);
                let handler = handler.clone();
                async move {
                    session.get_value("any").await.unwrap();
                    all_loaded.wait().await;
                    handler(nth, session).await;
                }
            };
            browser.request(&site, handler).await;
        })
    });
    for request in join_all(requests).await {
        request.unwrap();
    }
}

// The check of issue 13.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_parallel_requests_that_insert_a_key_each_make_64_keys() {
    let (app, sites) = start().await;
    for round in 0..rounds(5) {
        let id = app.stored(json!({})).await;
        in_parallel(&Browser::of(id), &sites, |nth, session| async move {
            set(&session, &format!("key {nth}"), nth).await;
        })
        .await;
        let data = app.record(id).await.data;
        assert_eq!(data.len(), PARALLEL, "round {round}");
        assert!((0..PARALLEL).all(|nth| data[&format!("key {nth}")] == nth), "round {round}");
    }
    app.assert_conflicts(0);
    app.assert_dropped(0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_parallel_requests_count_to_64() {
    let (app, sites) = start().await;
    for round in 0..rounds(5) {
        let id = app.stored(json!({})).await;
        in_parallel(&Browser::of(id), &sites, |_, session| async move {
            let n = number(&session, "n").await;
            set(&session, "n", n + 1).await;
        })
        .await;
        assert_eq!(app.record(id).await.data["n"], PARALLEL, "round {round}");
    }
    app.assert_conflicts(u32::try_from(63 * rounds(5)).unwrap());
}

// The check of issue 13; https://github.com/laravel/framework/issues/30996 with "sign out everywhere":
//
//     request      load ───────────────── cycle_id, save ── answered
//     sign-out          delete_by_owner
#[tokio::test]
async fn a_request_that_cycles_its_id_after_sign_out_everywhere_ends_signed_out() {
    let (app, sites) = start().await;
    for round in 0..rounds(100) {
        let id = app.stored(json!({ "user": 1 })).await;
        let browser = Browser::of(id);
        let gate = Gate::default();
        let at_gate = gate.clone();
        // The request runs on this instance or on the other one.
        let request = browser.request(&sites[round % 2], move |session| {
            let gate = at_gate.clone();
            async move {
                assert_eq!(number(&session, "user").await, 1);
                gate.pass().await;
                session.cycle_id().await.unwrap();
                set(&session, "seen", round).await;
            }
        });
        let sign_out = async {
            gate.reached().await;
            assert_eq!(app.one.delete_by_owner("1").await.unwrap(), 1);
            gate.open();
        };
        futures::join!(request, sign_out);
        assert_eq!(browser.id(), Some(id), "round {round}: a new cookie");
        assert_eq!(app.database.length().await.unwrap(), 0, "round {round}");
        assert_eq!(browser.value(&sites[0], "user").await, None, "round {round}");
    }
}

/// Of two requests of one browser, the slow one is answered last. It has loaded the session before the other
/// one logs in under a new id. Returns whether the browser is logged in afterwards.
async fn poll_beside_log_in(
    app: &App<CachedMongoStore>,
    site: impl Fn(&CachedMongoStore) -> Router,
) -> bool {
    let sites = [site(&app.one), site(&app.two)];
    let mut is_logged_in = true;
    for poll_on in 0..2 {
        for poll_writes in [false, true] {
            let browser = Browser::default();
            browser
                .request(&sites[0], |session| async move { set(&session, "csrf", "t").await })
                .await;
            let gate = Gate::default();
            let at_gate = gate.clone();
            let poll = browser.request(&sites[poll_on], move |session| {
                let gate = at_gate.clone();
                async move {
                    session.get_value("csrf").await.unwrap().expect("the session");
                    gate.pass().await;
                    if poll_writes {
                        set(&session, "polled", true).await;
                    }
                }
            });
            let log_in = async {
                gate.reached().await;
                let log_in = browser.request(&sites[0], |session| async move {
                    session.cycle_id().await.unwrap();
                    set(&session, "user", 1).await;
                });
                log_in.await;
                gate.open();
            };
            futures::join!(poll, log_in);
            is_logged_in &= browser.value(&sites[0], "user").await == Some(json!(1));
        }
    }
    is_logged_in
}

// https://github.com/laravel/framework/issues/18187: no data is lost, but the browser would keep the cookie of
// the response that comes last.
#[tokio::test]
async fn a_dropped_save_leaves_the_browser_the_cookie_of_the_log_in() {
    let (app, _) = start().await;
    assert!(poll_beside_log_in(&app, site).await);
    app.assert_dropped(4);
}

#[tokio::test]
async fn a_dropped_save_leaves_the_browser_the_signed_cookie_of_the_log_in() {
    let (app, _) = start().await;
    let key = Key::generate();
    let signed = |store: &CachedMongoStore| {
        let layer = sessions(store).with_signed(key.clone());
        routes().layer(layer).layer(RequestScopeLayer::new())
    };
    assert!(poll_beside_log_in(&app, signed).await);
}

/// Stands for private cookies, which are encrypted: the id is in the cookie, but not as text.
async fn hide_ids(mut request: Parts, next: Next) -> Response {
    let hidden = |cookie: &Cookie<'_>| {
        let mut cookie = cookie.clone().into_owned();
        let value: String = cookie.value().chars().rev().collect();
        cookie.set_value(value);
        cookie
    };
    if let Some(sent) = request.headers().get(header::COOKIE) {
        let sent = Cookie::parse(sent.to_str().unwrap().to_owned()).unwrap();
        let shown = hidden(&sent).to_string().parse().unwrap();
        request.headers_mut().insert(header::COOKIE, shown);
    }
    let mut response = next.run(request).await;
    for set in response.headers_mut().values_mut() {
        if let Ok(cookie) = Cookie::parse(set.to_str().unwrap().to_owned())
            && cookie.name() == "id"
        {
            *set = hidden(&cookie).to_string().parse().unwrap();
        }
    }
    response
}

/// The limit in the documents of the layer: it cannot see which id is in an encrypted cookie.
#[tokio::test]
async fn a_dropped_save_overwrites_the_private_cookie_of_the_log_in() {
    let (app, _) = start().await;
    let private = |store: &CachedMongoStore| {
        let site = routes().layer(sessions(store)).layer(from_fn(hide_ids));
        site.layer(RequestScopeLayer::new())
    };
    assert!(!poll_beside_log_in(&app, private).await);
    app.assert_dropped(4);
}

#[tokio::test]
async fn a_layer_inside_of_the_session_layer_logs_one_warning() {
    let store = mongo().await;
    let log = Log::default();
    let guard = tracing::subscriber::set_default(log.subscriber());
    let inside = routes().layer(RequestScopeLayer::new()).layer(sessions(&store));
    for _ in 0..3 {
        Browser::default().request(&inside, async |_| ()).await;
    }
    drop(guard);
    let said = "RequestScopeLayer is inside of the SessionManagerLayer";
    assert_eq!(log.take().matches(said).count(), 1);
    let guard = tracing::subscriber::set_default(log.subscriber());
    Browser::default().request(&site(&store), async |_| ()).await;
    drop(guard);
    assert!(!log.take().contains(said));
}

#[tokio::test]
async fn nested_layers_are_as_good_as_one() {
    let (app, sites) = start().await;
    let nested = sites.map(|site| site.layer(RequestScopeLayer::new()));
    let id = app.stored(json!({})).await;
    in_parallel(&Browser::of(id), &nested, |nth, session| async move {
        set(&session, &format!("key {nth}"), nth).await;
    })
    .await;
    assert_eq!(app.record(id).await.data.len(), PARALLEL);
    let browser = Browser::of(id);
    let gone = app.one.clone();
    let gone = browser.request(&nested[0], move |session| {
        let gone = gone.clone();
        async move {
            set(&session, "seen", true).await;
            tokio::spawn(async move { gone.delete(&id).await.unwrap() }).await.unwrap();
        }
    });
    gone.await;
    app.assert_dropped(1);
    // A cookie that the layer has set would have attributes.
    assert_eq!(browser.cookie().unwrap().path(), None, "a cookie was set");
}

/// The documents of the layer say so: such a task is outside of the scope. If it loads the session in a scope of
/// its own, it keeps the changes of others.
#[tokio::test]
async fn a_task_that_a_handler_spawns_needs_a_scope_of_its_own() {
    let (app, sites) = start().await;
    for has_scope in [false, true] {
        let id = app.stored(json!({ "a": 0 })).await;
        let store = app.one.clone();
        let gate = Gate::default();
        let at_gate = gate.clone();
        let ended = Gate::default();
        let at_end = ended.clone();
        let handler = move |session: Session| {
            let (store, gate, ended) = (store.clone(), at_gate.clone(), at_end.clone());
            async move {
                let work = async move {
                    let session = if has_scope {
                        Session::new(Some(id), Arc::new(store), None)
                    } else {
                        session
                    };
                    let a = number(&session, "a").await;
                    gate.pass().await;
                    set(&session, "a", a + 1).await;
                    session.save().await.unwrap();
                    ended.pass().await;
                };
                tokio::spawn(async move {
                    if has_scope { in_request_scope(work).await } else { work.await }
                });
            }
        };
        Browser::of(id).request(&sites[0], handler).await;
        gate.reached().await;
        Browser::of(id)
            .request(&sites[1], |session| async move { set(&session, "b", 1).await })
            .await;
        gate.open();
        ended.reached().await;
        let expected = if has_scope { json!({ "a": 1, "b": 1 }) } else { json!({ "a": 1 }) };
        assert_eq!(json!(app.record(id).await.data), expected, "in a scope: {has_scope}");
    }
}

/// The session of the outer layer, for an app with two.
#[derive(Clone)]
struct Outer(Session);

async fn keep_outer(mut request: Parts, next: Next) -> Response {
    let outer = request.extensions().get::<Session>().unwrap().clone();
    request.extensions_mut().insert(Outer(outer));
    next.run(request).await
}

#[tokio::test]
async fn two_stores_of_one_app_share_a_scope() {
    let app = App::<CachedMongoStore>::start(options).await;
    let other = mongo().await;
    let visits = create(&other).await.id;
    let id = app.stored(json!({})).await;
    let gate = Gate::default();
    let both = async |Extension(outer): Extension<Outer>,
                      session: Session,
                      Extension(nth): Extension<usize>,
                      Extension(gate): Extension<Gate>| {
        session.get_value("any").await.unwrap();
        outer.0.get_value("any").await.unwrap();
        if nth == 0 {
            gate.pass().await;
        }
        set(&session, &format!("inner {nth}"), nth).await;
        set(&outer.0, &format!("outer {nth}"), nth).await;
    };
    let site = Router::new()
        .route("/", get(both))
        .layer(SessionManagerLayer::new(app.one.clone()))
        .layer(from_fn(keep_outer))
        .layer(SessionManagerLayer::new(other.clone()).with_name("visits"))
        .layer(RequestScopeLayer::new());
    let send = async |nth: usize| {
        let request = Request::get("/")
            .header(header::COOKIE, format!("id={id}; visits={visits}"))
            .extension(nth)
            .extension(gate.clone());
        let response = site.clone().oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
    };
    let second = async {
        gate.reached().await;
        send(1).await;
        gate.open();
    };
    futures::join!(send(0), second);
    assert_eq!(json!(app.record(id).await.data), json!({ "inner 0": 0, "inner 1": 1 }));
    let data = other.load(&visits).await.unwrap().unwrap().data;
    assert_eq!((&data["outer 0"], &data["outer 1"]), (&json!(0), &json!(1)));
}

/// The older version of the contract, through its own layer.
#[cfg(feature = "tower-sessions-014")]
mod version_014 {
    use tower_sessions_014::{Session, SessionManagerLayer};

    use super::*;

    async fn count(
        session: Session,
        Extension(all_loaded): Extension<Arc<Barrier>>,
        Extension(nth): Extension<usize>,
    ) {
        let n: i64 = session.get("n").await.unwrap().unwrap_or(0);
        all_loaded.wait().await;
        session.insert("n", n + 1).await.unwrap();
        session.insert(&format!("key {nth}"), nth).await.unwrap();
    }

    #[tokio::test]
    async fn parallel_requests_keep_each_others_changes() {
        let app = App::<CachedMongoStore>::start(options).await;
        let id = app.stored(json!({ "n": 0 })).await;
        let all_loaded = Arc::new(Barrier::new(8));
        let requests = (0..8_usize).map(|nth| {
            let store = if nth % 2 == 0 { &app.one } else { &app.two };
            let site = Router::new()
                .route("/", get(count))
                .layer(SessionManagerLayer::new(store.clone()))
                .layer(RequestScopeLayer::new());
            let request = Request::get("/")
                .header(header::COOKIE, format!("id={id}"))
                .extension(Arc::clone(&all_loaded))
                .extension(nth);
            site.oneshot(request.body(Body::empty()).unwrap())
        });
        for response in join_all(requests).await {
            assert_eq!(response.unwrap().status(), StatusCode::OK);
        }
        let data = app.record(id).await.data;
        assert_eq!(data["n"], 8);
        assert_eq!(data.len(), 9);
    }
}
