//! The engine and the barrier as a whole: both sagas, under every fault that their messages can meet, end in one way.
//!
//! `schedules` has the harness. It drives the real book, which orchestrators and participants ask alike, and the real barrier; what is played is
//! the bus between them, because it is the bus that brings the faults. The last tests here have the orchestrator's own loop on a real bus.
#![allow(clippy::unwrap_used, reason = "all of this file is tests, also what carries no test attribute")]

mod schedules;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use bus::{Bus, Envelope, EnvelopeId, Limits, Subject};
use bytes::Bytes;
use drive::Bounds;
use proptest::prelude::*;
use saga::{Mode, Outcome, Reason, Status};
use shop::purchase::{INVENTORY_COMMANDS, ORCHESTRATOR, ORDER_COMMANDS, PURCHASE_PROGRESS};
use telemetry::{PubsubMetrics, Registry};
use tokio_util::sync::CancellationToken;

use schedules::desks::{Desks, InMemory, OnSqlite, Script, Services};
use schedules::faults::{Schedule, ordeals};
use schedules::sagas::{self, Saga};
use schedules::soup::Explorer;
use schedules::world::World;

/// The saga as it is when nothing refuses, and with each step that may refuse.
fn scripts(saga: &Saga) -> Vec<Script> {
    let refusals = saga.may_refuse().map(Some);
    [None].into_iter().chain(refusals).map(|refuses| Script { refuses, silent: None }).collect()
}

/// Fails every step, repeats every message, reorders every pair, kills every handler between any two effects, and sets
/// other drivers on the saga at every point.
fn put_to_the_test(saga: Saga, scripts: Vec<Script>, desks: impl Desks) {
    let saga = Rc::new(saga);
    let mut world = World::new(desks);
    for script in scripts {
        world.add(&saga, script, Schedule::calm());
        let deliveries = world.run().remove(0);
        for schedule in ordeals(deliveries) {
            world.add(&saga, script, schedule);
        }
        let runs = world.run().len();
        assert!(runs > 10 * deliveries as usize, "{} has only {runs} ordeals", saga.name);
    }
}

/// Also with steps that give no answer for a while, which only counting participants do.
fn with_silences(saga: &Saga) -> Vec<Script> {
    let mut all = scripts(saga);
    let steps = u8::try_from(saga.len()).unwrap();
    all.extend((0..steps).map(|step| Script { refuses: None, silent: Some((step, 3)) }));
    all
}

#[test]
fn the_shops_saga_survives_every_ordeal_in_memory() {
    put_to_the_test(Saga::shop(), with_silences(&Saga::shop()), InMemory::default());
}

#[test]
fn a_trip_survives_every_ordeal_in_memory() {
    put_to_the_test(Saga::trip(), with_silences(&Saga::trip()), InMemory::default());
}

#[test]
fn the_shops_saga_survives_every_ordeal_on_a_database() {
    put_to_the_test(Saga::shop(), scripts(&Saga::shop()), OnSqlite::new());
}

#[test]
fn a_trip_survives_every_ordeal_on_a_database() {
    put_to_the_test(Saga::trip(), with_silences(&Saga::trip()), OnSqlite::new());
}

#[test]
fn the_shops_saga_survives_every_ordeal_with_the_shops_services() {
    let refusals = [None, Some(0), Some(2)];
    let scripts = refusals.map(|refuses| Script { refuses, silent: None });
    put_to_the_test(Saga::shop(), scripts.to_vec(), Services::new());
}

