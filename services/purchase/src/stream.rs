//! A customer's events as server-sent events (WHATWG HTML, section 9.2): first what the client has missed, then what happens.
//!
//! Every piece of news carries a purchase's whole path, so what to send is always "the events of this path, without those that
//! were sent": a lost piece leaves no gap, a repeated one sends nothing.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;

use axum::response::sse::Event;
use db::Db;
use futures_util::Stream;
use futures_util::stream::unfold;
use saga::{Definition, Path};
use serde::Serialize;
use shop::purchase::PurchaseStep;
use tokio_util::sync::CancellationToken;
use wire::messages::decode_path;
use wire::time::UnixMillis;

use crate::cursor::Cursor;
use crate::live::{News, Subscription};
use crate::model::status_name;
use crate::store;

/// Purchases that are read at a time while a client catches up.
const PAGE_PURCHASES: u32 = 200;

/// One event, ready to be sent.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    /// The cursor after it.
    id: String,
    /// Its data, as JSON.
    data: String,
}

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

/// What is sent to one client, and how far it is. Pure: I/O is in [`events`].
struct Teller {
    definition: Arc<Definition<PurchaseStep>>,
    cursor: Cursor,
    /// The last cursor that had a text.
    id: String,
}

impl Teller {
    fn new(definition: Arc<Definition<PurchaseStep>>, cursor: Cursor) -> Teller {
        let id = cursor.text().unwrap_or_else(|| cursor.finished.to_string());
        Teller { definition, cursor, id }
    }

    /// The events of a path that were not sent yet.
    fn tell(&mut self, id: u64, started_at: UnixMillis, path: &Path, finished_no: Option<u64>) -> Vec<Line> {
        if finished_no.is_some_and(|number| number <= self.cursor.finished) {
            return Vec::new();
        }
        let events = match saga::events(&self.definition, started_at, path) {
            Ok(events) => events,
            Err(illegal) => {
                tracing::error!(purchase = id, %illegal, "a purchase's path has no history");
                if let Some(number) = finished_no {
                    self.cursor.finish(id, number);
                }
                return Vec::new();
            }
        };
        let sent = self.cursor.sent(id);
        let count = events.len();
        let mut lines = Vec::with_capacity(count.saturating_sub(sent));
        for (index, event) in events.into_iter().enumerate().skip(sent) {
            match finished_no {
                Some(number) if index + 1 == count => self.cursor.finish(id, number),
                _ => self.cursor.send(id),
            }
            if let Some(text) = self.cursor.text() {
                self.id = text;
            }
            let reason = event.reason.map(ToString::to_string);
            let data = Data {
                purchase_id: id,
                step: event.step.name(),
                status: status_name(event.status),
                timestamp: event.at / 1000,
                seq: index + 1,
                reason: reason.as_deref(),
            };
            let data = serde_json::to_string(&data).expect("an event can be written as JSON");
            lines.push(Line { id: self.id.clone(), data });
        }
        if let (Some(number), true) = (finished_no, sent >= count) {
            self.cursor.finish(id, number);
        }
        lines
    }
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
    ready: VecDeque<Line>,
    stop: CancellationToken,
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

/// The stream. It ends when the service stops, when the client falls behind its bound, and when the
/// database fails: the client resumes with the id of the last event it got.
pub(crate) fn events(parts: Parts) -> impl Stream<Item = Result<Event, Infallible>> + Send {
    let Parts { db, definition, customer_id, cursor, subscription, stop } = parts;
    let feed = Feed {
        db,
        customer_id,
        teller: Teller::new(definition, cursor),
        subscription,
        stage: Stage::Opening,
        ready: VecDeque::new(),
        stop,
    };
    unfold(feed, async |mut feed| feed.next().await.map(|event| (Ok(event), feed)))
}

impl Feed {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(Line { id, data }) = self.ready.pop_front() {
                return Some(Event::default().event("data").id(id).data(data));
            }
            match self.stage {
                Stage::Opening => {
                    self.stage = Stage::CatchingUp;
                    return Some(Event::default().comment("purchases"));
                }
                Stage::CatchingUp => self.catch_up().await?,
                Stage::Live => {
                    let news = tokio::select! {
                        biased;
                        () = self.stop.cancelled() => return None,
                        news = self.subscription.news.recv() => news?,
                    };
                    self.take(&news);
                }
            }
        }
    }

    /// Reads the next page of what the client missed; behind the last one come the purchases that are under way.
    async fn catch_up(&mut self) -> Option<()> {
        let (customer_id, after) = (self.customer_id, self.teller.cursor.finished);
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
            for news in std::mem::take(&mut self.subscription.open) {
                self.take(&news);
            }
            self.stage = Stage::Live;
        }
        for finished in page {
            match decode_path(&finished.path) {
                Ok(path) => {
                    let store::Finished { id, finished_no, created_at, .. } = finished;
                    self.ready.extend(self.teller.tell(id, created_at, &path, Some(finished_no)));
                }
                Err(error) => {
                    tracing::error!(purchase = finished.id, %error, "a kept path cannot be read");
                    self.teller.cursor.finish(finished.id, finished.finished_no);
                }
            }
        }
        Some(())
    }

    fn take(&mut self, news: &News) {
        let News { id, started_at, path, finished_no } = news;
        self.ready.extend(self.teller.tell(*id, *started_at, path, *finished_no));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use saga::{Entry, Outcome, Reason, StepIndex};
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
        Teller::new(Arc::new(purchase_saga()), Cursor::parse(cursor).unwrap())
    }

    #[test]
    fn a_longer_path_implies_what_a_shorter_one_told() {
        let mut told_once = teller("0");
        let whole = told_once.tell(7, 1_000, &success(), Some(1));
        assert_eq!(whole.len(), 6);
        let first = r#"{"purchase_id":7,"step":"UPDATE_PRODUCT_INVENTORY","status":"STATUS_EXECUTE","timestamp":1,"seq":1}"#;
        assert_eq!(whole[0], Line { id: "0-7.1".into(), data: first.into() });
        assert_eq!(whole[5].id, "1");

        let mut told_often = teller("0");
        let mut lines = told_often.tell(7, 1_000, &Path::new(), None);
        for length in [1, 1, 2, 1, 2] {
            let shorter = success().entries()[..length].iter().cloned().collect();
            lines.extend(told_often.tell(7, 1_000, &shorter, None));
        }
        lines.extend(told_often.tell(7, 1_000, &success(), Some(1)));
        lines.extend(told_often.tell(7, 1_000, &success(), Some(1)));
        assert_eq!(lines, whole, "nothing is missed and nothing comes twice");
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
            let mut lines = teller.tell(7, 1_000, &path(&[(0, Outcome::Done(vec![]))]), None);
            lines.extend(teller.tell(8, 1_000, &success(), Some(4)));
            lines.extend(teller.tell(7, 1_000, &failed, Some(5)));
            lines
        };
        assert_eq!(whole.len(), 3 + 6 + 2);
        for resumed_behind in 0..whole.len() {
            let mut teller = teller(&whole[resumed_behind].id);
            // As a replica would that has only the database: in the order of the finish numbers.
            let mut rest = teller.tell(8, 1_000, &success(), Some(4));
            rest.extend(teller.tell(7, 1_000, &failed, Some(5)));
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
            let lines = teller.tell(id, 1_000, &Path::new(), None);
            assert_eq!(lines.len(), 1);
            last = lines[0].id.clone();
        }
        let cursor = Cursor::parse(&last).unwrap();
        assert_eq!(cursor.sent(64), 1);
        assert_eq!(cursor.sent(65), 0, "what does not fit is sent again after a resume");
    }
}
