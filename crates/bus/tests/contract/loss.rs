//! Clause 10: a bus that forgets.

use bus::SettleError;

use super::*;

pub(super) async fn a_loss_takes_everything(stage: &Stage) {
    let bus = stage.open(LIMITS).await;
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame(0..4)).await.unwrap();
    consumer.next(1).await.unwrap().settle(vec![after(Duration::from_millis(100))]).await.unwrap();
    consumer.next(1).await.unwrap().settle(vec![park("poison")]).await.unwrap();
    let in_hand = consumer.next(1).await.unwrap();
    bus.publish(OTHER, frame([9])).await.unwrap();

    bus.clear().await.unwrap();
    assert_all_is_settled(&bus).await;
    assert_eq!(bus.parked().await.unwrap(), []);
    drop(in_hand);
    assert_nothing_comes(&mut consumer).await;
    assert_nothing_comes(&mut bus.subscribe(OTHER)).await;
    assert!(bus.stats().forgotten > 0);
}

pub(super) async fn a_batch_from_before_a_loss_settles_into_nothing(stage: &Stage) {
    let bus = stage.open(LIMITS).await;
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame(0..5)).await.unwrap();
    let mut old = Vec::new();
    for _ in 0..5 {
        old.push(consumer.next(1).await.unwrap());
    }
    bus.clear().await.unwrap();
    bus.publish(WORK, frame(10..15)).await.unwrap();
    let new = take(&mut consumer).await;
    assert_eq!(numbers(&new), (10..15).collect());

    let forgotten = Err(SettleError::Forgotten { subject: WORK });
    let mut old = old.into_iter();
    let mut next = || old.next().expect("five batches were taken");
    assert_eq!(next().ack_all().await, forgotten);
    assert_eq!(next().settle(vec![Verdict::Ack]).await, forgotten);
    assert_eq!(next().settle(vec![park("poison")]).await, forgotten);
    assert_eq!(next().settle(vec![after(Duration::ZERO)]).await, forgotten);
    drop(next());

    assert_eq!(bus.parked().await.unwrap(), []);
    assert_nothing_comes(&mut consumer).await;
    assert!(bus.depth(WORK).await.unwrap().in_hand > 0, "what is new is in hand still");
    new.ack_all().await.unwrap();
    assert_all_is_settled(&bus).await;
}

pub(super) async fn a_bus_goes_on_after_a_loss(stage: &Stage) {
    let limits = Limits { queue_envelopes: 2, frame_envelopes: 2, ..LIMITS };
    let bus = stage.open(limits).await;
    let mut consumer = bus.subscribe(WORK);
    publish_each(&bus, [1, 2]).await;
    bus.clear().await.unwrap();
    publish_each(&bus, [1, 2]).await;
    for batch in take_all(&mut consumer, 2).await {
        assert!(batch.deliveries().iter().all(|delivery| delivery.count == 1));
        batch.ack_all().await.unwrap();
    }
    // A consumer that waits through a loss is served by what comes after it.
    let waiting = tokio::spawn(async move { numbers(&take(&mut consumer).await) });
    let_others_wait().await;
    bus.clear().await.unwrap();
    bus.publish(WORK, frame([3])).await.unwrap();
    assert_eq!(soon(waiting).await.unwrap(), BTreeSet::from([3]));
}
