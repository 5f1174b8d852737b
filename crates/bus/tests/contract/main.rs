//! The delivery contract at the head of the crate, clause by clause, run against each backend.
//!
//! A backend joins with one `contract!` line. The clauses use nothing but the public API; where they wait, they wait for a
//! condition. `QUIET` is how long nothing must happen for "it does not come" to be believed. The embedded bus runs on tokio's clock,
//! which is paused, so the wait costs nothing and "at once" can be measured; a bus on servers runs in real time, in which nothing
//! is said about how long something takes at most ([`Stage::is_punctual`]).
//!
//! What only the embedded bus promises is in `exact.rs`, with the reason.
#![allow(clippy::unwrap_used, reason = "all of this file is tests, also what carries no test attribute")]

mod bounds;
mod delivery;
mod exact;
mod loss;
mod races;
mod redelivery;
mod stage;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Waker};
use std::time::Duration;

use bus::{Batch, Bus, Consumer, Delivery, Envelope, EnvelopeId, Limits, PublishError, Subject, Verdict};
use bytes::Bytes;
use stage::Stage;
use tokio::task::yield_now;
use tokio::time::timeout;

const WORK: Subject = Subject("contract.work");
const OTHER: Subject = Subject("contract.other");

const QUIET: Duration = Duration::from_millis(500);
/// Only a failing test waits this long.
const PATIENCE: Duration = Duration::from_secs(60);
const CONSUMERS: usize = 8;

const LIMITS: Limits =
    Limits { queue_envelopes: 1_000, frame_envelopes: 100, body_bytes: 1_024, parked_letters: 10 };

/// Runs the clauses against one backend.
macro_rules! contract {
    (embedded: $($rest:tt)*) => {
        contract!(@run stage::Backend::Embedded, paused; $($rest)*);
    };
    (nats with $replicas:literal replicas: $($rest:tt)*) => {
        contract!(@run stage::Backend::Nats { replicas: $replicas }, real; $($rest)*);
    };
    (@run $backend:expr, $clock:ident; $module:ident $(and $only:ident)?) => {
        mod $module {
            use super::*;
            contract!(@$clock $backend;
                delivery::what_is_published_first_waits_for_its_consumer,
                delivery::a_waiting_consumer_gets_what_is_published_then,
                delivery::a_batch_joins_and_divides_frames,
                delivery::subjects_do_not_mix,
                delivery::an_empty_frame_is_nothing,
                delivery::an_acknowledged_envelope_never_comes_again,
                delivery::a_batch_of_none_cannot_be_asked_for,
                delivery::who_stops_waiting_passes_the_wakeup_on,
                delivery::a_consumer_that_is_always_served_lets_others_run,
                delivery::closing_tells_all_who_wait,
                delivery::closing_ends_publishing_and_delivery_but_not_settling,
                redelivery::a_retried_envelope_comes_after_its_delay_and_not_before,
                redelivery::a_retry_without_delay_comes_at_once,
                redelivery::each_comes_after_its_own_delay,
                redelivery::a_retry_wakes_who_already_waits,
                redelivery::who_stops_waiting_for_a_delay_passes_it_on,
                redelivery::a_dropped_batch_comes_back_whole_at_once,
                redelivery::a_handler_that_panics_gives_its_batch_back,
                redelivery::a_handler_that_is_aborted_gives_its_batch_back,
                redelivery::each_delivery_counts_one_more,
                redelivery::each_envelope_has_its_own_verdict,
                redelivery::too_few_verdicts_are_a_bug_that_loses_nothing,
                bounds::dead_letters_are_bounded,
                bounds::a_full_queue_refuses_until_something_ends,
                bounds::what_is_delayed_or_in_hand_keeps_its_place,
                bounds::a_refused_frame_leaves_no_part_behind,
                bounds::a_large_frame_or_envelope_is_refused,
                loss::a_loss_takes_everything,
                loss::a_batch_from_before_a_loss_settles_into_nothing,
                loss::a_bus_goes_on_after_a_loss,
            );
            contract!(@threads $backend;
                races::each_is_delivered_once_when_all_acknowledge,
                races::nothing_is_lost_when_handlers_fail_at_random,
                races::no_ready_envelope_waits_while_a_consumer_is_idle,
                races::no_wakeup_is_lost_between_looking_and_waiting,
                races::a_bus_survives_losses_at_any_instant,
            );
            $(contract!(@$only);)?
        }
    };
    (@exact) => {
        contract!(@paused stage::Backend::Embedded;
            exact::depth_says_where_each_envelope_is,
            exact::the_bound_counts_envelopes,
            exact::a_frame_that_does_not_fit_as_a_whole_is_refused,
            exact::the_shortest_delay_ends_first,
            exact::an_absurd_delay_is_cut,
            exact::a_loss_is_counted,
        );
        contract!(@threads stage::Backend::Embedded;
            exact::a_loss_at_any_instant_leaves_the_counts_true,
        );
    };
    (@paused $backend:expr; $($file:ident::$clause:ident,)+) => {
        $(#[tokio::test(start_paused = true)]
        async fn $clause() {
            run($backend, async |stage| $file::$clause(stage).await).await;
        })+
    };
    (@real $backend:expr; $($file:ident::$clause:ident,)+) => {
        $(#[tokio::test]
        async fn $clause() {
            run($backend, async |stage| $file::$clause(stage).await).await;
        })+
    };
    (@threads $backend:expr; $($file:ident::$clause:ident,)+) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
        async fn $clause() {
            run($backend, async |stage| $file::$clause(stage).await).await;
        })+
    };
}

