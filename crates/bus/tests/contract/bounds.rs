//! Clauses 7 and 8: dead letters, and what a queue holds.
//!
//! A bus on servers counts frames, so here each envelope has a frame of its own wherever it counts.

use super::*;

pub(super) async fn dead_letters_are_bounded(stage: &Stage) {
    let bus = stage.open(Limits { parked_letters: 3, ..LIMITS }).await;
    let mut consumer = bus.subscribe(WORK);
    for n in 0..5 {
        bus.publish(WORK, frame([n])).await.unwrap();
        take(&mut consumer).await.settle(vec![park("poison")]).await.unwrap();
    }
    let kept: Vec<_> =
        bus.parked().await.unwrap().iter().map(|letter| letter.envelope.id.parts().0).collect();
    assert_eq!(kept, [2, 3, 4], "the oldest go first");
    assert_eq!((bus.stats().parked, bus.stats().letters_dropped), (5, 2));
}

pub(super) async fn a_full_queue_refuses_until_something_ends(stage: &Stage) {
    let limits = Limits { queue_envelopes: 4, frame_envelopes: 4, ..LIMITS };
    let bus = stage.open(limits).await;
    let mut consumer = bus.subscribe(WORK);
    publish_each(&bus, [1, 2, 3, 4]).await;
    assert_eq!(bus.publish(WORK, frame([5])).await, Err(full(WORK, limits)));

    assert_eq!(bus.is_half_full(WORK).await, Ok(true));

    finish(&mut consumer, 2).await;
    // An end is told to servers and not waited for.
    let is_told = async {
        while bus.is_half_full(WORK).await != Ok(false) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    soon(is_told).await;
    publish_soon(&bus, frame([6])).await;
    publish_soon(&bus, frame([7])).await;
    assert_eq!(bus.publish(WORK, frame([8])).await, Err(full(WORK, limits)));

    consumer.next(1).await.unwrap().settle(vec![park("poison")]).await.unwrap();
    publish_soon(&bus, frame([9])).await;
    assert_eq!(bus.publish(WORK, frame([10])).await, Err(full(WORK, limits)));
    assert_eq!(bus.depth(WORK).await.unwrap().held(), 4);
    let left = finish(&mut consumer, 4).await;
    assert!(left.is_superset(&BTreeSet::from([6, 7, 9])), "what was refused is not there: {left:?}");
    assert_nothing_comes(&mut consumer).await;
}

pub(super) async fn what_is_delayed_or_in_hand_keeps_its_place(stage: &Stage) {
    let limits = Limits { queue_envelopes: 3, frame_envelopes: 3, ..LIMITS };
    let bus = stage.open(limits).await;
    let mut consumer = bus.subscribe(WORK);
    publish_each(&bus, [1, 2, 3]).await;
    let refuses = async |when: &str| {
        assert_eq!(bus.publish(WORK, frame([4])).await, Err(full(WORK, limits)), "{when}");
    };
    let batches = take_all(&mut consumer, 3).await;
    refuses("in hand").await;
    for batch in batches {
        let verdicts = vec![after(Duration::from_secs(1)); batch.deliveries().len()];
        batch.settle(verdicts).await.expect("there is always room to come back");
    }
    refuses("delayed").await;
    let batches = take_all(&mut consumer, 3).await;
    refuses("in hand again").await;
    drop(batches);
    refuses("given back").await;
    let batches = take_all(&mut consumer, 3).await;
    let counts: BTreeMap<u64, u32> = batches.iter().flat_map(counts).collect();
    assert_eq!(counts, BTreeMap::from([(1, 3), (2, 3), (3, 3)]));
    for batch in batches {
        batch.ack_all().await.unwrap();
    }
    for n in [4, 5, 6] {
        publish_soon(&bus, frame([n])).await;
    }
}

pub(super) async fn a_refused_frame_leaves_no_part_behind(stage: &Stage) {
    let limits = Limits { queue_envelopes: 3, frame_envelopes: 3, ..LIMITS };
    let bus = stage.open(limits).await;
    let mut consumer = bus.subscribe(WORK);
    publish_each(&bus, [1, 2, 3]).await;
    assert_eq!(bus.publish(WORK, frame(10..13)).await, Err(full(WORK, limits)));
    assert_eq!(finish(&mut consumer, 3).await, BTreeSet::from([1, 2, 3]));
    assert_nothing_comes(&mut consumer).await;
    assert_eq!((bus.stats().published, bus.stats().refused), (3, 3));
}

pub(super) async fn a_large_frame_or_envelope_is_refused(stage: &Stage) {
    let bus = stage.open(LIMITS).await;
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
    let mut consumer = bus.subscribe(WORK);
    assert_eq!(finish(&mut consumer, 101).await, (0..101).collect());
    assert_nothing_comes(&mut consumer).await;
    assert_eq!(bus.stats().refused, 103);
}
