//! The devices of a user: the sessions that the store finds under the user's name as owner.

use axum::extract::{Form, FromRequestParts, State};
use axum::http::{header, request::Parts};
use axum::response::{IntoResponse, Redirect, Response};
use axum_messages::Messages;
use futures::TryStreamExt;
use serde::Deserialize;
use time::OffsetDateTime;
use tower_sessions_moka_mongodb_store::{CachedMongoStore, LiveSession, SessionHandle};

use crate::device::Device;
use crate::users::AuthSession;
use crate::{COOKIE, pages};
use support::{AppError, escape};

/// A signed-in user, with the handle of this session. The extractor redirects all other visitors to the
/// sign-in form, which says so if their session has ended.
pub(crate) struct Member {
    name: String,
    here: SessionHandle,
    auth: AuthSession,
}

impl<S: Send + Sync> FromRequestParts<S> for Member {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Response> {
        let auth = AuthSession::from_request_parts(parts, state).await;
        let auth = auth.map_err(IntoResponse::into_response)?;
        let here = auth.session.id().map(SessionHandle::of);
        match (&auth.user, here) {
            (Some(user), Some(here)) => Ok(Self { name: user.name.clone(), here, auth }),
            // The cookie names a session that no longer exists.
            (None, None) if has_cookie(parts) => {
                Err(Redirect::to("/sign-in?ended").into_response())
            }
            _ => Err(Redirect::to("/sign-in").into_response()),
        }
    }
}

fn has_cookie(parts: &Parts) -> bool {
    let sent = parts.headers.get_all(header::COOKIE).into_iter();
    let mut cookies = sent.filter_map(|sent| sent.to_str().ok()).flat_map(|sent| sent.split(';'));
    cookies.any(|cookie| cookie.split_once('=').is_some_and(|(name, _)| name.trim() == COOKIE))
}

pub(crate) async fn home() -> Redirect {
    Redirect::to("/devices")
}

pub(crate) async fn page(
    member: Member,
    messages: Messages,
    State(store): State<CachedMongoStore>,
) -> Result<Response, AppError> {
    let sessions: Vec<LiveSession> = store.find_by_owner(&member.name).try_collect().await?;
    let now = OffsetDateTime::now_utc();
    let (this, others): (Vec<_>, Vec<_>) =
        sessions.iter().partition(|session| session.handle == member.here);
    let this: String = this.into_iter().map(|session| this_device(session, now)).collect();
    let listed: String = others.iter().map(|session| other_device(session, now)).collect();
    let elsewhere = if others.is_empty() {
        "<p class=\"empty\">You are signed in nowhere else.</p>\n".to_owned()
    } else {
        format!(
            r#"<ul class="devices">
{listed}</ul>
<form method="post" action="/devices/sign-out-others" class="all">
<button class="danger">Sign out everywhere else</button>
<p class="hint">This device stays signed in.</p>
</form>
"#
        )
    };
    let main = format!(
        r#"<p class="lead">Where you are signed in. If there is a device that you do not know, sign it out.</p>
<section aria-labelledby="this"><h2 id="this">Here</h2>
<ul class="devices">
{this}</ul>
</section>
<section aria-labelledby="others"><h2 id="others">Elsewhere <span class="count">{count}</span></h2>
{elsewhere}</section>
"#,
        count = others.len(),
    );
    let shown = pages::Shown::of(messages);
    Ok(pages::page("Your devices", Some(&member.name), &shown, &main).into_response())
}

fn this_device(session: &LiveSession, now: OffsetDateTime) -> String {
    let device = Device::stored_in(&session.data);
    format!(
        r#"<li class="device this">
{icon}<div><h3>{name} <span class="badge">This device</span></h3>
<p>Active now</p>
<p>Signed in {created}</p></div>
</li>
"#,
        icon = pages::icon(device.is_mobile()),
        name = escape(&device.name()),
        created = pages::moment(session.created, now),
    )
}

fn other_device(session: &LiveSession, now: OffsetDateTime) -> String {
    let device = Device::stored_in(&session.data);
    format!(
        r#"<li class="device">
{icon}<div><h3>{name}</h3>
<p>Last seen {seen}</p>
<p>Signed in {created}</p></div>
<form method="post" action="/devices/sign-out">
<input type="hidden" name="session" value="{handle}">
<button>Sign out<span class="unseen"> {name}, last seen {seen}</span></button>
</form>
</li>
"#,
        icon = pages::icon(device.is_mobile()),
        name = escape(&device.name()),
        seen = pages::moment(session.updated, now),
        created = pages::moment(session.created, now),
        handle = session.handle,
    )
}

#[derive(Deserialize)]
pub(crate) struct Chosen {
    session: SessionHandle,
}

/// Ends one session of this user. A handle of another user's session ends nothing.
pub(crate) async fn sign_out_one(
    mut member: Member,
    messages: Messages,
    State(store): State<CachedMongoStore>,
    Form(chosen): Form<Chosen>,
) -> Result<Redirect, AppError> {
    if chosen.session == member.here {
        member.auth.logout().await?;
        messages.success("You are signed out.");
        return Ok(Redirect::to("/sign-in"));
    }
    if store.revoke_owned(&member.name, chosen.session).await? {
        messages.success("The device is signed out.");
    } else {
        messages.info("That device was signed out already.");
    }
    Ok(Redirect::to("/devices"))
}

/// Ends all sessions of this user except this one.
pub(crate) async fn sign_out_others(
    member: Member,
    messages: Messages,
    State(store): State<CachedMongoStore>,
) -> Result<Redirect, AppError> {
    let message = match store.delete_by_owner_except(&member.name, member.here).await? {
        0 => "There was no other device.".to_owned(),
        1 => "1 other device is signed out.".to_owned(),
        ended => format!("{ended} other devices are signed out."),
    };
    messages.success(message);
    Ok(Redirect::to("/devices"))
}
