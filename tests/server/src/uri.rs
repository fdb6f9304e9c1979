//! Connection strings: changes the database or one option, and keeps everything else.

/// The parts of a connection string. Joined again they give the same text.
struct Parts<'a> {
    /// `mongodb` or `mongodb+srv`.
    scheme: &'a str,
    /// `user:password`, still percent-encoded, if any.
    user: Option<&'a str>,
    /// `host:port,host:port`.
    hosts: &'a str,
    /// The database of the path, or empty.
    database: &'a str,
    /// The part after the `?`, or empty.
    query: &'a str,
}

impl<'a> Parts<'a> {
    fn of(uri: &'a str) -> Option<Self> {
        let (scheme, rest) = uri.split_once("://")?;
        if !matches!(scheme, "mongodb" | "mongodb+srv") {
            return None;
        }
        // The slash before the question mark may be missing: `mongodb://host?opt=1`.
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, tail) = rest.split_at(end);
        let (path, query) = tail.split_once('?').unwrap_or((tail, ""));
        let (user, hosts) = match authority.rsplit_once('@') {
            Some((user, hosts)) => (Some(user), hosts),
            None => (None, authority),
        };
        (!hosts.is_empty()).then_some(Self {
            scheme,
            user,
            hosts,
            database: path.strip_prefix('/').unwrap_or(path),
            query,
        })
    }

    /// The value of an option. Names of options have no case.
    fn option(&self, name: &str) -> Option<&'a str> {
        self.query
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .find_map(|(key, value)| key.eq_ignore_ascii_case(name).then_some(value))
    }

    /// The database of the credentials before the path changed, if the new URI must name it.
    fn auth_source(&self) -> Option<&'a str> {
        self.user.filter(|user| !user.is_empty())?;
        if self.option("authSource").is_some() {
            return None;
        }
        let own = (!self.database.is_empty()).then_some(self.database);
        let mechanism = self.option("authMechanism").unwrap_or_default().to_ascii_uppercase();
        match mechanism.as_str() {
            // Always `$external`, whatever the path is.
            "MONGODB-X509" | "MONGODB-AWS" | "MONGODB-OIDC" | "GSSAPI" => None,
            "PLAIN" => Some(own.unwrap_or("$external")),
            // The TXT record of an SRV name usually contains it (Atlas has one), and an option in
            // the URI would override that record.
            _ if self.scheme == "mongodb+srv" => None,
            _ => Some(own.unwrap_or("admin")),
        }
    }
}

/// `uri` with `database` as its path. The server still looks up the credentials in the same
/// database.
///
/// A text that is not a connection string is returned unchanged: the driver refuses it.
pub(crate) fn with_database(uri: &str, database: &str) -> String {
    let Some(parts) = Parts::of(uri) else {
        return uri.to_owned();
    };
    let user = parts.user.map(|u| format!("{u}@")).unwrap_or_default();
    let mut query = parts.query.to_owned();
    if let Some(source) = parts.auth_source() {
        push(&mut query, &format!("authSource={source}"));
    }
    let mark = if query.is_empty() { "" } else { "?" };
    format!("{}://{user}{}/{}{mark}{query}", parts.scheme, parts.hosts, encode(database))
}

/// `uri` with one more option. It replaces an option of the same name.
///
/// The value is percent-encoded as needed, so a path can be given unchanged:
///
/// ```
/// let uri = session_test_server::with_option("mongodb://localhost/x", "tlsCAFile", "/a b/ca.pem");
/// assert_eq!(uri, "mongodb://localhost/x?tlsCAFile=%2Fa%20b%2Fca.pem");
/// ```
#[must_use]
pub fn with_option(uri: &str, name: &str, value: &str) -> String {
    let (base, query) = uri.split_once('?').unwrap_or((uri, ""));
    let mut kept = String::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let key = pair.split_once('=').map_or(pair, |(key, _)| key);
        if !key.eq_ignore_ascii_case(name) {
            push(&mut kept, pair);
        }
    }
    push(&mut kept, &format!("{name}={}", encode(value)));
    let hosts_end = base.find("://").map_or(0, |at| at + 3);
    let slash = if base[hosts_end..].contains('/') { "" } else { "/" };
    format!("{base}{slash}?{kept}")
}

