//! Two instances of an app with axum-login, and one user with three browsers.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{Request, header};
use axum::routing::get;
use axum_login::tower_sessions::SessionManagerLayer;
use axum_login::{AuthManagerLayerBuilder, AuthUser, AuthnBackend};
use futures::TryStreamExt;
use http_body_util::BodyExt;
use tower::ServiceExt;
use tower_sessions_moka_mongodb_store::{
    CachedMongoStore, LiveSession, MongoStore, Owner, SessionHandle,
};

use crate::common::{eventually, uri};

#[derive(Clone, Debug)]
struct User(i64);

impl AuthUser for User {
    type Id = i64;

    fn id(&self) -> i64 {
        self.0
    }

    fn session_auth_hash(&self) -> &[u8] {
        b"hash"
    }
}

/// An authentication backend that accepts every name.
#[derive(Clone)]
struct Anybody;

impl AuthnBackend for Anybody {
    type User = User;
    type Credentials = i64;
    type Error = Infallible;

    async fn authenticate(&self, id: i64) -> Result<Option<User>, Infallible> {
        Ok(Some(User(id)))
    }

    async fn get_user(&self, id: &i64) -> Result<Option<User>, Infallible> {
        Ok(Some(User(*id)))
    }
}

type AuthSession = axum_login::AuthSession<Anybody>;

async fn who(auth: AuthSession) -> String {
    auth.user.map_or_else(|| "nobody".to_owned(), |user| user.0.to_string())
}

async fn log_in(mut auth: AuthSession, number: String) -> String {
    let user = auth.authenticate(number.parse().unwrap()).await.unwrap().unwrap();
    auth.login(&user).await.unwrap();
    "welcome".to_owned()
}

async fn end_others(auth: AuthSession, State(store): State<CachedMongoStore>) -> String {
    let user = auth.user.unwrap();
    let here = auth.session.id().unwrap();
    let this_one = SessionHandle::of(here);
    let listed: Vec<LiveSession> = store.find_by_owner(user.0).try_collect().await.unwrap();
    assert_eq!(listed.iter().filter(|session| session.handle == this_one).count(), 1);
    store.delete_by_owner_except(user.0, here).await.unwrap().to_string()
}

fn app(store: &CachedMongoStore) -> Router {
    let sessions = SessionManagerLayer::new(store.clone());
    Router::new()
        .route("/", get(who).post(log_in).delete(end_others))
        .layer(AuthManagerLayerBuilder::new(Anybody, sessions).build())
        .with_state(store.clone())
}

#[derive(Default)]
struct Browser(Option<String>);

impl Browser {
    async fn request(&mut self, app: &Router, method: &str, body: &str) -> String {
        let mut request = Request::builder().uri("/").method(method);
        if let Some(cookie) = &self.0 {
            request = request.header(header::COOKIE, cookie);
        }
        let request = request.body(Body::from(body.to_owned())).unwrap();
        let response = app.clone().oneshot(request).await.unwrap();
        assert!(response.status().is_success(), "{}", response.status());
        if let Some(cookie) = response.headers().get(header::SET_COOKIE) {
            self.0 = cookie.to_str().unwrap().split(';').next().map(str::to_owned);
        }
        let body = response.into_body().collect().await.unwrap().to_bytes();
        String::from_utf8(body.to_vec()).unwrap()
    }
}

#[tokio::test]
async fn sign_out_elsewhere_ends_two_of_three_sessions_on_both_instances() {
    let uri = uri();
    let mut apps = Vec::new();
    for _ in 0..2 {
        let mongo = MongoStore::builder().uri(&uri).owner(Owner::from_axum_login);
        let mongo = mongo.build().await.unwrap();
        apps.push(app(&CachedMongoStore::builder(mongo).build().await.unwrap()));
    }
    let mut browsers = [const { Browser(None) }; 3];
    let mut anothers = Browser::default();
    assert_eq!(anothers.request(&apps[1], "POST", "8").await, "welcome");
    for (number, browser) in browsers.iter_mut().enumerate() {
        assert_eq!(browser.request(&apps[number % 2], "POST", "7").await, "welcome");
        for app in &apps {
            assert_eq!(browser.request(app, "GET", "").await, "7");
        }
    }
    let [here, elsewhere @ ..] = &mut browsers;
    assert_eq!(here.request(&apps[0], "DELETE", "").await, "2");
    let ended = Instant::now();
    for browser in elsewhere {
        let cookie = browser.0.clone();
        for app in &apps {
            eventually("it is signed out", async || {
                browser.0.clone_from(&cookie);
                browser.request(app, "GET", "").await == "nobody"
            })
            .await;
        }
    }
    assert!(ended.elapsed() < Duration::from_secs(5), "the bound by default");
    for app in &apps {
        assert_eq!(here.request(app, "GET", "").await, "7");
        assert_eq!(anothers.request(app, "GET", "").await, "8");
    }
}