/// Every schedule of any number of messages, by states.
#[test]
fn every_schedule_of_either_saga_ends_in_one_way() {
    for saga in [Saga::shop(), Saga::trip()] {
        for script in scripts(&saga) {
            let explore = |modes: &[Mode]| Explorer::explore(&saga, script, modes);
            let what = format!("{}, {script:?}", saga.name);

            let expected = (script.refuses.is_none(), saga.expected(script.refuses));
            let (_, alone) = explore(&[Mode::Execute]);
            assert_eq!(alone, std::slice::from_ref(&expected), "{what}");
            let (_, once) = explore(&[Mode::Execute, Mode::Execute]);
            assert_eq!(once, alone, "{what}: who starts it again changes nothing");

            // A cancellation comes before any step, or too late.
            for modes in [&[Mode::Execute, Mode::Decide][..], &[Mode::Execute, Mode::Decide, Mode::Cancel]] {
                let (_, histories) = explore(modes);
                assert!(histories.contains(&expected), "{what}: it can come too late");
                let before_decider = script.refuses.unwrap_or(saga.decider().0);
                for step in 0..=usize::from(before_decider) {
                    let cancelled = cancelled_at(step);
                    assert!(
                        histories.contains(&(false, cancelled)),
                        "{what}: it can come before step {step}"
                    );
                }
                let expected_count = match script.refuses {
                    // Refused or cancelled, the step has failed: the history is the same.
                    Some(refuses) => usize::from(refuses) + 1,
                    None => usize::from(saga.decider().0) + 2,
                };
                assert_eq!(histories.len(), expected_count, "{what}: {histories:?}");
            }
        }
    }
}

/// The history of a saga that was cancelled before this step was done.
fn cancelled_at(step: usize) -> Vec<(usize, Status)> {
    let done = (0..step).flat_map(|step| [(step, Status::Execute), (step, Status::Success)]);
    let failed = [(step, Status::Execute), (step, Status::Failed)];
    let undone = (0..step).rev().map(|step| (step, Status::RolledBack));
    done.chain(failed).chain(undone).collect()
}

/// A saga of either kind, what it meets, and a schedule of this many choices at most.
fn any_run(choices: usize) -> impl Strategy<Value = (bool, Script, Schedule)> {
    let refuses = prop_oneof![2 => Just(None), 3 => (0..3u8).prop_map(Some)];
    let silent = prop_oneof![3 => Just(None), 1 => (0..4u8, 1..4u8).prop_map(Some)];
    let schedule = prop::collection::vec(any::<(u8, u8)>(), 0..choices)
        .prop_map(|choices| Schedule::Random(choices.into_iter().collect()));
    let script = (refuses, silent).prop_map(|(refuses, silent)| Script { refuses, silent });
    (any::<bool>(), script, schedule)
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, max_shrink_iters: 2_000, ..ProptestConfig::default() }
}

/// Runs random schedules, some sagas at a time, on these participants.
fn on_random_schedules(cases: u32, sagas_at_once: usize, desks: impl Desks) {
    let world = RefCell::new(World::new(desks));
    let kinds = [Rc::new(Saga::shop()), Rc::new(Saga::trip())];
    proptest!(config(cases), |(runs in prop::collection::vec(any_run(60), 1..=sagas_at_once))| {
        let mut world = world.borrow_mut();
        for (trip, script, schedule) in runs {
            world.add(&kinds[usize::from(trip)], script, schedule);
        }
        world.run();
    });
}

#[test]
fn thousands_of_random_schedules_end_in_one_way_in_memory() {
    on_random_schedules(2_000, 3, InMemory::default());
}

#[test]
fn hundreds_of_random_schedules_end_in_one_way_on_a_database() {
    on_random_schedules(60, 12, OnSqlite::new());
}

#[test]
fn random_schedules_end_in_one_way_with_the_shops_services() {
    let world = RefCell::new(World::new(Services::new()));
    let shop = Rc::new(Saga::shop());
    proptest!(config(40), |(runs in prop::collection::vec(any_run(60), 1..=12))| {
        let mut world = world.borrow_mut();
        for (_, Script { refuses, .. }, schedule) in runs {
            let refuses = refuses.filter(|step| *step != 1);
            world.add(&shop, Script { refuses, silent: None }, schedule);
        }
        world.run();
    });
}

/// Only a failing test waits this long.
const PATIENCE: Duration = Duration::from_secs(20);

const LIMITS: Limits =
    Limits { queue_envelopes: 8, frame_envelopes: 8, body_bytes: 64 * 1024, parked_letters: 8 };

