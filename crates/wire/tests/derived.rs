//! The messages are encoded by hand. Here the same messages have derived codecs: both must say the same and read what
//! the other wrote, and `proto/saga.proto` must say the same.

#![allow(clippy::unwrap_used, reason = "a test")]

use bytes::Bytes;
use proptest::prelude::*;
use prost::Message as _;
use saga::{Mode, Outcome, Phase, Reason, StepIndex, Token};
use wire::messages::{
    About, Carried, Command, FORMAT, MAX_REASON_BYTES, Pen, Progress, Purge, Recorded, Reply, Start,
    ToOrchestrator, ToParticipant, decode_path, encode_path,
};

#[derive(Clone, PartialEq, prost::Message)]
struct DerivedEntry {
    #[prost(uint32, tag = "1")]
    step: u32,
    #[prost(uint32, tag = "2")]
    outcome: u32,
    #[prost(bytes = "vec", tag = "3")]
    text: Vec<u8>,
    #[prost(uint64, tag = "4")]
    at: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct DerivedPath {
    #[prost(message, repeated, tag = "1")]
    entries: Vec<DerivedEntry>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct DerivedRecorded {
    #[prost(uint32, tag = "1")]
    outcome: u32,
    #[prost(bytes = "vec", tag = "2")]
    text: Vec<u8>,
    #[prost(uint64, tag = "3")]
    at: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct DerivedAbout {
    #[prost(string, tag = "1")]
    definition: String,
    #[prost(uint32, tag = "2")]
    version: u32,
    #[prost(uint64, tag = "3")]
    started_at: u64,
    #[prost(bytes = "vec", tag = "4")]
    input: Vec<u8>,
    #[prost(bytes = "vec", tag = "5")]
    trace: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct DerivedMessage {
    #[prost(uint32, tag = "1")]
    format: u32,
    #[prost(uint32, tag = "2")]
    kind: u32,
    #[prost(uint64, tag = "3")]
    saga: u64,
    #[prost(uint32, tag = "4")]
    mode: u32,
    #[prost(message, repeated, tag = "5")]
    path: Vec<DerivedEntry>,
    #[prost(message, optional, tag = "6")]
    about: Option<DerivedAbout>,
    #[prost(uint32, tag = "7")]
    step: u32,
    #[prost(uint32, tag = "8")]
    phase: u32,
    #[prost(bytes = "vec", tag = "9")]
    recorded: Vec<u8>,
    #[prost(uint64, tag = "10")]
    below: u64,
}

fn outcome_parts(outcome: &Outcome) -> (u32, Vec<u8>) {
    match outcome {
        Outcome::Done(data) => (1, data.clone()),
        Outcome::Rejected(Reason::Refused(why)) => (2, why.clone().into_bytes()),
        Outcome::Rejected(Reason::Cancelled) => (3, Vec::new()),
        Outcome::Compensated => (4, Vec::new()),
    }
}

fn derived_entries(path: &saga::Path) -> Vec<DerivedEntry> {
    let entry = |entry: &saga::Entry| {
        let (outcome, text) = outcome_parts(&entry.outcome);
        DerivedEntry { step: entry.step.0.into(), outcome, text, at: entry.at }
    };
    path.entries().iter().map(entry).collect()
}

/// A message with what every message about a saga has.
fn derived(kind: u32, carried: &Carried) -> DerivedMessage {
    let Carried { token, about } = carried;
    let mode = match token.mode {
        Mode::Execute => 1,
        Mode::Decide => 2,
        Mode::Cancel => 3,
    };
    let about = DerivedAbout {
        definition: about.definition().to_owned(),
        version: about.version(),
        started_at: about.started_at(),
        input: about.input().to_vec(),
        trace: about.trace().to_vec(),
    };
    DerivedMessage {
        format: FORMAT,
        kind,
        saga: token.saga,
        mode,
        path: derived_entries(&token.path),
        about: Some(about),
        ..DerivedMessage::default()
    }
}

fn outcomes() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..200).prop_map(Outcome::Done),
        ".{0,80}".prop_map(|why| Outcome::Rejected(Reason::Refused(why))),
        Just(Outcome::Rejected(Reason::Cancelled)),
        Just(Outcome::Compensated),
    ]
}

prop_compose! {
    fn entries()(step: u8, outcome in outcomes(), at: u64) -> saga::Entry {
        saga::Entry { step: StepIndex(step), outcome, at }
    }
}

prop_compose! {
    fn carrieds()(
        saga in 1..u64::MAX,
        mode in prop_oneof![Just(Mode::Execute), Just(Mode::Decide), Just(Mode::Cancel)],
        path in prop::collection::vec(entries(), 0..6),
        definition in "[ -~]{1,20}",
        version: u32,
        started_at: u64,
        input in prop::collection::vec(any::<u8>(), 0..400),
        trace in prop::collection::vec(any::<u8>(), 0..60),
    ) -> Carried {
        let token = Token { saga, mode, path: path.into_iter().collect() };
        Carried { token, about: About::new(&definition, version, started_at, &input, &trace) }
    }
}

fn phases() -> impl Strategy<Value = (Phase, u32)> {
    prop_oneof![Just((Phase::Action, 1)), Just((Phase::Compensation, 2)), Just((Phase::Cancel, 3))]
}

proptest! {
    #[test]
    fn both_codecs_understand_each_other(
        carried in carrieds(), step: u8, (phase, phase_number) in phases(), outcome in outcomes(), at: u64, below: u64,
    ) {
        let recorded = Recorded { outcome, at };
        let kept = recorded.encode();
        let (number, text) = outcome_parts(&recorded.outcome);
        prop_assert_eq!(&kept[..], &DerivedRecorded { outcome: number, text, at }.encode_to_vec()[..]);
        prop_assert_eq!(Recorded::decode(&kept).unwrap(), recorded);

        let path = &carried.token.path;
        prop_assert_eq!(encode_path(path), DerivedPath { entries: derived_entries(path) }.encode_to_vec());
        prop_assert_eq!(&decode_path(&encode_path(path)).unwrap(), path);

        // Protocol Buffers leaves the order of fields open: a message is compared by what it says.
        let said = |bytes: &Bytes| DerivedMessage::decode(bytes.clone()).unwrap();
        let start = ToOrchestrator::Start(Start { carried: carried.clone() });
        prop_assert_eq!(said(&start.encode()), derived(1, &carried));
        prop_assert_eq!(&ToOrchestrator::decode(start.encode()).unwrap(), &start);
        prop_assert_eq!(ToOrchestrator::decode(derived(1, &carried).encode_to_vec().into()).unwrap(), start);

        let step_number = u32::from(step);
        let asked = DerivedMessage { step: step_number, phase: phase_number, ..derived(2, &carried) };
        let command = ToParticipant::Command(Command { carried: carried.clone(), step: StepIndex(step), phase });
        prop_assert_eq!(&said(&command.encode()), &asked);
        prop_assert_eq!(&ToParticipant::decode(asked.encode_to_vec().into()).unwrap(), &command);
        prop_assert_eq!(ToParticipant::decode(command.encode()).unwrap(), command);

        let replied = DerivedMessage { kind: 3, recorded: kept.to_vec(), ..asked };
        let reply = Reply { carried: carried.clone(), step: StepIndex(step), phase, recorded: kept };
        let reply = ToOrchestrator::Reply(reply);
        prop_assert_eq!(&said(&reply.encode()), &replied);
        prop_assert_eq!(&ToOrchestrator::decode(replied.encode_to_vec().into()).unwrap(), &reply);
        prop_assert_eq!(ToOrchestrator::decode(reply.encode()).unwrap(), reply);

        let progress = Progress { carried: carried.clone() };
        prop_assert_eq!(said(&progress.encode()), derived(4, &carried));
        prop_assert_eq!(&Progress::decode(derived(4, &carried).encode_to_vec().into()).unwrap(), &progress);
        prop_assert_eq!(Progress::decode(progress.encode()).unwrap(), progress);

        let purge = ToParticipant::Purge(Purge { below });
        let derived = DerivedMessage { format: FORMAT, kind: 5, below, ..DerivedMessage::default() };
        prop_assert_eq!(said(&purge.encode()), derived);
        prop_assert_eq!(ToParticipant::decode(purge.encode()).unwrap(), purge);
    }

    /// As many as fill several buffers.
    #[test]
    fn messages_that_share_a_buffer_say_what_they_say_alone(
        carried in prop::collection::vec(carrieds(), 1..8), outcome in outcomes(), at: u64, rounds in 1_usize..30,
    ) {
        let recorded = Recorded { outcome, at }.encode();
        let (step, phase) = (StepIndex(1), Phase::Action);
        let write = |pen: &mut Pen, number: usize, Carried { token, about }: &Carried| match number % 4 {
            0 => pen.start(token, about),
            1 => pen.command(token, about, step, phase),
            2 => pen.reply(token, about, step, phase, &recorded),
            _ => pen.progress(token, about),
        };
        let mut pen = Pen::for_messages(carried.len());
        let all = || carried.iter().cycle().take(rounds * carried.len()).enumerate();
        let together: Vec<Bytes> = all().map(|(number, carried)| write(&mut pen, number, carried)).collect();
        for ((number, carried), message) in all().zip(together) {
            prop_assert_eq!(message, write(&mut Pen::for_messages(1), number, carried));
        }
    }

    #[test]
    fn nothing_that_comes_makes_a_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let bytes = Bytes::from(bytes);
        let _ = ToOrchestrator::decode(bytes.clone());
        let _ = ToParticipant::decode(bytes.clone());
        let _ = Progress::decode(bytes.clone());
        let _ = Recorded::decode(&bytes);
        let _ = decode_path(&bytes);
    }

