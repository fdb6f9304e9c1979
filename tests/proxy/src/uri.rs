//! Connection strings that lead through a proxy.

use std::net::{SocketAddr, ToSocketAddrs};

/// A connection string of one host that a proxy can stand in front of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    before: String,
    host: String,
    after: String,
}

impl Location {
    /// Parses a connection string.
    ///
    /// # Errors
    ///
    /// If the server cannot be reached through a proxy: the proxy does not have the server's
    /// certificate, or there is more than one host.
    pub fn of(uri: &str) -> Result<Self, &'static str> {
        let Some(rest) = uri.strip_prefix("mongodb://") else {
            return Err("it does not begin with mongodb://");
        };
        if ["tls=true", "ssl=true"].iter().any(|option| rest.contains(option)) {
            return Err("a certificate would not be valid for the proxy");
        }
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let begin = rest[..end].rfind('@').map_or(0, |at| at + 1);
        let host = &rest[begin..end];
        if host.contains(',') || host.contains('%') {
            return Err("it must name one host");
        }
        Ok(Self {
            before: format!("mongodb://{}", &rest[..begin]),
            host: host.to_owned(),
            after: rest[end..].to_owned(),
        })
    }

    /// The server's address. Resolves the host name, which may block.
    ///
    /// # Errors
    ///
    /// If the name has no address.
    pub fn address(&self) -> Result<SocketAddr, String> {
        let host = &*self.host;
        let found = host.to_socket_addrs().or_else(|_| (host, 27017).to_socket_addrs());
        let found = found.map_err(|error| format!("{host}: {error}"))?.next();
        found.ok_or_else(|| format!("{host} has no address"))
    }

    /// The same connection string with a proxy on this port instead of the host.
    #[must_use]
    pub fn through(&self, port: u16) -> String {
        format!("{}127.0.0.1:{port}{}", self.before, self.after)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uri_leads_through_the_proxy_and_keeps_everything_else() {
        for (uri, through) in [
            ("mongodb://localhost", "mongodb://127.0.0.1:7"),
            ("mongodb://h:1/app?w=1", "mongodb://127.0.0.1:7/app?w=1"),
            ("mongodb://me:p@h/?w=1", "mongodb://me:p@127.0.0.1:7/?w=1"),
        ] {
            assert_eq!(Location::of(uri).unwrap().through(7), through);
        }
        let address = Location::of("mongodb://127.0.0.1").unwrap().address();
        assert_eq!(address.unwrap().port(), 27017);
        for uri in
            ["mongodb+srv://h", "mongodb://a,b/", "mongodb://%2Ftmp%2Fs", "mongodb://h/?tls=true"]
        {
            assert!(Location::of(uri).is_err(), "{uri}");
        }
    }
}
