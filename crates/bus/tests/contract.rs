//! The delivery contract at the head of the crate, clause by clause, run against each backend.
//!
//! A backend joins with one `contract!` line. The clauses use nothing but the public API and no knowledge of
//! the backend; where they wait, they wait for a condition. `QUIET` is how long nothing must happen for "it
//! does not come" to be believed; where a backend runs on tokio's clock, that is paused and the wait costs
//! nothing.
#![allow(clippy::unwrap_used, reason = "all of this file is tests, also what carries no test attribute")]

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::hint::spin_loop;
use std::ops::Range;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Waker};
use std::time::Duration;

use bus::{
    Batch, Bus, Closed, Consumer, Delivery, Depth, Envelope, EnvelopeId, Limits, PublishError,
    RETRY_DELAY_MAX, SettleError, Subject, Verdict,
};
use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::Barrier;
use tokio::task::{JoinSet, spawn_blocking, yield_now};
use tokio::time::{Instant, timeout};

const WORK: Subject = Subject("contract.work");
const OTHER: Subject = Subject("contract.other");

const QUIET: Duration = Duration::from_millis(500);
/// Only a failing test waits this long.
const PATIENCE: Duration = Duration::from_secs(20);
const CONSUMERS: usize = 8;

const LIMITS: Limits =
    Limits { queue_envelopes: 1_000, frame_envelopes: 100, body_bytes: 1_024, parked_letters: 10 };

/// Runs every clause against one backend. Clauses about delays and about what does not come run on a paused
/// clock; those about races run on several threads.
macro_rules! contract {
    ($backend:ident, $open:expr) => {
        mod $backend {
            use super::*;
            contract!(@paused $open;
                what_is_published_first_waits_for_its_consumer,
                a_waiting_consumer_gets_what_is_published_then,
                a_batch_joins_and_divides_frames,
                subjects_do_not_mix,
                an_empty_frame_is_nothing,
                an_acknowledged_envelope_never_comes_again,
                a_retried_envelope_comes_after_its_delay_and_not_before,
                a_retry_without_delay_comes_at_once,
                the_shortest_delay_ends_first,
                an_absurd_delay_is_cut,
                a_retry_wakes_who_already_waits,
                a_dropped_batch_comes_back_whole_at_once,
                a_handler_that_panics_gives_its_batch_back,
                a_handler_that_is_aborted_gives_its_batch_back,
                each_delivery_counts_one_more,
                each_envelope_has_its_own_verdict,
                too_few_verdicts_are_a_bug_that_loses_nothing,
                dead_letters_are_bounded,
                a_full_queue_refuses_until_something_ends,
                what_is_delayed_or_in_hand_keeps_its_place,
                a_refused_frame_leaves_no_part_behind,
                a_large_frame_or_envelope_is_refused,
                a_batch_of_none_cannot_be_asked_for,
                who_stops_waiting_passes_the_wakeup_on,
                who_stops_waiting_for_a_delay_passes_it_on,
                a_consumer_that_is_always_served_lets_others_run,
                a_loss_takes_everything,
                a_batch_from_before_a_loss_settles_into_nothing,
                a_bus_goes_on_after_a_loss,
                closing_tells_all_who_wait,
                closing_ends_publishing_and_delivery_but_not_settling,
            );
            contract!(@threads $open;
                each_is_delivered_once_when_all_acknowledge,
                nothing_is_lost_when_handlers_fail_at_random,
                no_ready_envelope_waits_while_a_consumer_is_idle,
                no_wakeup_is_lost_between_looking_and_waiting,
                a_loss_at_any_instant_leaves_the_counts_true,
            );
        }
    };
    (@paused $open:expr; $($clause:ident,)+) => {
        $(#[tokio::test(start_paused = true)]
        async fn $clause() {
            super::$clause($open).await;
        })+
    };
    (@threads $open:expr; $($clause:ident,)+) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
        async fn $clause() {
            super::$clause($open).await;
        })+
    };
}

contract!(embedded, Bus::embedded);

type Open = fn(Limits) -> Bus;

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
fn assert_counts_are_true(bus: &Bus) {
    let (stats, depth) = (bus.stats(), bus.depth(WORK));
    assert_eq!(
        stats.published,
        stats.acked + stats.parked + stats.forgotten + depth.held() as u64,
        "{stats:?} {depth:?}"
    );
}

