//! The frame of all pages, and the files that they load.

use std::fmt::Write;

use axum::Router;
use axum::http::header;
use axum::response::{Html, IntoResponse};
use axum::routing::get;
use axum_messages::{Level, Messages, Metadata};
use support::escape;
use time::OffsetDateTime;

/// The state that one page hands to the next: messages, each shown once, and the name that was sent.
#[derive(Default)]
pub(crate) struct Shown {
    messages: String,
    pub(crate) name: String,
}

impl Shown {
    pub(crate) fn of(messages: Messages) -> Self {
        let mut shown = Self::default();
        for message in messages {
            let kept = message.metadata.as_ref().and_then(|kept| kept.get("name")?.as_str());
            shown.name.push_str(kept.unwrap_or_default());
            let level = match message.level {
                Level::Debug | Level::Info => "info",
                Level::Success => "success",
                Level::Warning => "warning",
                Level::Error => "error",
            };
            shown.add(level, &message.message);
        }
        shown
    }

    pub(crate) fn add(&mut self, level: &str, message: &str) {
        // Screen readers read both roles out at once, and an alert first.
        let role = if level == "error" { "alert" } else { "status" };
        let message = escape(message);
        let _ =
            writeln!(self.messages, "<p class=\"message {level}\" role=\"{role}\">{message}</p>");
    }
}

/// Attaches the name to a message, so that the user need not type it again.
pub(crate) fn kept(name: String) -> Metadata {
    Metadata::from([("name".to_owned(), name.into())])
}

/// A page of the account. No cache may store it, because it shows one visitor's data. `main` is already HTML.
pub(crate) fn page(
    title: &str,
    user: Option<&str>,
    shown: &Shown,
    main: &str,
) -> impl IntoResponse + use<> {
    let account = user.map_or_else(String::new, |name| {
        let name = escape(name);
        format!(
            r#"<form class="account" method="post" action="/sign-out">
<span>Signed in as <strong>{name}</strong></span>
<button>Sign out</button>
</form>
"#
        )
    });
    let narrow = if user.is_none() { " class=\"narrow\"" } else { "" };
    let main =
        format!("<main id=\"main\"{narrow}>\n<h1>{title}</h1>\n{}{main}</main>\n", shown.messages);
    html(title, &account, &main, "")
}

/// A whole page: `top` is beside the name of the site, `main` is its main part, and `head` is added
/// to the HTML head.
pub(crate) fn html(title: &str, top: &str, main: &str, head: &str) -> impl IntoResponse + use<> {
    let page = format!(
        r##"<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} – Account</title>
<link rel="icon" href="/icon.svg">
<link rel="stylesheet" href="/style.css">
{head}</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header>
<a class="brand" href="/"><img src="/icon.svg" alt="" width="28" height="28"> Account</a>
{top}</header>
{main}<footer><a href="/devices">Your devices</a> <a href="/operator">For the operator</a></footer>
</body>
</html>
"##
    );
    ([(header::CACHE_CONTROL, "no-store")], Html(page))
}

/// A time as people say it. The exact time is in the tooltip, and in a form for machines.
pub(crate) fn moment(at: OffsetDateTime, now: OffsetDateTime) -> String {
    let exact = format!(
        "{} {} {}, {:02}:{:02} UTC",
        at.day(),
        at.month(),
        at.year(),
        at.hour(),
        at.minute()
    );
    let date = at.date();
    let time = at.time();
    let (hour, minute, second) = time.as_hms();
    let machine = format!("{date}T{hour:02}:{minute:02}:{second:02}Z");
    let minutes = (now - at).whole_minutes();
    let said = match minutes {
        ..1 => "just now".to_owned(),
        1 => "a minute ago".to_owned(),
        2..60 => format!("{minutes} minutes ago"),
        60..120 => "an hour ago".to_owned(),
        120..1_440 => format!("{} hours ago", minutes / 60),
        _ => format!("on {exact}"),
    };
    format!("<time datetime=\"{machine}\" title=\"{exact}\">{said}</time>")
}

/// The icon of a phone or of a computer.
pub(crate) fn icon(mobile: bool) -> &'static str {
    if mobile {
        r#"<svg class="icon" viewBox="0 0 24 24" aria-hidden="true"><rect x="7" y="2.5" width="10" height="19" rx="2"/><path d="M11 18.5h2"/></svg>
"#
    } else {
        r#"<svg class="icon" viewBox="0 0 24 24" aria-hidden="true"><rect x="3" y="4" width="18" height="12" rx="1.5"/><path d="M1.5 19.5h21"/></svg>
"#
    }
}

/// The routes of the files that pages load. The files are built into the program.
pub(crate) fn files<S: Clone + Send + Sync + 'static>() -> Router<S> {
    let file = |kind: &'static str, text: &'static str| {
        get(async move || {
            ([(header::CONTENT_TYPE, kind), (header::CACHE_CONTROL, "no-cache")], text)
        })
    };
    Router::new()
        .route("/style.css", file("text/css; charset=utf-8", include_str!("style.css")))
        .route("/operator.js", file("text/javascript; charset=utf-8", include_str!("operator.js")))
        .route("/icon.svg", file("image/svg+xml", include_str!("icon.svg")))
}
