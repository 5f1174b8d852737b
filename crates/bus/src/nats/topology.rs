//! What the bus has on the servers: a stream and a durable consumer for each subject, and a stream of dead letters.
//!
//! A stream that was deleted, or lost with its server, is made again under the same name, and its messages are numbered from one
//! again. An acknowledgement of the old one's fifth message must not end the new one's. So a consumer's name, which is part of every
//! acknowledgement, holds the time at which its stream was made: another one for a new stream. A stream of this kind has one consumer
//! at most, and who is refused one because another process was quicker takes that.

use std::collections::BTreeMap;

use async_nats::jetstream::consumer::{AckPolicy, pull};
use async_nats::jetstream::context::{CreateStreamErrorKind, GetStreamError, GetStreamErrorKind};
use async_nats::jetstream::stream::{
    self, ConsumerError, ConsumerErrorKind, DiscardPolicy, Info, RetentionPolicy, StorageType,
};
use async_nats::jetstream::{self, Context, ErrorCode};
use futures_util::TryStreamExt;

use super::{Settings, StartError, Storage};
use crate::{Limits, Subject};

/// What the names of consumers begin with.
const CONSUMER: &str = "workers-";
/// Pull requests of all processes that may wait at a consumer.
const MAX_WAITING_PULLS: i64 = 4_096;

/// A stream of the bus as it should be.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// The one subject of this stream, as the servers know it.
    pub(super) address: String,
    pub(super) stream: stream::Config,
}

impl Plan {
    pub(super) fn queue(settings: &Settings, limits: &Limits, subject: Subject) -> Plan {
        let config = stream::Config {
            retention: RetentionPolicy::WorkQueue,
            discard: DiscardPolicy::New,
            max_messages: count(limits.queue_envelopes),
            ..Plan::stream(settings, &subject.0.replace('.', "_"))
        };
        Plan::at(format!("{}.{subject}", settings.prefix), config)
    }

    /// None where no letters are kept.
    pub(super) fn letters(settings: &Settings, limits: &Limits) -> Option<Plan> {
        let config = stream::Config {
            retention: RetentionPolicy::Limits,
            discard: DiscardPolicy::Old,
            max_messages: count(limits.parked_letters),
            num_replicas: settings.letter_replicas,
            ..Plan::stream(settings, "dead-letters")
        };
        let plan = Plan::at(format!("{}.dead-letters", settings.prefix), config);
        (limits.parked_letters > 0).then_some(plan)
    }

    fn at(address: String, config: stream::Config) -> Plan {
        Plan { stream: stream::Config { subjects: vec![address.clone()], ..config }, address }
    }

    fn stream(settings: &Settings, name: &str) -> stream::Config {
        stream::Config {
            name: format!("{}_{name}", settings.prefix),
            max_bytes: i64::try_from(settings.queue_bytes).unwrap_or(i64::MAX),
            num_replicas: settings.replicas,
            storage: match settings.storage {
                Storage::File => StorageType::File,
                Storage::Memory => StorageType::Memory,
            },
            duplicate_window: settings.duplicate_window,
            ..stream::Config::default()
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.stream.name
    }

    /// What of a stream is not as it should be.
    fn differences(&self, found: &stream::Config) -> BTreeMap<&'static str, String> {
        let wanted = &self.stream;
        let mut differences = BTreeMap::new();
        let mut compare = |name, wanted: String, found: String| {
            if wanted != found {
                differences.insert(name, format!("{found} where {wanted} is wanted"));
            }
        };
        macro_rules! compare {
            ($($field:ident)*) => {
                $(compare(stringify!($field), format!("{:?}", wanted.$field), format!("{:?}", found.$field));)*
            };
        }
        compare!(subjects retention discard storage num_replicas max_messages max_bytes duplicate_window);
        differences
    }
}

fn count(envelopes: usize) -> i64 {
    i64::try_from(envelopes).unwrap_or(i64::MAX)
}

/// All streams of a bus.
#[derive(Debug)]
pub(super) struct Topology {
    pub(super) queues: Vec<(Subject, Plan)>,
    /// None where no dead letters are kept.
    pub(super) letters: Option<Plan>,
}

/// Plans the streams of a bus. Two subjects that would share a stream are refused.
pub(super) fn plan(
    settings: &Settings,
    limits: &Limits,
    subjects: &[Subject],
) -> Result<Topology, StartError> {
    let letters = Plan::letters(settings, limits);
    let mut names: BTreeMap<String, &str> = BTreeMap::new();
    names.extend(letters.as_ref().map(|plan| (plan.name().to_owned(), "the dead letters")));
    let mut queues = Vec::with_capacity(subjects.len());
    for &subject in subjects {
        let plan = Plan::queue(settings, limits, subject);
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        let tokens_are_legal =
            subject.0.split('.').all(|token| !token.is_empty() && token.chars().all(legal));
        let why = match names.insert(plan.name().to_owned(), subject.0) {
            _ if !tokens_are_legal => {
                "it is not made of letters, digits, '-', '_' and single dots".to_owned()
            }
            Some(other) => format!("it would share the stream of {other}"),
            None => {
                queues.push((subject, plan));
                continue;
            }
        };
        return Err(StartError::BadSubject { subject, why });
    }
    Ok(Topology { queues, letters })
}