async fn what_is_published_first_waits_for_its_consumer(open: Open) {
    let bus = open(LIMITS);
    bus.publish(WORK, frame(0..3)).await.unwrap();
    let batch = take(&mut bus.subscribe(WORK)).await;
    let mut got = batch.deliveries().to_vec();
    got.sort_by_key(number);
    let expected: Vec<_> = (0..3).map(|n| Delivery { envelope: envelope(n), count: 1 }).collect();
    assert_eq!(got, expected);
    batch.ack_all().await.unwrap();
}

async fn a_waiting_consumer_gets_what_is_published_then(open: Open) {
    let bus = open(LIMITS);
    let mut consumer = bus.subscribe(WORK);
    let waiting = tokio::spawn(async move { numbers(&take(&mut consumer).await) });
    let_others_wait().await;
    bus.publish(WORK, frame([7])).await.unwrap();
    assert_eq!(soon(waiting).await.unwrap(), BTreeSet::from([7]));
}

async fn a_batch_joins_and_divides_frames(open: Open) {
    let bus = open(LIMITS);
    bus.publish(WORK, frame(0..4)).await.unwrap();
    bus.publish(WORK, frame(4..8)).await.unwrap();
    let mut consumer = bus.subscribe(WORK);
    let first = consumer.next(6).await.unwrap();
    assert_eq!(first.deliveries().len(), 6);
    let second = consumer.next(6).await.unwrap();
    assert_eq!(second.deliveries().len(), 2);
    assert_eq!(&numbers(&first) | &numbers(&second), (0..8).collect());
    assert_eq!(bus.depth(WORK), Depth { ready: 0, delayed: 0, in_hand: 8 });
    first.ack_all().await.unwrap();
    second.ack_all().await.unwrap();
    assert_eq!(bus.depth(WORK), Depth::default());
}

async fn subjects_do_not_mix(open: Open) {
    let limits = Limits { queue_envelopes: 2, frame_envelopes: 2, ..LIMITS };
    let bus = open(limits);
    bus.publish(WORK, frame([1, 2])).await.unwrap();
    bus.publish(OTHER, frame([3, 4])).await.expect("the other queue has its own bound");
    assert_eq!(numbers(&take(&mut bus.subscribe(OTHER)).await), BTreeSet::from([3, 4]));
    assert_eq!(numbers(&take(&mut bus.subscribe(WORK)).await), BTreeSet::from([1, 2]));
}

async fn an_empty_frame_is_nothing(open: Open) {
    let bus = open(LIMITS);
    bus.publish(WORK, Vec::new()).await.unwrap();
    assert_nothing_comes(&mut bus.subscribe(WORK)).await;
    assert_eq!(bus.stats(), bus::Stats::default());
}

async fn an_acknowledged_envelope_never_comes_again(open: Open) {
    let bus = open(LIMITS);
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame(0..10)).await.unwrap();
    take(&mut consumer).await.ack_all().await.unwrap();
    bus.publish(WORK, frame(10..20)).await.unwrap();
    let batch = take(&mut consumer).await;
    assert_eq!(numbers(&batch), (10..20).collect());
    batch.settle(vec![Verdict::Ack; 10]).await.unwrap();
    assert_nothing_comes(&mut consumer).await;
    assert_eq!(bus.depth(WORK), Depth::default());
    assert_eq!(bus.stats().acked, 20);
}

async fn a_retried_envelope_comes_after_its_delay_and_not_before(open: Open) {
    let delay = Duration::from_secs(2);
    let bus = open(LIMITS);
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame([1])).await.unwrap();
    let batch = take(&mut consumer).await;
    let start = Instant::now();
    batch.settle(vec![after(delay)]).await.unwrap();
    assert_eq!(bus.depth(WORK), Depth { ready: 0, delayed: 1, in_hand: 0 });
    assert_nothing_comes(&mut consumer).await;
    let again = take(&mut consumer).await;
    let waited = start.elapsed();
    assert_eq!(counts(&again), BTreeMap::from([(1, 2)]));
    assert!(waited >= delay, "it came after {waited:?}, before its delay was over");
    assert!(waited < delay + QUIET, "it came only after {waited:?}");
    again.ack_all().await.unwrap();
}

async fn a_retry_without_delay_comes_at_once(open: Open) {
    let bus = open(LIMITS);
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame([1])).await.unwrap();
    take(&mut consumer).await.settle(vec![after(Duration::ZERO)]).await.unwrap();
    let start = Instant::now();
    assert_eq!(counts(&take(&mut consumer).await), BTreeMap::from([(1, 2)]));
    assert!(start.elapsed() < QUIET);
}