/// Without a limit of its own, a message comes again for as long as its effects are refused.
fn orchestrator(bus: &Bus, drop_after_deliveries: u32) -> CancellationToken {
    let stop = CancellationToken::new();
    let parts = orchestrator::Parts {
        book: sagas::book(),
        bus: bus.clone(),
        subject: ORCHESTRATOR,
        metrics: PubsubMetrics::new(&Registry::new(), "test"),
        spans: telemetry::Spans::off(),
        settings: orchestrator::Settings {
            bounds: Bounds {
                retry_delay_min: Duration::from_millis(1),
                retry_delay_max: Duration::from_millis(2),
                drop_after_deliveries,
            },
            ..orchestrator::Settings::default()
        },
    };
    tokio::spawn(orchestrator::run(parts, stop.clone()));
    stop
}

fn start(saga: u64) -> Envelope {
    let body = Saga::shop().start(saga, Mode::Execute, &Bytes::new());
    Envelope { id: EnvelopeId::of(saga, 1), body }
}

async fn take(bus: &Bus, subject: Subject) -> Vec<Envelope> {
    let mut consumer = bus.subscribe(subject);
    let next = tokio::time::timeout(PATIENCE, consumer.next(8));
    let batch = next.await.expect("something comes").unwrap();
    let envelopes = batch.deliveries().iter().map(|delivery| delivery.envelope.clone()).collect();
    batch.ack_all().await.unwrap();
    envelopes
}

/// The command for the saga's first step, answered: Done calls for a report and for a command, Rejected for the last
/// report.
async fn first_reply(bus: &Bus, saga: u64, outcome: Outcome) -> Envelope {
    bus.publish(ORCHESTRATOR, vec![start(saga)]).await.unwrap();
    let command = take(bus, INVENTORY_COMMANDS).await.remove(0);
    let wire::messages::ToParticipant::Command(command) =
        wire::messages::ToParticipant::decode(command.body).unwrap()
    else {
        panic!("not a command");
    };
    let recorded = wire::messages::Recorded { outcome, at: 5 }.encode();
    let wire::messages::Command { carried, step, phase } = command;
    let reply = wire::messages::Reply { carried, step, phase, recorded };
    Envelope { id: EnvelopeId::of(saga, 2), body: wire::messages::ToOrchestrator::Reply(reply).encode() }
}

async fn fill(bus: &Bus, subject: Subject) {
    let filler = |number| Envelope { id: EnvelopeId::of(number, 0), body: Bytes::new() };
    bus.publish(subject, (1..=8).map(filler).collect()).await.unwrap();
}

/// What is refused is published in the end, also when something else that its message calls for was taken.
#[tokio::test]
async fn a_refused_frame_is_published_in_the_end() {
    let rejected = Outcome::Rejected(Reason::Refused("no".to_owned()));
    for (full, outcome) in [(ORDER_COMMANDS, Outcome::Done(Vec::new())), (PURCHASE_PROGRESS, rejected)] {
        let bus = Bus::embedded(LIMITS);
        let stop = orchestrator(&bus, u32::MAX);
        let reply = first_reply(&bus, 7, outcome).await;
        fill(&bus, full).await;
        bus.publish(ORCHESTRATOR, vec![reply]).await.unwrap();
        testkit::until("a frame is refused", PATIENCE, async || bus.stats().refused > 0).await;
        assert_eq!(take(&bus, full).await.len(), 8);
        assert_eq!(take(&bus, full).await[0].id.parts().0, 7);
        testkit::until("the reply is settled", PATIENCE, async || {
            bus.depth(ORCHESTRATOR).await.unwrap().held() == 0
        })
        .await;
        stop.cancel();
    }
}

