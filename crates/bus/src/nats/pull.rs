//! Brings one subject's frames from the servers into this process.
//!
//! A request for some frames waits at the servers and is answered frame by frame as they are published, so a frame is under way as soon as
//! it is there. When half of what was asked for has come and consumers keep up, more is asked for.
//!
//! The library's own stream of messages is not used: it asks for more whenever it is polled, and what it has asked for ages unpolled.
//! Here asking depends on what waits for consumers, and every frame that has come is spoken of until it is settled.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_nats::jetstream::{self, AckKind};
use async_nats::{Message, StatusCode, Subscriber};
use futures_util::{FutureExt, StreamExt};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout_at};

use super::Shared;
use super::frame::{DecodeError, Frame, Letter};
use super::queue::Queue;
use crate::{Delivery, Envelope, EnvelopeId};

/// The header that says how many frames a request did not bring.
const NATS_PENDING_MESSAGES: &str = "Nats-Pending-Messages";
/// How long a request waits at the servers.
const REQUEST_FOR: Duration = Duration::from_secs(30);
/// How often the servers say that a request still waits.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Without a sign of them for so long, no request waits any more.
const SILENCE: Duration = Duration::from_secs(3);
/// The shortest and the longest pause before the next request after one was refused.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// When a message comes again that only a newer program understands: one may be here soon.
const NEWER_AGAIN: Duration = Duration::from_secs(1);
/// After so many deliveries no newer program is expected any more.
const NEWER_DELIVERIES: i64 = 60;

/// Brings frames until the bus is closed and all that was brought is settled.
pub(super) async fn run(shared: Arc<Shared>, queue: Arc<Queue>) {
    let inbox = shared.link.client.new_inbox();
    let Ok(messages) = shared.link.client.subscribe(inbox.clone()).await else {
        // The connection is closed for good, and so is the bus.
        queue.drained.send_replace(true);
        return;
    };
    let now = Instant::now();
    let mut puller = Puller {
        shared,
        queue,
        inbox,
        consumer: None,
        asked: 0,
        heard: now,
        not_before: now,
        pause: PAUSE_MIN,
    };
    puller.pull(messages).await;
    // Only now, or what goes back would be delivered to this process again.
    puller.tend().await;
    puller.queue.drained.send_replace(true);
    // What is in hand still can be settled, and is not to be delivered to others until then.
    let mut tending = puller.tending();
    while !puller.queue.held.is_empty() {
        tokio::select! {
            _ = tending.tick() => {}
            () = puller.queue.held.tended.notified() => {}
        }
        puller.tend().await;
    }
}

struct Puller {
    shared: Arc<Shared>,
    queue: Arc<Queue>,
    inbox: String,
    /// Of whom frames were asked.
    consumer: Option<Arc<str>>,
    /// Frames that were asked for and have not come.
    asked: usize,
    /// When the servers last gave a sign.
    heard: Instant,
    /// No request before this.
    not_before: Instant,
    pause: Duration,
}

impl Puller {
    async fn pull(&mut self, mut messages: Subscriber) {
        let mut connections = self.shared.link.connections();
        let mut tending = self.tending();
        let queue = Arc::clone(&self.queue);
        while !queue.held.is_closed() {
            let paused = self.ask().await;
            tokio::select! {
                message = messages.next() => match message {
                    Some(message) => self.receive(message).await,
                    None => return,
                },
                () = queue.held.tended.notified() => {}
                // The servers forget what was asked for on a connection that is gone.
                _ = connections.changed() => {
                    self.asked = 0;
                    self.not_before = Instant::now();
                }
                _ = tending.tick() => self.tend().await,
                () = sleep_until(self.not_before), if paused => {}
                () = sleep_until(self.heard + SILENCE), if self.asked > 0 => {
                    self.asked = 0;
                    self.shared.in_doubt.notify_one();
                }
            }
        }
        self.drain(messages).await;
    }