contract!(embedded: embedded and exact);
contract!(nats with 1 replicas: nats);
contract!(nats with 3 replicas: nats_in_a_cluster);

async fn run(backend: stage::Backend, clause: impl AsyncFnOnce(&Stage)) {
    let stage = Stage::new(backend);
    clause(&stage).await;
    stage.clean_up().await;
}

fn envelope(n: u64) -> Envelope {
    Envelope { id: EnvelopeId::of(n, 1), body: Bytes::copy_from_slice(&n.to_le_bytes()) }
}

fn frame(numbers: impl IntoIterator<Item = u64>) -> Vec<Envelope> {
    numbers.into_iter().map(envelope).collect()
}

fn number(delivery: &Delivery) -> u64 {
    delivery.envelope.id.parts().0
}

fn numbers(batch: &Batch) -> BTreeSet<u64> {
    batch.deliveries().iter().map(number).collect()
}

fn counts(batch: &Batch) -> BTreeMap<u64, u32> {
    batch.deliveries().iter().map(|delivery| (number(delivery), delivery.count)).collect()
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(PATIENCE, what).await.expect("it should have happened by now")
}

async fn take(consumer: &mut Consumer) -> Batch {
    soon(consumer.next(LIMITS.queue_envelopes)).await.expect("the bus is open")
}

/// Takes so many, in as many batches as they come.
async fn take_all(consumer: &mut Consumer, envelopes: usize) -> Vec<Batch> {
    let mut batches = Vec::new();
    let mut missing = envelopes;
    while missing > 0 {
        let batch = soon(consumer.next(missing)).await.expect("the bus is open");
        missing -= batch.deliveries().len();
        batches.push(batch);
    }
    batches
}

/// Takes so many and acknowledges them.
async fn finish(consumer: &mut Consumer, envelopes: usize) -> BTreeSet<u64> {
    let mut all = BTreeSet::new();
    for batch in take_all(consumer, envelopes).await {
        all.extend(numbers(&batch));
        batch.ack_all().await.unwrap();
    }
    all
}

/// Publishes envelopes one by one, each in a frame of its own.
async fn publish_each(bus: &Bus, numbers: impl IntoIterator<Item = u64>) {
    for n in numbers {
        bus.publish(WORK, frame([n])).await.unwrap();
    }
}

/// Publishes as soon as there is room.
async fn publish_soon(bus: &Bus, frame: Vec<Envelope>) {
    let publishing = async {
        while let Err(refusal) = bus.publish(WORK, frame.clone()).await {
            assert!(matches!(refusal, PublishError::Full { .. }), "{refusal}");
            yield_now().await;
        }
    };
    soon(publishing).await;
}

/// Waits until the queue holds nothing: what was acknowledged is on its way to the servers, where there are any.
async fn assert_all_is_settled(bus: &Bus) {
    let settled = async {
        while bus.depth(WORK).await.unwrap().held() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    soon(settled).await;
}

async fn assert_nothing_comes(consumer: &mut Consumer) {
    if let Ok(batch) = timeout(QUIET, consumer.next(1)).await {
        panic!("nothing should come, but {batch:?} did");
    }
}

fn after(delay: Duration) -> Verdict {
    Verdict::Retry { after: delay }
}

fn park(reason: &str) -> Verdict {
    Verdict::Park { reason: reason.to_owned() }
}

fn full(subject: Subject, limits: Limits) -> PublishError {
    PublishError::Full { subject, capacity_envelopes: limits.queue_envelopes }
}

/// Lets every other task of a single-threaded runtime run until it waits.
async fn let_others_wait() {
    for _ in 0..100 {
        yield_now().await;
    }
}

/// Polls once without caring for a wakeup, as a `select!` does with the branch that then loses.
fn poll_once<F: Future>(future: Pin<&mut F>) -> bool {
    future.poll(&mut Context::from_waker(Waker::noop())).is_ready()
}

/// A small xorshift generator: the same choices in each run.
struct Choices(u64);

impl Choices {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// Everything that was published has ended or is still there.
async fn assert_counts_are_true(bus: &Bus) {
    let (stats, depth) = (bus.stats(), bus.depth(WORK).await.unwrap());
    assert_eq!(
        stats.published,
        stats.acked + stats.parked + stats.forgotten + depth.held() as u64,
        "{stats:?} {depth:?}"
    );
}
