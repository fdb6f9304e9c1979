//! A client's connection, which stays open and carries one request at a time.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{COOKIE, HOST, HeaderValue, SET_COOKIE};
use hyper::{Method, Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

pub(crate) struct Connection {
    address: SocketAddr,
    host: HeaderValue,
    sender: SendRequest<Empty<Bytes>>,
}

pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    /// The session's cookie, if the response sets it: `id=…`, as a request sends it.
    pub(crate) cookie: Option<HeaderValue>,
    pub(crate) body: Bytes,
}

impl Connection {
    pub(crate) async fn open(address: SocketAddr) -> Result<Self> {
        let host = HeaderValue::from_str(&address.to_string())?;
        Ok(Self { address, host, sender: dial(address).await? })
    }

    /// Sends a request and waits for the whole response. Reopens a broken connection for the next
    /// request.
    pub(crate) async fn ask(
        &mut self,
        method: Method,
        path: Uri,
        cookie: Option<&HeaderValue>,
    ) -> Result<Answer> {
        if self.sender.is_closed() {
            self.sender = dial(self.address).await?;
        }
        self.sender.ready().await?;
        let mut request = Request::new(Empty::new());
        *request.method_mut() = method;
        *request.uri_mut() = path;
        request.headers_mut().insert(HOST, self.host.clone());
        if let Some(cookie) = cookie {
            request.headers_mut().insert(COOKIE, cookie.clone());
        }
        let answer = self.sender.send_request(request).await?;
        let status = answer.status();
        let cookie = answer.headers().get(SET_COOKIE).and_then(session_cookie);
        let body = answer.into_body().collect().await?.to_bytes();
        Ok(Answer { status, cookie, body })
    }
}

async fn dial(address: SocketAddr) -> Result<SendRequest<Empty<Bytes>>> {
    let stream = TcpStream::connect(address).await.context("connect to the server")?;
    stream.set_nodelay(true)?;
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(async move {
        // An error also reaches the request that waits for its response.
        let _ = connection.await;
    });
    Ok(sender)
}

/// The part of the cookie that a request sends back: without attributes. `None` if the cookie is
/// empty.
fn session_cookie(set: &HeaderValue) -> Option<HeaderValue> {
    let pair = set.to_str().ok()?.split(';').next()?;
    (!pair.ends_with('=')).then(|| HeaderValue::from_str(pair).ok())?
}