/// `host:port` of each named server, if that is known without a DNS look-up.
pub(crate) fn addresses(uri: &str) -> Option<Vec<String>> {
    let parts = Parts::of(uri)?;
    if parts.scheme == "mongodb+srv" {
        return Some(Vec::new());
    }
    let plain = parts
        .hosts
        .split(',')
        // A host with a percent sign is the path of a Unix socket.
        .filter(|host| !host.contains('%'))
        .map(|host| {
            let named = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
            if named && !host.ends_with(']') { host.to_owned() } else { format!("{host}:27017") }
        });
    Some(plain.collect())
}

/// Only the hosts: the part that may be shown of a connection string with a password.
pub(crate) fn shown(uri: &str) -> String {
    Parts::of(uri).map_or_else(String::new, |parts| parts.hosts.to_owned())
}

fn push(query: &mut String, pair: &str) {
    if !query.is_empty() {
        query.push('&');
    }
    query.push_str(pair);
}

fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push('%');
            for digit in [byte >> 4, byte & 15] {
                let digit = char::from_digit(u32::from(digit), 16).unwrap_or('0');
                out.push(digit.to_ascii_uppercase());
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn database_replaces_the_path() {
        for (from, to) in [
            ("mongodb://h", "mongodb://h/d"),
            ("mongodb://h/", "mongodb://h/d"),
            ("mongodb://h/x", "mongodb://h/d"),
            ("mongodb://h1,h2:1/x?replicaSet=rs0", "mongodb://h1,h2:1/d?replicaSet=rs0"),
            ("mongodb://h?w=1", "mongodb://h/d?w=1"),
            ("mongodb://h/?w=1&w=2", "mongodb://h/d?w=1&w=2"),
            ("mongodb://%2Ftmp%2Fm.sock/x", "mongodb://%2Ftmp%2Fm.sock/d"),
            ("http://h/x", "http://h/x"),
        ] {
            assert_eq!(with_database(from, "d"), to, "{from}");
        }
        assert_eq!(with_database("mongodb://h", "a/b"), "mongodb://h/a%2Fb");
    }

    #[test]
    fn credentials_stay_where_they_were_looked_up() {
        for (from, to) in [
            ("mongodb://u:p@h", "mongodb://u:p@h/d?authSource=admin"),
            ("mongodb://u:p@h/x", "mongodb://u:p@h/d?authSource=x"),
            ("mongodb://u:p%40@h/x?w=1", "mongodb://u:p%40@h/d?w=1&authSource=x"),
            ("mongodb://u:p@h/x?AuthSource=y", "mongodb://u:p@h/d?AuthSource=y"),
            (
                "mongodb://u@h/x?authMechanism=MONGODB-X509",
                "mongodb://u@h/d?authMechanism=MONGODB-X509",
            ),
            (
                "mongodb://u:p@h/?authMechanism=PLAIN",
                "mongodb://u:p@h/d?authMechanism=PLAIN&authSource=$external",
            ),
            ("mongodb+srv://u:p@h/x", "mongodb+srv://u:p@h/d"),
        ] {
            assert_eq!(with_database(from, "d"), to, "{from}");
        }
    }

    #[test]
    fn an_option_is_added_or_replaced() {
        for (from, to) in [
            ("mongodb://h", "mongodb://h/?tls=true"),
            ("mongodb://h/d", "mongodb://h/d?tls=true"),
            ("mongodb://h/d?w=1", "mongodb://h/d?w=1&tls=true"),
            ("mongodb://h/d?TLS=false&w=1", "mongodb://h/d?w=1&tls=true"),
        ] {
            assert_eq!(with_option(from, "tls", "true"), to, "{from}");
        }
    }

    #[test]
    fn addresses_have_ports_and_no_secrets() {
        let of = |uri| addresses(uri).unwrap();
        assert_eq!(
            of("mongodb://u:p@h1,h2:5,[::1],[::1]:6/x?a=b"),
            ["h1:27017", "h2:5", "[::1]:27017", "[::1]:6"]
        );
        assert!(of("mongodb+srv://h/x").is_empty());
        assert!(of("mongodb://%2Ftmp%2Fm.sock").is_empty());
        assert_eq!(addresses("h1:27017"), None);
        assert_eq!(addresses("mongodb://"), None);
        assert_eq!(shown("mongodb://user:secret@h1,h2/x"), "h1,h2");
    }
}
