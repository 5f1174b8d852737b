//! How sagas get on: whatever is reported is shown to who watches; what has ended is first written to the database.
//!
//! Several replicas may be told of one end at once. Whoever deletes the purchase's open row first ends it; the row of the finish
//! numbers is locked until the commit, so numbers are given out in the order of commits, and a transaction that is rolled back
//! leaves no hole.
//!
//! What never happens: an end is announced before it is committed, a purchase ends twice, or ends differently the second
//! time. A report that contradicts what is written is set aside and shouted about: it would mean that a
//! saga had two paths.

use std::sync::Arc;
use std::time::Duration;

use bus::{Batch, Bus, Delivery, EnvelopeId, Verdict};
use db::Db;
use foldhash::{HashMap, HashMapExt};
use saga::{Definition, End, Path, Position};
use shop::purchase::{PURCHASE_PROGRESS, Purchase, PurchaseStep};
use telemetry::Spans;
use telemetry::metrics::PubsubMetrics;
use telemetry::spans::{Cause, Handling, within};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use wire::messages::{About, Progress, encode_path};
use wire::time::UnixMillis;

use crate::live::Live;
use crate::metrics::SagaMetrics;
use crate::model;
use crate::news::{Ended, Grown, Told};
use crate::store::{self, Finish, Known};

/// The delay before a report comes again that could not be written; it doubles with each delivery.
const RETRY_DELAY_MIN: Duration = Duration::from_millis(50);
/// The longest such delay.
const RETRY_DELAY_MAX: Duration = Duration::from_secs(5);
/// After so many deliveries a report is parked that cannot be written for a reason that time does not mend.
const PARK_AFTER_DELIVERIES: u32 = 10;
/// Ends that are remembered at least, once there were so many.
const RECENT_ENDS: usize = 16_384;

/// What the loop works with.
pub(crate) struct Parts {
    pub(crate) db: Db,
    pub(crate) bus: Bus,
    pub(crate) definition: Arc<Definition<PurchaseStep>>,
    pub(crate) live: Live,
    pub(crate) metrics: SagaMetrics,
    pub(crate) pubsub: PubsubMetrics,
    pub(crate) spans: Spans,
    pub(crate) batch_messages: usize,
}

/// Runs the loop until `stop` or until the bus is closed. The batch in hand is finished first.
pub(crate) async fn run(parts: Parts, stop: CancellationToken) {
    let mut consumer = parts.bus.subscribe(PURCHASE_PROGRESS);
    let mut pace = parts.bus.pace();
    let mut recent = RecentEnds::default();
    loop {
        stop.run_until_cancelled(pace.gather()).await;
        let batch = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            next = consumer.next(parts.batch_messages) => match next {
                Ok(batch) => batch,
                Err(bus::Closed) => return,
            },
        };
        pace.took(batch.deliveries().len(), parts.batch_messages, Instant::now());
        parts.work_off(batch, &mut recent).await;
    }
}

/// The ends that this replica has written or found written of late, by purchase, each with the number of its replies. Most reports of steps come
/// when their purchase has ended: then they need not be read.
#[derive(Debug, Default)]
struct RecentEnds {
    young: HashMap<u64, usize>,
    old: HashMap<u64, usize>,
}