async fn the_shortest_delay_ends_first(open: Open) {
    let bus = open(LIMITS);
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame(1..4)).await.unwrap();
    let batch = take(&mut consumer).await;
    let delay_of = |n: u64| Duration::from_secs([3, 1, 2][n as usize - 1]);
    let verdicts = batch.deliveries().iter().map(|delivery| after(delay_of(number(delivery)))).collect();
    let start = Instant::now();
    batch.settle(verdicts).await.unwrap();
    for n in [2, 3, 1] {
        let batch = take(&mut consumer).await;
        assert_eq!(numbers(&batch), BTreeSet::from([n]));
        assert!((delay_of(n)..delay_of(n) + QUIET).contains(&start.elapsed()));
        batch.ack_all().await.unwrap();
    }
}

async fn an_absurd_delay_is_cut(open: Open) {
    let bus = open(LIMITS);
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame([1])).await.unwrap();
    take(&mut consumer).await.settle(vec![after(Duration::MAX)]).await.unwrap();
    let batch = timeout(RETRY_DELAY_MAX + QUIET, consumer.next(1)).await.expect("the delay has an end");
    assert_eq!(counts(&batch.unwrap()), BTreeMap::from([(1, 2)]));
}

async fn a_retry_wakes_who_already_waits(open: Open) {
    let bus = open(LIMITS);
    bus.publish(WORK, frame([1])).await.unwrap();
    let batch = take(&mut bus.subscribe(WORK)).await;
    let mut consumer = bus.subscribe(WORK);
    let waiting = tokio::spawn(async move { counts(&take(&mut consumer).await) });
    let_others_wait().await;
    batch.settle(vec![after(Duration::from_secs(1))]).await.unwrap();
    assert_eq!(soon(waiting).await.unwrap(), BTreeMap::from([(1, 2)]));
}

async fn a_dropped_batch_comes_back_whole_at_once(open: Open) {
    let bus = open(LIMITS);
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame(0..10)).await.unwrap();
    drop(take(&mut consumer).await);
    assert_eq!(bus.depth(WORK), Depth { ready: 10, delayed: 0, in_hand: 0 });
    let start = Instant::now();
    assert_eq!(counts(&take(&mut consumer).await), (0..10).map(|n| (n, 2)).collect());
    assert!(start.elapsed() < QUIET);
    assert_eq!((bus.stats().delivered, bus.stats().redelivered), (20, 10));
}

async fn a_handler_that_panics_gives_its_batch_back(open: Open) {
    let bus = open(LIMITS);
    let mut handler = bus.subscribe(WORK);
    let dies = tokio::spawn(async move {
        let _batch = take(&mut handler).await;
        std::panic::panic_any("the handler has a bug");
    });
    let mut successor = bus.subscribe(WORK);
    bus.publish(WORK, frame([1, 2])).await.unwrap();
    assert!(soon(dies).await.unwrap_err().is_panic());
    assert_eq!(counts(&take(&mut successor).await), BTreeMap::from([(1, 2), (2, 2)]));
}

async fn a_handler_that_is_aborted_gives_its_batch_back(open: Open) {
    let bus = open(LIMITS);
    bus.publish(WORK, frame([1, 2])).await.unwrap();
    let mut handler = bus.subscribe(WORK);
    let hangs = tokio::spawn(async move {
        let _batch = take(&mut handler).await;
        std::future::pending::<()>().await;
    });
    let mut consumer = bus.subscribe(WORK);
    let successor = tokio::spawn(async move { counts(&take(&mut consumer).await) });
    let_others_wait().await;
    assert_eq!(bus.depth(WORK), Depth { ready: 0, delayed: 0, in_hand: 2 });
    hangs.abort();
    assert_eq!(soon(successor).await.unwrap(), BTreeMap::from([(1, 2), (2, 2)]));
}

async fn each_delivery_counts_one_more(open: Open) {
    let bus = open(LIMITS);
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame([1])).await.unwrap();
    for count in 1..=30 {
        let batch = take(&mut consumer).await;
        assert_eq!(counts(&batch), BTreeMap::from([(1, count)]));
        match count % 3 {
            0 => drop(batch),
            1 => batch.settle(vec![after(Duration::ZERO)]).await.unwrap(),
            _ => batch.settle(vec![after(Duration::from_millis(5))]).await.unwrap(),
        }
    }
}