/// When a stream was made, in nanoseconds since 1970: says which of those that have had its name it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Made(i128);

impl Made {
    fn of(info: &Info) -> Made {
        Made(info.created.unix_timestamp_nanos())
    }
}

/// Why the servers do not have what they should.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum Trouble {
    /// It may be otherwise in a moment.
    #[error("{0}")]
    Unanswered(String),
    /// It will not be otherwise before somebody changes something.
    #[error("{0}")]
    Refused(String),
}

/// Whether a stream or consumer that exists and differs is changed: at the start, as the settings say; later only what is missing
/// is made, or two processes with different settings would change it to and fro.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Existing {
    Change,
    Leave,
}

/// The stream as the servers describe it, if it is there.
async fn find_stream(jetstream: &Context, plan: &Plan) -> Result<Option<Info>, Trouble> {
    match jetstream.get_stream(plan.name()).await {
        Ok(stream) => Ok(Some(stream.cached_info().clone())),
        Err(error) if is_missing(&error) => Ok(None),
        Err(error) => match error.kind() {
            GetStreamErrorKind::JetStream(error) => Err(said(&error)),
            _ => Err(Trouble::Unanswered(error.to_string())),
        },
    }
}

/// Whether there is no such stream.
pub(super) fn is_missing(error: &GetStreamError) -> bool {
    matches!(error.kind(), GetStreamErrorKind::JetStream(said) if said.error_code() == ErrorCode::STREAM_NOT_FOUND)
}

/// When the stream was made, if it is there.
pub(super) async fn made(jetstream: &Context, plan: &Plan) -> Result<Option<Made>, Trouble> {
    Ok(find_stream(jetstream, plan).await?.as_ref().map(Made::of))
}

/// The name of the server that leads a stream's consumer, in a cluster: it hands out what is taken.
pub(super) async fn leader(
    jetstream: &Context,
    plan: &Plan,
    consumer: &str,
) -> Result<Option<String>, Trouble> {
    let found = jetstream.get_consumer_from_stream::<pull::Config, _, _>(consumer, plan.name()).await;
    let found = found.map_err(|error| trouble(&error))?;
    Ok(found.cached_info().cluster.as_ref().and_then(|cluster| cluster.leader.clone()))
}

/// Deletes the stream, if it is there.
pub(super) async fn delete_stream(jetstream: &Context, plan: &Plan) -> Result<(), Trouble> {
    match jetstream.delete_stream(plan.name()).await {
        Ok(_) => Ok(()),
        // The two operations share their type of error.
        Err(error) if is_missing(&error) => Ok(()),
        Err(error) => Err(Trouble::Unanswered(error.to_string())),
    }
}

/// Makes the stream, or finds that it is there.
pub(super) async fn ensure_stream(
    jetstream: &Context,
    plan: &Plan,
    existing: Existing,
) -> Result<Made, Trouble> {
    let found = find_stream(jetstream, plan).await?;
    let Some(found) = found else {
        let made =
            jetstream.create_stream(plan.stream.clone()).await.map_err(|error| match error.kind() {
                CreateStreamErrorKind::JetStream(error) => said(&error),
                _ => Trouble::Unanswered(error.to_string()),
            })?;
        tracing::info!(stream = plan.name(), "a stream was made");
        return Ok(Made::of(made.cached_info()));
    };
    let differences = plan.differences(&found.config);
    if !differences.is_empty() && existing == Existing::Change {
        tracing::warn!(
            stream = plan.name(),
            ?differences,
            "a stream differs from the settings and is changed"
        );
        jetstream.update_stream(&plan.stream).await.map_err(|error| match error.kind() {
            CreateStreamErrorKind::JetStream(error) => match said(&error) {
                Trouble::Refused(why) => Trouble::Refused(format!("{differences:?}; {why}")),
                trouble => trouble,
            },
            _ => Trouble::Unanswered(error.to_string()),
        })?;
    }
    Ok(Made::of(&found))
}

/// Whether a consumer is there, and so is its stream.
pub(super) async fn has_consumer(jetstream: &Context, plan: &Plan, name: &str) -> Result<bool, Trouble> {
    match jetstream.get_consumer_from_stream::<pull::Config, _, _>(name, plan.name()).await {
        Ok(_) => Ok(true),
        Err(error) => match error.kind() {
            ConsumerErrorKind::JetStream(said)
                if matches!(
                    said.error_code(),
                    ErrorCode::CONSUMER_NOT_FOUND | ErrorCode::STREAM_NOT_FOUND
                ) =>
            {
                Ok(false)
            }
            _ => Err(trouble(&error)),
        },
    }
}

