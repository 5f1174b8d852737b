//! The loop around a participant: take what is waiting, one transaction, publish, acknowledge.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bus::{Batch, Bus, Delivery, Envelope, EnvelopeId, Subject, Verdict};
use bytes::Bytes;
use db::Db;
use drive::{Answered, Book, Bounds, Frames, Messages, Outgoing, Reports};
use saga::Phase;
use telemetry::Spans;
use telemetry::metrics::PubsubMetrics;
use telemetry::spans::{Cause, Detail, Handling, within};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use wire::messages::{self, About, Carried, Pen, Purge, ToParticipant};
use wire::time::{Clock, UnixMillis};

use crate::batch::{Answer, Command, handle, handle_unseen};
use crate::{Participant, barrier};

/// The bounds of a participant's loop.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Commands in one transaction at most. Under load they gather for as long as the bus says ([`bus::Pace`]), otherwise never.
    pub batch_commands: usize,
    /// When a command comes again that got no answer, or whose next message the bus refused.
    pub bounds: Bounds,
    /// After so many deliveries, a command that fails for a reason which trying again cannot mend (a bug, rows that contradict
    /// each other) is parked. What may mend itself is tried for ever.
    pub park_after_deliveries: u32,
    /// Barrier rows are kept at least this long after they were recorded, whatever else is known: longer than any message
    /// stays under way.
    pub barrier_retention: Duration,
    /// How long the report of a step waits at least before it goes to who started the saga, if the saga goes on ([`drive::Reports`]).
    pub report_after: Duration,
}

impl Default for Settings {
    /// 1,024 commands, 10 deliveries, 24 hours, 100 milliseconds.
    fn default() -> Self {
        Settings {
            batch_commands: 1_024,
            bounds: Bounds::default(),
            park_after_deliveries: 10,
            barrier_retention: Duration::from_secs(24 * 60 * 60),
            report_after: Duration::from_millis(100),
        }
    }
}

/// After a command that was answered before, the barrier is read for so many batches before they are handled: where one was sent again (a
/// reconciler, a bus that was lost), more are.
const WARY_BATCHES: u32 = 64;

/// How long a stop waits for the bus to take the reports that are held back. They may be lost.
const LAST_REPORTS: Duration = Duration::from_millis(200);

/// What a participant's loop works with.
pub struct Parts<P> {
    /// The business.
    pub participant: P,
    /// Where its effects and its barrier are: one database, or the barrier is none.
    pub db: Db,
    /// Where messages come from and go to.
    pub bus: Bus,
    /// Where its commands wait.
    pub commands: Subject,
    /// The sagas that are driven on here, as soon as their replies are recorded.
    pub book: Book,
    /// Where the replies of all other sagas go.
    pub replies: Subject,
    /// The time that is recorded with replies.
    pub clock: Clock,
    /// Counts what it does.
    pub metrics: PubsubMetrics,
    /// Records what it does for sampled sagas.
    pub spans: Spans,
    /// Its bounds.
    pub settings: Settings,
}

/// Runs a participant until `stop` or until the bus is closed. The batch in hand is finished first.
pub async fn run<P: Participant>(parts: Parts<P>, stop: CancellationToken) {
    let mut consumer = parts.bus.subscribe(parts.commands);
    let runner = Runner {
        participant: Arc::new(parts.participant),
        wary: Arc::default(),
        rest: RunnerParts {
            db: parts.db,
            bus: parts.bus,
            commands: parts.commands,
            book: parts.book,
            replies: parts.replies,
            clock: parts.clock,
            metrics: parts.metrics,
            spans: parts.spans,
            settings: parts.settings,
        },
    };
    let limit = parts.settings.batch_commands.min(runner.rest.bus.limits().frame_envelopes);
    let RunnerParts { bus, metrics, .. } = &runner.rest;
    let mut purge = None;
    let mut reports = Reports::after(parts.settings.report_after);
    let mut pace = runner.rest.bus.pace();
    loop {
        stop.run_until_cancelled(pace.gather()).await;
        let batch = tokio::select! {
            biased;
            () = stop.cancelled() => {
                // Nobody waits for them for long.
                let _ = tokio::time::timeout(LAST_REPORTS, reports.take_all().publish(bus, metrics)).await;
                return;
            }
            next = consumer.next(limit) => match next {
                Ok(batch) => batch,
                Err(bus::Closed) => return,
            },
            () = reports.due() => {
                reports.take(Instant::now()).publish(bus, metrics).await;
                continue;
            }
            // Nothing waits: a good time to tidy up.
            () = std::future::ready(()), if purge.is_some() => {
                runner.tidy_up(&mut purge).await;
                continue;
            }
        };
        pace.took(batch.deliveries().len(), limit, Instant::now());
        runner.work_off(batch, &mut purge, &mut reports).await;
    }
}

