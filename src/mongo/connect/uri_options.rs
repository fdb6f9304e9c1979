//! The options of a connection string: the values that each takes, and the options that this driver does not support.
//!
//! Only the driver decides whether a URI is accepted. These tables explain a refusal: the driver's own texts quote
//! the refused value, which may be a piece of the password. The names are those of [the
//! manual](https://www.mongodb.com/docs/manual/reference/connection-string-options/).

use mongodb::options::{AuthMechanism, Credential};

use crate::error::Error;
use crate::mongo::connect::uri::percent_decoded;

/// The values that an option takes.
#[derive(Clone, Copy)]
enum Takes {
    Text,
    Boolean,
    /// A whole number in this range, both ends included.
    Number(i64, i64),
    /// One of these, in any case.
    OneOf(&'static [&'static str]),
    /// `key:value` pairs, with commas between them.
    Pairs,
    /// `key:value` pairs of a mechanism. The values of some keys cannot be in a URI.
    Properties,
    /// A whole number, or the name of a write concern.
    WriteConcern,
    /// The name of a mechanism. Some need a feature of the driver.
    Mechanism,
    /// Names of compressors, with commas between them. Each needs a feature of the driver.
    Compressors,
    /// Any value, if the driver was built with this feature.
    Feature(&'static str),
    /// The Rust driver does not support the option; with the remedy.
    Unsupported(&'static str),
}

use Takes::{
    Boolean, Compressors, Feature, Mechanism, Number, OneOf, Pairs, Properties, Text, Unsupported,
    WriteConcern,
};

const MILLIS: Takes = Number(0, i64::MAX);
const COUNT: Takes = Number(0, u32::MAX as i64);
const AT_LEAST_ONE: Takes = Number(1, u32::MAX as i64);
const OPERATION_TIMEOUT: Takes =
    Unsupported("take it out of the URI, and set MongoStoreBuilder::operation_timeout");
const TAKE_IT_OUT: Takes = Unsupported("take it out of the URI");

const OPTIONS: [(&str, Takes); 51] = [
    ("adaptiveRetries", TAKE_IT_OUT),
    ("appName", Text),
    ("authMechanism", Mechanism),
    ("authMechanismProperties", Properties),
    ("authSource", Text),
    ("compressors", Compressors),
    ("connectTimeoutMS", MILLIS),
    ("directConnection", Boolean),
    ("enableOverloadRetargeting", Boolean),
    ("heartbeatFrequencyMS", Number(500, i64::MAX)),
    ("journal", Boolean),
    ("loadBalanced", Boolean),
    ("localThresholdMS", MILLIS),
    ("maxAdaptiveRetries", COUNT),
    ("maxConnecting", AT_LEAST_ONE),
    ("maxIdleTimeMS", MILLIS),
    ("maxPoolSize", AT_LEAST_ONE),
    ("maxStalenessSeconds", Number(-1, i64::MAX)),
    ("minPoolSize", COUNT),
    ("proxyHost", Feature("socks5-proxy")),
    ("proxyPassword", Feature("socks5-proxy")),
    ("proxyPort", Feature("socks5-proxy")),
    ("proxyUsername", Feature("socks5-proxy")),
    ("readConcernLevel", Text),
    (
        "readPreference",
        OneOf(&["primary", "primaryPreferred", "secondary", "secondaryPreferred", "nearest"]),
    ),
    ("readPreferenceTags", Pairs),
    ("replicaSet", Text),
    ("retryReads", Boolean),
    ("retryWrites", Boolean),
    ("serverMonitoringMode", OneOf(&["auto", "poll", "stream"])),
    ("serverSelectionTimeoutMS", MILLIS),
    ("socketTimeoutMS", OPERATION_TIMEOUT),
    ("srvMaxHosts", COUNT),
    ("srvServiceName", Text),
    ("ssl", Boolean),
    ("timeoutMS", OPERATION_TIMEOUT),
    ("tls", Boolean),
    ("tlsAllowInvalidCertificates", Boolean),
    ("tlsAllowInvalidHostnames", TAKE_IT_OUT),
    ("tlsCAFile", Text),
    ("tlsCertificateKeyFile", Text),
    ("tlsCertificateKeyFilePassword", Feature("cert-key-password")),
    ("tlsDisableCertificateRevocationCheck", TAKE_IT_OUT),
    ("tlsDisableOCSPEndpointCheck", TAKE_IT_OUT),
    ("tlsInsecure", Boolean),
    ("uuidRepresentation", OneOf(&["csharpLegacy", "javaLegacy", "pythonLegacy"])),
    ("w", WriteConcern),
    ("waitQueueMultiple", TAKE_IT_OUT),
    ("waitQueueTimeoutMS", MILLIS),
    ("wTimeoutMS", MILLIS),
    ("zlibCompressionLevel", Feature("zlib-compression")),
];

const TAKE_OUT: &str = "take it out of the URI";
const SELECTION: &str = "write `serverSelectionTimeoutMS`";
const KEY_FILE: &str =
    "write `tlsCertificateKeyFile`, with the certificate and the key in one PEM file";
const KEY_PASSWORD: &str = "write `tlsCertificateKeyFilePassword`";
const CA_FILE: &str = "write `tlsCAFile`, with the path of a PEM file";
const INVALID_CERTIFICATES: &str = "write `tlsAllowInvalidCertificates`";
const NO_REVOCATION_LIST: &str =
    "take it out of the URI, since the Rust driver reads no revocation list";
const SERVICE_NAME: &str = "write authMechanismProperties=SERVICE_NAME:… in its place";
const TIME_OUT: &str = "take it out of the URI, and set MongoStoreBuilder::operation_timeout";

/// Options of older drivers and of drivers for other languages, each with the remedy. An app may have them in its
/// old URI.
///
/// Sources: the manual's
/// [options](https://www.mongodb.com/docs/manual/reference/connection-string-options/) and those of the
/// [specification](https://github.com/mongodb/specifications/blob/master/source/uri-options/uri-options.md),
/// the Node driver's options in its versions
/// [3](https://mongodb.github.io/node-mongodb-native/3.6/reference/connecting/connection-settings) and
/// [4 and later](https://mongodb.github.io/node-mongodb-native/6.0/interfaces/MongoClientOptions.html), and the
/// options of
/// [PyMongo](https://pymongo.readthedocs.io/en/4.3.2/migrate-to-pymongo4.html),
/// [Java](https://mongodb.github.io/mongo-java-driver/3.12/javadoc/com/mongodb/ConnectionString.html),
/// [C](https://manpages.ubuntu.com/manpages/mantic/man3/mongoc_uri_t.3.html) and
/// [C#](https://www.mongodb.com/docs/drivers/csharp/current/fundamentals/connection/connection-options/).
const OTHER_DRIVERS: [(&str, &str); 87] = [
    // Limits and waits.
    ("acceptableLatencyMS", "write `localThresholdMS`"),
    ("secondaryAcceptableLatencyMS", "write `localThresholdMS`"),
    ("autoReconnect", TAKE_OUT),
    ("auto_reconnect", TAKE_OUT),
    ("bufferCommands", TAKE_OUT),
    ("bufferMaxEntries", TAKE_OUT),
    ("connectWithNoPrimary", TAKE_OUT),
    ("family", TAKE_OUT),
    ("ha", TAKE_OUT),
    ("haInterval", "write `heartbeatFrequencyMS`"),
    ("heartbeatInterval", "write `heartbeatFrequencyMS`"),
    ("ipv6", TAKE_OUT),
    ("keepAlive", TAKE_OUT),
    ("keepAliveInitialDelay", TAKE_OUT),
    ("maxConnectionIdleTime", "write `maxIdleTimeMS`"),
    ("maxConnectionLifeTime", TAKE_OUT),
    ("maxLifeTimeMS", TAKE_OUT),
    ("minHeartbeatFrequencyMS", "write `heartbeatFrequencyMS`"),
    ("minSize", "write `minPoolSize`"),
    ("noDelay", TAKE_OUT),
    ("poolSize", "write `maxPoolSize`"),
    ("reconnectInterval", TAKE_OUT),
    ("reconnectTries", TAKE_OUT),
    ("serverSelectionTimeout", SELECTION),
    ("serverSelectionTryOnce", SELECTION),
    ("socketCheckIntervalMS", TAKE_OUT),
    ("socketTimeout", TIME_OUT),
    ("connectTimeout", "write `connectTimeoutMS`"),
    ("threadsAllowedToBlockForConnectionMultiplier", TAKE_OUT),
    ("waitQueueSize", TAKE_OUT),
    ("waitQueueTimeout", TIME_OUT),
    // The server, and how it is read and written.
    ("connect", "write `directConnection`"),
    ("fsync", "write `journal`"),
    ("j", "write `journal`"),
    (
        "readConcern",
        "take it out of the URI, since a session store reads with read concern `majority`",
    ),
    ("read_preference", "take it out of the URI, since a session store reads from the primary"),
    ("rs_name", "write `replicaSet`"),
    ("safe", "write `w`"),
    ("slaveOk", "take it out of the URI, since a session store reads from the primary"),
    ("slave_ok", "take it out of the URI, since a session store reads from the primary"),
    ("wtimeout", "write `wTimeoutMS`"),
    // Users.
    (
        "canonicalizeHostName",
        "write authMechanismProperties=CANONICALIZE_HOST_NAME:true in its place",
    ),
    ("gssapiServiceName", SERVICE_NAME),
    // TLS.
    ("checkServerIdentity", TAKE_OUT),
    ("servername", TAKE_OUT),
    ("sslAllowInvalidCertificates", INVALID_CERTIFICATES),
    ("sslAllowInvalidHostnames", TAKE_OUT),
    ("sslCA", CA_FILE),
    ("sslCAFile", CA_FILE),
    ("sslCert", KEY_FILE),
    ("sslCertificateAuthorityFile", CA_FILE),
    ("sslCertificateKeyFile", KEY_FILE),
    ("sslCertificateKeyPassword", KEY_PASSWORD),
    ("sslClientCertificateKeyFile", KEY_FILE),
    ("sslClientCertificateKeyPassword", KEY_PASSWORD),
    ("sslCRL", NO_REVOCATION_LIST),
    ("sslInsecure", "write `tlsInsecure`"),
    ("sslInvalidHostNameAllowed", TAKE_OUT),
    ("sslKey", KEY_FILE),
    ("sslPass", KEY_PASSWORD),
    ("sslPEMKeyFile", KEY_FILE),
    ("sslPEMKeyPassword", KEY_PASSWORD),
    ("sslValidate", INVALID_CERTIFICATES),
    ("sslVerifyCertificate", INVALID_CERTIFICATES),
    ("ssl_ca_certs", CA_FILE),
    ("ssl_cert_reqs", INVALID_CERTIFICATES),
    ("ssl_certfile", KEY_FILE),
    ("ssl_crlfile", NO_REVOCATION_LIST),
    ("ssl_keyfile", KEY_FILE),
    ("ssl_match_hostname", TAKE_OUT),
    ("ssl_pem_passphrase", KEY_PASSWORD),
    ("tlsCertificateFile", KEY_FILE),
    ("tlsCRLFile", NO_REVOCATION_LIST),
    // How a driver turns documents into values.
    ("domainsEnabled", TAKE_OUT),
    ("forceServerObjectId", TAKE_OUT),
    ("guids", TAKE_OUT),
    ("ignoreUndefined", TAKE_OUT),
    ("monitorCommands", TAKE_OUT),
    ("promoteBuffers", TAKE_OUT),
    ("promoteLongs", TAKE_OUT),
    ("promoteValues", TAKE_OUT),
    ("streamType", TAKE_OUT),
    ("tz_aware", TAKE_OUT),
    ("unicode_decode_error_handler", TAKE_OUT),
    ("useNewUrlParser", TAKE_OUT),
    ("useUnifiedTopology", TAKE_OUT),
    ("validateOptions", TAKE_OUT),
];

/// Each compressor with the driver's feature that it needs.
const COMPRESSORS: [(&str, &str); 3] =
    [("snappy", "snappy-compression"), ("zlib", "zlib-compression"), ("zstd", "zstd-compression")];

/// Each mechanism with the driver's feature that it needs, or with none.
const MECHANISMS: [(&str, Option<&str>); 7] = [
    ("GSSAPI", Some("gssapi-auth")),
    ("MONGODB-AWS", Some("aws-auth")),
    ("MONGODB-OIDC", None),
    ("MONGODB-X509", None),
    ("PLAIN", None),
    ("SCRAM-SHA-1", None),
    ("SCRAM-SHA-256", None),
];

/// Properties of a mechanism that the driver takes only from its own options.
const NOT_IN_A_URI: [&str; 3] = ["ALLOWED_HOSTS", "OIDC_CALLBACK", "OIDC_HUMAN_CALLBACK"];
const CANONICALIZE: [&str; 5] = ["none", "forward", "forwardAndReverse", "true", "false"];

/// The driver's reasons that have nothing of the URI in them, with `#` for a number. They may be passed on.
const REASONS: [&str; 38] = [
    "'heartbeat_freq' must be at least #ms, but #ms was given",
    "'tlsCAFile' can't be set if tls=false",
    "'tlsCertificateKeyFile' can't be set if tls=false",
    "'tlsCertificateKeyFilePassword' can't be set if tls=false",
    "A password cannot be specified with MONGODB-X#",
    "No password provided for PLAIN authentication",
    "No username provided for GSSAPI authentication",
    "No username provided for PLAIN authentication",
    "No username provided for SCRAM authentication",
    "Username for PLAIN authentication must be non-empty",
    "Username cannot be provided without password for MONGODB-AWS authentication",
    "a port cannot be specified with 'mongodb+srv'",
    "cannot set both tlsinsecure and tlsallowinvalidcertificates in the connection string",
    "cannot set max staleness without also setting read preference mode",
    "cannot set read preference tags without also setting read preference mode",
    "cannot set tlsallowinvalidcertificates when TLS is disabled",
    "cannot set tlsinsecure when TLS is disabled",
    "cannot set {key}={tls} if TLS is disabled",
    "cannot set {key}={tls} if other TLS options are set",
    "cannot specify directConnection=true with loadBalanced=true",
    "cannot specify multiple seeds with directConnection=true",
    "cannot specify multiple seeds with loadBalanced=true",
    "cannot specify replicaSet with loadBalanced=true",
    "cannot use SRV-style URI with directConnection=true",
    "empty authSource provided",
    "exactly one host must be specified with 'mongodb+srv'",
    "invalid max_staleness value: must be at least # seconds",
    "only $external may be specified as an auth source for GSSAPI",
    "only $external may be specified as an auth source for MONGODB-OIDC",
    "only $external may be specified as an auth source for MONGODB-X#",
    "password must not be set for MONGODB-OIDC authentication",
    "repeated options are not allowed in the connection string",
    "srvMaxHosts and loadBalanced=true cannot both be present",
    "srvMaxHosts and replicaSet cannot both be present",
    "srvMaxHosts cannot be specified with a non-SRV URI",
    "srvServiceName cannot be specified with a non-SRV URI",
    "unix sockets cannot be used with 'mongodb+srv'",
    "write concern cannot have w=# and j=true",
];

/// Options that the driver takes and that have no effect here: the name, the values with the same effect as the
/// store, and what counts instead.
const WITHOUT_EFFECT: [(&str, &[&str], &str); 3] = [
    ("readConcernLevel", &["majority"], "a session store reads with read concern `majority`"),
    ("readPreference", &["primary"], "a session store reads from the primary"),
    (
        "waitQueueTimeoutMS",
        &[],
        "the driver does not support it; MongoStoreBuilder::operation_timeout limits the wait",
    ),
];

/// Returns what is wrong with an option of a URI, given as `name=value`; `None` if nothing is.
pub(crate) fn fault(pair: &str) -> Option<Error> {
    let (key, value) = match pair.split_once('=') {
        Some((key, value)) => (key, Some(value)),
        None => (pair, None),
    };
    if let Some((name, instead)) = row(&OTHER_DRIVERS, key) {
        return Some(Error::config(format!(
            "the URI's option `{name}` is an option of an older or another driver: {instead}"
        )));
    }
    let Some((name, takes)) = row(&OPTIONS, key) else {
        return Some(Error::config(
            "the URI has an option after its ? that the driver does not know: they have the form \
             ?name=value&name=value, and a ? in the user name or password is written %3F",
        ));
    };
    let Some(value) = value else {
        return Some(Error::config(format!("the URI's option `{name}` has no value")));
    };
    let value = percent_decoded(value).unwrap_or_else(|_| value.to_owned());
    takes.refuse(name, &value).map(Error::config)
}

/// The row of an option. The case of its name does not matter.
fn row<'a, T>(table: &'a [(&'a str, T)], key: &str) -> Option<&'a (&'a str, T)> {
    table.iter().find(|(name, _)| name.eq_ignore_ascii_case(key))
}

/// Returns what is wrong with `authMechanismProperties` together with `authMechanism=MONGODB-OIDC`; `None` if
/// nothing is.
pub(crate) fn oidc_fault(pairs: &[&str]) -> Option<Error> {
    let value_of = |name: &str| {
        let given = pairs.iter().filter_map(|pair| pair.split_once('='));
        let (_, value) = given.into_iter().find(|(key, _)| key.eq_ignore_ascii_case(name))?;
        percent_decoded(value).ok()
    };
    if value_of("authMechanism")? != "MONGODB-OIDC" {
        return None;
    }
    let mut environment = None;
    let mut has_resource = false;
    let mut has_other = false;
    for (key, value) in
        value_of("authMechanismProperties")?.split(',').filter_map(|it| it.split_once(':'))
    {
        match key {
            "ENVIRONMENT" => environment = Some(value.to_owned()),
            "TOKEN_RESOURCE" => has_resource = true,
            _ => has_other = true,
        }
    }
    let wants_resource = match environment.as_deref() {
        Some("azure" | "gcp") => true,
        Some("k8s") | None => false,
        Some(_) => {
            has_other = true;
            false
        }
    };
    (has_other || has_resource != wants_resource).then(|| {
        Error::config(
            "the URI's option `authMechanismProperties` does not fit authMechanism=MONGODB-OIDC: write \
             ENVIRONMENT:azure,TOKEN_RESOURCE:… or ENVIRONMENT:gcp,TOKEN_RESOURCE:… or ENVIRONMENT:k8s, and \
             nothing else",
        )
    })
}

/// Returns the driver's reason for its refusal, if the reason has nothing of the URI in it.
pub(crate) fn reason(error: &mongodb::error::Error) -> Option<String> {
    let mongodb::error::ErrorKind::InvalidArgument { message, .. } = &*error.kind else {
        return None;
    };
    let mut pattern = String::new();
    for character in message.chars() {
        match character {
            '0'..='9' if pattern.ends_with('#') => {}
            '0'..='9' => pattern.push('#'),
            other => pattern.push(other),
        }
    }
    // The driver does not fill in these placeholders.
    let reason = message.replace("{key}={tls}", "`tls` or `ssl`");
    REASONS.contains(&pattern.as_str()).then_some(reason)
}

/// Refuses a mechanism that the driver reads from a URI but cannot use. Without this check, the error would be that
/// of a wrong password, after the server is reached.
pub(crate) fn unusable_mechanism(credential: &Credential) -> Option<Error> {
    match credential.mechanism.as_ref()? {
        AuthMechanism::MongoDbCr => Some(Error::config(
            "the Rust driver does not support the URI's option `authMechanism=MONGODB-CR`: take it \
             out of the URI, and it uses SCRAM",
        )),
        AuthMechanism::MongoDbOidc => {
            let properties = credential.mechanism_properties.as_ref();
            let has_environment = properties.is_some_and(|it| it.contains_key("ENVIRONMENT"));
            (!has_environment).then(|| {
                Error::config(
                    "the URI's option `authMechanism=MONGODB-OIDC` takes \
                     authMechanismProperties=ENVIRONMENT:… beside it: add it, or give a client with \
                     a callback of yours to MongoStoreBuilder::client",
                )
            })
        }
        _ => None,
    }
}

/// Translates the driver's text about a mechanism that needs a feature of the driver. The driver says so only after
/// it has reached the server.
pub(crate) fn missing_feature(said: &str) -> Option<Error> {
    let feature = ["azure-oidc", "gcp-oidc"]
        .into_iter()
        .find(|feature| said.contains(&format!("`{feature}` feature flag must be enabled")))?;
    Some(Error::config(lacks_feature("authMechanism=MONGODB-OIDC", feature)))
}

/// Warns of an option that has no effect here.
pub(crate) fn warn_of_no_effect(pair: &str) {
    let Some((key, value)) = pair.split_once('=') else { return };
    for (name, same, why) in WITHOUT_EFFECT {
        let has_same_effect = same.iter().any(|same| same.eq_ignore_ascii_case(value));
        if name.eq_ignore_ascii_case(key) && !has_same_effect {
            tracing::warn!("the URI's option `{name}` has no effect: {why}");
        }
    }
}

impl Takes {
    /// Returns why the driver refuses this value; `None` if it does not.
    fn refuse(self, name: &str, value: &str) -> Option<String> {
        let takes = |what: &str| Some(format!("the URI's option `{name}` takes {what}"));
        match self {
            Boolean if matches!(value, "true" | "false") => None,
            Boolean => takes("`true` or `false`"),
            Number(least, most) => match value.parse::<i64>() {
                Ok(number) if (least..=most).contains(&number) => None,
                _ if most == i64::MAX => takes(&format!("a whole number of at least {least}")),
                _ => takes(&format!("a whole number from {least} to {most}")),
            },
            OneOf(values) if values.iter().any(|one| one.eq_ignore_ascii_case(value)) => None,
            OneOf(values) => takes(&one_of(values)),
            Pairs if value.split(',').all(|pair| pair.is_empty() || pair.contains(':')) => None,
            Pairs => takes("pairs key:value, with commas between them"),
            Properties => refuse_properties(name, value),
            WriteConcern if value.starts_with('-') => {
                takes("a whole number of at least 0, or `majority`")
            }
            Text | WriteConcern => None,
            Mechanism => match MECHANISMS.iter().find(|(mechanism, _)| *mechanism == value) {
                Some((mechanism, Some(feature))) => {
                    Some(lacks_feature(&format!("{name}={mechanism}"), feature))
                }
                Some((_, None)) => None,
                None => takes(&one_of(&MECHANISMS.map(|(mechanism, _)| mechanism))),
            },
            Compressors => {
                let mut feature = None;
                for one in value.split(',') {
                    let known = COMPRESSORS.iter().find(|(compressor, _)| *compressor == one);
                    let Some((_, needed)) = known else {
                        let all = one_of(&COMPRESSORS.map(|(compressor, _)| compressor));
                        return takes(&format!("a list of {all}"));
                    };
                    feature = feature.or(Some(needed));
                }
                feature.map(|feature| lacks_feature(name, feature))
            }
            Feature(feature) => Some(lacks_feature(name, feature)),
            Unsupported(remedy) => Some(format!(
                "the Rust driver does not support the URI's option `{name}`: {remedy}"
            )),
        }
    }
}

fn refuse_properties(name: &str, value: &str) -> Option<String> {
    for pair in value.split(',') {
        let Some((key, value)) = pair.split_once(':') else {
            return Some(format!(
                "the URI's option `{name}` takes pairs key:value, with commas between them and none at \
                 either end"
            ));
        };
        if let Some(key) = NOT_IN_A_URI.iter().find(|it| **it == key) {
            return Some(format!(
                "the URI's option `{name}` takes no `{key}`: set it in the options of a client of yours, \
                 and give that to MongoStoreBuilder::client"
            ));
        }
        let is_canonical = CANONICALIZE.iter().any(|it| it.eq_ignore_ascii_case(value));
        if key == "CANONICALIZE_HOST_NAME" && !is_canonical {
            let values = one_of(&CANONICALIZE);
            return Some(format!(
                "`CANONICALIZE_HOST_NAME` in the URI's option `{name}` takes {values}"
            ));
        }
    }
    None
}

fn lacks_feature(option: &str, feature: &str) -> String {
    format!(
        "this build of the driver does not support the URI's option `{option}`: enable the feature \
         `{feature}` of the crate `mongodb` in your Cargo.toml, or take the option out"
    )
}

/// Formats values as `a`, `b` or `c`.
fn one_of(values: &[&str]) -> String {
    let quoted: Vec<_> = values.iter().map(|value| format!("`{value}`")).collect();
    match quoted.split_last() {
        Some((last, others)) if !others.is_empty() => {
            format!("{} or {last}", others.join(", "))
        }
        _ => quoted.join(""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_knows_no_option_of_another_driver_and_each_replacement() {
        for (name, instead) in OTHER_DRIVERS {
            let uri = format!("mongodb://localhost/app?{name}=1");
            assert!(mongodb::options::ConnectionString::parse(uri).is_err(), "{name}");
            assert!(row(&OPTIONS, name).is_none(), "{name}");
            let same = OTHER_DRIVERS.iter().filter(|(other, _)| other.eq_ignore_ascii_case(name));
            assert_eq!(same.count(), 1, "{name}");
            if let Some((_, to_write)) = instead.split_once("write `") {
                let (to_write, _) = to_write.split_once('`').unwrap();
                assert!(row(&OPTIONS, to_write).is_some(), "{name}: {to_write}");
            }
        }
    }
}
