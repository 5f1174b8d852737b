//! A customer's events as server-sent events (WHATWG HTML, section 9.2): first what the client has missed, then what happens.
//!
//! Every piece of news carries a purchase's whole path, so what to send is always "the events of this path, without those that
//! were sent": a lost piece leaves no gap, a repeated one sends nothing.
//!
//! A busy shop sends six events for each purchase. So what is there to be sent at one time is written into one buffer and
//! sent as one chunk, progress right behind a chunk waits a moment for more, and an event is written by hand: its JSON has one shape.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use db::Db;
use futures_util::Stream;
use futures_util::stream::unfold;
use saga::{Definition, Event, Path};
use shop::purchase::PurchaseStep;
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use wire::messages::decode_path;
use wire::time::UnixMillis;

use crate::cursor::Cursor;
use crate::live::{News, Subscription};
use crate::model::status_name;
use crate::store;

/// Purchases that are read at a time while a client catches up.
const PAGE_PURCHASES: u32 = 64;
/// While a client catches up, a chunk ends with the purchase that makes it as long as this, in bytes. How long an event is, the client
/// has a say in: each carries its cursor.
const CHUNK_BYTES: usize = 64 * 1024;
/// Pieces of news that are sent as one chunk at most. An event is at most about 2 KiB.
const CHUNK_NEWS: usize = 64;
/// Progress is sent at most so often; a purchase's end never waits, and takes along what does.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);
/// How many events a piece of news mostly is.
const NEWS_EVENTS: usize = 2;
/// How often a silent stream says that it is alive.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// About how long an event is beside its cursor, in bytes.
const EVENT_BYTES: usize = 160;

/// What is sent to one client, and how far it is. Pure: I/O is in [`events`].
struct Teller {
    definition: Arc<Definition<PurchaseStep>>,
    cursor: Cursor,
}

impl Teller {
    /// Appends the events of a path that were not sent yet.
    fn tell(
        &mut self,
        id: u64,
        started_at: UnixMillis,
        path: &Path,
        finished_no: Option<u64>,
        out: &mut Vec<u8>,
    ) {
        if finished_no.is_some_and(|number| number <= self.cursor.finished()) {
            return;
        }
        let events = match saga::events(&self.definition, started_at, path) {
            Ok(events) => events,
            Err(illegal) => {
                tracing::error!(purchase = id, %illegal, "a purchase's path has no history");
                if let Some(number) = finished_no {
                    self.cursor.finish(id, number);
                }
                return;
            }
        };
        let sent = self.cursor.sent(id);
        let count = events.len();
        for (index, event) in events.iter().enumerate().skip(sent) {
            match finished_no {
                Some(number) if index + 1 == count => self.cursor.finish(id, number),
                _ => self.cursor.send(id),
            }
            out.extend_from_slice(b"event: data\nid: ");
            self.cursor.put(out);
            out.extend_from_slice(b"\ndata: ");
            put_data(id, index + 1, event, out);
            out.extend_from_slice(b"\n\n");
        }
        if let (Some(number), true) = (finished_no, sent >= count) {
            self.cursor.finish(id, number);
        }
    }
}