struct Runner<P> {
    participant: Arc<P>,
    /// The batches for which the barrier is still to be read first.
    wary: Arc<AtomicU32>,
    rest: RunnerParts,
}

struct RunnerParts {
    db: Db,
    bus: Bus,
    commands: Subject,
    book: Book,
    replies: Subject,
    clock: Clock,
    metrics: PubsubMetrics,
    spans: Spans,
    settings: Settings,
}

/// A batch, understood: what to ask the database, and what is settled already.
struct Sorted<I> {
    commands: Vec<Command<I>>,
    /// For each of `commands`, what its saga is about, and its place in the batch.
    questions: Vec<(About, usize)>,
    purge: Option<Purge>,
    verdicts: Vec<Verdict>,
    /// Those of sampled sagas, by their place in the batch.
    traced: Handling,
}

impl<P: Participant> Runner<P> {
    async fn work_off(&self, batch: Batch, purge: &mut Option<Purge>, reports: &mut Reports) {
        failpoint::hit("participant.received");
        let metrics = &self.rest.metrics;
        metrics.batch(batch.deliveries().len());
        let began = Instant::now();
        let mut sorted = self.sort(batch.deliveries());
        let commands = Arc::new(std::mem::take(&mut sorted.commands));
        *purge = sorted.purge.or(*purge);
        let unseen = self.takes_for_unseen(batch.deliveries());
        let answers = within(sorted.traced.current(), self.answer(&commands, unseen, purge)).await;
        let success = answers.is_ok();
        metrics.handled(began.elapsed(), success);
        match answers {
            Ok(answers) => {
                failpoint::hit("participant.committed");
                self.publish(&mut sorted, &commands, answers, batch.deliveries(), reports).await;
                failpoint::hit("participant.published");
            }
            Err(error) => self.give_back(&mut sorted, &error, batch.deliveries()),
        }
        let acked =
            sorted.verdicts.iter().filter(|verdict| !matches!(verdict, Verdict::Retry { .. })).count();
        let returned = sorted.verdicts.len() - acked;
        metrics.received(true, acked as u64);
        metrics.received(false, returned as u64);
        sorted.traced.end_of(self.rest.commands.0);
        if let Err(forgotten) = batch.settle(sorted.verdicts).await {
            tracing::debug!(%forgotten, "nothing left to acknowledge");
        }
    }

    /// Decodes a batch. What cannot be understood is parked alone.
    fn sort(&self, deliveries: &[Delivery]) -> Sorted<P::Input> {
        let mut sorted = Sorted {
            commands: Vec::with_capacity(deliveries.len()),
            questions: Vec::with_capacity(deliveries.len()),
            purge: None,
            verdicts: vec![Verdict::Ack; deliveries.len()],
            traced: self.rest.spans.handle(deliveries.len()),
        };
        for (place, delivery) in deliveries.iter().enumerate() {
            match self.understand(delivery) {
                Ok(ToParticipant::Purge(purge)) => sorted.purge = Some(purge),
                Ok(ToParticipant::Command(command)) => {
                    let messages::Command { carried: Carried { token, about }, step, phase } = command;
                    match self.participant.read(&about.input()) {
                        Ok(input) => {
                            let message = Cause::Message(delivery.envelope.id.number());
                            sorted.traced.add(place, about.trace(), message);
                            sorted.traced.detail(place, "saga.step", || Detail::Count(step.0.into()));
                            sorted.traced.detail(place, "saga.phase", || Detail::Name(phase_name(phase)));
                            sorted.commands.push(Command { token, step, phase, input });
                            sorted.questions.push((about, place));
                        }
                        Err(bad) => sorted.verdicts[place] = park(delivery, bad.to_string()),
                    }
                }
                Err(bad) => sorted.verdicts[place] = park(delivery, bad.to_string()),
            }
        }
        sorted
    }

