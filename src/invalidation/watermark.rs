//! `Watermark`: up to which time a change stream has reported every change.

use crate::invalidation::source::{ServerId, ServerTime};

/// The server that feeds a change stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum StreamSource {
    /// A member of a replica set. It reads its own oplog.
    Member(ServerId),
    /// A router (mongos). It merges the streams of all shards.
    Router,
}

/// Judges the batches of one open change stream, in their order: up to which time has it reported every change?
///
/// A resume token of MongoDB begins with a time. What that time proves:
///
/// | batch | token | every change has been delivered |
/// |---|---|---|
/// | with changes | any | *before* the newest one in the batch, and before the token: the changes of a bulk share one time, and the batch may end among them |
/// | empty, from a member | later than the stream's first token | up to the token's time, and *at* it: the server has read the oplog entry of that time |
/// | empty, from a member | the first token again | *before* the token's time. Also every change that this member could see when the batch was requested |
/// | empty, from a member | holds no time | every change that this member could see when the batch was requested |
/// | empty, from a router | any | *before* the token's time: another shard may still report a change of that time |
///
/// The first token has a rule of its own. A fresh stream begins one tick *after* the newest entry of the oplog. No
/// entry has that time yet, and
/// [that time is its first token](https://github.com/mongodb/mongo/blob/master/src/mongo/db/pipeline/document_source_change_stream.cpp).
/// An empty batch repeats the token until the server has read an entry of a
/// [*later* time](https://github.com/mongodb/mongo/blob/master/src/mongo/db/query/plan_executor_pipeline.cpp).
/// So the next write may get exactly the time that an empty batch has named. A stream that is resumed from a
/// token begins at the token's time again.
#[derive(Clone, Debug)]
pub(crate) struct Watermark {
    source: StreamSource,
    /// The time in the first token. `None` until a token has held a time.
    first_token: Option<ServerTime>,
}

/// What a batch proves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Proof {
    /// Every change before this time has been delivered.
    pub(crate) reached: Option<ServerTime>,
    /// Every change that this member could see when the batch was requested has been delivered.
    pub(crate) complete_on: Option<ServerId>,
}

impl Watermark {
    /// For a stream that was just opened, with or without a token.
    pub(crate) fn new(source: StreamSource) -> Self {
        Self { source, first_token: None }
    }

    /// Judges the next batch by the time in its resume token and that of its newest change.
    pub(crate) fn judge(
        &mut self,
        token: Option<ServerTime>,
        newest_change: Option<ServerTime>,
        is_empty: bool,
    ) -> Proof {
        let is_past_first = self.first_token.is_some() && token > self.first_token;
        if self.first_token.is_none() {
            self.first_token = token;
        }
        if !is_empty {
            let reached = [token, newest_change].into_iter().flatten().min();
            return Proof { reached, complete_on: None };
        }
        match &self.source {
            StreamSource::Router => Proof { reached: token, complete_on: None },
            StreamSource::Member(_) if is_past_first => {
                let after = |time: ServerTime| ServerTime(time.0.saturating_add(1));
                Proof { reached: token.map(after), complete_on: None }
            }
            StreamSource::Member(member) => {
                Proof { reached: token, complete_on: Some(member.clone()) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHANGES: bool = false;
    const EMPTY: bool = true;

    #[allow(clippy::unnecessary_wraps, reason = "a token or a change may have no time")]
    fn time(time: u64) -> Option<ServerTime> {
        Some(ServerTime(time))
    }

    fn member() -> StreamSource {
        StreamSource::Member(ServerId("one".into()))
    }

    /// Judges the batches of one stream, and returns what the last one proves.
    fn last(
        source: StreamSource,
        batches: &[(Option<ServerTime>, Option<ServerTime>, bool)],
    ) -> (Option<ServerTime>, bool) {
        let mut watermark = Watermark::new(source);
        let mut proof = None;
        for (token, newest_change, is_empty) in batches {
            proof = Some(watermark.judge(*token, *newest_change, *is_empty));
        }
        let Proof { reached, complete_on } = proof.unwrap();
        (reached, complete_on.is_some())
    }

    #[test]
    fn an_empty_batch_proves_the_time_of_a_token_past_the_first_one() {
        let first = (time(5), None, EMPTY);
        assert_eq!(last(member(), &[first, (time(6), None, EMPTY)]), (time(7), false));
        assert_eq!(last(member(), &[first, first, (time(9), None, EMPTY)]), (time(10), false));
        let change = (time(6), time(6), CHANGES);
        assert_eq!(last(member(), &[first, change, (time(6), None, EMPTY)]), (time(7), false));
        let end = (time(u64::MAX), None, EMPTY);
        assert_eq!(last(member(), &[first, end]), (time(u64::MAX), false), "the end of time");
    }

    #[test]
    fn an_empty_batch_that_repeats_the_first_token_proves_only_what_is_before_it() {
        let first = (time(5), None, EMPTY);
        assert_eq!(last(member(), &[first]), (time(5), true));
        assert_eq!(last(member(), &[first, first]), (time(5), true));
        // The change of that time has come; more changes of the same time may follow.
        let change = (time(5), time(5), CHANGES);
        assert_eq!(last(member(), &[first, change]), (time(5), false));
        assert_eq!(last(member(), &[first, change, first]), (time(5), true));
        // A stream that is resumed among the changes of a bulk.
        assert_eq!(last(member(), &[change]), (time(5), false));
        assert_eq!(last(member(), &[change, first]), (time(5), true));
        // A token that goes back, and a first token that comes late.
        assert_eq!(last(member(), &[first, (time(4), None, EMPTY)]), (time(4), true));
        assert_eq!(last(member(), &[(None, None, EMPTY), first]), (time(5), true));
        assert_eq!(last(member(), &[first, (None, None, EMPTY)]), (None, true));
    }

    #[test]
    fn a_batch_with_changes_proves_what_is_before_the_newest_one() {
        for source in [member(), StreamSource::Router] {
            for (token, change, reached) in [
                (time(9), time(9), time(9)),
                (time(9), time(7), time(7)),
                // The time of the changes, or of the token, cannot be read.
                (time(9), None, time(9)),
                (None, time(7), time(7)),
                (None, None, None),
                (time(7), time(9), time(7)),
            ] {
                let first = (time(5), None, EMPTY);
                let batches = [first, (token, change, CHANGES)];
                assert_eq!(
                    last(source.clone(), &batches),
                    (reached, false),
                    "{token:?} {change:?}"
                );
            }
        }
    }

    #[test]
    fn without_times_in_tokens_an_empty_batch_proves_what_the_member_could_see() {
        let none = (None, None, EMPTY);
        assert_eq!(last(member(), &[none]), (None, true));
        assert_eq!(last(member(), &[none, (None, time(5), CHANGES)]), (time(5), false));
        assert_eq!(last(member(), &[none, (None, time(5), CHANGES), none]), (None, true));
    }

    #[test]
    fn through_a_router_an_empty_batch_proves_only_what_is_before_its_token() {
        let first = (time(5), None, EMPTY);
        assert_eq!(last(StreamSource::Router, &[first, first]), (time(5), false));
        assert_eq!(last(StreamSource::Router, &[first, (time(6), None, EMPTY)]), (time(6), false));
        assert_eq!(last(StreamSource::Router, &[(None, None, EMPTY)]), (None, false));
    }
}
