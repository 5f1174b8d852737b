//! Several processes on one queue: a bus each, with a connection of its own.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_envelope_goes_to_one_of_them() {
    const TOTAL: u64 = 2_000;
    let settings = shared();
    let (one, other) = (open(&settings).await, open(&settings).await);
    let (seen, mut arrived) = tokio::sync::mpsc::unbounded_channel();
    for (name, bus) in [("one", &one), ("other", &other)] {
        let (mut consumer, seen) = (bus.subscribe(WORK), seen.clone());
        tokio::spawn(async move {
            while let Ok(batch) = consumer.next(20).await {
                seen.send((name, numbers(&batch), batch.deliveries().len())).unwrap();
                batch.ack_all().await.unwrap();
            }
        });
    }
    let (mut all, mut served) = (BTreeSet::new(), BTreeSet::new());
    let mut next = 0;
    // As long as it takes until both have had their part.
    while next < TOTAL || served.len() < 2 {
        publish_at_last(&one, frame(next..next + 10)).await;
        next += 10;
        while all.len() < next as usize {
            let (name, numbers, envelopes) = soon(arrived.recv()).await.unwrap();
            served.insert(name);
            let before = all.len();
            all.extend(numbers);
            assert_eq!(all.len(), before + envelopes, "one came twice");
        }
    }
}

/// Each of many takes from a queue of its own, and each queue is kept on some server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_is_connected_to_the_server_that_keeps_what_it_takes() {
    const PROCESSES: usize = 6;
    let nats = servers::Nats::start(3).unwrap();
    let mut all = Vec::new();
    for number in 0..PROCESSES {
        let name = format!("process-{number}");
        let settings = Settings { name: name.clone(), near: Some(WORK), ..settings(&nats.urls()) };
        let bus = open(&settings).await;
        let mut consumer = bus.subscribe(WORK);
        let near = async || {
            let node = nats.nodes().iter().find(|node| node.keeps(&stream(&settings)));
            node.is_some_and(|node| node.clients().contains(&name))
        };
        until(near).await;
        bus.publish(WORK, frame([1])).await.unwrap();
        finish(&mut consumer, [1]).await;
        all.push((bus, consumer));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_dead_one_held_goes_to_another() {
    let settings = Settings { ack_wait: Duration::from_secs(1), ..shared() };
    let (dies, lives) = (open(&settings).await, open(&settings).await);
    lives.publish(WORK, frame(0..4)).await.unwrap();
    let mut consumer = dies.subscribe(WORK);
    let batch = soon(consumer.next(2)).await.unwrap();
    // With its handles go its tasks: nobody speaks of the frame any more.
    std::mem::forget(batch);
    drop((consumer, dies));
    let batch = take(&mut lives.subscribe(WORK)).await;
    assert_eq!(numbers(&batch), (0..4).collect());
    assert!(batch.deliveries().iter().all(|delivery| delivery.count == 2));
}

/// Row 10 of the fault list: the servers hear of the frame as long as its holder lives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_one_keeps_what_it_holds() {
    let settings = Settings { ack_wait: Duration::from_secs(1), ..shared() };
    let (slow, other) = (open(&settings).await, open(&settings).await);
    slow.publish(WORK, frame([1])).await.unwrap();
    let batch = take(&mut slow.subscribe(WORK)).await;
    let mut consumer = other.subscribe(WORK);
    assert!(timeout(4 * settings.ack_wait, consumer.next(1)).await.is_err(), "it came although it is held");
    batch.ack_all().await.unwrap();
    until(async || slow.depth(WORK).await.is_ok_and(|depth| depth.held() == 0)).await;
    assert_nothing_comes(&mut consumer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_closed_one_has_not_begun_goes_to_another_at_once() {
    // Longer than the test waits for anything.
    let settings = Settings { ack_wait: 2 * PATIENCE, ..shared() };
    let (closes, other) = (open(&settings).await, open(&settings).await);
    let mut consumer = closes.subscribe(WORK);
    closes.publish(WORK, frame(0..3)).await.unwrap();
    closes.publish(WORK, frame(3..6)).await.unwrap();
    let in_hand = soon(consumer.next(1)).await.unwrap();
    // Both frames are here, although only one envelope was taken.
    until(async || other.depth(WORK).await.is_ok_and(|depth| depth.in_hand == 2)).await;
    closes.close().await;
    let mut successor = other.subscribe(WORK);
    let batch = take(&mut successor).await;
    assert_eq!(numbers(&batch), (3..6).collect());
    // Not in between to the closed one, for whose request it would have been lost until `ack_wait` is over.
    assert!(batch.deliveries().iter().all(|delivery| delivery.count == 2), "{batch:?}");
    batch.ack_all().await.unwrap();
    assert_nothing_comes(&mut successor).await;
    // The rest of the frame that was begun is free when what was in hand is settled.
    in_hand.ack_all().await.unwrap();
    finish(&mut successor, 0..3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_stuck_one_does_not_begin_goes_to_another() {
    let settings = Settings { ack_wait: Duration::from_secs(1), ..shared() };
    let (stuck, other) = (open(&settings).await, open(&settings).await);
    let mut consumer = stuck.subscribe(WORK);
    stuck.publish(WORK, frame([1])).await.unwrap();
    let _in_hand_for_ever = take(&mut consumer).await;
    for n in 2..6 {
        stuck.publish(WORK, frame([n])).await.unwrap();
    }
    let mut successor = other.subscribe(WORK);
    finish(&mut successor, 2..6).await;
    assert_nothing_comes(&mut successor).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_retries_another_may_take_with_its_count() {
    let settings = shared();
    let (one, other) = (open(&settings).await, open(&settings).await);
    one.publish(WORK, frame(0..4)).await.unwrap();
    let mut consumer = one.subscribe(WORK);
    let batch = take(&mut consumer).await;
    let verdict = |delivery: &Delivery| match number(delivery) {
        3 => Verdict::Retry { after: QUIET },
        _ => Verdict::Ack,
    };
    let verdicts = batch.deliveries().iter().map(verdict).collect();
    batch.settle(verdicts).await.unwrap();
    one.close().await;
    let mut successor = other.subscribe(WORK);
    let batch = take(&mut successor).await;
    assert_eq!(batch.deliveries(), [Delivery { envelope: envelope(3), count: 2 }]);
    batch.ack_all().await.unwrap();
    assert_nothing_comes(&mut successor).await;
}

/// Another process has had the streams replaced; this one does not know it yet, and what it acknowledges has the number in the old stream
/// that something unhandled has in the new one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_acknowledgement_of_a_lost_stream_ends_nothing_in_the_new_one() {
    let settings = shared();
    let (late, other) = (open(&settings).await, open(&settings).await);
    late.publish(WORK, frame([1])).await.unwrap();
    let old = take(&mut late.subscribe(WORK)).await;
    other.clear().await.unwrap();
    other.publish(WORK, frame([2])).await.unwrap();
    let mut consumer = other.subscribe(WORK);
    let new = take(&mut consumer).await;
    // Whether it has noticed already or not.
    let _ = old.ack_all().await;
    assert_nothing_comes(&mut consumer).await;
    assert_eq!(other.depth(WORK).await.unwrap().in_hand, 1, "nobody has acknowledged it");
    drop(new);
    finish(&mut consumer, [2]).await;
}