    /// What nobody else would take for a message is none here either. Fields may come more than once; then the last one counts
    /// here, where the derived codec merges.
    #[test]
    fn what_the_derived_codec_refuses_is_refused(carried in carrieds(), at in 0_usize..600, to: u8) {
        let mut damaged = Progress { carried }.encode().to_vec();
        let at = at % damaged.len();
        damaged[at] = to;
        let damaged = Bytes::from(damaged);
        if DerivedMessage::decode(damaged.clone()).is_err() {
            prop_assert!(Progress::decode(damaged).is_err());
        }
    }

    #[test]
    fn a_message_that_is_cut_short_or_damaged_never_makes_a_reader_panic(
        carried in carrieds(), cut in 0_usize..600, at in 0_usize..600, to: u8,
    ) {
        let whole = Progress { carried }.encode();
        let _ = Progress::decode(whole.slice(..cut.min(whole.len())));
        let mut damaged = whole.to_vec();
        let at = at % damaged.len();
        damaged[at] = to;
        let _ = Progress::decode(damaged.into());
    }
}

fn carried() -> Carried {
    let token = Token { saga: 7, mode: Mode::Cancel, path: saga::Path::new() };
    Carried { token, about: About::new("trip", 3, 1_700_000_000_000, b"input", b"00-1-2-01") }
}

