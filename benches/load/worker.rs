//! A client: its connections, its sessions, and the content that the responses must have.

use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use hyper::header::HeaderValue;
use hyper::{Method, StatusCode, Uri};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Zipf};
use tower_sessions::session::Id;

use crate::client::{Answer, Connection};
use crate::number::float;
use crate::options::Options;
use crate::scenario::{Scenario, Step};

/// A session whose cookie this client has, and that no other client changes.
pub(crate) struct ClientSession {
    pub(crate) cookie: HeaderValue,
    pub(crate) owner: u64,
    /// The last acknowledged version, and when it was acknowledged.
    version: u64,
    acknowledged: Instant,
    /// The newest version that the other instance has returned.
    seen_elsewhere: u64,
}

/// In which way a response was correct.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Fresh,
    /// An older version, which another instance may return for a while.
    Stale,
}

/// The settings that do not change during a scenario.
#[derive(Clone)]
pub(crate) struct Rules {
    pub(crate) scenario: Scenario,
    pub(crate) options: Options,
    /// How old a session may be that another instance serves. `None` if the store has no bound.
    pub(crate) bound: Option<Duration>,
}

pub(crate) struct Worker {
    rules: Rules,
    /// One connection for each instance.
    connections: Vec<Connection>,
    pub(crate) sessions: Vec<ClientSession>,
    chance: ChaCha8Rng,
    zipf: Zipf<f64>,
    /// A session that was created, and whose id is cycled next.
    logged_in: Option<ClientSession>,
    /// The cookie of an id that was cycled away.
    retired: Option<HeaderValue>,
}

impl Worker {
    pub(crate) fn new(rules: Rules, connections: Vec<Connection>, index: usize) -> Result<Self> {
        let options = &rules.options;
        let count = options.sessions.div_ceil(options.connections);
        let zipf = Zipf::new(float(count as u64), options.zipf)?;
        let seed = options.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(index as u64);
        Ok(Self {
            rules,
            connections,
            sessions: Vec::with_capacity(count),
            chance: ChaCha8Rng::seed_from_u64(seed),
            zipf,
            logged_in: None,
            retired: None,
        })
    }

    /// Uses other instances from now on.
    pub(crate) fn reconnect(&mut self, connections: Vec<Connection>) {
        self.connections = connections;
    }

    /// Creates a session on the first instance and keeps its cookie.
    pub(crate) async fn create(&mut self, owner: u64) -> Result<()> {
        let held = self.log_in(owner).await?;
        self.sessions.push(held);
        Ok(())
    }

    /// Makes one request, and checks its response.
    pub(crate) async fn step(&mut self) -> Result<Verdict> {
        let drawn = self.chance.random_range(0..100);
        match self.rules.scenario.step(drawn, self.rules.options.invented) {
            Step::Bare => {
                let answer = self.ask(0, Method::GET, uri("/bare"), None).await?;
                ensure!(answer.body.as_ref() == b"0 0", "an answer with another text");
                Ok(Verdict::Fresh)
            }
            Step::Read(instance) => {
                let at = self.choice();
                self.read(instance, at, "/read").await
            }
            Step::Touch => {
                let at = self.choice();
                self.read(0, at, "/always/read").await
            }
            Step::Write => self.write().await,
            Step::LogIn => self.cycle().await,
            Step::Invent => {
                // `Id`'s own randomness is not seeded, and need not be: no two ids are equal.
                let cookie = HeaderValue::from_str(&format!("id={}", Id::default()))?;
                self.expect_absent(&cookie).await
            }
        }
    }

    /// Reads one session of all, which may be another client's.
    pub(crate) async fn read_cookie(&mut self, cookie: &HeaderValue, owner: u64) -> Result<()> {
        let (found, _) = version(&self.ask(0, Method::GET, uri("/read"), Some(cookie)).await?)?;
        ensure!(found == owner, "an answer with another visitor's session");
        Ok(())
    }

    fn choice(&mut self) -> usize {
        if self.rules.scenario.is_zipf() {
            let rank = self.zipf.sample(&mut self.chance);
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rank")]
            return (rank as usize - 1).min(self.sessions.len() - 1);
        }
        self.chance.random_range(0..self.sessions.len())
    }

