//! The proxy and its connections.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bson::Document;
use bson::oid::ObjectId;
use tokio::io::AsyncWriteExt;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};

use crate::fault::{Active, Commands, Injected, Injection, Lasts};
use crate::hold::{HeldReply, Released, Trap, Traps};
use crate::likeness::{Likeness, Rewrite};
use crate::message::{Message, Reader};
use crate::network::{Direction, Ending, Lane, Network};

/// A proxy on loopback. It lives as long as the runtime in which it was started.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
}

/// A server that proxies stand in front of. Clones share what they know of it.
#[derive(Clone, Debug)]
pub struct Upstream {
    address: SocketAddr,
    likeness: Option<Likeness>,
}

impl Upstream {
    /// Makes the change streams of the test server look like MongoDB's. A server with MongoDB's own
    /// tokens, or without change streams, is left as it is. It works as long as this runtime lives.
    ///
    /// # Errors
    ///
    /// If the server does not answer.
    pub async fn like_mongodb(address: SocketAddr) -> io::Result<Self> {
        Ok(Self { address, likeness: Likeness::of(address).await? })
    }

    /// Whether replies are made what MongoDB's would be.
    #[must_use]
    pub fn is_rewritten(&self) -> bool {
        self.likeness.is_some()
    }
}

impl From<SocketAddr> for Upstream {
    /// The server as it is.
    fn from(address: SocketAddr) -> Self {
        Self { address, likeness: None }
    }
}

/// What all connections of a proxy share.
#[derive(Debug)]
struct Shared {
    server: Upstream,
    network: Network,
    traps: Traps,
    /// A `Mutex` and no lock-free list: the lock is held for moments, and only if there are any.
    injections: Mutex<Vec<Arc<Active>>>,
    /// A `Mutex`, since it is a value of three and read once for each reply.
    role: Mutex<Role>,
}

/// As what the server introduces itself in its replies to `hello`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Role {
    /// As what it is.
    ItsOwn,
    /// As a member of a replica set that takes no writes, with no primary known.
    Secondary,
    /// As routers behind a load balancer.
    LoadBalancer,
}

impl Role {
    /// Changes a reply to `hello` to what this role says. Other replies stay: they lack the flags.
    fn rewrite(self, reply: &mut Document) {
        let flag = ["isWritablePrimary", "ismaster"].into_iter().find(|it| reply.contains_key(it));
        let Some(flag) = flag else { return };
        match self {
            Self::ItsOwn => {}
            Self::Secondary => {
                reply.insert(flag, false);
                reply.insert("secondary", true);
                reply.remove("primary");
                reply.remove("electionId");
                // With it, the driver would wait up to 10 s for the server to report the next change.
                reply.remove("topologyVersion");
            }
            Self::LoadBalancer => {
                reply.insert("serviceId", ObjectId::from_bytes([7; 12]));
                reply.insert("msg", "isdbgrid");
                reply.remove("setName");
            }
        }
    }
}

impl Proxy {
    /// Starts a proxy in front of this server.
    ///
    /// # Errors
    ///
    /// If the system has no port on loopback to spare.
    pub async fn start(server: impl Into<Upstream>) -> io::Result<Self> {
        let server = server.into();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let port = listener.local_addr()?.port();
        let shared = Arc::new(Shared {
            server,
            network: Network::new(),
            traps: Traps::default(),
            injections: Mutex::default(),
            role: Mutex::new(Role::ItsOwn),
        });
        tokio::spawn(accept(listener, shared.clone()));
        Ok(Self { port, shared })
    }

    /// The port on 127.0.0.1.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Holds the reply to the next command of this name.
    #[must_use]
    pub fn hold(&self, command: &'static str) -> HeldReply {
        self.shared.traps.set(command)
    }

    /// Puts errors of the server in, from the next command on.
    pub fn inject(
        &self,
        commands: impl Into<Commands>,
        injection: Injection,
        lasts: Lasts,
    ) -> Injected {
        let active = Arc::new(Active::new(commands.into(), injection, lasts));
        self.shared.injections().push(active.clone());
        Injected(active)
    }

    /// Has the server introduce itself as something else from now on.
    pub fn introduce_as(&self, role: Role) {
        *self.shared.role() = role;
    }

    /// Ends all present connections, and refuses new ones until [`mend`](Self::mend).
    pub fn cut(&self) {
        self.refuse(true);
        self.break_off(Ending::Close);
    }

    /// Undoes a [`cut`](Self::cut).
    pub fn mend(&self) {
        self.refuse(false);
    }

    /// Ends all present connections.
    pub fn break_off(&self, ending: Ending) {
        self.shared.network.broken_off.send_replace(ending);
    }

