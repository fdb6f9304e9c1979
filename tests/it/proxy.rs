//! A wire between a store and the server that a test can hold: it makes races happen as told.
//!
//! It understands as much of the
//! [wire protocol](https://www.mongodb.com/docs/manual/reference/mongodb-wire-protocol/) as it takes
//! to see which command a reply belongs to.

use std::io;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use mongodb::bson::oid::ObjectId;
use mongodb::bson::{Document, doc};
use session_test_server::{TestServer, fresh_database, shared};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};
use tower_sessions_moka_mongodb_store::mongodb;

/// The proxy; it lives as long as the test's runtime.
pub(crate) struct Proxy {
    uri: String,
    direct: String,
    traps: Traps,
    rules: Rules,
    network: watch::Sender<Network>,
}

/// What becomes of connections.
#[derive(Clone, Copy, PartialEq)]
enum Network {
    Whole,
    /// Those that there are break off, and new ones come to nothing.
    Cut,
}

type Traps = Arc<Mutex<Vec<Trap>>>;
type Rules = Arc<Mutex<Vec<Arc<Rule>>>>;

/// What is done to every command of a name.
struct Rule {
    command: &'static str,
    does: Does,
    times: AtomicUsize,
}

enum Does {
    /// The command does not reach the server: this is its answer.
    Answer(Document),
    /// The server's reply is changed.
    Edit(fn(&mut Document)),
}

/// Commands are refused as long as it is held.
pub(crate) struct Refusing {
    rule: Arc<Rule>,
    rules: Rules,
}

impl Refusing {
    /// How often so far.
    pub(crate) fn times(&self) -> usize {
        self.rule.times.load(Ordering::SeqCst)
    }
}

impl Drop for Refusing {
    fn drop(&mut self) {
        self.rules.lock().unwrap().retain(|rule| !Arc::ptr_eq(rule, &self.rule));
    }
}

struct Trap {
    command: &'static str,
    /// Told how many updates the command carries.
    reached: oneshot::Sender<usize>,
    abandoned: oneshot::Sender<()>,
    verdict: oneshot::Receiver<Verdict>,
}

/// A reply that the server has given and that the store has not got.
pub(crate) struct HeldReply {
    reached: oneshot::Receiver<usize>,
    abandoned: oneshot::Receiver<()>,
    verdict: oneshot::Sender<Verdict>,
}

enum Verdict {
    Deliver,
    Cut,
    Refuse(Document),
}

impl Proxy {
    pub(crate) async fn start() -> Self {
        let (port, database) = (server_port(), fresh_database());
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let own = listener.local_addr().unwrap().port();
        let uri = |port| format!("mongodb://127.0.0.1:{port}/{database}?directConnection=true");
        let traps = Traps::default();
        let rules = Rules::default();
        let (all, all_rules) = (traps.clone(), rules.clone());
        let (network, state) = watch::channel(Network::Whole);
        let lasts = network.clone();
        tokio::spawn(async move {
            let _as_long_as_the_runtime = lasts;
            while let Ok((client, _)) = listener.accept().await {
                if *state.borrow() == Network::Cut {
                    continue;
                }
                let server = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
                client.set_nodelay(true).unwrap();
                server.set_nodelay(true).unwrap();
                let (from_client, to_client) = client.into_split();
                let (from_server, to_server) = server.into_split();
                let (held, traps) = (Held::default(), all.clone());
                let (asks, asked) = (Arc::clone(&held), Arc::clone(&held));
                let rules = all_rules.clone();
                let to_client = Arc::new(tokio::sync::Mutex::new(to_client));
                let answers = to_client.clone();
                let edits = Edits::default();
                let edited = edits.clone();
                let (hangs_up, hung_up) = watch::channel(());
                let (mut cuts, mut also_cuts) = (state.clone(), state.clone());
                tokio::spawn(async move {
                    tokio::select! {
                        () = requests(from_client, to_server, answers, traps, rules, asks, edits) => {}
                        _ = cuts.wait_for(|network| *network == Network::Cut) => {}
                    }
                    drop(hangs_up);
                });
                tokio::spawn(async move {
                    tokio::select! {
                        () = replies(from_server, &to_client, asked, edited, hung_up) => {}
                        _ = also_cuts.wait_for(|network| *network == Network::Cut) => {}
                    }
                    // The other task has a share in it.
                    let _ = to_client.lock().await.shutdown().await;
                });
            }
        });
        Self { uri: uri(own), direct: uri(port), traps, rules, network }
    }

