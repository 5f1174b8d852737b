//! The bus on NATS beyond the contract that all buses share: servers that die, lose their store or vanish behind the network; several
//! processes on one queue (a bus each, as another process has); what messages and settings cannot be.
#![allow(clippy::unwrap_used, reason = "all of this file is tests, also what carries no test attribute")]

mod faults;
mod messages;
mod sharing;
mod start;

use std::collections::BTreeSet;
use std::future::Future;
use std::time::Duration;

use async_nats::jetstream;
use bus::nats::Settings;
use bus::{Batch, Bus, Consumer, Delivery, Envelope, EnvelopeId, Limits, PublishError, Subject, Verdict};
use bytes::Bytes;
use tokio::time::{sleep, timeout};

const WORK: Subject = Subject("work");

/// How long nothing must happen for "it does not come" to be believed.
const QUIET: Duration = Duration::from_millis(500);
/// Only a failing test waits this long.
const PATIENCE: Duration = Duration::from_secs(90);

const LIMITS: Limits =
    Limits { queue_envelopes: 10_000, frame_envelopes: 100, body_bytes: 1_024, parked_letters: 10 };

/// On those servers, with a prefix of its own.
fn settings(servers: &[String]) -> Settings {
    Settings { prefix: servers::unique_name(), ..Settings::from_urls(&servers.join(",")).unwrap() }
}

/// On the servers that all tests share.
fn shared() -> Settings {
    settings(servers::shared::nats())
}

async fn open(settings: &Settings) -> Bus {
    Bus::nats(settings.clone(), LIMITS, &[WORK]).await.unwrap()
}

/// Past the bus, as an operator has it.
async fn operator(settings: &Settings) -> jetstream::Context {
    jetstream::new(async_nats::connect(&settings.servers).await.unwrap())
}

fn stream(settings: &Settings) -> String {
    format!("{}_work", settings.prefix)
}

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

async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(PATIENCE, what).await.expect("it should have happened by now")
}

async fn until(condition: impl AsyncFn() -> bool) {
    soon(async {
        while !condition().await {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

async fn take(consumer: &mut Consumer) -> Batch {
    soon(consumer.next(1_000)).await.expect("the bus is open")
}

/// Takes and acknowledges until all of these have come; repeats are welcome.
async fn finish(consumer: &mut Consumer, expected: impl IntoIterator<Item = u64>) {
    let mut missing: BTreeSet<u64> = expected.into_iter().collect();
    while !missing.is_empty() {
        let batch = take(consumer).await;
        missing.retain(|n| !numbers(&batch).contains(n));
        batch.ack_all().await.unwrap();
    }
}

async fn assert_nothing_comes(consumer: &mut Consumer) {
    if let Ok(batch) = timeout(QUIET, consumer.next(1)).await {
        panic!("nothing should come, but {batch:?} did");
    }
}

/// Publishes until it is taken, as a service does from its database.
async fn publish_at_last(bus: &Bus, frame: Vec<Envelope>) {
    soon(async {
        while let Err(error) = bus.publish(WORK, frame.clone()).await {
            assert!(error.is_transient(), "{error}");
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}
