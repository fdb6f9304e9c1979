//! Collects the spans and events that a test's thread traces.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Once;

use tower_sessions_moka_mongodb_store::mongodb::Namespace;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

pub(super) const OURS: &str = "tower_sessions_moka_mongodb_store";

/// The spans and events of this thread.
#[derive(Debug, Default)]
pub(super) struct Captured {
    pub(super) spans: Vec<CapturedSpan>,
    pub(super) events: Vec<CapturedEvent>,
}

#[derive(Debug)]
pub(super) struct CapturedSpan {
    pub(super) id: u64,
    pub(super) parent: Option<u64>,
    pub(super) name: &'static str,
    pub(super) level: Level,
    pub(super) fields: Fields,
}

#[derive(Debug)]
pub(super) struct CapturedEvent {
    pub(super) span: Option<u64>,
    pub(super) level: Level,
    pub(super) text: String,
}

thread_local! {
    static CAPTURED: RefCell<Option<Captured>> = const { RefCell::new(None) };
}

impl Captured {
    /// Collects what this thread traces while `work` runs. The runtime of the test has no other
    /// thread.
    ///
    /// There is one subscriber for all threads: a subscriber of each thread would be disturbed by
    /// other threads' tests, which reset the cached interests.
    pub(super) async fn during(work: impl Future<Output = ()>) -> Self {
        static INSTALLED: Once = Once::new();
        INSTALLED.call_once(|| {
            let ours = Capture.with_filter(Targets::new().with_target(OURS, Level::TRACE));
            let all = tracing_subscriber::registry().with(ours);
            tracing::subscriber::set_global_default(all).unwrap();
        });
        CAPTURED.set(Some(Self::default()));
        work.await;
        CAPTURED.take().unwrap()
    }

    pub(super) fn span(&self, name: &str) -> Option<&CapturedSpan> {
        self.spans.iter().find(|span| span.name == name)
    }

    /// Asserts that there is the span of a verb, directly below it the spans of these commands on
    /// its collection, and nothing else.
    #[track_caller]
    pub(super) fn assert_verb(&self, verb: &str, commands: &[&str], on: &Namespace) {
        let name = verb;
        let [verb, below @ ..] = &*self.spans else { panic!("{name} has no span") };
        assert_eq!((verb.name, verb.parent), (&*format!("session_store.{name}"), None));
        let names: Vec<_> = below.iter().map(|it| &*it.fields["db.operation.name"]).collect();
        assert_eq!(names, commands, "{name}");
        for span in &self.spans {
            assert_eq!(span.level, Level::DEBUG, "{span:?}");
            assert!(!span.fields.contains_key("error.type"), "{span:?}");
        }
        for command in below {
            assert_eq!((command.name, command.parent), ("mongodb", Some(verb.id)));
            let name = format!("{} {}", command.fields["db.operation.name"], on.coll);
            for (field, value) in [
                ("otel.kind", "client"),
                ("otel.name", &*name),
                ("db.system.name", "mongodb"),
                ("db.namespace", &*on.db),
                ("db.collection.name", &*on.coll),
            ] {
                assert_eq!(command.fields[field], value, "{command:?}");
            }
        }
        assert!(self.events.is_empty(), "{:?}", self.events);
    }

    pub(super) fn warnings(&self, text: &str) -> usize {
        let warnings = self.events.iter().filter(|event| event.level == Level::WARN);
        warnings.filter(|event| event.text.contains(text)).count()
    }
}

#[derive(Debug, Default)]
pub(super) struct Fields(BTreeMap<&'static str, String>);

impl Fields {
    pub(super) fn contains_key(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    pub(super) fn get(&self, name: &str) -> Option<&String> {
        self.0.get(name)
    }
}

impl std::ops::Index<&str> for Fields {
    type Output = String;

    fn index(&self, name: &str) -> &String {
        self.0.get(name).unwrap_or_else(|| panic!("no {name} among {:?}", self.0))
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name(), value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }
}

struct Capture;

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Capture {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        CAPTURED.with_borrow_mut(|captured| {
            let Some(captured) = captured else { return };
            let mut fields = Fields::default();
            attributes.record(&mut fields);
            let parent = context.span(id).and_then(|span| Some(span.parent()?.id().into_u64()));
            let metadata = attributes.metadata();
            let id = id.into_u64();
            let level = *metadata.level();
            captured.spans.push(CapturedSpan { id, parent, name: metadata.name(), level, fields });
        });
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, _: Context<'_, S>) {
        CAPTURED.with_borrow_mut(|captured| {
            let spans = captured.iter_mut().flat_map(|captured| &mut captured.spans);
            for span in spans.filter(|span| span.id == id.into_u64()) {
                values.record(&mut span.fields);
            }
        });
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        CAPTURED.with_borrow_mut(|captured| {
            let Some(captured) = captured else { return };
            let mut fields = Fields::default();
            event.record(&mut fields);
            let span = context.event_span(event).map(|span| span.id().into_u64());
            let text = fields.0.into_values().collect::<Vec<_>>().join("\n");
            captured.events.push(CapturedEvent { span, level: *event.metadata().level(), text });
        });
    }
}