    /// Refuses every command of this name with this error, before it reaches the server.
    pub(crate) fn refuse_all(
        &self,
        command: &'static str,
        code: i32,
        name: &str,
        labels: &[&str],
    ) -> Refusing {
        let rule = self.add(command, Does::Answer(error(code, name, labels)));
        Refusing { rule, rules: self.rules.clone() }
    }

    /// Changes every reply to a command of this name.
    fn edit_all(&self, command: &'static str, edit: fn(&mut Document)) {
        self.add(command, Does::Edit(edit));
    }

    /// Makes itself a load balancer in front of routers, as far as a driver sees: its URI.
    pub(crate) fn as_load_balancer(&self) -> String {
        self.edit_all("hello", |reply| {
            reply.insert("serviceId", ObjectId::from_bytes([7; 12]));
            // As a router says.
            reply.insert("msg", "isdbgrid");
            reply.remove("setName");
        });
        self.uri.replace("directConnection=true", "loadBalanced=true")
    }

    fn add(&self, command: &'static str, does: Does) -> Arc<Rule> {
        let rule = Arc::new(Rule { command, does, times: AtomicUsize::new(0) });
        self.rules.lock().unwrap().push(rule.clone());
        rule
    }

    /// Breaks off every connection, and lets no new one come to anything until it is
    /// [mended](Self::mend).
    pub(crate) fn cut(&self) {
        self.network.send_replace(Network::Cut);
    }

    pub(crate) fn mend(&self) {
        self.network.send_replace(Network::Whole);
    }

    /// Through the proxy.
    pub(crate) fn uri(&self) -> &str {
        &self.uri
    }

    /// Past it, to the same database.
    pub(crate) fn direct(&self) -> &str {
        &self.direct
    }

    /// Holds the reply to the next command of this name.
    pub(crate) fn hold(&self, command: &'static str) -> HeldReply {
        let ((reached, is_reached), (verdict, decided)) = (oneshot::channel(), oneshot::channel());
        let (abandoned, is_abandoned) = oneshot::channel();
        let trap = Trap { command, reached, abandoned, verdict: decided };
        self.traps.lock().unwrap().push(trap);
        HeldReply { reached: is_reached, abandoned: is_abandoned, verdict }
    }
}

impl HeldReply {
    /// Waits until the server has carried the command out. Answers with how many updates it carries.
    pub(crate) async fn reached(&mut self) -> usize {
        let reached = tokio::time::timeout(crate::common::PATIENCE, &mut self.reached);
        reached.await.expect("the command was sent").unwrap()
    }

    /// Waits until the store has closed the connection on which it had asked.
    pub(crate) async fn abandoned(&mut self) {
        let abandoned = tokio::time::timeout(crate::common::PATIENCE, &mut self.abandoned);
        abandoned.await.expect("nobody waits for the reply").unwrap();
    }

    pub(crate) fn deliver(self) {
        drop(self.verdict.send(Verdict::Deliver));
    }

    /// Closes the connection instead: the store never learns how the command ended.
    pub(crate) fn cut(self) {
        drop(self.verdict.send(Verdict::Cut));
    }
}

impl HeldReply {
    /// Replaces it by an error of the server.
    pub(crate) fn refuse(self, code: i32) {
        self.refuse_with(code, "Refused", &[]);
    }

    pub(crate) fn refuse_with(self, code: i32, name: &str, labels: &[&str]) {
        drop(self.verdict.send(Verdict::Refuse(error(code, name, labels))));
    }
}

type Held = Arc<Mutex<Vec<(u32, usize, Trap)>>>;

/// The replies that are to be changed, by what they answer.
type Edits = Arc<Mutex<Vec<(u32, fn(&mut Document))>>>;
type ToClient = Arc<tokio::sync::Mutex<OwnedWriteHalf>>;

async fn requests(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    answers: ToClient,
    traps: Traps,
    rules: Rules,
    held: Held,
    edits: Edits,
) {
    while let Ok(message) = message(&mut from).await {
        if let Some(name) = command(&message) {
            let rule = {
                let rules = rules.lock().unwrap();
                rules.iter().find(|rule| rule.command.as_bytes() == name).cloned()
            };
            if let Some(rule) = rule {
                rule.times.fetch_add(1, Ordering::SeqCst);
                match &rule.does {
                    Does::Answer(answer) => {
                        let answer = reply(word(&message, 4), answer);
                        if answers.lock().await.write_all(&answer).await.is_err() {
                            return;
                        }
                        continue;
                    }
                    Does::Edit(edit) => edits.lock().unwrap().push((word(&message, 4), *edit)),
                }
            }
            let mut traps = traps.lock().unwrap();
            if let Some(at) = traps.iter().position(|trap| trap.command.as_bytes() == name) {
                held.lock().unwrap().push((word(&message, 4), updates(&message), traps.remove(at)));
            }
        }
        if to.write_all(&message).await.is_err() {
            return;
        }
    }
}

