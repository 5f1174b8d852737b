//! Clauses 1 to 4 and 9: publishing, batches, waiting, closing.

use std::pin::pin;

use bus::{Closed, Delivery, Limits, PublishError, Verdict};
use tokio::task::JoinSet;

use super::*;

pub(super) async fn what_is_published_first_waits_for_its_consumer(stage: &Stage) {
    let bus = stage.open(LIMITS).await;
    bus.publish(WORK, frame(0..3)).await.unwrap();
    let batch = take(&mut bus.subscribe(WORK)).await;
    let mut got = batch.deliveries().to_vec();
    got.sort_by_key(number);
    let expected: Vec<_> = (0..3).map(|n| Delivery { envelope: envelope(n), count: 1 }).collect();
    assert_eq!(got, expected);
    batch.ack_all().await.unwrap();
}

pub(super) async fn a_waiting_consumer_gets_what_is_published_then(stage: &Stage) {
    let bus = stage.open(LIMITS).await;
    let mut consumer = bus.subscribe(WORK);
    let waiting = tokio::spawn(async move { numbers(&take(&mut consumer).await) });
    let_others_wait().await;
    bus.publish(WORK, frame([7])).await.unwrap();
    assert_eq!(soon(waiting).await.unwrap(), BTreeSet::from([7]));
}

/// A batch is what waits when it is taken, so where frames travel it takes some rounds until two of them have met.
pub(super) async fn a_batch_joins_and_divides_frames(stage: &Stage) {
    let bus = stage.open(LIMITS).await;
    let mut consumer = bus.subscribe(WORK);
    let (mut joined, mut divided) = (false, false);
    let meeting = async {
        while !(joined && divided) {
            bus.publish(WORK, frame(0..4)).await.unwrap();
            bus.publish(WORK, frame(4..8)).await.unwrap();
            let mut all = Vec::new();
            while all.len() < 8 {
                let batch = consumer.next(6).await.unwrap();
                assert!((1..=6).contains(&batch.deliveries().len()));
                let numbers: Vec<u64> = batch.deliveries().iter().map(number).collect();
                let of_first = numbers.iter().filter(|n| **n < 4).count();
                let of_second = numbers.len() - of_first;
                joined |= of_first > 0 && of_second > 0;
                divided |= (1..4).contains(&of_first) || (1..4).contains(&of_second);
                all.extend(numbers);
                let_others_wait().await;
                batch.ack_all().await.unwrap();
            }
            all.sort_unstable();
            assert!(all.into_iter().eq(0..8), "each once");
        }
    };
    soon(meeting).await;
    assert_all_is_settled(&bus).await;
}

pub(super) async fn subjects_do_not_mix(stage: &Stage) {
    let limits = Limits { queue_envelopes: 2, frame_envelopes: 2, ..LIMITS };
    let bus = stage.open(limits).await;
    publish_each(&bus, [1, 2]).await;
    bus.publish(OTHER, frame([3, 4])).await.expect("the other queue has its own bound");
    assert_eq!(finish(&mut bus.subscribe(OTHER), 2).await, BTreeSet::from([3, 4]));
    assert_eq!(finish(&mut bus.subscribe(WORK), 2).await, BTreeSet::from([1, 2]));
}

pub(super) async fn an_empty_frame_is_nothing(stage: &Stage) {
    let bus = stage.open(LIMITS).await;
    bus.publish(WORK, Vec::new()).await.unwrap();
    assert_nothing_comes(&mut bus.subscribe(WORK)).await;
    assert_eq!(bus.stats(), bus::Stats::default());
}

pub(super) async fn an_acknowledged_envelope_never_comes_again(stage: &Stage) {
    let bus = stage.open(LIMITS).await;
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame(0..10)).await.unwrap();
    take(&mut consumer).await.ack_all().await.unwrap();
    bus.publish(WORK, frame(10..20)).await.unwrap();
    let batch = take(&mut consumer).await;
    assert_eq!(numbers(&batch), (10..20).collect());
    batch.settle(vec![Verdict::Ack; 10]).await.unwrap();
    assert_nothing_comes(&mut consumer).await;
    assert_all_is_settled(&bus).await;
    assert_eq!(bus.stats().acked, 20);
}

pub(super) async fn a_batch_of_none_cannot_be_asked_for(stage: &Stage) {
    let mut consumer = stage.open(LIMITS).await.subscribe(WORK);
    let asking = tokio::spawn(async move { consumer.next(0).await.is_ok() });
    assert!(soon(asking).await.unwrap_err().is_panic());
}

pub(super) async fn who_stops_waiting_passes_the_wakeup_on(stage: &Stage) {
    let bus = stage.open(LIMITS).await;
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

pub(super) async fn a_consumer_that_is_always_served_lets_others_run(stage: &Stage) {
    let bus = stage.open(LIMITS).await;
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

pub(super) async fn closing_tells_all_who_wait(stage: &Stage) {
    let bus = stage.open(LIMITS).await;
    let mut waiting = JoinSet::new();
    for subject in [WORK, WORK, WORK, OTHER, OTHER] {
        let mut consumer = bus.subscribe(subject);
        waiting.spawn(async move { consumer.next(1).await.map(drop) });
    }
    let_others_wait().await;
    bus.close().await;
    bus.close().await;
    while let Some(told) = soon(waiting.join_next()).await {
        assert_eq!(told.unwrap(), Err(Closed));
    }
}

pub(super) async fn closing_ends_publishing_and_delivery_but_not_settling(stage: &Stage) {
    let bus = stage.open(LIMITS).await;
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame(0..4)).await.unwrap();
    let first = consumer.next(1).await.unwrap();
    let second = consumer.next(1).await.unwrap();
    bus.close().await;
    for _ in 0..2 {
        assert_eq!(soon(consumer.next(1)).await.map(drop), Err(Closed), "though two are ready");
    }
    assert_eq!(bus.publish(WORK, frame([9])).await, Err(PublishError::Closed));
    assert_eq!(bus.publish(OTHER, frame([9])).await, Err(PublishError::Closed), "a queue not seen before");
    assert_eq!(soon(bus.subscribe(OTHER).next(1)).await.map(drop), Err(Closed));
    first.ack_all().await.unwrap();
    second.settle(vec![park("poison")]).await.unwrap();
    assert_eq!(bus.parked().await.unwrap().len(), 1);
}
