//! Many publishers and consumers at once, on several threads.

use std::hint::spin_loop;
use std::ops::Range;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bus::{Batch, SettleError};
use tokio::runtime::Handle;
use tokio::sync::Barrier;
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::Instant;

use super::*;

/// Publishes frames of changing size, again and again where the bus is full or, where it is told to be, in trouble.
pub(super) async fn publish_all(bus: Bus, numbers: Range<u64>) {
    let mut choices = Choices(numbers.start + 1);
    let mut next = numbers.start;
    while next < numbers.end {
        let size = (1 + choices.below(LIMITS.frame_envelopes as u64)).min(numbers.end - next);
        match bus.publish(WORK, frame(next..next + size)).await {
            Ok(()) => next += size,
            Err(refusal) if refusal.is_transient() => yield_now().await,
            Err(refusal) => panic!("{refusal}"),
        }
    }
}

pub(super) async fn each_is_delivered_once_when_all_acknowledge(stage: &Stage) {
    const PUBLISHERS: u64 = 4;
    let each = stage.volume(20_000);
    let bus = stage.open(LIMITS).await;
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
                if acked.fetch_add(size as u64, Ordering::Relaxed) + size as u64 == PUBLISHERS * each {
                    bus.close().await;
                }
            }
            seen
        });
    }
    let mut publishers = JoinSet::new();
    for p in 0..PUBLISHERS {
        publishers.spawn(publish_all(bus.clone(), p * each..(p + 1) * each));
    }
    soon(publishers.join_all()).await;
    let mut seen = soon(consumers.join_all()).await.concat();
    seen.sort_unstable();
    assert!(seen.into_iter().eq(0..PUBLISHERS * each), "each number exactly once");
    assert_all_is_settled(&bus).await;
    assert_counts_are_true(&bus).await;
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

pub(super) async fn nothing_is_lost_when_handlers_fail_at_random(stage: &Stage) {
    let total = stage.volume(20_000);
    let bus = stage.open(LIMITS).await;
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
                let all = {
                    let mut acked = acked.lock().unwrap();
                    for n in ended {
                        assert!(acked.insert(n), "{n} came again after it was acknowledged");
                    }
                    acked.len() as u64 == total
                };
                if all {
                    bus.close().await;
                }
            }
        });
    }
    soon(publish_all(bus.clone(), 0..total)).await;
    soon(consumers.join_all()).await;
    assert!(acked.lock().unwrap().iter().copied().eq(0..total));
    assert_all_is_settled(&bus).await;
    assert_counts_are_true(&bus).await;
    assert!(bus.stats().redelivered > 0);
}

/// Each round has as many envelopes as consumers, and no consumer goes on before all have got one. So a round
/// ends only if every consumer is woken, however the wakeups merged.
pub(super) async fn no_ready_envelope_waits_while_a_consumer_is_idle(stage: &Stage) {
    let rounds = stage.volume(2_000);
    let bus = stage.open(LIMITS).await;
    let met = Arc::new(Barrier::new(CONSUMERS + 1));
    let mut consumers = JoinSet::new();
    for _ in 0..CONSUMERS {
        let (mut consumer, met) = (bus.subscribe(WORK), Arc::clone(&met));
        consumers.spawn(async move {
            for round in 0..rounds {
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
    for round in 0..rounds {
        // In one frame, in single ones, and in two.
        let all = frame(0..CONSUMERS as u64);
        let size = [CONSUMERS, 1, CONSUMERS / 2][round as usize % 3];
        for part in all.chunks(size) {
            bus.publish(WORK, part.to_vec()).await.unwrap();
        }
        soon(met.wait()).await;
    }
    soon(consumers.join_all()).await;
    assert_all_is_settled(&bus).await;
}

/// A single consumer goes to sleep again and again while the next envelope is being published, earlier or
/// later by some nanoseconds each time. A wakeup that falls between its look at the queue and its wait leaves
/// it asleep.
pub(super) async fn no_wakeup_is_lost_between_looking_and_waiting(stage: &Stage) {
    const ROUNDS: u64 = 100_000;
    /// On a busy machine there are fewer rounds, not a longer test.
    const BUDGET: Duration = Duration::from_secs(2);
    let bus = stage.open(LIMITS).await;
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
        runtime.block_on(bus.close());
    });
    publishing.await.unwrap();
    soon(consuming).await.unwrap();
}

/// Whenever it happens: publishers go on, consumers are served, and nothing comes that was forgotten.
pub(super) async fn a_bus_survives_losses_at_any_instant(stage: &Stage) {
    let total = stage.volume(20_000);
    let bus = stage.open(LIMITS).await;
    let consumers = lossy_consumers(&bus);
    let publisher = tokio::spawn(publish_all(bus.clone(), 0..total));
    while !publisher.is_finished() {
        // Where there are servers, a stream may be made while it is deleted.
        let _ = bus.clear().await;
        yield_now().await;
    }
    publisher.await.unwrap();
    assert_all_is_settled(&bus).await;
    assert_eq!(bus.stats().published, total);
    bus.close().await;
    soon(consumers.join_all()).await;
}

/// Consumers that give each batch some end, in a bus that may forget it before.
pub(super) fn lossy_consumers(bus: &Bus) -> JoinSet<()> {
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
    consumers
}
