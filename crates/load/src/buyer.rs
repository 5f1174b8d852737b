//! One connection that sends one request after the other.

use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use fastrand::Rng;
use http::header::HeaderName;
use http::{HeaderValue, Method, StatusCode, Uri};
use serde::Deserialize;

use crate::ask::{Asker, is_busy, path_of, request};
use crate::backoff::Backoff;
use crate::desk::Desk;
use crate::http1::Answer;
use crate::options::Scenario;
use crate::record::Failure;
use crate::tracker::Accepted;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// What is read of the catalogue at a time.
const CATALOGUE: &str = "/api/products?offset=0&size=100";

#[derive(Deserialize)]
struct Bought {
    purchase_id: u64,
}

/// How sending ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    /// With success.
    Accepted,
    /// Not with success. Whoever has the choice waits for so long.
    Failed(Duration),
}

/// See the module.
pub(crate) struct Buyer {
    desk: Rc<Desk>,
    /// Its place among those of the thread.
    place: u32,
    /// Its customer's place among those of the thread.
    customer: u32,
    dice: Rng,
    asker: Asker,
    backoff: Backoff,
    /// What this buyer's keys begin with.
    key_prefix: String,
    keys: u64,
    /// Paths of products, where those are read.
    paths: Vec<Uri>,
}

impl Buyer {
    /// `number` is its number among all of the run.
    pub(crate) fn new(desk: Rc<Desk>, place: u32, customer: u32, number: u32) -> Buyer {
        let plan = &desk.plan;
        let paths = match plan.options.scenario {
            Scenario::Product => plan.products.all().iter().map(|it| path_of("product", it.id)).collect(),
            Scenario::Catalogue => vec![Uri::from_static(CATALOGUE)],
            Scenario::Purchase => Vec::new(),
        };
        Buyer {
            place,
            customer,
            dice: Rng::with_seed(plan.options.seed.wrapping_add(u64::from(number))),
            asker: Asker::new(&plan.options.url, plan.options.request_timeout),
            backoff: Backoff::default(),
            key_prefix: format!("load-{:016x}-{number}", plan.run),
            keys: 0,
            paths,
            desk,
        }
    }

    /// Sends what was due then, and again where that is wanted, until it is answered or all is over.
    pub(crate) async fn send(&mut self, due: Instant) -> Sent {
        self.desk.recorder.borrow_mut().offered(due);
        let sent = match self.desk.plan.options.scenario {
            Scenario::Purchase => self.purchase(due).await,
            Scenario::Product | Scenario::Catalogue => self.read(due).await,
        };
        if sent == Sent::Accepted {
            self.backoff = Backoff::default();
        }
        sent
    }

    async fn purchase(&mut self, due: Instant) -> Sent {
        let desk = Rc::clone(&self.desk);
        let cart = desk.plan.carts.draw(&mut self.dice);
        let key = desk.plan.options.retry.then(|| self.next_key());
        let (mut from, mut renewed, mut lost) = (due, false, false);
        loop {
            let bearer = desk.customers[self.customer as usize].bearer();
            let answer = self.post(cart, &bearer, key.as_ref()).await;
            let now = Instant::now();
            let again = match answer {
                Ok(answer) if answer.status == StatusCode::CREATED => {
                    return self.bought(due, cart, &answer, now);
                }
                Ok(answer) if answer.status == StatusCode::UNAUTHORIZED && !renewed => {
                    renewed = true;
                    if desk.customers[self.customer as usize].renew(&bearer, &mut self.asker).await {
                        continue;
                    }
                    desk.recorder.borrow_mut().failed(now, Failure::Status(401));
                    None
                }
                Ok(answer) => {
                    let status = answer.status;
                    if is_busy(status) {
                        desk.recorder.borrow_mut().refused(from, now, status.as_u16());
                    } else {
                        desk.recorder.borrow_mut().failed(now, Failure::Status(status.as_u16()));
                        // It went wrong somewhere inside: perhaps behind the place where it was accepted.
                        lost |= status.is_server_error();
                    }
                    (is_busy(status) || status == StatusCode::CONFLICT).then_some(answer.retry_after)
                }
                Err(failure) => {
                    desk.recorder.borrow_mut().failed(now, failure);
                    lost |= failure != Failure::NoConnection;
                    Some(None)
                }
            };
            let asked = again.flatten();
            let pause = self.backoff.next(asked);
            if key.is_none() || again.is_none() {
                if lost {
                    self.desk.unknown(cart, self.customer, now);
                }
                return Sent::Failed(pause);
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = desk.over.cancelled() => {
                    if lost {
                        self.desk.unknown(cart, self.customer, now);
                    }
                    return Sent::Failed(pause);
                }
            }
            from = Instant::now();
            desk.recorder.borrow_mut().resent(from);
        }
    }

    fn bought(&mut self, due: Instant, cart: u32, answer: &Answer, now: Instant) -> Sent {
        let Ok(Bought { purchase_id }) = serde_json::from_slice(&answer.body) else {
            self.desk.recorder.borrow_mut().failed(now, Failure::Unreadable);
            self.desk.unknown(cart, self.customer, now);
            return Sent::Failed(self.backoff.next(None));
        };
        let purchase = Accepted { due, cart, customer: self.customer, buyer: self.place };
        self.desk.accepted(purchase_id, purchase, now);
        Sent::Accepted
    }

    async fn read(&mut self, due: Instant) -> Sent {
        let path = self.paths[self.dice.usize(0..self.paths.len())].clone();
        let request = request(&self.desk.plan.options.url, Method::GET, path, None, Bytes::new());
        let answer = self.asker.send(request).await;
        let now = Instant::now();
        let mut recorder = self.desk.recorder.borrow_mut();
        let asked = match answer {
            Ok(answer) if answer.status == StatusCode::OK => {
                recorder.accepted(due, now);
                return Sent::Accepted;
            }
            Ok(answer) if is_busy(answer.status) => {
                recorder.refused(due, now, answer.status.as_u16());
                answer.retry_after
            }
            Ok(answer) => {
                recorder.failed(now, Failure::Status(answer.status.as_u16()));
                None
            }
            Err(failure) => {
                recorder.failed(now, failure);
                None
            }
        };
        Sent::Failed(self.backoff.next(asked))
    }

    async fn post(
        &mut self,
        cart: u32,
        bearer: &HeaderValue,
        key: Option<&HeaderValue>,
    ) -> Result<Answer, Failure> {
        let plan = &self.desk.plan;
        let path = Uri::from_static("/api/purchase");
        let body = plan.carts.all()[cart as usize].body.clone();
        let mut request = request(&plan.options.url, Method::POST, path, Some(bearer), body);
        if let Some(key) = key {
            request.headers_mut().insert(IDEMPOTENCY_KEY, key.clone());
        }
        self.asker.send(request).await
    }

    fn next_key(&mut self) -> HeaderValue {
        self.keys += 1;
        let key = format!("{}-{}", self.key_prefix, self.keys);
        HeaderValue::try_from(key).expect("letters, digits and hyphens are a header value")
    }
}