impl RecentEnds {
    fn remember(&mut self, id: u64, replies: usize) {
        if self.young.len() == RECENT_ENDS {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(id, replies);
    }

    /// Whether a report says less than an end that is remembered.
    fn knows_more(&self, report: EnvelopeId) -> bool {
        let (id, _) = report.parts();
        let replies = self.young.get(&id).or_else(|| self.old.get(&id));
        replies.is_some_and(|replies| drive::is_old_report(report, *replies))
    }
}

/// A batch, understood.
#[derive(Default)]
struct Sorted {
    /// Paths of sagas that go on.
    open: Vec<Grown>,
    /// Sagas that have ended, each once.
    ended: Vec<Reported>,
    verdicts: Vec<Verdict>,
}

/// What a report says.
enum Understood {
    /// The saga goes on.
    Open(Grown),
    Ended(Reported),
}

/// A saga that is reported to have ended.
struct Reported {
    id: u64,
    customer_id: u64,
    started_at: UnixMillis,
    end: End,
    path: Path,
    /// The first of its reports in the batch.
    place: usize,
}

/// What the database made of a saga's end.
#[derive(Debug)]
enum Written {
    /// The purchase has ended now, with this number.
    Finished { finished_no: u64 },
    /// It had ended before, in the same way.
    Before,
    /// It had ended before, in another way.
    Contradicted,
    /// There is no such purchase.
    Unknown,
}

impl Parts {
    async fn work_off(&self, batch: Batch, recent: &mut RecentEnds) {
        failpoint::hit("purchase.result.received");
        let began = Instant::now();
        self.pubsub.batch(batch.deliveries().len());
        let mut traced = self.spans.handle(batch.deliveries().len());
        let Sorted { open, ended, mut verdicts } = self.sort(batch.deliveries(), recent, &mut traced);
        let work = async {
            // An error means that the service is stopping: then nobody watches.
            let _ = self.live.progressed(open).await;
            if !ended.is_empty() {
                self.end(ended, batch.deliveries(), &mut verdicts, recent).await;
            }
        };
        within(traced.current(), work).await;
        traced.end_of(PURCHASE_PROGRESS.0);
        failpoint::hit("purchase.result.announced");
        let returned = verdicts.iter().filter(|verdict| matches!(verdict, Verdict::Retry { .. })).count();
        self.pubsub.received(true, (verdicts.len() - returned) as u64);
        self.pubsub.received(false, returned as u64);
        self.pubsub.handled(began.elapsed(), returned == 0);
        if let Err(forgotten) = batch.settle(verdicts).await {
            tracing::debug!(%forgotten, "nothing left to acknowledge");
        }
    }

    fn sort(&self, deliveries: &[Delivery], recent: &RecentEnds, traced: &mut Handling) -> Sorted {
        let mut sorted = Sorted { verdicts: vec![Verdict::Ack; deliveries.len()], ..Sorted::default() };
        let mut seen: HashMap<u64, usize> = HashMap::new();
        for (place, delivery) in deliveries.iter().enumerate() {
            if recent.knows_more(delivery.envelope.id) {
                continue;
            }
            match self.understand(place, delivery, |about| {
                traced.add(place, about.trace(), Cause::Message(delivery.envelope.id.number()));
            }) {
                Err(reason) => {
                    tracing::error!(id = %delivery.envelope.id, reason, "a report was parked");
                    sorted.verdicts[place] = Verdict::Park { reason };
                }
                Ok(Understood::Open(grown)) => sorted.open.push(grown),
                Ok(Understood::Ended(reported)) => match seen.get(&reported.id) {
                    Some(&known) if sorted.ended[known].path == reported.path => {}
                    Some(_) => sorted.verdicts[place] = contradiction(reported.id),
                    None => {
                        seen.insert(reported.id, sorted.ended.len());
                        sorted.ended.push(reported);
                    }
                },
            }
        }
        sorted
    }

    /// `of` is shown what the report's saga is about.
    fn understand(
        &self,
        place: usize,
        delivery: &Delivery,
        of: impl FnOnce(&About),
    ) -> Result<Understood, String> {
        let Progress { carried } =
            Progress::decode(delivery.envelope.body.clone()).map_err(|error| error.to_string())?;
        of(&carried.about);
        let (name, version) = (carried.about.definition(), carried.about.version());
        if (name, version) != (self.definition.name(), self.definition.version()) {
            return Err(format!("no definition {name:?} version {version} is known here"));
        }
        let (id, path) = (carried.token.saga, carried.token.path);
        match path.position(&self.definition).map_err(|illegal| illegal.to_string())? {
            Position::Forward(_) | Position::Backward(_) => Ok(Understood::Open(Grown::to(id, path))),
            Position::Ended(end) => {
                let customer_id =
                    Purchase::buyer(&carried.about.input()).map_err(|error| error.to_string())?;
                let started_at = carried.about.started_at();
                Ok(Understood::Ended(Reported { id, customer_id, started_at, end, path, place }))
            }
        }
    }