    fn tending(&self) -> tokio::time::Interval {
        let mut ticks = interval(self.shared.settings.ack_wait / 6);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks
    }

    /// Asks for more frames, if they are wanted. True when it would, and waits for the end of a pause.
    async fn ask(&mut self) -> bool {
        let settings = &self.shared.settings;
        let now = Instant::now();
        let consumer = self.queue.consumer();
        if self.consumer != consumer {
            // What was asked of another one, nobody knows any more.
            self.consumer = consumer;
            self.asked = 0;
        }
        if self.asked > settings.pull_frames / 2
            || !self.shared.link.is_up()
            || !self.queue.held.wants(settings.waiting_envelopes, settings.ack_wait, now)
        {
            return false;
        }
        let Some(consumer) = &self.consumer else { return false };
        if now < self.not_before {
            return true;
        }
        let frames = settings.pull_frames - self.asked;
        let request = format!(
            r#"{{"batch":{frames},"expires":{},"idle_heartbeat":{}}}"#,
            REQUEST_FOR.as_nanos(),
            HEARTBEAT.as_nanos()
        );
        let address = self.address(consumer);
        let asking = self.shared.link.client.publish_with_reply(address, self.inbox.clone(), request.into());
        if timeout_at(now + SILENCE, asking).await.is_ok_and(|asked| asked.is_ok()) {
            if self.asked == 0 {
                self.heard = now;
            }
            self.asked += frames;
        }
        false
    }

    async fn receive(&mut self, message: Message) {
        self.heard = Instant::now();
        match message.status {
            None => {
                self.asked = self.asked.saturating_sub(1);
                self.pause = PAUSE_MIN;
                self.take(message).await;
            }
            Some(StatusCode::IDLE_HEARTBEAT) => {}
            // A request is over; it says how much of it was not fulfilled.
            Some(StatusCode::TIMEOUT) => self.asked = self.asked.saturating_sub(pending(&message)),
            Some(status) => {
                let why = message.description.as_deref().unwrap_or_default();
                tracing::debug!(subject = %self.queue.subject, %status, why, "a request for frames was refused");
                self.asked = 0;
                self.not_before = Instant::now() + self.pause;
                self.pause = (self.pause * 2).min(PAUSE_MAX);
                // The consumer may be gone, or its stream.
                self.shared.in_doubt.notify_one();
            }
        }
    }

    async fn take(&self, message: Message) {
        let message = jetstream::Message { message, context: self.shared.link.jetstream.clone() };
        let (delivered, place) = match message.info() {
            // What is of an earlier life of the stream is not to be found any more.
            Ok(info) if Some(info.consumer) != self.queue.consumer().as_deref() => return,
            Ok(info) => (info.delivered, info.stream_sequence),
            Err(error) => {
                tracing::error!(subject = %self.queue.subject, error, "a message came that is of no stream");
                return;
            }
        };
        let Message { reply, payload, .. } = message.message;
        let Some(reply) = reply else { return };
        let again = |delay| AckKind::Nak(Some(delay));
        let fate = match Frame::decode(&payload) {
            // Its delay begins with its first delivery; the servers keep it until it is over.
            Ok(frame) if !frame.delay.is_zero() && delivered <= 1 => again(frame.delay),
            Ok(frame) => {
                let earlier = if frame.delay.is_zero() { delivered } else { delivered - 1 };
                let earlier = u32::try_from(earlier).unwrap_or(u32::MAX);
                let deliveries = frame
                    .parcels
                    .into_iter()
                    .map(|parcel| Delivery { count: parcel.count.saturating_add(earlier), ..parcel });
                match self.queue.held.push(reply.clone(), deliveries.collect(), Instant::now()) {
                    Some(()) => return,
                    None => AckKind::Nak(None),
                }
            }
            Err(DecodeError::Version(_)) if delivered < NEWER_DELIVERIES => again(NEWER_AGAIN),
            Err(bad) => match self.park(payload, place, delivered, bad).await {
                true => AckKind::Ack,
                false => again(NEWER_AGAIN),
            },
        };
        self.shared.link.tell(reply, fate).await;
    }

