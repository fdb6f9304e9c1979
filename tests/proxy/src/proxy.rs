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
use crate::network::{Direction, DirectionState, Ending, Network};

/// A proxy on loopback. It lives as long as the runtime in which it was started.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
}

/// A server behind proxies. Clones share what they know of it.
#[derive(Clone, Debug)]
pub struct Upstream {
    address: SocketAddr,
    likeness: Option<Likeness>,
}

impl Upstream {
    /// Makes the change streams of the test server look like MongoDB's. A server with MongoDB's own
    /// tokens, or without change streams, is not changed. It works as long as this runtime lives.
    ///
    /// # Errors
    ///
    /// If the server does not answer.
    pub async fn like_mongodb(address: SocketAddr) -> io::Result<Self> {
        Ok(Self { address, likeness: Likeness::of(address).await? })
    }

    /// Whether the proxy changes replies to those of MongoDB.
    #[must_use]
    pub fn is_rewritten(&self) -> bool {
        self.likeness.is_some()
    }
}

impl From<SocketAddr> for Upstream {
    /// A server whose replies are not changed.
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
    /// A `Mutex` suffices: it is held briefly, and only if the test has injections.
    injections: Mutex<Vec<Arc<Active>>>,
    /// A `Mutex`, since it is one small value that is read once for each reply.
    role: Mutex<Role>,
}

/// What the server says that it is in its replies to `hello`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Role {
    /// What it really is.
    ItsOwn,
    /// A member of a replica set that accepts no writes and knows no primary.
    Secondary,
    /// A router behind a load balancer.
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
                // With this field, the driver would wait up to 10 s for the server to report the
                // next change.
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
    /// If the system has no free port on loopback.
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

    /// Injects errors of the server, from the next command on.
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

    /// Changes the role of the server in its replies to `hello` from now on.
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

    /// Refuses new connections. `false` undoes one call with `true`.
    pub fn refuse(&self, yes: bool) {
        self.shared.network.refuse(yes);
    }

    /// Holds back all messages in this direction. `false` undoes one call with `true`.
    pub fn stall(&self, direction: Direction, yes: bool) {
        self.shared.network.state(direction).stall(yes);
    }

    /// Delays each message in this direction.
    pub fn delay(&self, direction: Direction, delay: Duration) {
        self.shared.network.state(direction).delay(delay);
    }

    /// Ends the connection in the middle of each of the next `count` messages in this direction.
    pub fn break_next(&self, direction: Direction, ending: Ending, count: usize) {
        self.shared.network.state(direction).break_next(ending, count);
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        if let Ok((client, _)) = listener.accept().await {
            tokio::spawn(connect(shared.clone(), client));
        } else {
            // The process may be out of file descriptors. The next attempt may work.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Forwards messages both ways until one side ends the connection, or a fault does.
async fn connect(shared: Arc<Shared>, mut client: TcpStream) {
    // Subscribe before the first wait, so that a fault from now on ends this connection too.
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

/// When the stream is dropped, the other end receives a reset.
fn reset(stream: &TcpStream) {
    // A closed connection cannot be reset, so ignore the error.
    let _ = stream.set_zero_linger();
}

/// A client's connection, and the proxy's own connection to the server.
struct Connection<'a> {
    shared: &'a Shared,
    /// The requests whose replies are not simply forwarded, by their ids.
    open: Mutex<HashMap<i32, Open>>,
    hung_up: watch::Sender<bool>,
}

/// A request, and what happens to its reply.
#[derive(Debug, Default)]
struct Open {
    command: Document,
    statements: usize,
    rewrite: Option<Rewrite>,
    trap: Option<Trap>,
    injection: Option<Injection>,
}

/// A reply that the proxy sends instead of the server.
type OwnReply = (i32, Document);

/// What the proxy does with a request.
enum Taken {
    Forward(Message),
    Answer(Document),
}

impl<'a> Connection<'a> {
    fn new(shared: &'a Shared) -> Self {
        Self { shared, open: Mutex::default(), hung_up: watch::Sender::new(false) }
    }

    fn state(&self, direction: Direction) -> &DirectionState {
        self.shared.network.state(direction)
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
                // A request that a stall holds back arrives afterwards, even if the client has
                // closed the connection: as on a network that loses its packets for a while.
                self.state(Direction::ToServer).pass().await;
            }
            let Ok(Some(request)) = request else {
                self.hung_up.send_replace(true);
                self.state(Direction::ToServer).pass().await;
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

    /// Records what happens to the reply to a request, and decides who answers it.
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
                        self.state(Direction::ToClient).pass().await;
                        return to.shutdown().await.map_err(|_| Ending::Close);
                    };
                    self.rewritten(reply).await.map_err(|_| Ending::Close)?
                }
            };
            let Some(reply) = self.held(reply).await? else { return Err(Ending::Close) };
            self.state(Direction::ToClient).pass().await;
            self.carry(&mut to, &reply, Direction::ToClient).await?;
        }
    }

    /// The server's reply as MongoDB would send it, with the injected errors.
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

    /// The reply, once the test releases it if a test holds it. `None` if the connection must be
    /// cut.
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
        if let Some(ending) = self.state(direction).next_break() {
            // The other side receives a part of a message, and then the end of the connection.
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

    /// The first injection that applies to this command.
    fn injection(&self, command: &str) -> Option<Injection> {
        let mut injections = self.injections();
        injections.retain(|active| !active.has_ended());
        injections.iter().find_map(|active| active.hits(command)).cloned()
    }
}