/// Each update of a command has its query as a document under `q`.
fn updates(message: &[u8]) -> usize {
    message.windows(3).filter(|window| *window == b"\x03q\0").count()
}

async fn replies(
    mut from: OwnedReadHalf,
    to: &ToClient,
    held: Held,
    edits: Edits,
    mut hung_up: watch::Receiver<()>,
) {
    while let Ok(mut message) = message(&mut from).await {
        let answered = word(&message, 8);
        let trap = {
            let mut held = held.lock().unwrap();
            held.iter().position(|(id, ..)| *id == answered).map(|at| held.remove(at))
        };
        if let Some((_, updates, trap)) = trap {
            let _ = trap.reached.send(updates);
            let verdict = tokio::select! {
                verdict = trap.verdict => verdict,
                _ = hung_up.changed() => {
                    let _ = trap.abandoned.send(());
                    return;
                }
            };
            match verdict {
                Ok(Verdict::Cut) => return,
                Ok(Verdict::Refuse(error)) => message = reply(answered, &error),
                Ok(Verdict::Deliver) | Err(_) => {}
            }
        }
        let edit = {
            let mut edits = edits.lock().unwrap();
            edits.iter().position(|(id, _)| *id == answered).map(|at| edits.remove(at).1)
        };
        if let Some(edit) = edit {
            // Header 16, flags 4, section kind 1.
            let mut body = Document::from_reader(&message[21..]).unwrap();
            edit(&mut body);
            message = reply(answered, &body);
        }
        if to.lock().await.write_all(&message).await.is_err() {
            return;
        }
    }
}

const OP_MSG: u32 = 2013;

/// One message: its length, with itself, comes first.
async fn message(from: &mut OwnedReadHalf) -> io::Result<Vec<u8>> {
    let mut message = vec![0; 4];
    from.read_exact(&mut message).await?;
    let length = word(&message, 0) as usize;
    message.resize(length, 0);
    from.read_exact(&mut message[4..]).await?;
    Ok(message)
}

/// The first key of an `OP_MSG`'s document: header 16, flags 4, section kind 1, length 4, type 1.
fn command(message: &[u8]) -> Option<&[u8]> {
    let key = message.get(26..).filter(|_| word(message, 12) == OP_MSG)?;
    key.split(|byte| *byte == 0).next()
}

fn error(code: i32, name: &str, labels: &[&str]) -> Document {
    doc! { "ok": 0.0, "errmsg": "refused", "code": code, "codeName": name, "errorLabels": labels }
}

/// An `OP_MSG` with this body.
fn reply(answered: u32, body: &Document) -> Vec<u8> {
    let mut message = vec![0; 4];
    message.extend([1, answered, OP_MSG, 0].iter().flat_map(|word| word.to_le_bytes()));
    message.push(0);
    message.extend(body.to_vec().unwrap());
    let length = u32::try_from(message.len()).unwrap();
    message[..4].copy_from_slice(&length.to_le_bytes());
    message
}

fn word(message: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(message[at..at + 4].try_into().unwrap())
}

/// The shared server if it is on loopback and without TLS, or else one of our own.
fn server_port() -> u16 {
    static OWN: OnceLock<TestServer> = OnceLock::new();
    let shared = shared().expect("a server to test on").port();
    shared.or_else(|| OWN.get_or_init(|| TestServer::builder().start().unwrap()).port()).unwrap()
}

#[tokio::test]
async fn the_proxy_holds_the_reply_it_is_told_to_hold() {
    use mongodb::Client;
    use mongodb::bson::Document;

    let proxy = Proxy::start().await;
    let client = Client::with_uri_str(proxy.uri()).await.unwrap();
    let things = client.default_database().unwrap().collection::<Document>("things");
    let mut held = proxy.hold("insert");
    let inserted = things.clone();
    let insert = tokio::spawn(async move { inserted.insert_one(doc! { "_id": 1 }).await });
    held.reached().await;
    let found = things.find_one(doc! {}).await.unwrap();
    assert_eq!(found, Some(doc! { "_id": 1 }), "done, and nobody knows");
    assert!(!insert.is_finished());
    held.deliver();
    insert.await.unwrap().unwrap();
}