    /// Writes the ends of sagas in one transaction, then announces them. When that fails for a reason that trying again
    /// cannot mend, each alone, so that the one at fault holds up no other.
    async fn end(
        &self,
        ended: Vec<Reported>,
        deliveries: &[Delivery],
        verdicts: &mut [Verdict],
        recent: &mut RecentEnds,
    ) {
        let finishes: Arc<Vec<Finish>> = Arc::new(ended.iter().map(finish).collect());
        match self.write(Arc::clone(&finishes)).await {
            Ok(written) => {
                failpoint::hit("purchase.result.committed");
                let mut news = Vec::with_capacity(ended.len());
                for ((reported, finish), written) in ended.into_iter().zip(finishes.iter()).zip(written) {
                    if let Written::Finished { .. } | Written::Before = written {
                        recent.remember(reported.id, reported.path.len());
                    }
                    news.extend(self.announce(reported, finish, written, verdicts));
                }
                // An error means that the service is stopping: then nobody watches.
                let _ = self.live.ended(news).await;
            }
            Err(error) if !error.is_transient() && ended.len() > 1 => {
                tracing::error!(%error, sagas = ended.len(), "ends were not written; trying each alone");
                for reported in ended {
                    Box::pin(self.end(vec![reported], deliveries, verdicts, recent)).await;
                }
            }
            Err(error) => {
                tracing::warn!(%error, sagas = ended.len(), "the ends of sagas were not written; they come again");
                for reported in ended {
                    verdicts[reported.place] = not_written(&error, deliveries[reported.place].count);
                }
            }
        }
    }

    async fn write(&self, finishes: Arc<Vec<Finish>>) -> Result<Vec<Written>, db::Error> {
        self.db.write(move |tx| write(tx, &finishes)).await
    }