/// A report that a later one implies is not worth sending the command beside it again.
#[tokio::test]
async fn a_refused_report_of_an_open_saga_is_lost_and_its_command_sent_once() {
    let bus = Bus::embedded(LIMITS);
    let stop = orchestrator(&bus, u32::MAX);
    let reply = first_reply(&bus, 7, Outcome::Done(Vec::new())).await;
    fill(&bus, PURCHASE_PROGRESS).await;
    bus.publish(ORCHESTRATOR, vec![reply]).await.unwrap();
    testkit::until("the reply is settled", PATIENCE, async || {
        bus.stats().refused > 0 && bus.depth(ORCHESTRATOR).await.unwrap().held() == 0
    })
    .await;
    assert_eq!((bus.stats().refused, bus.depth(ORDER_COMMANDS).await.unwrap().held()), (1, 1));
    stop.cancel();
}

/// Services publish in circles. One that kept for ever what another has no room for would fill its own queue with it.
#[tokio::test]
async fn what_is_refused_too_often_is_dropped_and_the_saga_started_again() {
    let bus = Bus::embedded(LIMITS);
    let stop = orchestrator(&bus, 3);
    let reply = first_reply(&bus, 7, Outcome::Done(Vec::new())).await;
    fill(&bus, ORDER_COMMANDS).await;
    bus.publish(ORCHESTRATOR, vec![reply.clone()]).await.unwrap();
    testkit::until("it is dropped", PATIENCE, async || bus.depth(ORCHESTRATOR).await.unwrap().held() == 0)
        .await;
    assert_eq!((bus.stats().refused, bus.parked().await.unwrap()), (3, Vec::new()));
    assert_eq!(take(&bus, ORDER_COMMANDS).await.len(), 8);
    bus.publish(ORCHESTRATOR, vec![reply]).await.unwrap();
    assert_eq!(take(&bus, ORDER_COMMANDS).await[0].id.parts().0, 7);
    stop.cancel();
}

/// Row 8 of the fault list.
#[tokio::test]
async fn what_an_orchestrator_cannot_understand_is_parked_alone() {
    let bus = Bus::embedded(LIMITS);
    let stop = orchestrator(&bus, u32::MAX);
    let raw =
        |saga, body: &'static [u8]| Envelope { id: EnvelopeId::of(saga, 1), body: Bytes::from_static(body) };
    let unknown_format = raw(3, &[0x08, 2]);
    bus.publish(ORCHESTRATOR, vec![start(1), raw(2, b"\xff\xff"), unknown_format, start(4)]).await.unwrap();
    let flow: Vec<u64> =
        take(&bus, INVENTORY_COMMANDS).await.iter().map(|envelope| envelope.id.parts().0).collect();
    assert_eq!(flow, [1, 4]);
    testkit::until("all is settled", PATIENCE, async || bus.depth(ORCHESTRATOR).await.unwrap().held() == 0)
        .await;
    let parked: Vec<(u64, u32)> = bus
        .parked()
        .await
        .unwrap()
        .iter()
        .map(|letter| (letter.envelope.id.parts().0, letter.count))
        .collect();
    assert_eq!(parked, [(2, 1), (3, 1)]);
    assert_eq!(bus.stats().redelivered, 0);
    stop.cancel();
}

/// A reply that its saga cannot get is nobody's retry: trying again would not help.
#[tokio::test]
async fn a_reply_that_cannot_come_is_parked_with_the_reason() {
    let bus = Bus::embedded(LIMITS);
    let stop = orchestrator(&bus, u32::MAX);
    let reply = first_reply(&bus, 7, Outcome::Done(Vec::new())).await;
    let wire::messages::ToOrchestrator::Reply(mut wrong) =
        wire::messages::ToOrchestrator::decode(reply.body).unwrap()
    else {
        panic!("not a reply");
    };
    wrong.step = saga::StepIndex(2);
    let body = wire::messages::ToOrchestrator::Reply(wrong).encode();
    bus.publish(ORCHESTRATOR, vec![Envelope { id: reply.id, body }]).await.unwrap();
    testkit::until("it is parked", PATIENCE, async || !bus.parked().await.unwrap().is_empty()).await;
    assert_eq!(bus.parked().await.unwrap()[0].reason, "saga 7: step 2 replied where step 0 was asked");
    stop.cancel();
}
