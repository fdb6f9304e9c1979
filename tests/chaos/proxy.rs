//! A network that can be broken: one proxy between each instance and the server.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    ToServer,
    ToClient,
}

/// How a connection is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// In good order, as far as TCP is concerned.
    Close,
    /// By a reset, on both sides.
    Reset,
}

/// A proxy on loopback; it lives as long as the runtime.
pub(crate) struct Proxy {
    port: u16,
    wire: Arc<Wire>,
}

struct Wire {
    refusing: AtomicU32,
    cut: watch::Sender<Ending>,
    to_server: Lane,
    to_client: Lane,
}

/// One direction of all connections.
struct Lane {
    flow: watch::Sender<Flow>,
    /// How the next chunks of bytes are to be broken off.
    breaks: Mutex<Vec<Ending>>,
}

#[derive(Clone, Copy, Default)]
struct Flow {
    /// How many faults want it to stand still.
    stalls: u32,
    delay: Duration,
}

impl Lane {
    fn new() -> Self {
        Self { flow: watch::Sender::new(Flow::default()), breaks: Mutex::default() }
    }

    /// Waits while it stands still.
    async fn flowing(&self) -> Duration {
        let mut flow = self.flow.subscribe();
        let flowing = flow.wait_for(|flow| flow.stalls == 0).await;
        flowing.map(|flow| flow.delay).unwrap_or_default()
    }

    fn next_break(&self) -> Option<Ending> {
        self.breaks.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }
}

impl Proxy {
    pub(crate) async fn start(server: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let port = listener.local_addr()?.port();
        let wire = Arc::new(Wire {
            refusing: AtomicU32::new(0),
            cut: watch::Sender::new(Ending::Close),
            to_server: Lane::new(),
            to_client: Lane::new(),
        });
        let shared = wire.clone();
        tokio::spawn(async move {
            loop {
                if let Ok((client, _)) = listener.accept().await {
                    tokio::spawn(shared.clone().connect(client, server));
                } else {
                    // Out of descriptors, say: the next one may do.
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
        });
        Ok(Self { port, wire })
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Ends all connections that there are.
    pub(crate) fn cut(&self, ending: Ending) {
        self.wire.cut.send_replace(ending);
    }

    /// Refuses new connections, until told otherwise as often.
    pub(crate) fn refuse(&self, yes: bool) {
        if yes {
            self.wire.refusing.fetch_add(1, Ordering::SeqCst);
        } else {
            self.wire.refusing.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Holds back all bytes that go this way, until told otherwise as often.
    pub(crate) fn stall(&self, way: Way, yes: bool) {
        self.lane(way).flow.send_modify(|flow| {
            flow.stalls = if yes { flow.stalls + 1 } else { flow.stalls.saturating_sub(1) };
        });
    }

    /// Delays each chunk of bytes that goes this way.
    pub(crate) fn delay(&self, way: Way, delay: Duration) {
        self.lane(way).flow.send_modify(|flow| flow.delay = delay);
    }

    /// Breaks the next `count` connections off in the middle of what they send this way.
    pub(crate) fn break_next(&self, way: Way, ending: Ending, count: usize) {
        let mut breaks = self.lane(way).breaks.lock().unwrap_or_else(PoisonError::into_inner);
        breaks.clear();
        breaks.resize(count, ending);
    }

    fn lane(&self, way: Way) -> &Lane {
        match way {
            Way::ToServer => &self.wire.to_server,
            Way::ToClient => &self.wire.to_client,
        }
    }
}

impl Wire {
    async fn connect(self: Arc<Self>, client: TcpStream, server: SocketAddr) {
        let mut cut = self.cut.subscribe();
        if self.refusing.load(Ordering::SeqCst) > 0 {
            return reset(&client);
        }
        let Ok(server) = TcpStream::connect(server).await else {
            return reset(&client);
        };
        let (mut client, mut server) = (client, server);
        let ready = client.set_nodelay(true).and_then(|()| server.set_nodelay(true));
        if ready.is_err() {
            return;
        }
        let ending = {
            let (from_client, to_client) = client.split();
            let (from_server, to_server) = server.split();
            let both = async {
                let up = pump(from_client, to_server, &self.to_server);
                let down = pump(from_server, to_client, &self.to_client);
                tokio::try_join!(up, down).err().unwrap_or(Ending::Close)
            };
            tokio::select! {
                ending = both => ending,
                _ = cut.changed() => *cut.borrow(),
            }
        };
        if ending == Ending::Reset {
            reset(&client);
            reset(&server);
        }
    }
}

/// Once it is dropped, the other end gets a reset.
fn reset(stream: &TcpStream) {
    // A connection that is gone already cannot be reset any more.
    let _ = stream.set_zero_linger();
}

/// Carries bytes one way until they end or the connection is to.
async fn pump(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>, lane: &Lane) -> Result<(), Ending> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let read = from.read(&mut buffer).await.map_err(|_| Ending::Close)?;
        // What a stall holds back arrives after it, though the sender may have hung up: as on a
        // network that loses its packets for a while.
        let delay = lane.flowing().await;
        if read == 0 {
            return to.shutdown().await.map_err(|_| Ending::Close);
        }
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
            lane.flowing().await;
        }
        if let Some(ending) = lane.next_break() {
            // The other side gets a part of a message, and then the end.
            let _ = to.write_all(&buffer[..read / 2]).await;
            return Err(ending);
        }
        to.write_all(&buffer[..read]).await.map_err(|_| Ending::Close)?;
    }
}