    async fn read(&mut self, instance: usize, at: usize, path: &'static str) -> Result<Verdict> {
        let asked = Instant::now();
        let cookie = self.sessions[at].cookie.clone();
        let answer = self.ask(instance, Method::GET, uri(path), Some(&cookie)).await?;
        let (owner, version) = version(&answer)?;
        let held = &mut self.sessions[at];
        ensure!(owner == held.owner, "an answer with another visitor's session");
        ensure!(version <= held.version, "an answer with a version that was never written");
        if instance == 0 {
            ensure!(version == held.version, "an answer with an older version than was written");
            return Ok(Verdict::Fresh);
        }
        if version == held.version {
            held.seen_elsewhere = version;
            return Ok(Verdict::Fresh);
        }
        if let Some(bound) = self.rules.bound {
            let age = asked.saturating_duration_since(held.acknowledged);
            ensure!(age <= bound, "an answer that is {age:?} old, past the bound of {bound:?}");
            ensure!(version >= held.seen_elsewhere, "an answer that goes back to an older version");
        }
        held.seen_elsewhere = version;
        Ok(Verdict::Stale)
    }

    async fn write(&mut self) -> Result<Verdict> {
        let at = self.choice();
        let cookie = self.sessions[at].cookie.clone();
        let next = self.sessions[at].version + 1;
        // If the response is lost, the write may still have been carried out.
        let path = Uri::from_str(&format!("/write/{next}"))?;
        let answer = self.ask(0, Method::POST, path, Some(&cookie)).await?;
        let (owner, written) = version(&answer)?;
        let held = &mut self.sessions[at];
        ensure!(owner == held.owner, "a write to another visitor's session");
        ensure!(written == next, "a write of another version");
        ensure!(answer.cookie.as_ref() == Some(&held.cookie), "a write that changed the id");
        (held.version, held.acknowledged) = (next, Instant::now());
        Ok(Verdict::Fresh)
    }

    /// Alternates between the two steps of a log-in, and sometimes reads an old cookie.
    async fn cycle(&mut self) -> Result<Verdict> {
        if let Some(retired) = self.retired.take()
            && self.chance.random_range(0..16) == 0
        {
            return self.expect_absent(&retired).await;
        }
        let Some(anonymous) = self.logged_in.take() else {
            let owner = self.chance.random_range(0..1 << 40);
            self.logged_in = Some(self.log_in(owner).await?);
            return Ok(Verdict::Fresh);
        };
        let answer = self.ask(0, Method::POST, uri("/rotate"), Some(&anonymous.cookie)).await?;
        let (owner, _) = version(&answer)?;
        ensure!(owner == anonymous.owner, "a log-in as another visitor");
        let cookie = answer.cookie.context("a log-in without a cookie")?;
        ensure!(cookie != anonymous.cookie, "a log-in that kept the id");
        self.retired = Some(anonymous.cookie);
        Ok(Verdict::Fresh)
    }

    async fn log_in(&mut self, owner: u64) -> Result<ClientSession> {
        let path = Uri::from_str(&format!("/login/{owner}"))?;
        let answer = self.ask(0, Method::POST, path, None).await?;
        ensure!(version(&answer)? == (owner, 0), "a log-in as another visitor");
        let cookie = answer.cookie.context("a log-in without a cookie")?;
        let acknowledged = Instant::now();
        Ok(ClientSession { cookie, owner, version: 0, acknowledged, seen_elsewhere: 0 })
    }

    async fn expect_absent(&mut self, cookie: &HeaderValue) -> Result<Verdict> {
        let connection = &mut self.connections[0];
        let answer = connection.ask(Method::GET, uri("/read"), Some(cookie)).await?;
        ensure!(
            answer.status == StatusCode::NOT_FOUND,
            "{} for a session that there is not",
            answer.status
        );
        ensure!(answer.cookie.is_none(), "a session under an id that a client made up");
        Ok(Verdict::Fresh)
    }

    async fn ask(
        &mut self,
        instance: usize,
        method: Method,
        path: Uri,
        cookie: Option<&HeaderValue>,
    ) -> Result<Answer> {
        let answer = self.connections[instance].ask(method, path, cookie).await?;
        if answer.status != StatusCode::OK {
            bail!("{} for a session that there is", answer.status);
        }
        Ok(answer)
    }
}

fn uri(path: &'static str) -> Uri {
    Uri::from_static(path)
}

/// The owner and the version in a response.
fn version(answer: &Answer) -> Result<(u64, u64)> {
    let odd = || anyhow!("an answer with another text");
    let text = std::str::from_utf8(&answer.body)?;
    let (owner, version) = text.split_once(' ').ok_or_else(odd)?;
    Ok((owner.parse()?, version.parse()?))
}