async fn each_envelope_has_its_own_verdict(open: Open) {
    let bus = open(LIMITS);
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame(0..9)).await.unwrap();
    let batch = take(&mut consumer).await;
    let verdict = |delivery: &Delivery| match number(delivery) {
        4 => park("cannot be decoded"),
        6 => after(Duration::from_secs(1)),
        _ => Verdict::Ack,
    };
    let verdicts = batch.deliveries().iter().map(verdict).collect();
    batch.settle(verdicts).await.unwrap();

    let letters = bus.parked();
    assert_eq!(letters.len(), 1, "{letters:?}");
    assert_eq!((letters[0].subject, &letters[0].envelope), (WORK, &envelope(4)));
    assert_eq!((letters[0].count, letters[0].reason.as_str()), (1, "cannot be decoded"));
    let again = take(&mut consumer).await;
    assert_eq!(counts(&again), BTreeMap::from([(6, 2)]));
    again.ack_all().await.unwrap();
    assert_nothing_comes(&mut consumer).await;
    let stats = bus.stats();
    assert_eq!((stats.published, stats.acked, stats.parked), (9, 8, 1));
    assert_eq!((stats.delivered, stats.redelivered, stats.letters_dropped), (10, 1, 0));
}

async fn too_few_verdicts_are_a_bug_that_loses_nothing(open: Open) {
    let bus = open(LIMITS);
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame(0..3)).await.unwrap();
    for wrong in [2, 4] {
        let batch = take(&mut consumer).await;
        let settling = tokio::spawn(batch.settle(vec![Verdict::Ack; wrong]));
        assert!(soon(settling).await.unwrap_err().is_panic());
    }
    assert_eq!(counts(&take(&mut consumer).await), (0..3).map(|n| (n, 3)).collect());
}

async fn dead_letters_are_bounded(open: Open) {
    let bus = open(Limits { parked_letters: 3, ..LIMITS });
    let mut consumer = bus.subscribe(WORK);
    for n in 0..5 {
        bus.publish(WORK, frame([n])).await.unwrap();
        take(&mut consumer).await.settle(vec![park("poison")]).await.unwrap();
    }
    let kept: Vec<_> = bus.parked().iter().map(|letter| letter.envelope.id.parts().0).collect();
    assert_eq!(kept, [2, 3, 4], "the oldest go first");
    assert_eq!((bus.stats().parked, bus.stats().letters_dropped), (5, 2));
}

async fn a_full_queue_refuses_until_something_ends(open: Open) {
    let limits = Limits { queue_envelopes: 4, frame_envelopes: 4, ..LIMITS };
    let bus = open(limits);
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame([1, 2, 3])).await.unwrap();
    assert_eq!(bus.publish(WORK, frame([4, 5])).await, Err(full(WORK, limits)));
    bus.publish(WORK, frame([4])).await.expect("one place was left");
    assert_eq!(bus.publish(WORK, frame([5])).await, Err(full(WORK, limits)));
    assert_eq!(bus.stats().refused, 3);

    consumer.next(2).await.unwrap().ack_all().await.unwrap();
    bus.publish(WORK, frame([6, 7])).await.expect("an acknowledgement makes room");
    assert_eq!(bus.publish(WORK, frame([8])).await, Err(full(WORK, limits)));

    consumer.next(1).await.unwrap().settle(vec![park("poison")]).await.unwrap();
    bus.publish(WORK, frame([9])).await.expect("parking makes room");
    assert_eq!(bus.publish(WORK, frame([10])).await, Err(full(WORK, limits)));
    assert_eq!(bus.depth(WORK).held(), 4);
}

async fn what_is_delayed_or_in_hand_keeps_its_place(open: Open) {
    let limits = Limits { queue_envelopes: 3, frame_envelopes: 3, ..LIMITS };
    let bus = open(limits);
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame([1, 2, 3])).await.unwrap();
    let refuses = async |when: &str| {
        assert_eq!(bus.publish(WORK, frame([4])).await, Err(full(WORK, limits)), "{when}");
    };
    let batch = take(&mut consumer).await;
    refuses("in hand").await;
    batch.settle(vec![after(Duration::from_secs(1)); 3]).await.expect("there is always room to come back");
    refuses("delayed").await;
    let batch = take(&mut consumer).await;
    refuses("in hand again").await;
    drop(batch);
    refuses("given back").await;
    let batch = take(&mut consumer).await;
    assert_eq!(counts(&batch), BTreeMap::from([(1, 3), (2, 3), (3, 3)]));
    batch.ack_all().await.unwrap();
    bus.publish(WORK, frame([4, 5, 6])).await.expect("all places are free again");
}