    fn understand(&self, delivery: &Delivery) -> Result<ToParticipant, messages::DecodeError> {
        ToParticipant::decode(delivery.envelope.body.clone())
    }

    /// Whether a batch is handled without reading the barrier first. Not where something comes again: it may have been answered.
    fn takes_for_unseen(&self, deliveries: &[Delivery]) -> bool {
        let wary = self.wary.load(Ordering::Relaxed);
        self.wary.store(wary.saturating_sub(1), Ordering::Relaxed);
        wary == 0 && deliveries.iter().all(|delivery| delivery.count == 1)
    }

    /// All commands in one transaction. When that fails for a reason that trying again cannot mend, each alone, so that the
    /// one at fault holds up no other.
    async fn answer(
        &self,
        commands: &Arc<Vec<Command<P::Input>>>,
        unseen: bool,
        purge: &mut Option<Purge>,
    ) -> Result<Vec<Answer>, db::Error> {
        let all = 0..commands.len();
        let answered = match self.transact(commands, all.clone(), unseen, purge).await {
            // Most likely something was answered before.
            Err(error) if unseen && !error.is_transient() => self.transact(commands, all, false, purge).await,
            other => other,
        };
        match answered {
            Err(error) if !error.is_transient() && commands.len() > 1 => {
                tracing::error!(%error, commands = commands.len(), "a batch failed; trying each command alone");
                let mut answers = Vec::with_capacity(commands.len());
                for index in 0..commands.len() {
                    answers.push(match self.transact(commands, index..index + 1, false, &mut None).await {
                        Ok(mut one) => one.remove(0),
                        Err(error) if error.is_transient() => Answer::Retry(error.to_string()),
                        Err(error) => Answer::Park(error.to_string()),
                    });
                }
                Ok(answers)
            }
            other => other,
        }
    }

    /// These commands in one transaction, and a bounded part of the purge; `purge` is none when all of it is done. `unseen`: without a look
    /// at the barrier, in the first run of the transaction.
    async fn transact(
        &self,
        commands: &Arc<Vec<Command<P::Input>>>,
        range: std::ops::Range<usize>,
        mut unseen: bool,
        purge: &mut Option<Purge>,
    ) -> Result<Vec<Answer>, db::Error> {
        let commands = Arc::clone(commands);
        let wary = Arc::clone(&self.wary);
        let participant = Arc::clone(&self.participant);
        let now = self.rest.clock.now();
        let recorded_before = before(now, self.rest.settings.barrier_retention);
        let below = purge.map(|purge| purge.below);
        let (answers, changes, purged) = self
            .rest
            .db
            .write(move |tx| {
                let mut changes = P::Changes::default();
                let commands = &commands[range.clone()];
                let answers = match std::mem::take(&mut unseen) {
                    true => handle_unseen(&*participant, tx, commands, now, &mut changes),
                    false => None,
                };
                let answers = match answers {
                    Some(Err(error)) if !error.is_transient() => {
                        wary.store(WARY_BATCHES, Ordering::Relaxed);
                        return Err(error);
                    }
                    Some(answers) => answers?,
                    None => handle(&*participant, tx, commands, now, &mut changes)?,
                };
                let purged = match below {
                    Some(below) => {
                        participant.ended_below(tx, below)?;
                        barrier::purge(tx, below, recorded_before)?
                    }
                    None => 0,
                };
                failpoint::hit("participant.before_commit");
                Ok::<_, db::Error>((answers, changes, purged))
            })
            .await?;
        self.participant.committed(changes);
        if purged == 0 {
            *purge = None;
        }
        Ok(answers)
    }

    /// Goes on with a purge while no command waits. One that fails is left to the next purge message.
    async fn tidy_up(&self, purge: &mut Option<Purge>) {
        let nothing = Arc::new(Vec::new());
        if let Err(error) = self.transact(&nothing, 0..0, false, purge).await {
            tracing::warn!(%error, "the barrier was not purged");
            *purge = None;
        }
    }