    /// Keeps a message that is no frame as a dead letter, as much of it as a body may have.
    async fn park(&self, mut payload: bytes::Bytes, place: u64, delivered: i64, why: DecodeError) -> bool {
        tracing::error!(subject = %self.queue.subject, place, %why, "a message is no frame and was parked");
        payload.truncate(self.shared.limits.body_bytes);
        let letter = Letter {
            subject: self.queue.subject.0.to_owned(),
            reason: format!("message {place} of the stream is no frame: {why}"),
            delivery: Delivery {
                envelope: Envelope { id: EnvelopeId::of(0, place), body: payload },
                count: u32::try_from(delivered).unwrap_or(u32::MAX),
            },
        };
        self.shared.keep(letter).await
    }

    /// Tells the servers what is still held, and what is given up.
    async fn tend(&self) {
        let ack_wait = self.shared.settings.ack_wait;
        let now = Instant::now();
        let returned = self.queue.held.returned(ack_wait, now);
        if !returned.is_empty() {
            self.shared.tell(returned).await;
        }
        if self.shared.link.is_up() {
            for message in self.queue.held.unmentioned(ack_wait / 3, now) {
                self.shared.link.tell(message, AckKind::Progress).await;
            }
        }
    }

    /// Ends the requests that still wait, and gives back what they bring although nothing is wanted any more.
    ///
    /// The servers end a request when its inbox has no subscriber any more, and what they sent before they knew is lost until
    /// `ack_wait` is over. So what is under way is waited for first, and whatever goes back does so behind the end of the subscription.
    async fn drain(&mut self, mut messages: Subscriber) {
        let deadline = Instant::now() + SILENCE;
        if !self.shared.link.is_up() {
            return;
        }
        let mut late = Vec::new();
        let mut keep = |message: Message, asked: &mut usize| {
            if message.status.is_none() {
                *asked = asked.saturating_sub(1);
                late.extend(message.reply);
            }
        };
        while self.asked > 0
            && let Some(answer) = self.ask_at_once(deadline).await
        {
            let more = answer.status.is_none();
            keep(answer, &mut 0);
            while let Some(Some(message)) = messages.next().now_or_never() {
                keep(message, &mut self.asked);
            }
            if !more {
                break;
            }
        }
        if messages.drain().await.is_ok() {
            while let Ok(Some(message)) = timeout_at(deadline, messages.next()).await {
                keep(message, &mut self.asked);
            }
        }
        for message in late {
            self.shared.link.tell(message, AckKind::Nak(None)).await;
        }
    }

    /// Asks for one frame that is there already. The answer, a frame or that there is none, comes behind all that was sent before.
    async fn ask_at_once(&self, deadline: Instant) -> Option<Message> {
        let address = self.address(self.consumer.as_deref()?);
        let asking = self.shared.link.client.request(address, r#"{"batch":1,"no_wait":true}"#.into());
        timeout_at(deadline, asking).await.ok()?.ok()
    }

    /// Where frames are asked for.
    fn address(&self, consumer: &str) -> String {
        format!("$JS.API.CONSUMER.MSG.NEXT.{}.{consumer}", self.queue.plan.name())
    }
}

/// Frames that a request did not bring.
fn pending(message: &Message) -> usize {
    let value = message.headers.as_ref().and_then(|headers| headers.get(NATS_PENDING_MESSAGES));
    value.and_then(|value| value.as_str().parse().ok()).unwrap_or(usize::MAX)
}

/// Starts bringing frames, unless somebody does.
pub(super) fn start(shared: &Arc<Shared>, queue: &Arc<Queue>) {
    if !queue.is_pulled.swap(true, Ordering::Relaxed) {
        shared.spawn(run(Arc::clone(shared), Arc::clone(queue)));
    }
}