async fn a_refused_frame_leaves_no_part_behind(open: Open) {
    let limits = Limits { queue_envelopes: 5, frame_envelopes: 5, ..LIMITS };
    let bus = open(limits);
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame([1, 2, 3])).await.unwrap();
    assert_eq!(bus.publish(WORK, frame(10..13)).await, Err(full(WORK, limits)));
    let batch = take(&mut consumer).await;
    assert_eq!(numbers(&batch), BTreeSet::from([1, 2, 3]));
    batch.ack_all().await.unwrap();
    assert_nothing_comes(&mut consumer).await;
    assert_eq!((bus.stats().published, bus.stats().refused), (3, 3));
}

async fn a_large_frame_or_envelope_is_refused(open: Open) {
    let bus = open(LIMITS);
    let of_bytes = |n: u64, bytes: usize| Envelope { id: EnvelopeId::of(n, 1), body: vec![0; bytes].into() };
    bus.publish(WORK, frame(0..100)).await.expect("a frame at its limit is taken");
    bus.publish(WORK, vec![of_bytes(100, 1_024)]).await.expect("a body at its limit is taken");

    let refusal = bus.publish(WORK, frame(200..301)).await.unwrap_err();
    assert_eq!(
        refusal,
        PublishError::FrameTooLarge {
            subject: WORK,
            envelopes: 101,
            limit_envelopes: LIMITS.frame_envelopes
        }
    );
    let refusal = bus.publish(WORK, vec![of_bytes(201, 1), of_bytes(202, 1_025)]).await.unwrap_err();
    assert_eq!(
        refusal,
        PublishError::EnvelopeTooLarge {
            subject: WORK,
            id: EnvelopeId::of(202, 1),
            bytes: 1_025,
            limit_bytes: LIMITS.body_bytes
        }
    );
    assert_eq!(numbers(&take(&mut bus.subscribe(WORK)).await), (0..101).collect());
    assert_eq!(bus.stats().refused, 103);
}

async fn a_batch_of_none_cannot_be_asked_for(open: Open) {
    let mut consumer = open(LIMITS).subscribe(WORK);
    let asking = tokio::spawn(async move { consumer.next(0).await.is_ok() });
    assert!(soon(asking).await.unwrap_err().is_panic());
}

async fn who_stops_waiting_passes_the_wakeup_on(open: Open) {
    let bus = open(LIMITS);
    let mut fickle = bus.subscribe(WORK);
    let mut steady = bus.subscribe(WORK);
    let steady = {
        // The fickle one waits first, so the wakeup goes to it; it goes away without having looked.
        let mut waiting = pin!(fickle.next(10));
        assert!(!poll_once(waiting.as_mut()));
        let steady = tokio::spawn(async move { numbers(&take(&mut steady).await) });
        let_others_wait().await;
        bus.publish(WORK, frame([1])).await.unwrap();
        steady
    };
    assert_eq!(soon(steady).await.unwrap(), BTreeSet::from([1]));
}

async fn who_stops_waiting_for_a_delay_passes_it_on(open: Open) {
    let bus = open(LIMITS);
    bus.publish(WORK, frame([1])).await.unwrap();
    let batch = take(&mut bus.subscribe(WORK)).await;
    let mut fickle = bus.subscribe(WORK);
    let mut steady = bus.subscribe(WORK);
    let steady = {
        let mut waiting = pin!(fickle.next(10));
        assert!(!poll_once(waiting.as_mut()));
        let steady = tokio::spawn(async move { numbers(&take(&mut steady).await) });
        let_others_wait().await;
        batch.settle(vec![after(Duration::from_secs(1))]).await.unwrap();
        // Woken for the delay, it now is the one that sleeps until its end.
        assert!(!poll_once(waiting.as_mut()));
        steady
    };
    assert_eq!(soon(steady).await.unwrap(), BTreeSet::from([1]));
}

async fn a_consumer_that_is_always_served_lets_others_run(open: Open) {
    let bus = open(LIMITS);
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame([1])).await.unwrap();
    let other = tokio::spawn(async {});
    for _ in 0..10_000 {
        drop(take(&mut consumer).await);
        if other.is_finished() {
            return;
        }
    }
    panic!("10,000 batches in a row, and no other task could run");
}

async fn a_loss_takes_everything(open: Open) {
    let bus = open(LIMITS);
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame(0..4)).await.unwrap();
    consumer.next(1).await.unwrap().settle(vec![after(Duration::from_millis(100))]).await.unwrap();
    consumer.next(1).await.unwrap().settle(vec![park("poison")]).await.unwrap();
    let in_hand = consumer.next(1).await.unwrap();
    assert_eq!(bus.depth(WORK), Depth { ready: 1, delayed: 1, in_hand: 1 });
    bus.publish(OTHER, frame([9])).await.unwrap();

    bus.clear();
    assert_eq!(bus.depth(WORK), Depth::default());
    assert_eq!(bus.parked(), []);
    drop(in_hand);
    assert_nothing_comes(&mut consumer).await;
    assert_nothing_comes(&mut bus.subscribe(OTHER)).await;
    assert_eq!(bus.stats().forgotten, 4);
}

