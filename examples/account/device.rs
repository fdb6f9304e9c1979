//! The name of a device, from the `User-Agent` of its browser.

use std::collections::HashMap;

use axum::http::{HeaderMap, header};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The longest `User-Agent` that is stored, in characters. The session stores what a stranger sends, so it
/// needs a limit.
const LONGEST: usize = 300;

/// The mark of each browser and its name. The first match counts, because most browsers also name others
/// that they resemble.
const BROWSERS: [(&str, &str); 9] = [
    ("Edg", "Edge"),
    ("OPR/", "Opera"),
    ("SamsungBrowser/", "Samsung Internet"),
    ("Firefox/", "Firefox"),
    ("FxiOS/", "Firefox"),
    ("CriOS/", "Chrome"),
    ("Chrome/", "Chrome"),
    ("Safari/", "Safari"),
    ("curl/", "curl"),
];

/// The mark of each system, its name, and whether it runs on phones and tablets. The first match counts.
const SYSTEMS: [(&str, &str, bool); 8] = [
    ("iPhone", "iPhone", true),
    ("iPad", "iPad", true),
    ("Android", "Android", true),
    ("Windows", "Windows", false),
    ("CrOS", "ChromeOS", false),
    ("Macintosh", "Mac", false),
    ("X11", "Linux", false),
    ("Linux", "Linux", false),
];

/// The device on which a session began. The session stores it once, at sign-in.
#[derive(Serialize, Deserialize)]
pub(crate) struct Device {
    agent: String,
}

impl Device {
    /// The key of the session's data under which it is stored.
    pub(crate) const KEY: &'static str = "device";

    pub(crate) fn of(headers: &HeaderMap) -> Self {
        let agent = headers.get(header::USER_AGENT).and_then(|agent| agent.to_str().ok());
        Self { agent: agent.unwrap_or_default().chars().take(LONGEST).collect() }
    }

    pub(crate) fn stored_in(data: &HashMap<String, Value>) -> Self {
        let stored = data.get(Self::KEY).and_then(|value| Self::deserialize(value).ok());
        stored.unwrap_or(Self { agent: String::new() })
    }

    /// A name such as "Firefox on Windows". Users recognize their own devices by it, but a browser can claim
    /// anything.
    pub(crate) fn name(&self) -> String {
        let browser = BROWSERS.iter().find(|(mark, _)| self.agent.contains(mark));
        let browser = browser.map_or("A browser", |(_, name)| name);
        match self.system() {
            Some((_, system, _)) => format!("{browser} on {system}"),
            None => browser.to_owned(),
        }
    }

    pub(crate) fn is_mobile(&self) -> bool {
        self.system().is_some_and(|(_, _, mobile)| *mobile)
    }

    fn system(&self) -> Option<&'static (&'static str, &'static str, bool)> {
        SYSTEMS.iter().find(|(mark, ..)| self.agent.contains(mark))
    }
}