    /// Publishes what the replies call for, or the replies themselves where somebody else has to know what that is. If that is
    /// refused, the commands come again and are answered the same.
    async fn publish(
        &self,
        sorted: &mut Sorted<P::Input>,
        commands: &[Command<P::Input>],
        answers: Vec<Answer>,
        deliveries: &[Delivery],
        reports: &mut Reports,
    ) {
        let RunnerParts { bus, metrics, settings, .. } = &self.rest;
        let mut frames = Frames::without_reports(deliveries.len(), bus);
        let mut pen = Pen::for_messages(2 * answers.len());
        for (((about, place), command), answer) in sorted.questions.drain(..).zip(commands).zip(answers) {
            let delivery = &deliveries[place];
            match answer {
                Answer::Reply(recorded) => {
                    let planned = self.next(command, &about, recorded, &mut pen);
                    let added = planned.and_then(|messages| {
                        frames.add(place, messages, &mut sorted.traced).map_err(|large| large.to_string())
                    });
                    if let Err(why) = added {
                        sorted.verdicts[place] = park(delivery, why);
                    }
                }
                Answer::Retry(why) => {
                    let (saga, count) = (command.token.saga, delivery.count);
                    let trace = String::from_utf8_lossy(about.trace());
                    tracing::warn!(saga, %trace, step = %command.step, count, why, "a command got no answer yet");
                    sorted.verdicts[place] = settings.bounds.retry(count);
                }
                Answer::Park(why) => {
                    sorted.verdicts[place] = retry_or_park(settings, delivery, why);
                }
            }
        }
        let Sorted { verdicts, traced, .. } = sorted;
        let now = Instant::now();
        reports.hold(frames.take_reports(), now);
        let (refusals, ()) =
            tokio::join!(frames.publish(bus, metrics, traced), reports.take(now).publish(bus, metrics));
        settings.bounds.judge(refusals, deliveries, verdicts);
    }

    /// What a recorded reply calls for.
    fn next(
        &self,
        command: &Command<P::Input>,
        about: &About,
        recorded: Bytes,
        pen: &mut Pen,
    ) -> Result<[Option<Outgoing>; 2], String> {
        let Command { token, step, phase, .. } = command;
        let answered = Answered { step: *step, phase: *phase, recorded: &recorded };
        match self.rest.book.answered(token, about, answered, pen) {
            Some(messages) => messages.map(Messages::outgoing).map_err(|refused| refused.to_string()),
            None => {
                let envelope = reply(command, about, &recorded, pen);
                Ok([Some(Outgoing { subject: self.rest.replies, envelope, may_be_lost: false }), None])
            }
        }
    }

    /// The whole transaction failed: nothing was done, so everything comes again.
    fn give_back(&self, sorted: &mut Sorted<P::Input>, error: &db::Error, deliveries: &[Delivery]) {
        tracing::warn!(%error, commands = sorted.questions.len(), "a batch failed; its commands come again");
        sorted.traced.failed("transaction failed");
        for (_, place) in sorted.questions.drain(..) {
            let delivery = &deliveries[place];
            sorted.verdicts[place] = if error.is_transient() {
                self.rest.settings.bounds.retry(delivery.count)
            } else {
                retry_or_park(&self.rest.settings, delivery, error.to_string())
            };
        }
    }
}

/// What a span says of a command.
fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Action => "action",
        Phase::Compensation => "compensation",
        Phase::Cancel => "cancel",
    }
}

fn before(now: UnixMillis, retention: Duration) -> UnixMillis {
    now.saturating_sub(u64::try_from(retention.as_millis()).unwrap_or(u64::MAX))
}

/// A reply, and which one it is: repeated when the same command is answered again, different for any other command.
fn reply<I>(command: &Command<I>, about: &About, recorded: &Bytes, pen: &mut Pen) -> Envelope {
    let Command { token, step, phase, .. } = command;
    let tag = 1 << 40
        | u64::from(step.0) << 32
        | (*phase as u64) << 28
        | (token.mode as u64) << 24
        | token.path.len() as u64;
    Envelope { id: EnvelopeId::of(token.saga, tag), body: pen.reply(token, about, *step, *phase, recorded) }
}

fn retry_or_park(settings: &Settings, delivery: &Delivery, why: String) -> Verdict {
    if delivery.count < settings.park_after_deliveries {
        tracing::warn!(id = %delivery.envelope.id, count = delivery.count, why, "a command failed; it comes again");
        settings.bounds.retry(delivery.count)
    } else {
        park(delivery, why)
    }
}

fn park(delivery: &Delivery, reason: String) -> Verdict {
    tracing::error!(id = %delivery.envelope.id, count = delivery.count, reason, "a command was parked");
    Verdict::Park { reason }
}