async fn a_batch_from_before_a_loss_settles_into_nothing(open: Open) {
    let bus = open(LIMITS);
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame(0..5)).await.unwrap();
    let mut old = Vec::new();
    for _ in 0..5 {
        old.push(consumer.next(1).await.unwrap());
    }
    bus.clear();
    bus.publish(WORK, frame(10..15)).await.unwrap();
    let new = take(&mut consumer).await;

    let forgotten = Err(SettleError::Forgotten { subject: WORK });
    let mut old = old.into_iter();
    let mut next = || old.next().expect("five batches were taken");
    assert_eq!(next().ack_all().await, forgotten);
    assert_eq!(next().settle(vec![Verdict::Ack]).await, forgotten);
    assert_eq!(next().settle(vec![park("poison")]).await, forgotten);
    assert_eq!(next().settle(vec![after(Duration::ZERO)]).await, forgotten);
    drop(next());

    assert_eq!(bus.depth(WORK), Depth { ready: 0, delayed: 0, in_hand: 5 });
    assert_eq!(bus.parked(), []);
    assert_nothing_comes(&mut consumer).await;
    new.ack_all().await.unwrap();
    assert_eq!(bus.depth(WORK), Depth::default());
    assert_counts_are_true(&bus);
}

async fn a_bus_goes_on_after_a_loss(open: Open) {
    let limits = Limits { queue_envelopes: 2, frame_envelopes: 2, ..LIMITS };
    let bus = open(limits);
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame([1, 2])).await.unwrap();
    bus.clear();
    bus.publish(WORK, frame([1, 2])).await.expect("what was lost takes no room");
    let batch = take(&mut consumer).await;
    assert_eq!(counts(&batch), BTreeMap::from([(1, 1), (2, 1)]));
    batch.ack_all().await.unwrap();
    // A consumer that waits through a loss is served by what comes after it.
    let waiting = tokio::spawn(async move { numbers(&take(&mut consumer).await) });
    let_others_wait().await;
    bus.clear();
    bus.publish(WORK, frame([3])).await.unwrap();
    assert_eq!(soon(waiting).await.unwrap(), BTreeSet::from([3]));
}

async fn closing_tells_all_who_wait(open: Open) {
    let bus = open(LIMITS);
    let mut waiting = JoinSet::new();
    for subject in [WORK, WORK, WORK, OTHER, OTHER] {
        let mut consumer = bus.subscribe(subject);
        waiting.spawn(async move { consumer.next(1).await.map(drop) });
    }
    let_others_wait().await;
    bus.close();
    bus.close();
    while let Some(told) = soon(waiting.join_next()).await {
        assert_eq!(told.unwrap(), Err(Closed));
    }
}

async fn closing_ends_publishing_and_delivery_but_not_settling(open: Open) {
    let bus = open(LIMITS);
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame(0..4)).await.unwrap();
    let first = consumer.next(1).await.unwrap();
    let second = consumer.next(1).await.unwrap();
    bus.close();
    for _ in 0..2 {
        assert_eq!(soon(consumer.next(1)).await.map(drop), Err(Closed), "though two are ready");
    }
    assert_eq!(bus.publish(WORK, frame([9])).await, Err(PublishError::Closed));
    assert_eq!(bus.publish(OTHER, frame([9])).await, Err(PublishError::Closed), "a queue not seen before");
    assert_eq!(soon(bus.subscribe(OTHER).next(1)).await.map(drop), Err(Closed));
    first.ack_all().await.unwrap();
    second.settle(vec![park("poison")]).await.unwrap();
    assert_eq!(bus.depth(WORK), Depth { ready: 2, delayed: 0, in_hand: 0 });
    assert_eq!(bus.parked().len(), 1);
}

/// Publishes frames of changing size, again and again where the bus is full.
async fn publish_all(bus: Bus, numbers: Range<u64>) {
    let mut choices = Choices(numbers.start + 1);
    let mut next = numbers.start;
    while next < numbers.end {
        let size = (1 + choices.below(LIMITS.frame_envelopes as u64)).min(numbers.end - next);
        match bus.publish(WORK, frame(next..next + size)).await {
            Ok(()) => next += size,
            Err(PublishError::Full { .. }) => yield_now().await,
            Err(refusal) => panic!("{refusal}"),
        }
    }
}

