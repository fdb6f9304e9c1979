//! Generated filters over sessions that are stored as texts and as documents, compared with a
//! model.
//!
//! For each session, the model knows what MongoDB can see of it. MongoDB cannot see the data of a
//! text: a condition on it is unknown (`None`). A filter finds a session only if it is true
//! (`Some(true)`).

use std::collections::HashSet;

use futures::StreamExt;
use mongodb::bson::{Bson, Document, doc};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use serde_json::json;
use tower_sessions::SessionStore;
use tower_sessions_moka_mongodb_store::{
    ErrorKind, MongoStore, Owner, SessionHandle, data_path, mongodb,
};

use crate::common::{record, uri};

const FILTERS: usize = 250;
const VALUES: [&str; 3] = ["x", "y", "z"];

/// A condition of a filter on one field.
#[derive(Clone, Debug)]
enum Condition {
    Equal(&'static str),
    Implied(&'static str),
    NotEqual(&'static str),
    In(Vec<&'static str>),
    NotIn(Vec<&'static str>),
    Exists(bool),
    NotNot(Box<Condition>),
}

#[derive(Clone, Copy, Debug)]
enum Field {
    Owner,
    Role,
}

/// How an expression reads a field.
#[derive(Clone, Copy, Debug)]
enum Reading {
    Path,
    RootPath,
    GetField,
    Let,
}

#[derive(Clone, Debug)]
enum Filter {
    Field(Field, Condition),
    All(Vec<Filter>),
    Any(Vec<Filter>),
    None(Vec<Filter>),
    Expression(Expression),
}

#[derive(Clone, Debug)]
enum Expression {
    Compare(Field, Reading, bool, &'static str),
    All(Vec<Expression>),
    Any(Vec<Expression>),
    Not(Box<Expression>),
}

/// A stored session and its content.
struct Stored {
    handle: SessionHandle,
    is_document: bool,
    owner: Option<&'static str>,
    role: Option<&'static str>,
}

impl Stored {
    /// What MongoDB sees of a field: nothing if the data is a text.
    fn see<T>(&self, field: Field, then: impl FnOnce(Option<&str>) -> T) -> Option<T> {
        match field {
            Field::Owner => Some(then(self.owner)),
            Field::Role => self.is_document.then(|| then(self.role)),
        }
    }
}

fn all(parts: impl Iterator<Item = Option<bool>>) -> Option<bool> {
    let mut all = Some(true);
    for part in parts {
        all = match (all, part) {
            (Some(false), _) | (_, Some(false)) => Some(false),
            (Some(true), Some(true)) => Some(true),
            _ => None,
        };
    }
    all
}

fn any(parts: impl Iterator<Item = Option<bool>>) -> Option<bool> {
    all(parts.map(not)).map(|none| !none)
}

fn not(part: Option<bool>) -> Option<bool> {
    part.map(|part| !part)
}

impl Condition {
    fn holds(&self, value: Option<&str>) -> bool {
        match self {
            Self::Equal(other) | Self::Implied(other) => value == Some(*other),
            Self::NotEqual(other) => value != Some(*other),
            Self::In(others) => value.is_some_and(|value| others.contains(&value)),
            Self::NotIn(others) => !value.is_some_and(|value| others.contains(&value)),
            Self::Exists(exists) => value.is_some() == *exists,
            Self::NotNot(condition) => !condition.holds(value),
        }
    }

    fn bson(&self) -> Bson {
        match self {
            Self::Equal(other) => doc! { "$eq": *other }.into(),
            Self::Implied(other) => (*other).into(),
            Self::NotEqual(other) => doc! { "$ne": *other }.into(),
            Self::In(others) => doc! { "$in": others.clone() }.into(),
            Self::NotIn(others) => doc! { "$nin": others.clone() }.into(),
            Self::Exists(exists) => doc! { "$exists": *exists }.into(),
            Self::NotNot(condition) => doc! { "$not": condition.bson() }.into(),
        }
    }
}

impl Filter {
    fn finds(&self, session: &Stored) -> Option<bool> {
        match self {
            Self::Field(field, condition) => session.see(*field, |value| condition.holds(value)),
            Self::All(parts) => all(parts.iter().map(|part| part.finds(session))),
            Self::Any(parts) => any(parts.iter().map(|part| part.finds(session))),
            Self::None(parts) => not(any(parts.iter().map(|part| part.finds(session)))),
            Self::Expression(expression) => expression.holds(session),
        }
    }

    fn bson(&self) -> Document {
        let list = |parts: &[Self]| parts.iter().map(Self::bson).collect::<Vec<_>>();
        match self {
            Self::Field(Field::Owner, condition) => doc! { "owner": condition.bson() },
            Self::Field(Field::Role, condition) => doc! { data_path(&["role"]): condition.bson() },
            Self::All(parts) => doc! { "$and": list(parts) },
            Self::Any(parts) => doc! { "$or": list(parts) },
            Self::None(parts) => doc! { "$nor": list(parts) },
            Self::Expression(expression) => doc! { "$expr": expression.bson() },
        }
    }
}

impl Expression {
    fn holds(&self, session: &Stored) -> Option<bool> {
        match self {
            Self::Compare(field, _, equal, other) => {
                session.see(*field, |value| (value == Some(*other)) == *equal)
            }
            Self::All(parts) => all(parts.iter().map(|part| part.holds(session))),
            Self::Any(parts) => any(parts.iter().map(|part| part.holds(session))),
            Self::Not(part) => not(part.holds(session)),
        }
    }

    fn bson(&self) -> Bson {
        let list = |parts: &[Self]| parts.iter().map(Self::bson).collect::<Vec<_>>();
        match self {
            Self::Compare(Field::Role, Reading::Let, equal, other) => doc! { "$let": {
                "vars": { "data": "$data" },
                "in": { if *equal { "$eq" } else { "$ne" }: ["$$data.role", *other] },
            } },
            Self::Compare(field, reading, equal, other) => {
                let read: Bson = match (field, reading) {
                    (Field::Owner, Reading::RootPath) => "$$ROOT.owner".into(),
                    (Field::Owner, _) => "$owner".into(),
                    (Field::Role, Reading::RootPath) => "$$ROOT.data.role".into(),
                    (Field::Role, Reading::GetField) => {
                        doc! { "$getField": { "field": "role", "input": "$data" } }.into()
                    }
                    (Field::Role, _) => "$data.role".into(),
                };
                doc! { if *equal { "$eq" } else { "$ne" }: [read, *other] }
            }
            Self::All(parts) => doc! { "$and": list(parts) },
            Self::Any(parts) => doc! { "$or": list(parts) },
            Self::Not(part) => doc! { "$not": [part.bson()] },
        }
        .into()
    }
}

fn value() -> impl Strategy<Value = &'static str> {
    prop::sample::select(&VALUES[..])
}

fn field() -> impl Strategy<Value = Field> {
    prop_oneof![1 => Just(Field::Owner), 2 => Just(Field::Role)]
}

fn condition() -> impl Strategy<Value = Condition> {
    let values = || prop::collection::vec(value(), 1..3);
    let one = prop_oneof![
        value().prop_map(Condition::Equal),
        value().prop_map(Condition::NotEqual),
        values().prop_map(Condition::In),
        values().prop_map(Condition::NotIn),
        proptest::bool::ANY.prop_map(Condition::Exists),
    ];
    let negated = one.clone().prop_map(|condition| Condition::NotNot(Box::new(condition)));
    prop_oneof![4 => one, 1 => value().prop_map(Condition::Implied), 2 => negated]
}

fn expression() -> impl Strategy<Value = Expression> {
    let reading = prop_oneof![
        Just(Reading::Path),
        Just(Reading::RootPath),
        Just(Reading::GetField),
        Just(Reading::Let),
    ];
    let compare = (field(), reading, proptest::bool::ANY, value()).prop_map(
        |(field, reading, equal, other)| Expression::Compare(field, reading, equal, other),
    );
    compare.prop_recursive(2, 6, 2, |part| {
        let parts = prop::collection::vec(part.clone(), 1..3);
        prop_oneof![
            parts.clone().prop_map(Expression::All),
            parts.prop_map(Expression::Any),
            part.prop_map(|part| Expression::Not(Box::new(part))),
        ]
    })
}

fn filter() -> impl Strategy<Value = Filter> {
    let leaf = prop_oneof![
        3 => (field(), condition()).prop_map(|(field, condition)| Filter::Field(field, condition)),
        1 => expression().prop_map(Filter::Expression),
    ];
    leaf.prop_recursive(3, 12, 3, |part| {
        let parts = prop::collection::vec(part, 1..4);
        prop_oneof![
            parts.clone().prop_map(Filter::All),
            parts.clone().prop_map(Filter::Any),
            parts.prop_map(Filter::None),
        ]
    })
}

#[tokio::test]
async fn filter_finds_exactly_the_sessions_of_the_model() {
    let uri = uri();
    let owner = |data: &std::collections::HashMap<String, serde_json::Value>| {
        Owner::from_value(data.get("owner")?)
    };
    let mut sessions = Vec::new();
    let mut stores = Vec::new();
    for is_document in [false, true] {
        let builder = MongoStore::builder().uri(&uri).owner(owner).queryable(is_document);
        let store = builder.build().await.unwrap();
        for owner in [None, Some("x"), Some("y")] {
            for role in [None, Some("x"), Some("y")] {
                let mut record = record();
                for (key, value) in [("owner", owner), ("role", role)] {
                    if let Some(value) = value {
                        record.data.insert(key.to_owned(), json!(value));
                    }
                }
                store.create(&mut record).await.unwrap();
                let handle = SessionHandle::of(record.id);
                sessions.push(Stored { handle, is_document, owner, role });
            }
        }
        stores.push(store);
    }
    let [texts, store] = &stores[..] else { panic!("two stores") };

    let mut runner = TestRunner::deterministic();
    let mut compared = 0;
    for _ in 0..FILTERS {
        let filter = filter().new_tree(&mut runner).unwrap().current();
        let wanted = sessions.iter().filter(|session| filter.finds(session) == Some(true));
        let wanted: HashSet<_> = wanted.map(|session| session.handle).collect();
        let mut listed = store.find(filter.bson());
        let mut found = HashSet::new();
        let mut refused = None;
        while let Some(session) = listed.next().await {
            match session {
                Ok(session) => drop(found.insert(session.handle)),
                Err(error) => refused = Some(error),
            }
        }
        if let Some(error) = refused {
            // The test server does not support every operator of MongoDB.
            assert_eq!(error.kind(), ErrorKind::Server, "{}: {error}", filter.bson());
            continue;
        }
        compared += 1;
        assert_eq!(found, wanted, "{}", filter.bson());

        // If all sessions are texts, a filter does not read the data, or is rejected.
        let reads_data = filter.bson().to_string().contains("data");
        let refused = texts.find(filter.bson()).next().await;
        let refused = matches!(refused, Some(Err(error)) if error.kind() == ErrorKind::Config);
        assert_eq!(refused, reads_data, "{}", filter.bson());
    }
    assert!(compared > FILTERS / 2, "the server refuses most filters: {compared} of {FILTERS}");
}
