//! `RequestScopeLayer`: opens a scope around each request.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use http::header::SET_COOKIE;
use http::{HeaderMap, HeaderValue, Request, Response};
use tower_layer::Layer;
use tower_service::Service;

use crate::request_scope::{SCOPE, Scope};
use crate::session::id::RawId;
use crate::sync::lock;

/// A layer that lets parallel requests of one session keep each other's changes. Put it outside of the
/// `SessionManagerLayer`:
///
/// ```no_run
/// use axum::Router;
/// use tower_sessions::SessionManagerLayer;
/// use tower_sessions_moka_mongodb_store::{CachedMongoStore, RequestScopeLayer};
///
/// fn app(store: CachedMongoStore) -> Router {
///     Router::new()
///         // The routes come here. The layer that is added last is the outermost one.
///         .layer(SessionManagerLayer::new(store))
///         .layer(RequestScopeLayer::new())
/// }
/// ```
///
/// Without it, a save stores all data of the session, so it overwrites what another request has changed since
/// this one loaded the session. With it:
///
/// - A save stores what the request has changed: the keys that it added, changed and removed since it loaded
///   the session. It keeps the changes that other requests have stored meanwhile, on any instance.
/// - If two requests change the same key, the later save wins, or
///   [`on_conflict`](crate::MongoStoreBuilder::on_conflict) merges the two values.
/// - A save that changes nothing only prolongs the session. The later expiry wins.
/// - `cycle_id` does not bring back a session that somebody else has ended since the request loaded it, for
///   example by "sign out everywhere". Nothing is stored then.
/// - If a save finds that its session has ended, the response has no cookie of that session. It would overwrite
///   the cookie of a new log-in. (This needs cookies that are plain or signed, not private ones.)
///
/// The scope belongs to the task of the request. A task that the handler spawns is outside of it, and so is the
/// body of a streaming response: a save there stores all data. [`in_request_scope`] opens a scope for such a
/// task, which must load the session itself.
///
/// The layer works for both stores and for every version of tower-sessions that they support. An app with several
/// stores needs it only once.
#[derive(Clone, Copy, Debug, Default)]
pub struct RequestScopeLayer(());

impl RequestScopeLayer {
    /// Returns the layer. It has no options.
    #[must_use]
    pub fn new() -> Self {
        Self(())
    }
}

impl<S> Layer<S> for RequestScopeLayer {
    type Service = RequestScope<S>;

    fn layer(&self, inner: S) -> RequestScope<S> {
        RequestScope { inner }
    }
}

/// The service of [`RequestScopeLayer`].
#[derive(Clone, Debug)]
pub struct RequestScope<S> {
    inner: S,
}

impl<S, RequestBody, ResponseBody> Service<Request<RequestBody>> for RequestScope<S>
where
    S: Service<Request<RequestBody>, Response = Response<ResponseBody>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<RequestBody>) -> Self::Future {
        warn_if_inside(&request);
        let scope = Scope::default();
        let response = SCOPE.scope(scope.clone(), self.inner.call(request));
        Box::pin(async move {
            let mut response = response.await?;
            let ids = std::mem::take(&mut lock(&scope.0).ids_without_session);
            remove_cookies(response.headers_mut(), &ids);
            Ok(response)
        })
    }
}

/// Runs a future in a request scope of its own, as [`RequestScopeLayer`] does for a request. For tasks that
/// load a session and save it.
///
/// # Cancel safety
///
/// That of the future.
pub async fn in_request_scope<F: Future>(future: F) -> F::Output {
    SCOPE.scope(Scope::default(), future).await
}

/// The session layer saves after the inner service has ended. Inside of it, the scope would have ended too.
fn warn_if_inside<B>(request: &Request<B>) {
    static WARNED: AtomicBool = AtomicBool::new(false);
    let is_inside = request.extensions().get::<tower_sessions_core::Session>().is_some();
    #[cfg(feature = "tower-sessions-014")]
    let is_inside =
        is_inside || request.extensions().get::<tower_sessions_core_014::Session>().is_some();
    if is_inside && !WARNED.swap(true, Ordering::Relaxed) {
        tracing::warn!(
            "RequestScopeLayer is inside of the SessionManagerLayer, where it has no effect on the save \
             after the request: add it after the SessionManagerLayer"
        );
    }
}

/// Removes the cookies that would give a client one of these ids.
fn remove_cookies(headers: &mut HeaderMap, ids: &[RawId]) {
    if ids.is_empty() {
        return;
    }
    let ids: Vec<_> =
        ids.iter().map(|id| tower_sessions_core::session::Id(id.0).to_string()).collect();
    let is_of_one = |cookie: &HeaderValue| {
        let value = cookie.as_bytes().split(|byte| *byte == b';').next().unwrap_or_default();
        // A signed cookie has its signature before the id.
        ids.iter().any(|id| value.ends_with(id.as_bytes()))
    };
    let kept: Vec<_> =
        headers.get_all(SET_COOKIE).iter().filter(|cookie| !is_of_one(cookie)).cloned().collect();
    headers.remove(SET_COOKIE);
    for cookie in kept {
        headers.append(SET_COOKIE, cookie);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_cookies_of_these_ids_are_removed() {
        let id = RawId::random();
        let text = tower_sessions_core::session::Id(id.0).to_string();
        let other = tower_sessions_core::session::Id(RawId::random().0).to_string();
        let mut headers = HeaderMap::new();
        for cookie in [
            format!("id={text}; HttpOnly; Path=/"),
            "theme=dark".to_owned(),
            format!("signed=c2lnbmF0dXJlIG9mIGEgY29va2ll{text}; Path=/"),
            format!("id={other}; Path=/"),
            format!("seen=1; Domain={text}"),
        ] {
            headers.append(SET_COOKIE, cookie.parse().unwrap());
        }
        remove_cookies(&mut headers, &[id]);
        let left: Vec<_> = headers.get_all(SET_COOKIE).iter().cloned().collect();
        assert_eq!(
            left,
            [
                HeaderValue::from_static("theme=dark"),
                format!("id={other}; Path=/").parse().unwrap(),
                format!("seen=1; Domain={text}").parse().unwrap(),
            ]
        );
        remove_cookies(&mut headers, &[]);
        assert_eq!(headers.len(), 3);
    }
}
