//! Sign-up, sign-in and sign-out. Each form is answered with a redirect, so that reloading a page sends
//! nothing twice, and with a message that is shown once.

use std::collections::HashMap;

use axum::extract::{Form, Query};
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Redirect, Response};
use axum_messages::Messages;

use crate::device::Device;
use crate::pages;
use crate::users::{AuthSession, Credentials, User};
use support::{AppError, escape};

pub(crate) async fn sign_in_form(
    auth: AuthSession,
    messages: Messages,
    Query(asked): Query<HashMap<String, String>>,
) -> Response {
    if auth.user.is_some() {
        return Redirect::to("/devices").into_response();
    }
    let mut shown = pages::Shown::of(messages);
    if asked.contains_key("ended") {
        shown.add(
            "warning",
            "You are signed out here: your session has ended, or was ended from another device.",
        );
    }
    let fields = fields(&shown, "current-password", "");
    let main = format!(
        r#"<form class="card narrow" method="post" action="/sign-in">
{fields}<button class="primary">Sign in</button>
</form>
<p class="aside">New here? <a href="/sign-up">Create an account</a></p>
"#
    );
    pages::page("Sign in", None, &shown, &main).into_response()
}

pub(crate) async fn sign_up_form(auth: AuthSession, messages: Messages) -> Response {
    if auth.user.is_some() {
        return Redirect::to("/devices").into_response();
    }
    let shown = pages::Shown::of(messages);
    let hint = "<p class=\"hint\" id=\"password-hint\">At least 8 characters.</p>\n";
    let fields = fields(&shown, "new-password", hint);
    let main = format!(
        r#"<form class="card narrow" method="post" action="/sign-up">
{fields}<button class="primary">Create account</button>
</form>
<p class="aside">You have an account? <a href="/sign-in">Sign in</a></p>
"#
    );
    pages::page("Create an account", None, &shown, &main).into_response()
}

/// The fields for name and password. A name that was already sent is filled in.
fn fields(shown: &pages::Shown, autocomplete: &str, hint: &str) -> String {
    let described = if hint.is_empty() { "" } else { " aria-describedby=\"password-hint\"" };
    let shortest = if hint.is_empty() { 1 } else { *Credentials::PASSWORD.start() };
    format!(
        r#"<label for="name">Name</label>
<input id="name" name="name" value="{name}" maxlength="{longest_name}" required autocomplete="username" autocapitalize="none" spellcheck="false">
<label for="password">Password</label>
<input id="password" name="password" type="password" minlength="{shortest}" maxlength="{longest}" required autocomplete="{autocomplete}"{described}>
{hint}"#,
        name = escape(&shown.name),
        longest_name = Credentials::NAME,
        longest = Credentials::PASSWORD.end(),
    )
}

pub(crate) async fn sign_in(
    mut auth: AuthSession,
    messages: Messages,
    headers: HeaderMap,
    Form(sent): Form<Credentials>,
) -> Result<Redirect, AppError> {
    let name = sent.name();
    let Some(user) = auth.authenticate(sent).await? else {
        let wrong = "This name and password do not belong together.";
        messages.error_with_metadata(wrong, pages::kept(name));
        return Ok(Redirect::to("/sign-in"));
    };
    begin(&mut auth, &user, &headers).await?;
    messages.success(format!("Welcome back, {}!", user.name));
    Ok(Redirect::to("/devices"))
}

pub(crate) async fn sign_up(
    mut auth: AuthSession,
    messages: Messages,
    headers: HeaderMap,
    Form(sent): Form<Credentials>,
) -> Result<Redirect, AppError> {
    let name = sent.name();
    if let Some(fault) = sent.fault() {
        messages.error_with_metadata(fault, pages::kept(name));
        return Ok(Redirect::to("/sign-up"));
    }
    let Some(user) = auth.backend.sign_up(sent).await? else {
        messages.error_with_metadata("This name is taken.", pages::kept(name));
        return Ok(Redirect::to("/sign-up"));
    };
    begin(&mut auth, &user, &headers).await?;
    messages.success(format!("Welcome, {}! Your account is ready.", user.name));
    Ok(Redirect::to("/devices"))
}

/// Signs `user` in, under a new session id.
async fn begin(auth: &mut AuthSession, user: &User, headers: &HeaderMap) -> Result<(), AppError> {
    // Another user may be signed in. That session must not become this user's.
    if auth.user.is_some() {
        auth.logout().await?;
    }
    // `login` gives the session a new id. An id that an attacker knew before is worthless from here on.
    auth.login(user).await?;
    auth.session.insert(Device::KEY, Device::of(headers)).await?;
    Ok(())
}

pub(crate) async fn sign_out(
    mut auth: AuthSession,
    messages: Messages,
) -> Result<Redirect, AppError> {
    auth.logout().await?;
    // This message starts a new session, which holds nothing of the user.
    messages.success("You are signed out.");
    Ok(Redirect::to("/sign-in"))
}
