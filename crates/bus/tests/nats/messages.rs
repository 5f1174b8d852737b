//! What messages carry, and what they cannot.

use servers::Nats;

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frame_larger_than_a_message_is_sent_in_several() {
    let nats = Nats::start_with(1, "max_payload: 16KB").unwrap();
    let settings = settings(&nats.urls());
    let bus = open(&settings).await;
    let large = |n| Envelope { id: EnvelopeId::of(n, 1), body: vec![n as u8; 1_024].into() };
    bus.publish(WORK, (0..100).map(large).collect()).await.unwrap();
    let messages = bus.depth(WORK).await.unwrap().held();
    assert!((7..=10).contains(&messages), "{messages}");
    let mut consumer = bus.subscribe(WORK);
    let mut all = Vec::new();
    while all.len() < 100 {
        let batch = take(&mut consumer).await;
        all.extend(batch.deliveries().iter().map(|delivery| delivery.envelope.clone()));
        batch.ack_all().await.unwrap();
    }
    all.sort_by_key(|envelope| envelope.id);
    assert!(all.into_iter().eq((0..100).map(large)));
}

/// Frames of several kilobytes fill a queue up long before their number does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_is_half_full_when_half_of_its_bytes_are_taken() {
    let settings = Settings { queue_bytes: 1024 * 1024, ..shared() };
    let bus = Bus::nats(settings, Limits { body_bytes: 64 * 1024, ..LIMITS }, &[WORK]).await.unwrap();
    let large = |n| vec![Envelope { id: EnvelopeId::of(n, 1), body: vec![n as u8; 32 * 1024].into() }];
    for n in 0..12 {
        bus.publish(WORK, large(n)).await.unwrap();
    }
    assert_eq!(bus.is_half_full(WORK).await, Ok(false), "384 KiB");
    for n in 12..20 {
        bus.publish(WORK, large(n)).await.unwrap();
    }
    assert_eq!(bus.is_half_full(WORK).await, Ok(true), "640 KiB");
}

/// Row 8 of the fault list.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_frame_is_parked_and_others_flow() {
    let settings = shared();
    let bus = open(&settings).await;
    let operator = operator(&settings).await;
    let address = format!("{}.work", settings.prefix);
    for payload in [&b""[..], b"\x01nonsense", b"\x01\0\0\0\0"] {
        operator.publish(address.clone(), payload.into()).await.unwrap().await.unwrap();
    }
    bus.publish(WORK, frame([1])).await.unwrap();
    let mut consumer = bus.subscribe(WORK);
    let batch = take(&mut consumer).await;
    assert_eq!(numbers(&batch), BTreeSet::from([1]));
    batch.ack_all().await.unwrap();
    until(async || bus.depth(WORK).await.unwrap().held() == 0).await;
    let parked = bus.parked().await.unwrap();
    let bodies: Vec<&[u8]> = parked.iter().map(|letter| &letter.envelope.body[..]).collect();
    assert_eq!(bodies, [&b""[..], b"\x01nonsense", b"\x01\0\0\0\0"]);
    assert!(parked[1].reason.contains("message 2 of the stream is no frame"), "{}", parked[1].reason);
}

/// Row 23 of the fault list: during a rolling update, a newer process publishes what this one cannot read yet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_only_a_newer_program_reads_waits_for_it() {
    let settings = shared();
    let bus = open(&settings).await;
    let operator = operator(&settings).await;
    let payload = Bytes::from_static(b"\xffwhatever is to come");
    operator.publish(format!("{}.work", settings.prefix), payload).await.unwrap().await.unwrap();
    bus.publish(WORK, frame([1])).await.unwrap();
    let mut consumer = bus.subscribe(WORK);
    finish(&mut consumer, [1]).await;
    assert_nothing_comes(&mut consumer).await;
    until(async || bus.depth(WORK).await.unwrap().held() == 1).await;
    assert_eq!(bus.parked().await.unwrap(), []);
}

/// The envelope to be retried needs a frame of its own, and there is no room for it: then its frame comes again whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_in_a_full_queue_brings_the_neighbours_again() {
    let settings = shared();
    let limits = Limits { queue_envelopes: 4, frame_envelopes: 4, ..LIMITS };
    let bus = Bus::nats(settings, limits, &[WORK]).await.unwrap();
    let mut consumer = bus.subscribe(WORK);
    for _ in 0..4 {
        bus.publish(WORK, frame([1, 2, 3])).await.unwrap();
    }
    let batch = soon(consumer.next(3)).await.unwrap();
    let verdict = |delivery: &Delivery| match number(delivery) {
        2 => Verdict::Retry { after: QUIET },
        _ => Verdict::Ack,
    };
    let verdicts = batch.deliveries().iter().map(verdict).collect();
    batch.settle(verdicts).await.unwrap();
    let mut came_again = BTreeSet::new();
    while came_again.len() < 3 {
        let batch = take(&mut consumer).await;
        let again = batch.deliveries().iter().filter(|delivery| delivery.count == 2).map(number);
        came_again.extend(again);
        batch.ack_all().await.unwrap();
    }
    assert_nothing_comes(&mut consumer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn equal_frames_are_different_messages() {
    let bus = open(&shared()).await;
    let mut consumer = bus.subscribe(WORK);
    for count in 1..=3 {
        // As a purchase that is started again, because what became of it is not known.
        bus.publish(WORK, frame([1])).await.unwrap();
        let batch = take(&mut consumer).await;
        assert_eq!(batch.deliveries(), [Delivery { envelope: envelope(1), count: 1 }], "time {count}");
        batch.ack_all().await.unwrap();
    }
}