async fn each_is_delivered_once_when_all_acknowledge(open: Open) {
    const PUBLISHERS: u64 = 4;
    const EACH: u64 = 20_000;
    let bus = open(LIMITS);
    let acked = Arc::new(AtomicU64::new(0));
    let mut consumers = JoinSet::new();
    for max in 0..CONSUMERS {
        let (bus, mut consumer, acked) = (bus.clone(), bus.subscribe(WORK), Arc::clone(&acked));
        consumers.spawn(async move {
            let mut seen = Vec::new();
            while let Ok(batch) = consumer.next(1 + max * 20).await {
                let size = batch.deliveries().len();
                assert!((1..=1 + max * 20).contains(&size));
                assert!(batch.deliveries().iter().all(|delivery| delivery.count == 1));
                seen.extend(batch.deliveries().iter().map(number));
                batch.ack_all().await.unwrap();
                if acked.fetch_add(size as u64, Ordering::Relaxed) + size as u64 == PUBLISHERS * EACH {
                    bus.close();
                }
            }
            seen
        });
    }
    let mut publishers = JoinSet::new();
    for p in 0..PUBLISHERS {
        publishers.spawn(publish_all(bus.clone(), p * EACH..(p + 1) * EACH));
    }
    soon(publishers.join_all()).await;
    let mut seen = soon(consumers.join_all()).await.concat();
    seen.sort_unstable();
    assert!(seen.into_iter().eq(0..PUBLISHERS * EACH), "each number exactly once");
    assert_eq!(bus.depth(WORK), Depth::default());
    assert_counts_are_true(&bus);
}

/// Every kind of end that a batch can have. Returns the numbers that were acknowledged.
async fn end_somehow(batch: Batch, choices: &mut Choices) -> Vec<u64> {
    match choices.below(6) {
        0 => {
            drop(batch);
            Vec::new()
        }
        1 => {
            // Asked to settle, but the task is gone before it happens.
            drop(batch.ack_all());
            Vec::new()
        }
        2 | 3 => {
            let all = batch.deliveries().iter().map(number).collect();
            batch.ack_all().await.unwrap();
            all
        }
        _ => {
            let mut acked = Vec::new();
            let verdicts = batch.deliveries().iter().map(|delivery| match choices.below(4) {
                0 => after(Duration::from_micros(choices.below(3_000))),
                _ => {
                    acked.push(number(delivery));
                    Verdict::Ack
                }
            });
            let verdicts = verdicts.collect();
            batch.settle(verdicts).await.unwrap();
            acked
        }
    }
}

async fn nothing_is_lost_when_handlers_fail_at_random(open: Open) {
    const TOTAL: u64 = 20_000;
    let bus = open(LIMITS);
    let acked = Arc::new(Mutex::new(BTreeSet::new()));
    let counts = Arc::new(Mutex::new(BTreeMap::<u64, u32>::new()));
    let mut consumers = JoinSet::new();
    for c in 0..CONSUMERS {
        let (bus, mut consumer) = (bus.clone(), bus.subscribe(WORK));
        let (acked, counts) = (Arc::clone(&acked), Arc::clone(&counts));
        consumers.spawn(async move {
            let mut choices = Choices(c as u64 + 1);
            loop {
                if choices.below(4) == 0 {
                    // Gives up waiting, or drops a batch unseen; so counts below may jump, but only upwards.
                    poll_once(pin!(consumer.next(10)));
                }
                let max = 1 + choices.below(64) as usize;
                let Ok(batch) = consumer.next(max).await else { return };
                for delivery in batch.deliveries() {
                    let mut counts = counts.lock().unwrap();
                    let last = counts.insert(number(delivery), delivery.count).unwrap_or(0);
                    assert!(delivery.count > last, "{} after {last}", delivery.count);
                }
                let ended = end_somehow(batch, &mut choices).await;
                let mut acked = acked.lock().unwrap();
                for n in ended {
                    assert!(acked.insert(n), "{n} came again after it was acknowledged");
                }
                if acked.len() as u64 == TOTAL {
                    bus.close();
                }
            }
        });
    }
    soon(publish_all(bus.clone(), 0..TOTAL)).await;
    soon(consumers.join_all()).await;
    assert!(acked.lock().unwrap().iter().copied().eq(0..TOTAL));
    assert_eq!(bus.depth(WORK), Depth::default());
    assert_counts_are_true(&bus);
    assert!(bus.stats().redelivered > 0);
}

