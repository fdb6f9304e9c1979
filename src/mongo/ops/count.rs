//! The operations that count live sessions.

use bson::{Document, doc};
use mongodb::options::Hint;

use crate::error::Result;
use crate::mongo::collection::SessionCollection;
use crate::mongo::ops::query::and;
use crate::mongo::schema;
use crate::telemetry::metrics::{Outcome, Verb};

impl SessionCollection {
    /// Counts the live sessions.
    pub(crate) async fn count(self) -> Result<u64> {
        let timer = self.timer(Verb::Count);
        let live = || doc! { "expires": { "$gt": schema::date(self.clock.wall()) } };
        let counted = async {
            let mut session = self.causal_session().await?;
            let count = self.documents.count_documents(live()).max_time(self.timeout);
            let all = count.session(&mut session).await;
            let foreign = match all {
                Ok(_) => self.count_foreign(live()).session(&mut session).await,
                Err(_) => Ok(0),
            };
            self.causal.observe(&session);
            Ok(all?.saturating_sub(foreign?))
        };
        match counted.await {
            Ok(count) => timer.finish(Outcome::Ok, Ok(count)),
            Err(error) => timer.fail("count the sessions", &error),
        }
    }

    /// Estimates the number of live sessions by the metadata of the collection.
    pub(crate) async fn estimate(self) -> Result<u64> {
        let timer = self.timer_of(Verb::Count, "count");
        let ended = doc! { "$lte": schema::date(self.clock.wall()) };
        let expired = self.documents.count_documents(doc! { "expires": ended.clone() });
        // `expired` already has the documents of other programs whose `expires` is in the past.
        let foreign = self.count_foreign(doc! { "expires": { "$not": ended } });
        let (all, expired, foreign) = tokio::join!(
            self.documents.estimated_document_count().max_time(self.timeout).into_future(),
            expired.max_time(self.timeout).into_future(),
            foreign.into_future(),
        );
        match all.and_then(|all| Ok(all.saturating_sub(expired?).saturating_sub(foreign?))) {
            Ok(count) => timer.finish(Outcome::Ok, Ok(count)),
            Err(error) => timer.fail("estimate the number of sessions", &error),
        }
    }

    /// Counts the documents of other programs that match a filter, through the index on `_id`.
    fn count_foreign(&self, filter: Document) -> mongodb::action::CountDocuments<'_> {
        let foreign = self.documents.count_documents(and(schema::foreign_filter(), filter));
        foreign.hint(Hint::Keys(doc! { "_id": 1 })).max_time(self.timeout)
    }
}
