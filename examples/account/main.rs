//! An account with its devices, as large sites have it: sign up, sign in, see where you are signed in,
//! and sign out there. A page for the operator shows the state of the store.
//!
//! `cargo run --example account`, then open <http://127.0.0.1:3000>. See `examples/README.md`.
//!
//! axum-login 0.18 and axum-messages 0.8 use tower-sessions 0.14, so your app must enable the feature
//! `tower-sessions-014`. The examples enable it.

mod chart;
mod device;
mod devices;
mod entry;
mod figures;
mod operator;
mod pages;
mod users;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use axum::Router;
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum_login::AuthManagerLayerBuilder;
use axum_login::tower_sessions::cookie::SameSite;
use axum_login::tower_sessions::{Expiry, SessionManagerLayer};
use axum_messages::MessagesManagerLayer;
use tower_sessions_moka_mongodb_store::{
    CachedMongoStore, MongoStoreBuilder, Owner, RequestScopeLayer,
};

use crate::figures::History;
use crate::users::Users;

/// The name of the cookie.
const COOKIE: &str = "account";

/// The largest form, in bytes: enough for a name, a password and their encoding.
const LARGEST_FORM: usize = 4_096;

#[tokio::main]
async fn main() -> ExitCode {
    support::log();
    support::exit(run().await)
}

async fn run() -> Result<()> {
    let listener = support::listen().await?;
    // Install the recorder before the store: a store uses the recorder that exists when it is built.
    let metrics = figures::recorder()?;
    let options = |mongo: MongoStoreBuilder| {
        // The operator's page shows the number of live sessions. Each count scans an index.
        mongo.owner(Owner::from_axum_login).count_every(Duration::from_secs(2))
    };
    let mongo = support::connect("account", options).await?;
    // The session layer saves on each request, so a session knows when its device was last seen. Of the
    // saves that change only the expiry, the store sends one a minute.
    let store =
        CachedMongoStore::builder(mongo).touch_after(Duration::from_secs(60)).build().await?;
    let users = Users::beside(&store);
    let history = History::start(store.clone(), metrics);

    support::serve(listener, app(store.clone(), users, history)).await?;
    store.shutdown().await;
    Ok(())
}

fn app(store: CachedMongoStore, users: Users, history: History) -> Router {
    let sessions = SessionManagerLayer::new(store.clone())
        .with_name(COOKIE)
        // For http on localhost. Remove this line where the app is served over https.
        .with_secure(false)
        // With `Strict`, a user who follows a link from another site would seem to be signed out.
        .with_same_site(SameSite::Lax)
        .with_always_save(true)
        .with_expiry(Expiry::OnInactivity(time::Duration::days(14)));
    Router::new()
        .route("/", get(devices::home))
        .route("/sign-up", get(entry::sign_up_form).post(entry::sign_up))
        .route("/sign-in", get(entry::sign_in_form).post(entry::sign_in))
        .route("/sign-out", post(entry::sign_out))
        .route("/devices", get(devices::page))
        .route("/devices/sign-out", post(devices::sign_out_one))
        .route("/devices/sign-out-others", post(devices::sign_out_others))
        .layer(MessagesManagerLayer)
        .layer(AuthManagerLayerBuilder::new(users, sessions).build())
        // Outside of the session layer. A request that has loaded its session before "sign out everywhere else"
        // cannot give it a new id afterwards, and parallel requests keep each other's changes.
        .layer(RequestScopeLayer::new())
        .with_state(store)
        // Without a session, so that the page does not count its own visits. A real app shows this to its
        // operators only: on a port that is not public, or behind an extractor like `devices::Member`.
        .merge(operator::routes(history))
        .merge(pages::files())
        .layer(DefaultBodyLimit::max(LARGEST_FORM))
        .layer(middleware::from_fn(from_here))
        .layer(middleware::from_fn(guarded))
}

/// Refuses a request that another site makes a visitor's browser send (cross-site request forgery).
///
/// The cookie is `SameSite=Lax`. That does not protect against other ports and subdomains of this site,
/// nor the forms of visitors who are not signed in. Browsers name the origin of a request in
/// `Sec-Fetch-Site`, older ones in `Origin`, so the forms need no token. Other clients send neither header,
/// and hold no user's cookies. See <https://words.filippo.io/csrf/>.
async fn from_here(request: Request, next: Next) -> Response {
    if request.method().is_safe() || is_from_here(request.headers()) {
        return next.run(request).await;
    }
    let refusal = "This was sent from another site, so nothing was done.\n";
    (StatusCode::FORBIDDEN, refusal).into_response()
}

fn is_from_here(headers: &HeaderMap) -> bool {
    if let Some(site) = headers.get("sec-fetch-site") {
        return site == "same-origin" || site == "none";
    }
    let Some(origin) = headers.get(header::ORIGIN) else { return true };
    let origin = origin.to_str().ok();
    let host = headers.get(header::HOST);
    let origin = origin.and_then(|origin| origin.split_once("://")).map(|(_, host)| host);
    origin.is_some() && origin == host.and_then(|host| host.to_str().ok())
}

/// Tells browsers to load nothing from other sites, and to let no other site embed these pages.
async fn guarded(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    for (name, value) in [
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; \
             img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
        ),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        // With `no-referrer`, browsers would send forms with an `Origin` of `null`.
        (header::REFERRER_POLICY, "same-origin"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}
