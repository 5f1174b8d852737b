//! What only a bus promises that sees everything: the embedded one.
//!
//! Servers know frames, not envelopes; they answer for all processes, of which each knows only what it did itself; and between a
//! decision and its effect on them lies a network. So nobody can say there at one instant where each envelope is, and no bound can count
//! envelopes. And they know no paused clock: a day's delay is too long for a test.

use bus::{Depth, RETRY_DELAY_MAX};
use tokio::time::Instant;

use super::races::{lossy_consumers, publish_all};
use super::*;

pub(super) async fn depth_says_where_each_envelope_is(stage: &Stage) {
    let bus = stage.open(LIMITS).await;
    let depth = async || bus.depth(WORK).await.unwrap();
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame(0..4)).await.unwrap();
    bus.publish(WORK, frame(4..8)).await.unwrap();
    assert_eq!(depth().await, Depth { ready: 8, delayed: 0, in_hand: 0 });
    let first = consumer.next(6).await.unwrap();
    assert_eq!(first.deliveries().len(), 6);
    let second = consumer.next(6).await.unwrap();
    assert_eq!(second.deliveries().len(), 2);
    assert_eq!(&numbers(&first) | &numbers(&second), (0..8).collect());
    assert_eq!(depth().await, Depth { ready: 0, delayed: 0, in_hand: 8 });
    first.settle(vec![after(Duration::from_secs(2)); 6]).await.unwrap();
    assert_eq!(depth().await, Depth { ready: 0, delayed: 6, in_hand: 2 });
    drop(second);
    assert_eq!(depth().await, Depth { ready: 2, delayed: 6, in_hand: 0 });
    take(&mut consumer).await.ack_all().await.unwrap();
    assert_nothing_comes(&mut consumer).await;
    let again = take(&mut consumer).await;
    assert_eq!(depth().await, Depth { ready: 0, delayed: 0, in_hand: 6 });
    bus.close().await;
    again.ack_all().await.unwrap();
    assert_eq!(depth().await, Depth::default());
    assert_counts_are_true(&bus).await;
}

pub(super) async fn the_bound_counts_envelopes(stage: &Stage) {
    let limits = Limits { queue_envelopes: 4, frame_envelopes: 4, ..LIMITS };
    let bus = stage.open(limits).await;
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame([1, 2, 3])).await.unwrap();
    assert_eq!(bus.publish(WORK, frame([4, 5])).await, Err(full(WORK, limits)));
    bus.publish(WORK, frame([4])).await.expect("one place was left");
    assert_eq!(bus.publish(WORK, frame([5])).await, Err(full(WORK, limits)));
    assert_eq!(bus.stats().refused, 3);
    consumer.next(2).await.unwrap().ack_all().await.unwrap();
    bus.publish(WORK, frame([6, 7])).await.expect("an acknowledgement makes room at once");
    assert_eq!(bus.publish(WORK, frame([8])).await, Err(full(WORK, limits)));
    consumer.next(1).await.unwrap().settle(vec![park("poison")]).await.unwrap();
    bus.publish(WORK, frame([9])).await.expect("parking makes room at once");
    assert_eq!(bus.publish(WORK, frame([10])).await, Err(full(WORK, limits)));
}

pub(super) async fn a_frame_that_does_not_fit_as_a_whole_is_refused(stage: &Stage) {
    let limits = Limits { queue_envelopes: 5, frame_envelopes: 5, ..LIMITS };
    let bus = stage.open(limits).await;
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame([1, 2, 3])).await.unwrap();
    assert_eq!(bus.publish(WORK, frame(10..13)).await, Err(full(WORK, limits)));
    assert_eq!(finish(&mut consumer, 3).await, BTreeSet::from([1, 2, 3]));
    assert_nothing_comes(&mut consumer).await;
    assert_eq!((bus.stats().published, bus.stats().refused), (3, 3));
}

pub(super) async fn the_shortest_delay_ends_first(stage: &Stage) {
    let bus = stage.open(LIMITS).await;
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

pub(super) async fn an_absurd_delay_is_cut(stage: &Stage) {
    let bus = stage.open(LIMITS).await;
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame([1])).await.unwrap();
    take(&mut consumer).await.settle(vec![after(Duration::MAX)]).await.unwrap();
    let batch = timeout(RETRY_DELAY_MAX + QUIET, consumer.next(1)).await.expect("the delay has an end");
    assert_eq!(counts(&batch.unwrap()), BTreeMap::from([(1, 2)]));
}

pub(super) async fn a_loss_is_counted(stage: &Stage) {
    let bus = stage.open(LIMITS).await;
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame(0..4)).await.unwrap();
    consumer.next(1).await.unwrap().settle(vec![after(Duration::from_millis(100))]).await.unwrap();
    consumer.next(1).await.unwrap().settle(vec![park("poison")]).await.unwrap();
    let in_hand = consumer.next(1).await.unwrap();
    assert_eq!(bus.depth(WORK).await, Ok(Depth { ready: 1, delayed: 1, in_hand: 1 }));
    bus.publish(OTHER, frame([9])).await.unwrap();
    bus.clear().await.unwrap();
    assert_eq!(bus.depth(WORK).await, Ok(Depth::default()));
    drop(in_hand);
    assert_eq!(bus.stats().forgotten, 4);
    assert_counts_are_true(&bus).await;
}

pub(super) async fn a_loss_at_any_instant_leaves_the_counts_true(stage: &Stage) {
    const TOTAL: u64 = 20_000;
    let bus = stage.open(LIMITS).await;
    let consumers = lossy_consumers(&bus);
    let publisher = tokio::spawn(publish_all(bus.clone(), 0..TOTAL));
    while !publisher.is_finished() {
        bus.clear().await.unwrap();
        assert!(bus.depth(WORK).await.unwrap().held() <= LIMITS.queue_envelopes);
        yield_now().await;
    }
    publisher.await.unwrap();
    assert_all_is_settled(&bus).await;
    assert_counts_are_true(&bus).await;
    assert_eq!(bus.stats().published, TOTAL);
    assert!(bus.stats().forgotten > 0);
    bus.close().await;
    soon(consumers.join_all()).await;
}
