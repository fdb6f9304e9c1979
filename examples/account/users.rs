//! The users who may sign in, with a name and a password. They are in the MongoDB of the sessions.

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

/// The code of MongoDB's error when a name is taken.
const DUPLICATE_KEY: i32 = 11_000;

/// The number of passwords that are hashed at the same time. A hash takes 19 MiB of memory and a core for
/// a moment, on purpose, so strangers must not start any number of them. A real app also limits the
/// attempts of each client.
const HASHED_AT_ONCE: usize = 4;

pub(crate) type AuthSession = axum_login::AuthSession<Users>;

#[derive(Clone)]
pub(crate) struct User {
    pub(crate) name: String,
    password_hash: String,
    /// A digest of the password hash, because each session stores it and must not hold the hash itself.
    /// A new password makes a new digest, which ends every session of the user.
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

/// A user as MongoDB stores it. The name is the key, so no two users have the same name.
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

/// The fields of the sign-in and sign-up forms.
#[derive(Deserialize)]
pub(crate) struct Credentials {
    name: String,
    password: String,
}

impl Credentials {
    /// The longest name, in characters. With the range of the password below, it limits what a stranger
    /// can make this app store and hash.
    pub(crate) const NAME: usize = 32;
    pub(crate) const PASSWORD: std::ops::RangeInclusive<usize> = 8..=128;

    /// The name as it is stored, in lower case: a user need not remember its capital letters.
    pub(crate) fn name(&self) -> String {
        self.name.trim().chars().take(Self::NAME).collect::<String>().to_lowercase()
    }

    /// The reason why a new user cannot have this name or password.
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
    /// A hash for names that do not exist. No password of a user matches it.
    nobodys: Arc<str>,
}

impl Users {
    /// Opens the collection of users in the database of `store`.
    pub(crate) fn beside(store: &CachedMongoStore) -> Self {
        let sessions = store.collection();
        let database = sessions.client().database(&sessions.namespace().db);
        Self {
            stored: database.collection("account_users"),
            hashing: Arc::new(Semaphore::new(HASHED_AT_ONCE)),
            nobodys: password_auth::generate_hash("").into(),
        }
    }

    /// Creates a user. Returns `None` if the name is taken.
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

    /// Runs `hashing`, which is slow, on a thread that serves no requests.
    async fn hash<T: Send + 'static>(
        &self,
        hashing: impl FnOnce(&str) -> T + Send + 'static,
    ) -> Result<T, Failed> {
        // Nothing closes the semaphore, so this always gets a permit.
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
            // An unknown name takes as long as a wrong password, so the time does not reveal which
            // names exist.
            let hash = user.as_ref().map_or(nobodys, |user| &user.password_hash);
            let right = password_auth::verify_password(sent.password, hash).is_ok();
            user.filter(|_| right)
        };
        self.hash(check).await
    }

    /// axum-login calls this on each request of a signed-in user. A busy site caches its users as well.
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

/// Why a user was not found or created. It has no source, because the driver's message may quote what the
/// visitor has sent.
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