    fn announce(
        &self,
        reported: Reported,
        finish: &Finish,
        written: Written,
        verdicts: &mut [Verdict],
    ) -> Option<Ended> {
        let Reported { id, customer_id, started_at, path, place, .. } = reported;
        match written {
            Written::Finished { finished_no } => {
                self.metrics.finished(finish.state, finish.finished_at.saturating_sub(started_at));
                tracing::debug!(purchase = id, state = ?finish.state, "a purchase has ended");
                let path = Told::Path(path);
                Some(Ended { customer_id, finished_no, id, started_at, path })
            }
            Written::Before => None,
            Written::Contradicted => {
                verdicts[place] = contradiction(id);
                None
            }
            Written::Unknown => {
                let reason = format!("there is no purchase {id}");
                tracing::error!(reason, "a report was parked");
                verdicts[place] = Verdict::Park { reason };
                None
            }
        }
    }
}

/// What becomes of a report that could not be written.
fn not_written(error: &db::Error, count: u32) -> Verdict {
    if !error.is_transient() && count >= PARK_AFTER_DELIVERIES {
        return Verdict::Park { reason: error.to_string() };
    }
    let doublings = count.saturating_sub(1).min(16);
    Verdict::Retry { after: RETRY_DELAY_MIN.saturating_mul(1 << doublings).min(RETRY_DELAY_MAX) }
}

fn contradiction(id: u64) -> Verdict {
    let reason = format!("purchase {id} is reported to have ended in two ways");
    tracing::error!(purchase = id, "two paths of one saga: its participants contradict themselves");
    Verdict::Park { reason }
}

fn finish(reported: &Reported) -> Finish {
    let (state, reason) = model::ended(reported.end, &reported.path);
    let finished_at = reported.path.entries().last().map_or(0, |entry| entry.at);
    let (id, customer_id) = (reported.id, reported.customer_id);
    Finish { id, customer_id, state, finished_at, reason, path: encode_path(&reported.path) }
}

/// Ends those purchases that have not ended. One answer for each, in their order.
///
/// None is read where all were open, which their deletion tells.
fn write(tx: &mut db::Tx<'_>, finishes: &[Finish]) -> Result<Vec<Written>, db::Error> {
    let ids: Vec<u64> = finishes.iter().map(|finish| finish.id).collect();
    let all_were_open = store::close(tx, &ids)? == ids.len();
    let known: HashMap<u64, Known> =
        if all_were_open { HashMap::new() } else { store::known(tx, &ids)?.into_iter().collect() };
    let of = |id: u64| if all_were_open { Some(&Known::Closed) } else { known.get(&id) };
    let ending: Vec<&Finish> =
        finishes.iter().filter(|finish| of(finish.id) == Some(&Known::Closed)).collect();
    let mut number = if ending.is_empty() { 0 } else { store::finish(tx, &ending, store::LIST_BEHIND)? };
    let written = finishes.iter().map(|finish| match of(finish.id) {
        None => Written::Unknown,
        Some(Known::Ended { path }) if *path == finish.path => Written::Before,
        Some(Known::Ended { .. }) => Written::Contradicted,
        Some(Known::Closed) => {
            let finished_no = number;
            number += 1;
            Written::Finished { finished_no }
        }
    });
    Ok(written.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use drive::Book;
    use saga::{Mode, Outcome, Phase, Reason, StepIndex, Token};
    use wire::messages::{Pen, Recorded};

    const COMMANDS: bus::Subject = bus::Subject("test.commands");

    /// The id of the report that the first of two steps is done.
    fn report_of(saga: u64) -> EnvelopeId {
        report(saga, Outcome::Done(Vec::new()))
    }

    /// The id of the report that it was refused, which is the end.
    fn end_of(saga: u64) -> EnvelopeId {
        report(saga, Outcome::Rejected(Reason::Refused("no".to_owned())))
    }

    fn report(saga: u64, outcome: Outcome) -> EnvelopeId {
        let definition = Definition::new("two", 1).compensatable(()).compensatable(()).build();
        let book = Book::new().with(definition, |()| COMMANDS, PURCHASE_PROGRESS);
        let recorded = Recorded { outcome, at: 5 }.encode();
        let answered = drive::Answered { step: StepIndex(0), phase: Phase::Action, recorded: &recorded };
        let token = Token { saga, mode: Mode::Execute, path: Path::new() };
        let about = About::new("two", 1, 5, b"", b"");
        let messages = book.answered(&token, &about, answered, &mut Pen::for_messages(2));
        messages.unwrap().unwrap().report.unwrap().envelope.id
    }

    #[test]
    fn a_report_that_comes_behind_the_end_is_known_by_its_id() {
        let mut recent = RecentEnds::default();
        let report = report_of(7);
        assert!(!recent.knows_more(report));
        recent.remember(8, 2);
        assert!(!recent.knows_more(report), "another purchase has ended");
        recent.remember(7, 1);
        assert!(!recent.knows_more(report), "it may be the end itself, and say something else");
        recent.remember(7, 2);
        assert!(recent.knows_more(report));
    }

    #[test]
    fn another_end_is_read_however_short_its_path_is() {
        let mut recent = RecentEnds::default();
        recent.remember(7, 5);
        assert!(recent.knows_more(report_of(7)) && !recent.knows_more(end_of(7)));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut recent = RecentEnds::default();
        for id in 0..3 * RECENT_ENDS as u64 {
            recent.remember(id, 2);
        }
        assert_eq!(recent.young.len() + recent.old.len(), 2 * RECENT_ENDS);
        let known = |id| recent.knows_more(report_of(id));
        assert!(known(RECENT_ENDS as u64) && !known(0));
    }
}
