//! Servers that die, forget, or do not answer. Each test has servers of its own.

use servers::{Nats, NatsNode, Proxy};
use tokio::task::JoinSet;

use super::*;

/// Longer than a test takes: who needs something from the servers has to notice by itself that it is gone.
const NEVER: Duration = Duration::from_secs(24 * 60 * 60);

/// One server, and a bus on it.
async fn alone() -> (Nats, Settings, Bus) {
    let nats = Nats::start(1).unwrap();
    let settings = settings(&nats.urls());
    let bus = open(&settings).await;
    (nats, settings, bus)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_server_is_away_publishing_fails_and_consumers_wait() {
    let (nats, _, bus) = alone().await;
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame([1])).await.unwrap();
    let in_hand = take(&mut consumer).await;
    bus.publish(WORK, frame([2])).await.unwrap();

    nats.kill().unwrap();
    // An attempt that was under way may not know what became of it; from then on it is known that nothing is sent.
    until(async || bus.publish(WORK, frame([3])).await == Err(PublishError::Unavailable { subject: WORK }))
        .await;
    assert!(bus.depth(WORK).await.is_err() && bus.parked().await.is_err());
    let waiting = tokio::spawn(async move {
        finish(&mut consumer, [2, 4]).await;
        consumer
    });
    nats.restart().unwrap();
    publish_at_last(&bus, frame([4])).await;
    let mut consumer = soon(waiting).await.unwrap();
    in_hand.ack_all().await.unwrap();
    until(async || bus.depth(WORK).await.is_ok_and(|depth| depth.held() == 0)).await;
    assert_nothing_comes(&mut consumer).await;
}

/// Row 9 and 17 of the fault list, for the bus alone: all three servers die, and their stores with them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_lost_everything_serves_at_once_what_is_new() {
    let nats = Nats::start(3).unwrap();
    let settings = Settings { replicas: 3, ..settings(&nats.urls()) };
    let bus = open(&settings).await;
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame([1])).await.unwrap();
    let in_hand = take(&mut consumer).await;
    in_hand.settle(vec![Verdict::Park { reason: "poison".to_owned() }]).await.unwrap();
    bus.publish(WORK, frame([2])).await.unwrap();
    let in_hand = take(&mut consumer).await;

    nats.kill().unwrap();
    nats.wipe().unwrap();
    let waiting = tokio::spawn(async move {
        let first = take(&mut consumer).await;
        assert_eq!(numbers(&first), BTreeSet::from([3]), "nothing else is left");
        (first, consumer)
    });
    nats.restart().unwrap();
    publish_at_last(&bus, frame([3])).await;
    let (first, mut consumer) = soon(waiting).await.unwrap();
    // It has the place in its stream that the old one had in the old stream.
    assert!(in_hand.ack_all().await.is_err(), "the bus has noticed the loss");
    drop(first);
    finish(&mut consumer, [3]).await;
    until(async || bus.parked().await.is_ok_and(|parked| parked.is_empty())).await;
}

/// Of a cluster that keeps each stream once, the server that keeps it dies and does not return.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_whose_only_server_stays_away_is_made_on_another() {
    let nats = Nats::start(3).unwrap();
    let settings = Settings {
        letter_replicas: 3,
        abandon_after: Duration::from_secs(1),
        request_timeout: Duration::from_secs(1),
        ..settings(&nats.urls())
    };
    let bus = open(&settings).await;
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame([1])).await.unwrap();
    let in_hand = take(&mut consumer).await;
    in_hand.settle(vec![Verdict::Park { reason: "poison".to_owned() }]).await.unwrap();
    bus.publish(WORK, frame([2])).await.unwrap();
    let in_hand = take(&mut consumer).await;

    let keeper = keeper(&nats, &settings).await;
    keeper.kill().unwrap();
    publish_at_last(&bus, frame([3])).await;
    // Who publishes may be served before this bus has a consumer of the new stream, and so knows that it is a new one.
    let new = take(&mut consumer).await;
    assert_eq!(numbers(&new), BTreeSet::from([3]));
    assert!(in_hand.ack_all().await.is_err(), "what was in the stream is given up");
    new.ack_all().await.unwrap();
    until(async || bus.parked().await.is_ok_and(|parked| parked.len() == 1)).await;

    // It finds that the stream is another's now.
    keeper.restart().unwrap();
    nats.wait_until_ready().unwrap();
    publish_at_last(&bus, frame([4])).await;
    finish(&mut consumer, [4]).await;
    assert_nothing_comes(&mut consumer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bus_starts_though_the_only_server_of_its_stream_stays_away() {
    let nats = Nats::start(3).unwrap();
    let settings = Settings {
        letter_replicas: 3,
        abandon_after: Duration::from_secs(2),
        request_timeout: Duration::from_secs(1),
        ..settings(&nats.urls())
    };
    open(&settings).await.close().await;
    keeper(&nats, &settings).await.kill().unwrap();
    let bus = soon(open(&settings)).await;
    let mut consumer = bus.subscribe(WORK);
    publish_at_last(&bus, frame([1])).await;
    finish(&mut consumer, [1]).await;
}

/// Where starts are many and the servers slow, each start that gave up a stream would cost all others what is in it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_waits_for_a_stream_that_is_slow_and_leaves_it_what_is_in_it() {
    let nats = Nats::start(3).unwrap();
    let settings = Settings {
        letter_replicas: 3,
        abandon_after: PATIENCE,
        set_up_timeout: NEVER,
        ..settings(&nats.urls())
    };
    let bus = open(&settings).await;
    bus.publish(WORK, frame([1])).await.unwrap();
    bus.close().await;

    let (keeper, operator) = (keeper(&nats, &settings).await, operator(&settings).await);
    keeper.pause().unwrap();
    let starting = tokio::spawn({
        let settings = settings.clone();
        async move { open(&settings).await }
    });
    // Who asks for the stream gets no answer; nor does the start, which asks for less long.
    until(async || operator.get_stream(stream(&settings)).await.is_err()).await;
    assert!(!starting.is_finished());
    keeper.resume().unwrap();
    let bus = soon(starting).await.unwrap();
    finish(&mut bus.subscribe(WORK), [1]).await;
}