/// Makes the consumer of a stream, or finds and changes the one that is there. Returns its name.
pub(super) async fn ensure_consumer(
    jetstream: &Context,
    plan: &Plan,
    made: Made,
    settings: &Settings,
) -> Result<String, Trouble> {
    let mut name = format!("{CONSUMER}{:x}", made.0);
    let config = |name: &str| pull::Config {
        durable_name: Some(name.to_owned()),
        ack_policy: AckPolicy::Explicit,
        ack_wait: settings.ack_wait,
        max_deliver: -1,
        max_ack_pending: count(settings.max_ack_pending),
        max_waiting: MAX_WAITING_PULLS,
        ..pull::Config::default()
    };
    let mut adopted = false;
    loop {
        let Err(error) = jetstream.create_consumer_on_stream(config(&name), plan.name()).await else {
            return Ok(name);
        };
        match (error.kind(), adopted) {
            (ConsumerErrorKind::JetStream(said), false) if is_taken(&said) => {
                name = find_consumer(jetstream, plan).await?;
                adopted = true;
            }
            _ => return Err(trouble(&error)),
        }
    }
}

/// Whether a consumer was refused because the stream has one.
fn is_taken(said: &jetstream::Error) -> bool {
    matches!(
        said.error_code(),
        ErrorCode::CONSUMER_WQ_MULTIPLE_UNFILTERED | ErrorCode::CONSUMER_WQ_CONSUMER_NOT_UNIQUE
    )
}

async fn find_consumer(jetstream: &Context, plan: &Plan) -> Result<String, Trouble> {
    let unanswered = |error: &dyn std::error::Error| Trouble::Unanswered(error.to_string());
    let stream = jetstream.get_stream_no_info(plan.name()).await.map_err(|error| unanswered(&error))?;
    let names: Vec<String> =
        stream.consumer_names().try_collect().await.map_err(|error| unanswered(&error))?;
    match names.iter().find(|name| name.starts_with(CONSUMER)) {
        Some(ours) => Ok(ours.clone()),
        None => Err(Trouble::Refused(format!("it has consumers that are not of this bus: {names:?}"))),
    }
}

fn trouble(error: &ConsumerError) -> Trouble {
    match error.kind() {
        ConsumerErrorKind::JetStream(error) => said(&error),
        _ => Trouble::Unanswered(error.to_string()),
    }
}

/// What an error that the servers sent means.
pub(super) fn said(error: &jetstream::Error) -> Trouble {
    let passes = error.code() == 503
        || error.code() == 404
        || matches!(error.error_code(), ErrorCode::CLUSTER_NO_PEERS | ErrorCode::CLUSTER_NOT_AVAILABLE);
    if passes { Trouble::Unanswered(error.to_string()) } else { Trouble::Refused(error.to_string()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings::new(vec!["localhost:4222".to_owned()])
    }

    #[test]
    fn each_subject_has_a_stream_of_its_own_that_refuses_when_full() {
        let limits = Limits { queue_envelopes: 7, parked_letters: 3, ..Limits::default() };
        let subjects = [Subject("saga.orders"), Subject("saga.stock")];
        let Topology { queues, letters } = plan(&settings(), &limits, &subjects).expect("two legal subjects");
        let (_, orders) = &queues[0];
        assert_eq!((orders.name(), orders.address.as_str()), ("saga_saga_orders", "saga.saga.orders"));
        assert_eq!(orders.stream.subjects, ["saga.saga.orders"]);
        assert_eq!(
            (orders.stream.retention, orders.stream.discard),
            (RetentionPolicy::WorkQueue, DiscardPolicy::New)
        );
        assert_eq!(orders.stream.max_messages, 7);
        let letters = letters.expect("letters are kept");
        assert_eq!(
            (letters.stream.retention, letters.stream.discard),
            (RetentionPolicy::Limits, DiscardPolicy::Old)
        );
        assert_eq!(letters.stream.max_messages, 3);
        let limits = Limits { parked_letters: 0, ..limits };
        assert!(Plan::letters(&settings(), &limits).is_none());
    }

    #[test]
    fn a_subject_that_cannot_have_a_stream_of_its_own_is_refused() {
        let refused = |subjects: &[Subject]| match plan(&settings(), &Limits::default(), subjects) {
            Err(StartError::BadSubject { subject, .. }) => subject.0,
            other => panic!("{other:?}"),
        };
        assert_eq!(refused(&[Subject("a.b"), Subject("a_b")]), "a_b");
        assert_eq!(refused(&[Subject("dead-letters")]), "dead-letters");
        for illegal in ["", "a..b", "a.>", "a.*", "a b"] {
            assert_eq!(refused(&[Subject(illegal)]), illegal);
        }
    }

    #[test]
    fn what_differs_is_named() {
        let wanted = Plan::queue(&settings(), &Limits::default(), Subject("a"));
        assert_eq!(wanted.differences(&wanted.stream), BTreeMap::new());
        let found = stream::Config { max_bytes: 5, storage: StorageType::Memory, ..wanted.stream.clone() };
        let differences: Vec<_> = wanted.differences(&found).into_keys().collect();
        assert_eq!(differences, ["max_bytes", "storage"]);
    }
}