/// Each round has as many envelopes as consumers, and no consumer goes on before all have got one. So a round
/// ends only if every consumer is woken, however the wakeups merged.
async fn no_ready_envelope_waits_while_a_consumer_is_idle(open: Open) {
    const ROUNDS: u64 = 2_000;
    let bus = open(LIMITS);
    let met = Arc::new(Barrier::new(CONSUMERS + 1));
    let mut consumers = JoinSet::new();
    for _ in 0..CONSUMERS {
        let (mut consumer, met) = (bus.subscribe(WORK), Arc::clone(&met));
        consumers.spawn(async move {
            for round in 0..ROUNDS {
                let batch = consumer.next(1).await.unwrap();
                met.wait().await;
                match round % 3 {
                    0 => batch.ack_all().await.unwrap(),
                    1 => batch.settle(vec![Verdict::Ack]).await.unwrap(),
                    _ => batch.settle(vec![park("counted")]).await.unwrap(),
                }
            }
        });
    }
    for round in 0..ROUNDS {
        // In one frame, in single ones, and in two.
        let all = frame(0..CONSUMERS as u64);
        let size = [CONSUMERS, 1, CONSUMERS / 2][round as usize % 3];
        for part in all.chunks(size) {
            bus.publish(WORK, part.to_vec()).await.unwrap();
        }
        soon(met.wait()).await;
    }
    soon(consumers.join_all()).await;
    assert_eq!(bus.depth(WORK), Depth::default());
}

/// A single consumer goes to sleep again and again while the next envelope is being published, earlier or
/// later by some nanoseconds each time. A wakeup that falls between its look at the queue and its wait leaves
/// it asleep.
async fn no_wakeup_is_lost_between_looking_and_waiting(open: Open) {
    const ROUNDS: u64 = 100_000;
    /// On a busy machine there are fewer rounds, not a longer test.
    const BUDGET: Duration = Duration::from_secs(2);
    let bus = open(LIMITS);
    let acked = Arc::new(AtomicU64::new(0));
    let (mut consumer, acks) = (bus.subscribe(WORK), Arc::clone(&acked));
    let consuming = tokio::spawn(async move {
        while let Ok(batch) = consumer.next(1).await {
            batch.ack_all().await.unwrap();
            acks.fetch_add(1, Ordering::Release);
        }
    });
    // On a thread of its own: tasks that wake each other tend to share a worker, and then never meet.
    let runtime = Handle::current();
    let publishing = spawn_blocking(move || {
        let mut choices = Choices(1);
        let start = Instant::now();
        for round in 0..ROUNDS {
            let published = Instant::now();
            while acked.load(Ordering::Acquire) < round {
                assert!(published.elapsed() < PATIENCE, "the consumer sleeps while an envelope is ready");
                std::thread::yield_now();
            }
            if start.elapsed() > BUDGET {
                break;
            }
            for _ in 0..choices.below(30) {
                spin_loop();
            }
            runtime.block_on(bus.publish(WORK, frame([round]))).unwrap();
        }
        bus.close();
    });
    publishing.await.unwrap();
    soon(consuming).await.unwrap();
}

async fn a_loss_at_any_instant_leaves_the_counts_true(open: Open) {
    const TOTAL: u64 = 20_000;
    let bus = open(LIMITS);
    let mut consumers = JoinSet::new();
    for c in 0..CONSUMERS {
        let mut consumer = bus.subscribe(WORK);
        consumers.spawn(async move {
            let mut choices = Choices(c as u64 + 1);
            while let Ok(batch) = consumer.next(32).await {
                let size = batch.deliveries().len();
                let verdict = [Verdict::Ack, after(Duration::ZERO), park("poison")];
                let verdict = verdict[choices.below(3) as usize].clone();
                match choices.below(4) {
                    0 => drop(batch),
                    _ => match batch.settle(vec![verdict; size]).await {
                        Ok(()) | Err(SettleError::Forgotten { .. }) => {}
                    },
                }
                yield_now().await;
            }
        });
    }
    let publisher = tokio::spawn(publish_all(bus.clone(), 0..TOTAL));
    while !publisher.is_finished() {
        bus.clear();
        assert!(bus.depth(WORK).held() <= LIMITS.queue_envelopes);
        yield_now().await;
    }
    publisher.await.unwrap();
    let drained = async {
        while bus.depth(WORK).held() > 0 {
            yield_now().await;
        }
    };
    soon(drained).await;
    assert_counts_are_true(&bus);
    assert_eq!(bus.stats().published, TOTAL);
    assert!(bus.stats().forgotten > 0);
    bus.close();
    soon(consumers.join_all()).await;
}
