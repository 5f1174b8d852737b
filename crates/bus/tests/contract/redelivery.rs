//! Clauses 5 and 6, and 4 as far as it is on verdicts: what comes again, when, and how often it has come.

use std::pin::pin;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::*;

pub(super) async fn a_retried_envelope_comes_after_its_delay_and_not_before(stage: &Stage) {
    let delay = Duration::from_secs(2);
    let bus = stage.open(LIMITS).await;
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame([1])).await.unwrap();
    let batch = take(&mut consumer).await;
    let start = Instant::now();
    batch.settle(vec![after(delay)]).await.unwrap();
    assert_nothing_comes(&mut consumer).await;
    let again = take(&mut consumer).await;
    let waited = start.elapsed();
    assert_eq!(counts(&again), BTreeMap::from([(1, 2)]));
    assert!(waited >= delay, "it came after {waited:?}, before its delay was over");
    assert!(!stage.is_punctual() || waited < delay + QUIET, "it came only after {waited:?}");
    again.ack_all().await.unwrap();
}

pub(super) async fn a_retry_without_delay_comes_at_once(stage: &Stage) {
    let bus = stage.open(LIMITS).await;
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame([1])).await.unwrap();
    take(&mut consumer).await.settle(vec![after(Duration::ZERO)]).await.unwrap();
    let start = Instant::now();
    assert_eq!(counts(&take(&mut consumer).await), BTreeMap::from([(1, 2)]));
    assert!(!stage.is_punctual() || start.elapsed() < QUIET);
}

pub(super) async fn each_comes_after_its_own_delay(stage: &Stage) {
    let bus = stage.open(LIMITS).await;
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame(1..4)).await.unwrap();
    let batch = take(&mut consumer).await;
    let delay_of = |n: u64| Duration::from_millis([1_500, 500, 1_000][n as usize - 1]);
    let verdicts = batch.deliveries().iter().map(|delivery| after(delay_of(number(delivery)))).collect();
    let start = Instant::now();
    batch.settle(verdicts).await.unwrap();
    let mut come = BTreeSet::new();
    while come.len() < 3 {
        let batch = take(&mut consumer).await;
        for n in numbers(&batch) {
            assert!(start.elapsed() >= delay_of(n), "{n} came after {:?}", start.elapsed());
            assert!(come.insert(n), "{n} came twice");
        }
        assert!(batch.deliveries().iter().all(|delivery| delivery.count == 2));
        batch.ack_all().await.unwrap();
    }
    assert_nothing_comes(&mut consumer).await;
}

pub(super) async fn a_retry_wakes_who_already_waits(stage: &Stage) {
    let bus = stage.open(LIMITS).await;
    bus.publish(WORK, frame([1])).await.unwrap();
    let batch = take(&mut bus.subscribe(WORK)).await;
    let mut consumer = bus.subscribe(WORK);
    let waiting = tokio::spawn(async move { counts(&take(&mut consumer).await) });
    let_others_wait().await;
    batch.settle(vec![after(Duration::from_secs(1))]).await.unwrap();
    assert_eq!(soon(waiting).await.unwrap(), BTreeMap::from([(1, 2)]));
}

pub(super) async fn who_stops_waiting_for_a_delay_passes_it_on(stage: &Stage) {
    let bus = stage.open(LIMITS).await;
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

pub(super) async fn a_dropped_batch_comes_back_whole_at_once(stage: &Stage) {
    let bus = stage.open(LIMITS).await;
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame(0..10)).await.unwrap();
    drop(take(&mut consumer).await);
    let start = Instant::now();
    assert_eq!(counts(&take(&mut consumer).await), (0..10).map(|n| (n, 2)).collect());
    assert!(!stage.is_punctual() || start.elapsed() < QUIET);
    assert_eq!((bus.stats().delivered, bus.stats().redelivered), (20, 10));
}

pub(super) async fn a_handler_that_panics_gives_its_batch_back(stage: &Stage) {
    let bus = stage.open(LIMITS).await;
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

pub(super) async fn a_handler_that_is_aborted_gives_its_batch_back(stage: &Stage) {
    let bus = stage.open(LIMITS).await;
    bus.publish(WORK, frame([1, 2])).await.unwrap();
    let mut handler = bus.subscribe(WORK);
    let (has_taken, taken) = oneshot::channel();
    let hangs = tokio::spawn(async move {
        let batch = take(&mut handler).await;
        has_taken.send(batch.deliveries().len()).unwrap();
        std::future::pending::<()>().await;
    });
    let mut consumer = bus.subscribe(WORK);
    assert_eq!(soon(taken).await, Ok(2));
    let successor = tokio::spawn(async move { counts(&take(&mut consumer).await) });
    let_others_wait().await;
    hangs.abort();
    assert_eq!(soon(successor).await.unwrap(), BTreeMap::from([(1, 2), (2, 2)]));
}

pub(super) async fn each_delivery_counts_one_more(stage: &Stage) {
    let bus = stage.open(LIMITS).await;
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame([1])).await.unwrap();
    for count in 1..=30 {
        let batch = take(&mut consumer).await;
        assert_eq!(counts(&batch), BTreeMap::from([(1, count)]));
        match count % 4 {
            0 => drop(batch),
            1 => batch.settle(vec![after(Duration::ZERO)]).await.unwrap(),
            _ => batch.settle(vec![after(Duration::from_millis(5))]).await.unwrap(),
        }
    }
}

pub(super) async fn each_envelope_has_its_own_verdict(stage: &Stage) {
    let bus = stage.open(LIMITS).await;
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

    let letters = bus.parked().await.unwrap();
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

pub(super) async fn too_few_verdicts_are_a_bug_that_loses_nothing(stage: &Stage) {
    let bus = stage.open(LIMITS).await;
    let mut consumer = bus.subscribe(WORK);
    bus.publish(WORK, frame(0..3)).await.unwrap();
    for wrong in [2, 4] {
        let batch = take(&mut consumer).await;
        let settling = tokio::spawn(batch.settle(vec![Verdict::Ack; wrong]));
        assert!(soon(settling).await.unwrap_err().is_panic());
    }
    assert_eq!(counts(&take(&mut consumer).await), (0..3).map(|n| (n, 3)).collect());
}
