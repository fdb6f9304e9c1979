//! Commands to a server during its set-up: whether it is ready, and the commands that make it
//! ready.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme, StreamOwned};

use crate::error::Error;
use crate::wire::{self, Doc, Reply};

/// The timeout of one command. A server that has just started may be slow.
const PATIENCE: Duration = Duration::from_secs(5);

/// Sends one command to the server on loopback `port`.
pub(crate) fn ask(port: u16, tls: bool, command: Doc) -> io::Result<Reply> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    if tls { wire::ask(&mut encrypted(stream)?, command) } else { wire::ask(&mut stream, command) }
}

/// The command `hello`, which checks that a server answers.
pub(crate) fn hello() -> Doc {
    Doc::default().int("hello", 1)
}

/// Whether the server answers `hello` and accepts writes.
pub(crate) fn is_ready(port: u16, tls: bool) -> bool {
    ask(port, tls, hello())
        .is_ok_and(|reply| reply.is_true("ok") && reply.is_true("isWritablePrimary"))
}

/// Creates the first user, who may do everything. The server must not require a password yet.
pub(crate) fn create_user(port: u16, user: &str, password: &str) -> Result<(), Error> {
    let command = Doc::default()
        .text("createUser", user)
        .text("pwd", password)
        .array("roles", &Doc::default().text("0", "root"));
    done("createUser", ask(port, false, command))
}

/// Makes a new `mongod --replSet rs0` a replica set of one member: only replica sets have change
/// streams.
pub(crate) fn initiate(port: u16) -> Result<(), Error> {
    let member = Doc::default().int("_id", 0).text("host", &format!("127.0.0.1:{port}"));
    let config =
        Doc::default().text("_id", "rs0").array("members", &Doc::default().doc("0", &member));
    let command = Doc::default().doc("replSetInitiate", &config);
    done("replSetInitiate", ask(port, false, command))
}

fn done(command: &'static str, reply: io::Result<Reply>) -> Result<(), Error> {
    let reason = match reply {
        Ok(reply) if reply.is_true("ok") => return Ok(()),
        Ok(reply) => {
            let message = reply.text("errmsg").unwrap_or_default();
            let code = reply.int("code").unwrap_or_default();
            format!("{message} (code {code})")
        }
        Err(error) => error.to_string(),
    };
    Err(Error::Command { command, reason })
}

fn encrypted(stream: TcpStream) -> io::Result<impl Read + Write> {
    // Named explicitly: the tests choose the process's default provider.
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").map_err(io::Error::other)?;
    let client = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
    Ok(StreamOwned::new(client, stream))
}

/// Accepts any certificate. This client only checks that this process's own server is up, and sends
/// no secret. The test that made the certificate checks it.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
