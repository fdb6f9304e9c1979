//! Who may sign in: users with a name and a password, in the MongoDB that has the sessions too.

use std::fmt;
use std::sync::Arc;

use axum_login::{AuthUser, AuthnBackend};
use mongodb::Collection;
use mongodb::bson::doc;
use mongodb::error::{ErrorKind, WriteFailure};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tower_sessions_moka_mongodb_store::CachedMongoStore;

/// What MongoDB says when a name is taken.
const DUPLICATE_KEY: i32 = 11_000;

/// Hashing a password takes 19 MiB of memory and a core for a moment, on purpose. So many at a time,
/// however many strangers try: a real app also counts the attempts of each and makes them wait.
const HASHED_AT_ONCE: usize = 4;

pub(crate) type AuthSession = axum_login::AuthSession<Users>;

#[derive(Clone)]
pub(crate) struct User {
    pub(crate) name: String,
    password_hash: String,
    /// Stored in each session, so it is a digest of the hash and not the hash itself. Another
    /// password makes another digest, which ends every session of the user.
    session_hash: [u8; 32],
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

impl fmt::Debug for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("User").finish_non_exhaustive()
    }
}

/// A user as MongoDB has it. The name is the key, so no two users have the same.
#[derive(Serialize, Deserialize)]
struct Stored {
    #[serde(rename = "_id")]
    name: String,
    password_hash: String,
}

impl From<Stored> for User {
    fn from(stored: Stored) -> Self {
        let session_hash = Sha256::digest(&stored.password_hash).into();
        Self { name: stored.name, password_hash: stored.password_hash, session_hash }
    }
}

/// What the forms send.
#[derive(Deserialize)]
pub(crate) struct Credentials {
    name: String,
    password: String,
}

impl Credentials {
    /// The longest name and password, in characters, and the shortest password: what the store keeps
    /// of a stranger, and what is hashed for one, has a limit.
    pub(crate) const NAME: usize = 32;
    pub(crate) const PASSWORD: std::ops::RangeInclusive<usize> = 8..=128;

    /// The name as it is stored: nobody has to remember how it was capitalized.
    pub(crate) fn name(&self) -> String {
        self.name.trim().chars().take(Self::NAME).collect::<String>().to_lowercase()
    }

    /// What is wrong with them for a new user.
    pub(crate) fn fault(&self) -> Option<&'static str> {
        let allowed = |char: char| char.is_alphanumeric() || "._-".contains(char);
        let name = self.name.trim();
        if name.is_empty() || name.chars().count() > Self::NAME || !name.chars().all(allowed) {
            return Some("A name has 1 to 32 letters, digits, dots, dashes and underscores.");
        }
        if !Self::PASSWORD.contains(&self.password.chars().count()) {
            return Some("A password has 8 to 128 characters.");
        }
        None
    }
}

/// All users.
#[derive(Clone)]
pub(crate) struct Users {
    stored: Collection<Stored>,
    hashing: Arc<Semaphore>,
    /// The hash of a password that nobody has.
    nobodys: Arc<str>,
}

impl Users {
    /// The users in the database of a store.
    pub(crate) fn beside(store: &CachedMongoStore) -> Self {
        let sessions = store.collection();
        let database = sessions.client().database(&sessions.namespace().db);
        Self {
            stored: database.collection("account_users"),
            hashing: Arc::new(Semaphore::new(HASHED_AT_ONCE)),
            nobodys: password_auth::generate_hash("").into(),
        }
    }

    /// Makes a new user; `None` if the name is taken.
    pub(crate) async fn sign_up(&self, sent: Credentials) -> Result<Option<User>, Failed> {
        let name = sent.name();
        let password_hash = self.hash(move |_| password_auth::generate_hash(sent.password)).await?;
        let user = Stored { name, password_hash };
        match self.stored.insert_one(&user).await {
            Ok(_) => Ok(Some(user.into())),
            Err(error) if is_duplicate(&error) => Ok(None),
            Err(_) => Err(Failed::Database),
        }
    }

    /// Runs what takes long: on a thread that serves no requests.
    async fn hash<T: Send + 'static>(
        &self,
        hashing: impl FnOnce(&str) -> T + Send + 'static,
    ) -> Result<T, Failed> {
        // Never closed, so there is always a permit to wait for.
        let permit = self.hashing.clone().acquire_owned().await.ok();
        let nobodys = self.nobodys.clone();
        let hashed = spawn_blocking(move || {
            let hashed = hashing(&nobodys);
            drop(permit);
            hashed
        });
        hashed.await.map_err(|_| Failed::Hashing)
    }
}

impl AuthnBackend for Users {
    type User = User;
    type Credentials = Credentials;
    type Error = Failed;

    async fn authenticate(&self, sent: Credentials) -> Result<Option<User>, Failed> {
        let user = self.get_user(&sent.name()).await?;
        let check = move |nobodys: &str| {
            // An unknown name takes as long as a wrong password: time tells nobody who exists.
            let hash = user.as_ref().map_or(nobodys, |user| &user.password_hash);
            let right = password_auth::verify_password(sent.password, hash).is_ok();
            user.filter(|_| right)
        };
        self.hash(check).await
    }

    /// Asked for on each request of who is signed in. A busy site keeps its users in a cache, too.
    async fn get_user(&self, name: &String) -> Result<Option<User>, Failed> {
        let found = self.stored.find_one(doc! { "_id": name }).await;
        Ok(found.map_err(|_| Failed::Database)?.map(User::from))
    }
}

fn is_duplicate(error: &mongodb::error::Error) -> bool {
    matches!(
        &*error.kind,
        ErrorKind::Write(WriteFailure::WriteError(error)) if error.code == DUPLICATE_KEY
    )
}

/// What kept a user from being found or made. The driver's own words may quote what was sent, so they
/// are left out.
#[derive(Debug)]
pub(crate) enum Failed {
    Database,
    Hashing,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Database => "MongoDB did not answer for the users",
            Self::Hashing => "a password was not hashed",
        })
    }
}

impl std::error::Error for Failed {}