/// The server that has the queue's stream.
async fn keeper<'n>(nats: &'n Nats, settings: &Settings) -> &'n NatsNode {
    let mut found = operator(settings).await.get_stream(stream(settings)).await.unwrap();
    let leader = found.info().await.unwrap().cluster.clone().and_then(|cluster| cluster.leader).unwrap();
    let place: usize = leader.trim_start_matches('n').parse().unwrap();
    &nats.nodes()[place]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_that_was_taken_is_lost_when_servers_of_a_cluster_die_in_turn() {
    const FRAMES: u64 = 60;
    let nats = Nats::start(3).unwrap();
    let settings = Settings { replicas: 3, ack_wait: Duration::from_secs(5), ..settings(&nats.urls()) };
    let bus = open(&settings).await;
    let mut consumers = JoinSet::new();
    let (seen, mut arrived) = tokio::sync::mpsc::unbounded_channel();
    for _ in 0..2 {
        let (mut consumer, seen) = (bus.subscribe(WORK), seen.clone());
        consumers.spawn(async move {
            while let Ok(batch) = consumer.next(50).await {
                seen.send(numbers(&batch)).unwrap();
                batch.ack_all().await.unwrap();
            }
        });
    }
    let publishing = tokio::spawn({
        let bus = bus.clone();
        async move {
            for n in 0..FRAMES {
                publish_at_last(&bus, frame(n * 10..n * 10 + 10)).await;
                sleep(Duration::from_millis(50)).await;
            }
        }
    });
    for node in nats.nodes() {
        node.kill().unwrap();
        sleep(QUIET).await;
        node.restart().unwrap();
        nats.wait_until_ready().unwrap();
    }
    soon(publishing).await.unwrap();
    let mut missing: BTreeSet<u64> = (0..FRAMES * 10).collect();
    while !missing.is_empty() {
        let numbers = soon(arrived.recv()).await.expect("consumers run");
        missing.retain(|n| !numbers.contains(n));
    }
    bus.close().await;
    soon(consumers.join_all()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deleted_stream_is_made_again_by_the_first_who_publishes() {
    let settings = Settings { check_interval: NEVER, ..shared() };
    let bus = open(&settings).await;
    bus.publish(WORK, frame([1])).await.unwrap();
    operator(&settings).await.delete_stream(stream(&settings)).await.unwrap();
    // Nobody subscribes before that, and notices.
    publish_at_last(&bus, frame([2])).await;
    let mut consumer = bus.subscribe(WORK);
    let batch = take(&mut consumer).await;
    assert_eq!(numbers(&batch), BTreeSet::from([2]));
    batch.ack_all().await.unwrap();
    assert_nothing_comes(&mut consumer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deleted_stream_is_made_again_while_somebody_waits() {
    let settings = Settings { check_interval: NEVER, ..shared() };
    let bus = open(&settings).await;
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame([1])).await.unwrap();
    let old = take(&mut consumer).await;
    let waiting = tokio::spawn(async move { (take(&mut consumer).await, consumer) });
    let operator = operator(&settings).await;
    operator.delete_stream(stream(&settings)).await.unwrap();
    until(async || operator.get_stream(stream(&settings)).await.is_ok()).await;
    publish_at_last(&bus, frame([2])).await;
    let (new, mut consumer) = soon(waiting).await.unwrap();
    assert_eq!(numbers(&new), BTreeSet::from([2]));
    assert!(old.ack_all().await.is_err(), "the bus has noticed the loss");
    new.ack_all().await.unwrap();
    assert_nothing_comes(&mut consumer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deleted_stream_is_made_again_though_nobody_uses_it() {
    let settings = Settings { check_interval: Duration::from_millis(100), ..shared() };
    let _bus = open(&settings).await;
    let operator = operator(&settings).await;
    for name in [stream(&settings), format!("{}_dead-letters", settings.prefix)] {
        operator.delete_stream(&name).await.unwrap();
        until(async || operator.get_stream(&name).await.is_ok()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deleted_consumer_is_made_again_while_somebody_waits() {
    let settings = Settings { check_interval: NEVER, ..shared() };
    let bus = open(&settings).await;
    let mut consumer = bus.subscribe(WORK);
    let waiting = tokio::spawn(async move { numbers(&take(&mut consumer).await) });
    let operator = operator(&settings).await;
    let found = operator.get_stream(stream(&settings)).await.unwrap();
    let names = async || -> Vec<String> {
        use futures_util::TryStreamExt;
        found.consumer_names().try_collect().await.unwrap()
    };
    let [name] = &names().await[..] else { panic!("one consumer serves all") };
    until(async || found.consumer_info(name).await.is_ok_and(|info| info.num_waiting > 0)).await;
    found.delete_consumer(name).await.unwrap();
    publish_at_last(&bus, frame([2])).await;
    assert_eq!(soon(waiting).await.unwrap(), BTreeSet::from([2]));
}

/// Row 18 of the fault list, for the bus: the frame is taken, and the connection gone before it is acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frame_whose_acknowledgement_is_lost_is_taken_once() {
    let nats = Nats::start(1).unwrap();
    let proxy = Proxy::start(nats.nodes()[0].socket_addr()).unwrap();
    let settings = Settings {
        publish_timeout: Duration::from_secs(30),
        duplicate_window: Duration::from_secs(60),
        ..settings(&[format!("nats://{}", proxy.socket_addr())])
    };
    let bus = open(&settings).await;
    let body = Bytes::from_static(b"the frame that loses its acknowledgement");
    proxy.cut_after(&body);
    bus.publish(WORK, vec![Envelope { id: EnvelopeId::of(1, 1), body }]).await.unwrap();
    assert_eq!(proxy.trapped(), 1);
    let mut consumer = bus.subscribe(WORK);
    let batch = take(&mut consumer).await;
    assert_eq!(batch.deliveries().iter().map(number).collect::<Vec<_>>(), [1]);
    batch.ack_all().await.unwrap();
    assert_nothing_comes(&mut consumer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_nobody_answers_publishing_ends_in_doubt_and_goes_on_later() {
    let nats = Nats::start(1).unwrap();
    let proxy = Proxy::start(nats.nodes()[0].socket_addr()).unwrap();
    let settings = Settings {
        publish_timeout: QUIET,
        ping_interval: QUIET,
        ..settings(&[format!("nats://{}", proxy.socket_addr())])
    };
    let bus = open(&settings).await;
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame([1])).await.unwrap();
    finish(&mut consumer, [1]).await;
    proxy.stall().unwrap();
    assert_eq!(bus.publish(WORK, frame([2])).await, Err(PublishError::Unconfirmed { subject: WORK }));
    // In the end it is noticed that nobody is there.
    until(async || bus.publish(WORK, frame([3])).await == Err(PublishError::Unavailable { subject: WORK }))
        .await;
    proxy.heal().unwrap();
    publish_at_last(&bus, frame([4])).await;
    finish(&mut consumer, [4]).await;
}

/// What is settled while the servers are away comes again; nobody waits for them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_can_be_settled_while_the_server_is_away() {
    let nats = Nats::start(1).unwrap();
    let settings = Settings { ack_wait: Duration::from_secs(2), ..settings(&nats.urls()) };
    let bus = open(&settings).await;
    let mut consumer = bus.subscribe(WORK);
    for n in 0..4 {
        bus.publish(WORK, frame([2 * n, 2 * n + 1])).await.unwrap();
    }
    let mut batches = Vec::new();
    while batches.len() < 4 {
        batches.push(soon(consumer.next(2)).await.unwrap());
    }
    nats.kill().unwrap();
    until(async || bus.publish(WORK, frame([9])).await == Err(PublishError::Unavailable { subject: WORK }))
        .await;
    let mut batches = batches.into_iter();
    let mut next = || batches.next().expect("four were taken");
    soon(next().ack_all()).await.unwrap();
    let retry = Verdict::Retry { after: Duration::from_millis(10) };
    soon(next().settle(vec![retry.clone(), retry])).await.unwrap();
    soon(next().settle(vec![Verdict::Ack, Verdict::Park { reason: "poison".to_owned() }])).await.unwrap();
    drop(next());
    nats.restart().unwrap();
    // The first has been acknowledged as soon as the connection was there, or comes again; the others have to come.
    finish(&mut consumer, [2, 3, 5, 6, 7]).await;
}
