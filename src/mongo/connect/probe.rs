//! The checks of `build` against the server: its version, and whether this user may read and write.
//!
//! They change no document. Without them an app would start, and then every log-in would fail.

use bson::{Document, RawDocumentBuf, doc};
use mongodb::options::{Acknowledgment, Hint, WriteConcern};

use crate::batching::{Condition, NewExpiry};
use crate::error::{Error, ErrorKind, Result};
use crate::mongo::collection::SessionCollection;
use crate::mongo::error;
use crate::mongo::owner_field::OwnerUpdate;
use crate::mongo::schema;
use crate::mongo::server_errors::{self, Meaning};
use crate::telemetry::metrics::{Outcome, Verb};

/// The first version with `hello`, by which a cached store reads the time of the cluster. The driver needs 4.4. A
/// save is an update with `$replaceWith`, which needs 4.2.
const OLDEST: &str = "4.4.2";

/// Each [wire version](https://github.com/mongodb/mongo/blob/master/src/mongo/db/wire_version.h) that the driver refuses
/// as too old, with the newest version of MongoDB that has it.
const WIRE_VERSIONS: [(&str, &str); 4] = [("8", "4.2"), ("7", "4.0"), ("6", "3.6"), ("5", "3.4")];

impl SessionCollection {
    /// Fails if this user cannot store sessions on this server.
    pub(crate) async fn probe(self) -> Result<()> {
        self.check_version().await?;
        self.probe_read().await?;
        self.probe_write().await
    }

    async fn check_version(&self) -> Result<()> {
        let timer = self.timer_of(Verb::Ping, "hello");
        match self.database_command(doc! { "hello": 1 }).await {
            Ok(_) => timer.finish(Outcome::Ok, Ok(())),
            Err(error) if server_errors::has_meaning(&error, Meaning::UnknownCommand) => {
                let info = self.database_command(doc! { "buildInfo": 1 }).await;
                let version =
                    info.ok().and_then(|info| info.get_str("version").map(str::to_owned).ok());
                let found = version.unwrap_or_else(|| format!("older than {OLDEST}"));
                timer.finish(Outcome::Failed(ErrorKind::Server), Err(too_old(&found)))
            }
            Err(error) => timer.fail("connect", &error),
        }
    }

    async fn database_command(&self, command: Document) -> mongodb::error::Result<Document> {
        let namespace = self.documents.namespace();
        self.documents.client().database(&namespace.db).run_command(command).await
    }

    /// Reads a document that is not a session, and warns if there is one.
    async fn probe_read(&self) -> Result<()> {
        let timer = self.timer_of(Verb::Ping, "find");
        let documents = self.documents.clone_with_type::<RawDocumentBuf>();
        let find = documents.find_one(schema::foreign_filter()).projection(doc! { "_id": 1 });
        let find = find.hint(Hint::Keys(doc! { "_id": 1 })).max_time(self.timeout);
        match find.await {
            Ok(None) => timer.finish(Outcome::Ok, Ok(())),
            Ok(Some(_)) => {
                tracing::warn!(
                    "the collection {} holds documents that are not sessions of this store: it \
                     neither lists, counts nor removes them, but a TTL index removes those whose \
                     `expires` is in the past. Keep sessions in a collection of their own",
                    self.documents.namespace()
                );
                timer.finish(Outcome::Ok, Ok(()))
            }
            Err(error) => match timer.fail("read a session", &error) {
                // A server that is only compatible with MongoDB may not take this filter. Then a plain read decides.
                Err(error) if error.kind() == ErrorKind::Server => self.try_plain_read().await,
                failed => failed,
            },
        }
    }

    /// Reads the session of a key that no session has, as a load does.
    async fn try_plain_read(&self) -> Result<()> {
        let timer = self.timer_of(Verb::Ping, "find");
        let documents = self.documents.clone_with_type::<RawDocumentBuf>();
        let unused = schema::binary(&schema::FIRST_KEY);
        match documents.find_one(doc! { "_id": unused }).max_time(self.timeout).await {
            Ok(_) => timer.finish(Outcome::Ok, Ok(())),
            Err(error) => timer.fail("read a session", &error),
        }
    }

    /// Sends a save for a key that no session has. It needs the acknowledgement of one member only, so it does not
    /// wait for a majority.
    async fn probe_write(&self) -> Result<()> {
        let timer = self.timer_of(Verb::Ping, "update");
        let unused = schema::binary(&schema::FIRST_KEY);
        let save = schema::replace_update(
            doc! { "expires": schema::date(self.clock.wall()) },
            OwnerUpdate::Set,
            self.clock.wall(),
            Condition::HasRev(None),
            NewExpiry::AtLeast(self.clock.wall()),
            self.lifetime,
        );
        let one = WriteConcern::builder().w(Acknowledgment::Nodes(1)).build();
        let update = self.documents.update_one(doc! { "_id": unused }, vec![save]);
        let Err(error) = update.write_concern(one).await else {
            return timer.finish(Outcome::Ok, Ok(()));
        };
        if server_errors::is_not_understood(&error) {
            let said = error::to_error("save a session", &error);
            return timer.finish(
                Outcome::Failed(ErrorKind::Server),
                Err(Error::new(
                    ErrorKind::Server,
                    format!(
                        "{said}: this server does not have what a save needs ($replaceWith in an \
                         update). The store needs MongoDB {OLDEST} or newer"
                    ),
                )),
            );
        }
        let is_atlas = server_errors::has_meaning(&error, Meaning::AtlasRefusal);
        match timer.fail("save a session", &error) {
            // The error will pass (an election, an overload), or sessions can at least be read (a full disk).
            Err(error) if error.is_outage() || (error.kind() == ErrorKind::Server && !is_atlas) => {
                tracing::warn!("sessions can be read, but not saved: {error}");
                Ok(())
            }
            failed => failed,
        }
    }
}

/// Translates the driver's text about a server of the wrong version. `None` if the text is about anything else.
pub(crate) fn incompatible(said: &str) -> Option<Error> {
    if said.contains("only supports up to") && said.contains("requires wire version") {
        return Some(Error::new(
            ErrorKind::Server,
            "this MongoDB is too new for the driver: update the crate `mongodb`",
        ));
    }
    let (_, rest) = said.split_once("reports wire version ")?;
    let wire = rest.split(',').next()?;
    let known = WIRE_VERSIONS.iter().find(|(version, _)| *version == wire);
    Some(too_old(known.map_or("older than 3.4", |(_, version)| version)))
}

fn too_old(found: &str) -> Error {
    Error::new(
        ErrorKind::Server,
        format!(
            "this MongoDB is too old: its version is {found}, and the store needs {OLDEST} or newer. \
             Update the server"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wire_version_is_reported_as_a_version_of_mongodb() {
        let said = |wire: &str| {
            let driver = format!(
                "Server at a:1 reports wire version {wire}, but this version of the MongoDB Rust \
                 driver requires at least 9 (MongoDB 4.4)."
            );
            incompatible(&driver).unwrap().to_string()
        };
        assert!(
            said("8").contains("its version is 4.2, and the store needs 4.4.2"),
            "{}",
            said("8")
        );
        assert!(said("6").contains("its version is 3.6"));
        assert!(said("2").contains("its version is older than 3.4"));
        let newer = "Server at a:1 requires wire version 99, but this version of the MongoDB Rust \
                     driver only supports up to 29";
        assert!(incompatible(newer).unwrap().to_string().contains("too new"));
        assert!(incompatible("Server selection timeout: No available servers.").is_none());
    }
}