    /// Refuses new connections, until called with `false` as often as with `true`.
    pub fn refuse(&self, yes: bool) {
        self.shared.network.refuse(yes);
    }

    /// Holds back everything that goes this way, until called with `false` as often as with `true`.
    pub fn stall(&self, direction: Direction, yes: bool) {
        self.shared.network.lane(direction).stall(yes);
    }

    /// Delays each message that goes this way.
    pub fn delay(&self, direction: Direction, delay: Duration) {
        self.shared.network.lane(direction).delay(delay);
    }

    /// Breaks the next `count` messages that go this way off in the middle, with their connections.
    pub fn break_next(&self, direction: Direction, ending: Ending, count: usize) {
        self.shared.network.lane(direction).break_next(ending, count);
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        if let Ok((client, _)) = listener.accept().await {
            tokio::spawn(connect(shared.clone(), client));
        } else {
            // Out of file descriptors, perhaps: the next one may work.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Carries messages both ways until one side ends the connection, or a fault does.
async fn connect(shared: Arc<Shared>, mut client: TcpStream) {
    // Before the first wait: what ends connections from now on ends this one.
    let mut broken_off = shared.network.broken_off.subscribe();
    if shared.network.is_refusing() {
        return reset(&client);
    }
    let Ok(mut server) = TcpStream::connect(shared.server.address).await else {
        return reset(&client);
    };
    if client.set_nodelay(true).and_then(|()| server.set_nodelay(true)).is_err() {
        return;
    }
    let ending = {
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        let connection = Connection::new(&shared);
        let (answer, answers) = mpsc::unbounded_channel();
        let both = async {
            let requests = connection.requests(from_client, to_server, answer);
            let replies = connection.replies(from_server, to_client, answers);
            tokio::try_join!(requests, replies).err().unwrap_or(Ending::Close)
        };
        tokio::select! {
            ending = both => ending,
            _ = broken_off.changed() => *broken_off.borrow(),
        }
    };
    if ending == Ending::Reset {
        reset(&client);
        reset(&server);
    }
}

/// Once the stream is dropped, the other end gets a reset.
fn reset(stream: &TcpStream) {
    // A connection that is gone already cannot be reset any more.
    let _ = stream.set_zero_linger();
}

/// A connection of a client, and the one of the proxy's own to the server.
struct Connection<'a> {
    shared: &'a Shared,
    /// The requests whose replies are not simply passed on, by their ids.
    open: Mutex<HashMap<i32, Open>>,
    hung_up: watch::Sender<bool>,
}

/// A request, and what is to become of its reply.
#[derive(Debug, Default)]
struct Open {
    command: Document,
    statements: usize,
    rewrite: Option<Rewrite>,
    trap: Option<Trap>,
    injection: Option<Injection>,
}

/// A reply of the proxy's own.
type OwnReply = (i32, Document);

/// What becomes of a request.
enum Taken {
    Forward(Message),
    Answer(Document),
}

impl<'a> Connection<'a> {
    fn new(shared: &'a Shared) -> Self {
        Self { shared, open: Mutex::default(), hung_up: watch::Sender::new(false) }
    }

    fn lane(&self, direction: Direction) -> &Lane {
        self.shared.network.lane(direction)
    }

    fn open(&self) -> MutexGuard<'_, HashMap<i32, Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn requests(
        &self,
        from: ReadHalf<'_>,
        mut to: WriteHalf<'_>,
        answer: mpsc::UnboundedSender<OwnReply>,
    ) -> Result<(), Ending> {
        let mut from = Reader::new(from);
        loop {
            let request = from.next().await;
            if matches!(request, Ok(Some(_))) {
                // What a stall holds back arrives after it, though the client may have hung up: as
                // on a network that loses its packets for a while.
                self.lane(Direction::ToServer).pass().await;
            }
            let Ok(Some(request)) = request else {
                self.hung_up.send_replace(true);
                self.lane(Direction::ToServer).pass().await;
                return to.shutdown().await.map_err(|_| Ending::Close);
            };
            let id = request.id();
            match self.take(request).map_err(|_| Ending::Close)? {
                Taken::Answer(reply) => {
                    let _ = answer.send((id, reply));
                }
                Taken::Forward(request) => {
                    self.carry(&mut to, &request, Direction::ToServer).await?;
                }
            }
        }
    }

    /// Notes what is to become of the reply to a request, and decides who answers it.
    fn take(&self, request: Message) -> io::Result<Taken> {
        let Some(name) = request.command() else { return Ok(Taken::Forward(request)) };
        let trap = self.shared.traps.spring(name);
        let injection = self.shared.injection(name);
        let likeness =
            self.shared.server.likeness.as_ref().filter(|_| Likeness::concerns(name, &request));
        if trap.is_none() && injection.is_none() && likeness.is_none() {
            return Ok(Taken::Forward(request));
        }
        let Some(command) = request.body() else { return Ok(Taken::Forward(request)) };
        let statements = request.statements();
        let reply = injection.as_ref().and_then(|it| it.instead(&command, statements));
        let mut changed = command.clone();
        let likeness = likeness.filter(|_| reply.is_none());
        let rewrite = likeness.and_then(|it| it.request(&mut changed));
        let forward = if changed == command { None } else { Some(request.with_body(&changed)?) };
        if rewrite.is_some() || trap.is_some() || injection.is_some() {
            let open = Open { command, statements, rewrite, trap, injection };
            self.open().insert(request.id(), open);
        }
        Ok(match reply {
            Some(reply) => Taken::Answer(reply),
            None => Taken::Forward(forward.unwrap_or(request)),
        })
    }

    async fn replies(
        &self,
        from: ReadHalf<'_>,
        mut to: WriteHalf<'_>,
        mut answers: mpsc::UnboundedReceiver<OwnReply>,
    ) -> Result<(), Ending> {
        let mut from = Reader::new(from);
        loop {
            let reply = tokio::select! {
                Some((request, reply)) = answers.recv() => {
                    Message::reply(request, &reply).map_err(|_| Ending::Close)?
                }
                reply = from.next() => {
                    let Ok(Some(reply)) = reply else {
                        self.lane(Direction::ToClient).pass().await;
                        return to.shutdown().await.map_err(|_| Ending::Close);
                    };
                    self.rewritten(reply).await.map_err(|_| Ending::Close)?
                }
            };
            let Some(reply) = self.held(reply).await? else { return Err(Ending::Close) };
            self.lane(Direction::ToClient).pass().await;
            self.carry(&mut to, &reply, Direction::ToClient).await?;
        }
    }

    /// The server's reply as MongoDB would give it, with what is put in.
    async fn rewritten(&self, reply: Message) -> io::Result<Message> {
        let (rewrite, injected) = match self.open().get_mut(&reply.answers()) {
            None => (None, None),
            Some(open) => {
                let injected = open.injection.take();
                (open.rewrite.take(), injected.map(|it| (it, open.command.clone())))
            }
        };
        let role = *self.shared.role();
        if rewrite.is_none() && injected.is_none() && role == Role::ItsOwn {
            return Ok(reply);
        }
        let Some(mut body) = reply.body() else { return Ok(reply) };
        if let (Some(rewrite), Some(likeness)) = (&rewrite, &self.shared.server.likeness) {
            likeness.reply(rewrite, &mut body).await?;
        }
        role.rewrite(&mut body);
        if let Some((injection, command)) = injected {
            body = injection.afterwards(&command, body);
        }
        reply.with_body(&body)
    }

    /// The reply once the test releases it, if it is one that a test holds; `None` if the connection is
    /// to be cut.
    async fn held(&self, reply: Message) -> Result<Option<Message>, Ending> {
        let open = self.open().remove(&reply.answers());
        let Some(Open { command, statements, trap: Some(trap), .. }) = open else {
            return Ok(Some(reply));
        };
        let mut hung_up = self.hung_up.subscribe();
        let hung_up = async {
            let _ = hung_up.wait_for(|yes| *yes).await;
        };
        match trap.hold(&command, statements, hung_up).await {
            Released::AsItWas => Ok(Some(reply)),
            Released::Instead(body) => {
                Message::reply(reply.answers(), &body).map(Some).map_err(|_| Ending::Close)
            }
            Released::Cut => Ok(None),
        }
    }

    async fn carry(
        &self,
        to: &mut WriteHalf<'_>,
        message: &Message,
        direction: Direction,
    ) -> Result<(), Ending> {
        let bytes = message.bytes();
        if let Some(ending) = self.lane(direction).next_break() {
            // The other side gets a part of a message, and then the end.
            let _ = to.write_all(&bytes[..bytes.len() / 2]).await;
            return Err(ending);
        }
        to.write_all(bytes).await.map_err(|_| Ending::Close)
    }
}

impl Shared {
    fn role(&self) -> MutexGuard<'_, Role> {
        self.role.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn injections(&self) -> MutexGuard<'_, Vec<Arc<Active>>> {
        self.injections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first injection that is for this command.
    fn injection(&self, command: &str) -> Option<Injection> {
        let mut injections = self.injections();
        injections.retain(|active| !active.has_ended());
        injections.iter().find_map(|active| active.hits(command)).cloned()
    }
}