#[test]
fn what_cannot_be_understood_is_refused_with_the_reason() {
    let refused = |bytes: Vec<u8>| ToOrchestrator::decode(bytes.into()).unwrap_err().to_string();
    assert!(refused(b"\xff\xffnot protobuf".to_vec()).starts_with("not a saga message"));
    let future = DerivedMessage { format: FORMAT + 1, mode: 99, ..DerivedMessage::default() };
    assert_eq!(refused(future.encode_to_vec()), "a saga message of format 3; this version reads format 2");
    assert!(refused(Vec::new()).contains("format 0"), "an empty message is no message");

    let good = derived(1, &carried());
    let changed = |change: fn(&mut DerivedMessage)| {
        let mut message = good.clone();
        change(&mut message);
        refused(message.encode_to_vec())
    };
    assert_eq!(changed(|message| message.mode = 9), "a saga message with mode = 9");
    assert_eq!(changed(|message| message.kind = 4), "a saga message with kind = 4");
    assert_eq!(changed(|message| message.saga = 0), "a saga message without a saga id");
    assert_eq!(changed(|message| message.about = None), "a saga message without what it is about");
    assert_eq!(changed(|message| message.kind = 3), "a saga message with phase = 0");
    let mut message = good.clone();
    message.path.push(DerivedEntry { step: 256, outcome: 1, ..DerivedEntry::default() });
    assert_eq!(refused(message.encode_to_vec()), "a saga message with step = 256");
    message.path[0] = DerivedEntry { step: 1, outcome: 9, ..DerivedEntry::default() };
    assert_eq!(refused(message.encode_to_vec()), "a saga message with outcome = 9");

    let mut cut = good.encode_to_vec();
    cut.truncate(cut.len() - 3);
    assert!(refused(cut).starts_with("not a saga message"));
    let mut unreadable = good.encode_to_vec();
    let at = unreadable.windows(4).position(|bytes| bytes == b"trip").unwrap();
    unreadable[at] = 0xff;
    assert!(refused(unreadable).contains("not ASCII"));
}