/// Appends an event's data, as JSON.
fn put_data(purchase_id: u64, seq: usize, event: &Event<'_, PurchaseStep>, out: &mut Vec<u8>) {
    let mut number = itoa::Buffer::new();
    out.extend_from_slice(br#"{"purchase_id":"#);
    out.extend_from_slice(number.format(purchase_id).as_bytes());
    out.extend_from_slice(br#","step":""#);
    out.extend_from_slice(event.step.name().as_bytes());
    out.extend_from_slice(br#"","status":""#);
    out.extend_from_slice(status_name(event.status).as_bytes());
    out.extend_from_slice(br#"","timestamp":"#);
    out.extend_from_slice(number.format(event.at / 1000).as_bytes());
    out.extend_from_slice(br#","seq":"#);
    out.extend_from_slice(number.format(seq).as_bytes());
    if let Some(reason) = event.reason {
        out.extend_from_slice(br#","reason":"#);
        serde_json::to_writer(&mut *out, &reason.to_string()).expect("a text can be written as JSON");
    }
    out.push(b'}');
}

/// What a stream is made of.
pub(crate) struct Parts {
    pub(crate) db: Db,
    pub(crate) definition: Arc<Definition<PurchaseStep>>,
    pub(crate) customer_id: u64,
    /// Where the client is.
    pub(crate) cursor: Cursor,
    pub(crate) subscription: Subscription,
    /// Ends the stream.
    pub(crate) stop: CancellationToken,
}

struct Feed {
    db: Db,
    customer_id: u64,
    teller: Teller,
    subscription: Subscription,
    stage: Stage,
    /// Progress that waits for more of its kind, fewer than [`CHUNK_NEWS`].
    held: Vec<Arc<News>>,
    stop: Pin<Box<WaitForCancellationFutureOwned>>,
    /// When something was sent.
    sent_at: Instant,
    /// Goes off when nothing was sent for long; not before, but perhaps when it no longer is so.
    silent: Pin<Box<Sleep>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Nothing was sent yet.
    Opening,
    /// Sending what ended before the stream was opened.
    CatchingUp,
    /// Sending what happens.
    Live,
}

/// The stream, in chunks of whole events. It ends when the service stops, when the client falls behind its bound, and when the
/// database fails: the client resumes with the id of the last event it got.
pub(crate) fn events(parts: Parts) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
    let Parts { db, definition, customer_id, cursor, subscription, stop } = parts;
    let feed = Feed {
        db,
        customer_id,
        teller: Teller { definition, cursor },
        subscription,
        stage: Stage::Opening,
        held: Vec::new(),
        stop: Box::pin(stop.cancelled_owned()),
        sent_at: Instant::now(),
        silent: Box::pin(tokio::time::sleep(KEEP_ALIVE)),
    };
    // Boxed: it is moved from chunk to chunk.
    unfold(Box::new(feed), async |mut feed| feed.next().await.map(|chunk| (Ok(chunk), feed)))
}

/// Whether all of this is progress, and there is room for more.
fn may_wait(news: &[Arc<News>]) -> bool {
    news.len() < CHUNK_NEWS && news.iter().all(|news| news.finished_no.is_none())
}

impl Feed {
    /// The next chunk; never an empty one.
    async fn next(&mut self) -> Option<Bytes> {
        let chunk = loop {
            let mut chunk = Vec::new();
            match self.stage {
                Stage::Opening => {
                    self.stage = Stage::CatchingUp;
                    chunk.extend_from_slice(b": purchases\n\n");
                }
                Stage::CatchingUp => self.catch_up(&mut chunk).await?,
                Stage::Live => self.hear(&mut chunk).await?,
            }
            if !chunk.is_empty() {
                break chunk;
            }
        };
        self.sent_at = Instant::now();
        Some(chunk.into())
    }

    /// Waits for news, or until something has to be said for want of them.
    async fn hear(&mut self, chunk: &mut Vec<u8>) -> Option<()> {
        let progress_at = self.sent_at + PROGRESS_EVERY;
        let (is_held, room) = (!self.held.is_empty(), CHUNK_NEWS - self.held.len());
        tokio::select! {
            biased;
            () = &mut self.stop => return None,
            count = self.subscription.news.recv_many(&mut self.held, room) => {
                if count == 0 {
                    return None;
                }
                if may_wait(&self.held) && Instant::now() < progress_at {
                    return Some(());
                }
            }
            () = sleep_until(progress_at), if is_held => {}
            () = &mut self.silent => {
                let (now, mut due) = (Instant::now(), self.sent_at + KEEP_ALIVE);
                if due <= now {
                    chunk.extend_from_slice(b":\n\n");
                    due = now + KEEP_ALIVE;
                }
                self.silent.as_mut().reset(due);
                return Some(());
            }
        }
        chunk.reserve(self.held.len() * NEWS_EVENTS * (EVENT_BYTES + self.teller.cursor.text_bytes()));
        for news in std::mem::take(&mut self.held) {
            self.take(&news, chunk);
        }
        Some(())
    }

    /// Reads the next page of what the client missed; behind the last one come the purchases that are under way.
    async fn catch_up(&mut self, chunk: &mut Vec<u8>) -> Option<()> {
        let (customer_id, after) = (self.customer_id, self.teller.cursor.finished());
        let up_to = self.subscription.announced;
        let page =
            self.db.read(move |tx| store::finished_between(tx, customer_id, after, up_to, PAGE_PURCHASES));
        let page = match page.await {
            Ok(page) => page,
            Err(error) => {
                let error: db::Error = error;
                tracing::warn!(customer = customer_id, %error, "an event stream ends: nothing can be read");
                return None;
            }
        };
        if page.is_empty() {
            while chunk.len() < CHUNK_BYTES {
                let Some(news) = self.subscription.open.pop_front() else {
                    self.stage = Stage::Live;
                    break;
                };
                self.take(&news, chunk);
            }
        }
        for finished in page {
            if chunk.len() >= CHUNK_BYTES {
                // The cursor says where to go on.
                break;
            }
            match decode_path(&finished.path) {
                Ok(path) => {
                    let store::Finished { id, finished_no, created_at, .. } = finished;
                    self.teller.tell(id, created_at, &path, Some(finished_no), chunk);
                }
                Err(error) => {
                    tracing::error!(purchase = finished.id, %error, "a kept path cannot be read");
                    self.teller.cursor.finish(finished.id, finished.finished_no);
                }
            }
        }
        Some(())
    }

    fn take(&mut self, news: &News, chunk: &mut Vec<u8>) {
        let News { id, started_at, path, finished_no } = news;
        self.teller.tell(*id, *started_at, path, *finished_no, chunk);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use proptest::prelude::*;
    use saga::{Entry, Outcome, Reason, StepIndex};
    use serde::Serialize;
    use shop::purchase::purchase_saga;

    fn path(outcomes: &[(u8, Outcome)]) -> Path {
        let entry = |(step, outcome): &(u8, Outcome)| Entry {
            step: StepIndex(*step),
            outcome: outcome.clone(),
            at: 5_000 + u64::from(*step),
        };
        outcomes.iter().map(entry).collect()
    }

    fn success() -> Path {
        path(&[(0, Outcome::Done(vec![])), (1, Outcome::Done(vec![])), (2, Outcome::Done(vec![]))])
    }

    fn teller(cursor: &str) -> Teller {
        Teller { definition: Arc::new(purchase_saga()), cursor: Cursor::parse(cursor).unwrap() }
    }

    /// An event as a client reads it: the cursor after it, and its data.
    #[derive(Debug, PartialEq, Eq)]
    struct Line {
        id: String,
        data: String,
    }

    impl Teller {
        fn lines(
            &mut self,
            id: u64,
            started_at: UnixMillis,
            path: &Path,
            finished_no: Option<u64>,
        ) -> Vec<Line> {
            let mut out = Vec::new();
            self.tell(id, started_at, path, finished_no, &mut out);
            let text = String::from_utf8(out).unwrap();
            let event = |event: &str| {
                let event = event.strip_prefix("event: data\nid: ").unwrap();
                let (id, data) = event.split_once("\ndata: ").unwrap();
                assert!(!data.contains('\n'), "{data:?}");
                Line { id: id.to_owned(), data: data.to_owned() }
            };
            text.split_terminator("\n\n").map(event).collect()
        }
    }

    #[test]
    fn a_longer_path_implies_what_a_shorter_one_told() {
        let mut told_once = teller("0");
        let whole = told_once.lines(7, 1_000, &success(), Some(1));
        assert_eq!(whole.len(), 6);
        let first = r#"{"purchase_id":7,"step":"UPDATE_PRODUCT_INVENTORY","status":"STATUS_EXECUTE","timestamp":1,"seq":1}"#;
        assert_eq!(whole[0], Line { id: "0-7.1".into(), data: first.into() });
        assert_eq!(whole[5].id, "1");

        let mut told_often = teller("0");
        let mut lines = told_often.lines(7, 1_000, &Path::new(), None);
        for length in [1, 1, 2, 1, 2] {
            let shorter = success().entries()[..length].iter().cloned().collect();
            lines.extend(told_often.lines(7, 1_000, &shorter, None));
        }
        lines.extend(told_often.lines(7, 1_000, &success(), Some(1)));
        lines.extend(told_often.lines(7, 1_000, &success(), Some(1)));
        assert_eq!(lines, whole, "nothing is missed and nothing comes twice");
    }

    /// A live stream, right behind a chunk, and what tells it.
    fn live(db: Db) -> (Feed, tokio::sync::mpsc::Sender<Arc<News>>) {
        let (tell, news) = tokio::sync::mpsc::channel(200);
        let feed = Feed {
            db,
            customer_id: 9,
            teller: teller("0"),
            subscription: Subscription { announced: 0, open: VecDeque::new(), news },
            stage: Stage::Live,
            held: Vec::new(),
            stop: Box::pin(CancellationToken::new().cancelled_owned()),
            sent_at: Instant::now(),
            silent: Box::pin(tokio::time::sleep(KEEP_ALIVE)),
        };
        (feed, tell)
    }

    fn progress(id: u64, steps: usize) -> Arc<News> {
        let path = success().entries()[..steps].iter().cloned().collect();
        Arc::new(News { id, started_at: 1_000, path, finished_no: None })
    }

    fn count(chunk: &Bytes) -> usize {
        std::str::from_utf8(chunk).unwrap().matches("event: data").count()
    }

    #[tokio::test]
    async fn progress_right_behind_a_chunk_waits_for_more_and_an_end_takes_it_along() {
        let place = testdb::TestDb::sqlite();
        let db = place.open(crate::MIGRATIONS);
        tokio::time::pause();
        let (mut feed, tell) = live(db);
        let begun = Instant::now();
        tell.send(progress(7, 0)).await.unwrap();
        tell.send(progress(8, 0)).await.unwrap();
        let late = async {
            tokio::time::sleep(PROGRESS_EVERY / 2).await;
            tell.send(progress(7, 1)).await.unwrap();
        };
        let (chunk, ()) = tokio::join!(feed.next(), late);
        assert_eq!(count(&chunk.unwrap()), 4, "1 of 8, 3 of 7");
        // Timers go off at whole milliseconds.
        assert!((PROGRESS_EVERY..PROGRESS_EVERY * 2).contains(&begun.elapsed()), "{:?}", begun.elapsed());

        let begun = Instant::now();
        tell.send(progress(8, 1)).await.unwrap();
        let end = News { id: 7, started_at: 1_000, path: success(), finished_no: Some(1) };
        tell.send(Arc::new(end)).await.unwrap();
        let chunk = feed.next().await.unwrap();
        assert_eq!((count(&chunk), begun.elapsed()), (5, Duration::ZERO), "2 of 8, the last 3 of 7");

        // After a quiet time, progress is told at once.
        tokio::time::sleep(PROGRESS_EVERY).await;
        let begun = Instant::now();
        tell.send(progress(8, 2)).await.unwrap();
        assert_eq!((count(&feed.next().await.unwrap()), begun.elapsed()), (2, Duration::ZERO));

        // And so is as much as one chunk holds.
        for id in 0..CHUNK_NEWS as u64 {
            tell.send(progress(100 + id, 0)).await.unwrap();
        }
        assert_eq!((count(&feed.next().await.unwrap()), begun.elapsed()), (CHUNK_NEWS, Duration::ZERO));
    }

    /// A client may say that it was told of purchases that never were: its cursor then is long in every event.
    #[tokio::test]
    async fn who_catches_up_on_much_gets_it_in_chunks_of_a_bounded_length() {
        const ENDED: u64 = 300;
        const UNDER_WAY: u64 = 100;
        let place = testdb::TestDb::sqlite();
        let db = place.open(crate::MIGRATIONS);
        let (new, ends): (Vec<_>, Vec<_>) = (1..=ENDED)
            .map(|id| {
                let new = store::NewPurchase {
                    id,
                    customer_id: 9,
                    key: None,
                    input: Bytes::new(),
                    trace: String::new(),
                    created_at: 1_000,
                    deadline_at: 2_000,
                    next_wake_at: 2_000,
                };
                let path = wire::messages::encode_path(&success());
                let (state, reason) = (crate::model::State::Succeeded, None);
                (new, store::Finish { id, customer_id: 9, state, finished_at: 1_000, reason, path })
            })
            .unzip();
        let write = move |tx: &mut db::Tx<'_>| {
            store::insert(tx, new.iter())?;
            store::close(tx, &(1..=ENDED).collect::<Vec<_>>())?;
            store::finish(tx, &ends.iter().collect::<Vec<_>>(), store::LIST_BEHIND)
        };
        db.write(write).await.unwrap();
        let (mut feed, _tell) = live(db);
        let invented: Vec<String> =
            (0..64).map(|number| format!("{}.1", 1_u64 << 52 | number << 30)).collect();
        feed.teller = teller(&format!("0-{}", invented.join("~")));
        feed.subscription.announced = ENDED;
        feed.subscription.open = (ENDED + 1..=ENDED + UNDER_WAY).map(|id| progress(id, 2)).collect();
        feed.stage = Stage::CatchingUp;
        let (mut events, mut longest) = (0, 0);
        while feed.stage == Stage::CatchingUp {
            let mut chunk = Vec::new();
            feed.catch_up(&mut chunk).await.unwrap();
            longest = longest.max(chunk.len());
            events += count(&chunk.into());
        }
        assert_eq!(events as u64, ENDED * 6 + UNDER_WAY * 5, "nothing is missed and nothing comes twice");
        let a_purchase = 6 * (EVENT_BYTES + feed.teller.cursor.text_bytes());
        assert!(a_purchase > 6 * 500, "the cursor is long: {a_purchase}");
        assert!(longest < 100_000, "{longest} bytes");
    }

    #[test]
    fn a_stream_resumes_behind_every_event() {
        let failed = path(&[
            (0, Outcome::Done(vec![])),
            (1, Outcome::Rejected(Reason::Refused("no".into()))),
            (0, Outcome::Compensated),
        ]);
        let whole = {
            let mut teller = teller("3");
            let mut lines = teller.lines(7, 1_000, &path(&[(0, Outcome::Done(vec![]))]), None);
            lines.extend(teller.lines(8, 1_000, &success(), Some(4)));
            lines.extend(teller.lines(7, 1_000, &failed, Some(5)));
            lines
        };
        assert_eq!(whole.len(), 3 + 6 + 2);
        for resumed_behind in 0..whole.len() {
            let mut teller = teller(&whole[resumed_behind].id);
            // As a replica would that has only the database: in the order of the finish numbers.
            let mut rest = teller.lines(8, 1_000, &success(), Some(4));
            rest.extend(teller.lines(7, 1_000, &failed, Some(5)));
            let data = |lines: &[Line]| {
                let mut data: Vec<String> = lines.iter().map(|line| line.data.clone()).collect();
                data.sort();
                data
            };
            assert_eq!(data(&rest), data(&whole[resumed_behind + 1..]), "behind {resumed_behind}");
        }
    }

    #[test]
    fn with_too_many_under_way_an_id_stays_one_that_misses_nothing() {
        let mut teller = teller("0");
        let mut last = String::new();
        for id in 1..=100 {
            let mut lines = teller.lines(id, 1_000, &Path::new(), None);
            assert_eq!(lines.len(), 1);
            last = lines.remove(0).id;
        }
        let cursor = Cursor::parse(&last).unwrap();
        assert_eq!(cursor.sent(64), 1);
        assert_eq!(cursor.sent(65), 0, "what does not fit is sent again after a resume");
    }

    /// What an event's data is, by a library.
    #[derive(Serialize)]
    struct Data<'a> {
        purchase_id: u64,
        step: &'static str,
        status: &'static str,
        timestamp: u64,
        seq: usize,
        #[serde(skip_serializing_if = "Option::is_none")]
        reason: Option<&'a str>,
    }

    proptest! {
        #[test]
        fn an_event_s_data_is_what_a_library_would_write(
            purchase_id: u64,
            seq: usize,
            at: u64,
            step in prop::sample::select(vec![
                PurchaseStep::UpdateProductInventory, PurchaseStep::CreateOrder, PurchaseStep::CreatePayment,
            ]),
            status in prop::sample::select(vec![
                saga::Status::Execute, saga::Status::Success, saga::Status::Failed, saga::Status::RolledBack,
            ]),
            reason in prop::option::of(any::<String>()),
        ) {
            let why = reason.clone().map(Reason::Refused);
            let mut out = Vec::new();
            put_data(purchase_id, seq, &Event { step, status, at, reason: why.as_ref() }, &mut out);
            let data = Data {
                purchase_id,
                step: step.name(),
                status: status_name(status),
                timestamp: at / 1000,
                seq,
                reason: reason.as_deref(),
            };
            prop_assert_eq!(String::from_utf8(out).unwrap(), serde_json::to_string(&data).unwrap());
        }
    }
}
