//! Signs users in with axum-login and shows messages with axum-messages, in sessions that MongoDB
//! stores.
//!
//! `cargo run --example login`, then open <http://127.0.0.1:3000>. See `examples/README.md`.
//!
//! Both crates use tower-sessions 0.14, so your app must enable the feature `tower-sessions-014`. The
//! examples enable it.

use std::fmt::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::{get, post};
use axum::{Form, Router};
use axum_login::tower_sessions::cookie::SameSite;
use axum_login::tower_sessions::{Expiry, SessionManagerLayer};
use axum_login::{AuthManagerLayerBuilder, AuthUser, AuthnBackend, login_required};
use axum_messages::{Messages, MessagesManagerLayer};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use support::AppError;
use tokio::task::{JoinError, spawn_blocking};
use tower_sessions_moka_mongodb_store::{CachedMongoStore, RequestScopeLayer};

/// The users, with the Argon2 hashes of `hunter42` and `correct-horse`, made by
/// `password_auth::generate_hash`.
const USERS: [(&str, &str); 2] = [
    (
        "ferris",
        "$argon2id$v=19$m=19456,t=2,p=1$vfOfQyQbyHzIOf76pl1alQ\
         $clNCpASsYoUcima88iAzhHaZgN3aNizEeVOMur2sOSc",
    ),
    (
        "corro",
        "$argon2id$v=19$m=19456,t=2,p=1$f/dcdjJotTf7NuVl+kVpAw\
         $Czb/ufWEV1rH3fkAi7mg39+8b6drfL1OUZjuN/VEROY",
    ),
];

#[tokio::main]
async fn main() -> ExitCode {
    support::log();
    support::exit(run().await)
}

async fn run() -> Result<()> {
    let listener = support::listen().await?;
    let mongo = support::connect("login", |mongo| mongo).await?;
    let store = CachedMongoStore::builder(mongo).build().await?;

    support::serve(listener, app(store.clone())).await?;
    store.shutdown().await;
    Ok(())
}

fn app(store: CachedMongoStore) -> Router {
    let sessions = SessionManagerLayer::new(store)
        .with_name("login")
        // For http on localhost. Remove this line where the app is served over https.
        .with_secure(false)
        .with_same_site(SameSite::Lax)
        .with_expiry(Expiry::OnInactivity(time::Duration::days(1)));
    Router::new()
        .route("/", get(home))
        .route_layer(login_required!(Users, login_url = "/login"))
        .route("/login", get(form).post(sign_in))
        .route("/logout", post(sign_out))
        .layer(MessagesManagerLayer)
        .layer(AuthManagerLayerBuilder::new(Users::new(), sessions).build())
        // Outside of the session layer: parallel requests of one session keep each other's changes.
        .layer(RequestScopeLayer::new())
}

type AuthSession = axum_login::AuthSession<Users>;

/// The page for users who are signed in.
async fn home(auth: AuthSession, messages: Messages) -> Response {
    let Some(user) = auth.user else { return Redirect::to("/login").into_response() };
    let main = format!(
        r#"{messages}<p>You are signed in as <strong>{name}</strong>.</p>
<form method="post" action="/logout">
<button>Sign out</button>
</form>
"#,
        messages = shown(messages),
        name = support::escape(&user.name),
    );
    support::page("Members only", &main).into_response()
}

async fn form(auth: AuthSession, messages: Messages) -> Response {
    if auth.user.is_some() {
        return Redirect::to("/").into_response();
    }
    let main = format!(
        r#"{messages}<form method="post" action="/login">
<label for="name">Name</label>
<input id="name" name="name" required autocomplete="username">
<label for="password">Password</label>
<input id="password" name="password" type="password" required autocomplete="current-password">
<p><button>Sign in</button></p>
</form>
"#,
        messages = shown(messages),
    );
    support::page("Sign in", &main).into_response()
}

async fn sign_in(
    mut auth: AuthSession,
    messages: Messages,
    Form(credentials): Form<Credentials>,
) -> Result<Redirect, AppError> {
    let Some(user) = auth.authenticate(credentials).await? else {
        messages.error("This name and password do not belong together.");
        return Ok(Redirect::to("/login"));
    };
    // `login` gives the session a new id. An id that an attacker knew before is worthless from here on.
    auth.login(&user).await?;
    messages.success(format!("Welcome, {}!", user.name));
    Ok(Redirect::to("/"))
}

async fn sign_out(mut auth: AuthSession, messages: Messages) -> Result<Redirect, AppError> {
    auth.logout().await?;
    // This message starts a new session, which holds nothing of the user.
    messages.success("You are signed out.");
    Ok(Redirect::to("/login"))
}

/// Takes the messages for this visitor, and formats them.
fn shown(messages: Messages) -> String {
    messages.into_iter().fold(String::new(), |mut html, message| {
        let _ = write!(html, "{}", support::status(&message.message));
        html
    })
}

#[derive(Clone)]
struct User {
    name: String,
    password_hash: String,
    /// A digest of the password hash, because each session stores it and must not hold the hash itself.
    /// A new password makes a new digest, which ends every session of the user.
    session_hash: [u8; 32],
}

impl fmt::Debug for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("User").field("name", &self.name).finish_non_exhaustive()
    }
}

impl AuthUser for User {
    type Id = String;

    fn id(&self) -> String {
        self.name.clone()
    }

    fn session_auth_hash(&self) -> &[u8] {
        &self.session_hash
    }
}

#[derive(Deserialize)]
struct Credentials {
    name: String,
    password: String,
}

/// The users who may sign in.
#[derive(Clone)]
struct Users(Arc<[User]>);

impl Users {
    fn new() -> Self {
        let user = |(name, password_hash): (&str, &str)| User {
            name: name.to_owned(),
            password_hash: password_hash.to_owned(),
            session_hash: Sha256::digest(password_hash).into(),
        };
        Self(USERS.map(user).into())
    }

    fn named(&self, name: &str) -> Option<&User> {
        self.0.iter().find(|user| user.name == name)
    }
}

impl AuthnBackend for Users {
    type User = User;
    type Credentials = Credentials;
    type Error = JoinError;

    async fn authenticate(&self, sent: Credentials) -> Result<Option<User>, JoinError> {
        let users = self.clone();
        // Hashing is slow on purpose, so it must not block a thread that serves requests.
        let check = move || {
            let user = users.named(&sent.name);
            // An unknown name takes as long as a wrong password, so the time does not reveal which
            // names exist.
            let hash = user.map_or(USERS[0].1, |user| &user.password_hash);
            let right = password_auth::verify_password(&sent.password, hash).is_ok();
            user.filter(|_| right).cloned()
        };
        spawn_blocking(check).await
    }

    async fn get_user(&self, name: &String) -> Result<Option<User>, JoinError> {
        Ok(self.named(name).cloned())
    }
}