#[test]
fn fields_that_a_later_version_added_are_skipped() {
    let mut later = derived(1, &carried()).encode_to_vec();
    // Field 100 as a varint, eight bytes, bytes with their length, four bytes.
    let added: [&[u8]; 4] = [
        &[0xa0, 0x06, 0x05],
        &[0xa1, 0x06, 1, 2, 3, 4, 5, 6, 7, 8],
        &[0xa2, 0x06, 2, 9, 9],
        &[0xa5, 0x06, 1, 2, 3, 4],
    ];
    added.iter().for_each(|field| later.extend_from_slice(field));
    let start = ToOrchestrator::Start(Start { carried: carried() });
    assert_eq!(ToOrchestrator::decode(later.into()).unwrap(), start);
}

#[test]
fn a_long_reason_is_cut_between_characters() {
    let outcome = Outcome::Rejected(Reason::Refused("é".repeat(MAX_REASON_BYTES)));
    let recorded = Recorded { outcome, at: 1 };
    let Outcome::Rejected(Reason::Refused(kept)) = Recorded::decode(&recorded.encode()).unwrap().outcome
    else {
        panic!("a rejection came back as something else");
    };
    assert_eq!(kept.len(), MAX_REASON_BYTES);
    assert!(kept.chars().all(|c| c == 'é'));
}

/// `MESSAGE.field = tag` for every field, from the lines of a file.
fn fields(text: &str, message: &str, field: impl Fn(&str) -> Option<(String, u32)>) -> Vec<String> {
    let mut current = String::new();
    let mut fields = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix(message) {
            current = name.trim_end_matches(" {").to_owned();
        }
        if let Some((name, tag)) = field(line) {
            fields.push(format!("{current}.{name} = {tag}"));
        }
    }
    fields.sort();
    fields
}

#[test]
fn the_proto_file_says_what_the_derived_structs_do() {
    let proto = include_str!("../../../proto/saga.proto");
    let described = fields(proto, "message ", |line| {
        let (left, right) = line.split_once(" = ")?;
        let tag = right.split(';').next()?.parse().ok()?;
        Some((left.rsplit(' ').next()?.to_owned(), tag))
    });
    let tag = std::cell::Cell::new(None);
    let coded = fields(include_str!("derived.rs"), "struct Derived", |line| {
        if let Some(rest) = line.strip_prefix("#[prost(") {
            tag.set(rest.rsplit('"').nth(1)?.parse().ok());
            return None;
        }
        let name = line.split_once(": ")?.0.to_owned();
        Some((name, tag.take()?))
    });
    assert!(described.len() > 22, "only {} fields were found", described.len());
    assert_eq!(described, coded);
}
