//! Asking for the ends of purchases whose events did not come.

use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::join_all;
use http::{HeaderValue, Method, StatusCode};
use serde::Deserialize;

use crate::ask::{Asker, path_of};
use crate::customer::Customer;
use crate::desk::Desk;

/// How often it is looked whether somebody has to be asked for.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Purchases that are asked for at each look, at most.
const MOST_AT_A_TIME: usize = 256;
/// Connections that they are asked for on.
const ASKERS: usize = 4;

#[derive(Deserialize)]
struct Shown<'a> {
    state: &'a str,
}

/// Asks until all is over.
pub(crate) async fn poll(desk: Rc<Desk>) {
    let options = &desk.plan.options;
    let mut askers: Vec<Asker> =
        (0..ASKERS).map(|_| Asker::new(&options.url, options.request_timeout)).collect();
    let mut look = tokio::time::interval(LOOK_EVERY);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let work = async {
        loop {
            look.tick().await;
            let due = desk.tracker.borrow_mut().to_ask(Instant::now(), MOST_AT_A_TIME);
            let part = due.len().div_ceil(ASKERS).max(1);
            let desk = &desk;
            join_all(askers.iter_mut().zip(due.chunks(part)).map(async |(asker, part)| {
                for (id, customer) in part {
                    if let Some(committed) = ask(asker, &desk.customers[*customer as usize], *id).await {
                        desk.answered(*id, committed, Instant::now());
                    }
                }
            }))
            .await;
        }
    };
    tokio::select! {
        () = work => {}
        () = desk.over.cancelled() => {}
    }
}

/// Whether a purchase was committed. None when it has not ended, or nobody knows.
async fn ask(asker: &mut Asker, customer: &Customer, id: u64) -> Option<bool> {
    let mut bearer = customer.bearer();
    let mut answer =
        asker.ask(Method::GET, path_of("purchase", id), Some(&bearer), Bytes::new()).await.ok()?;
    if answer.status == StatusCode::UNAUTHORIZED && customer.renew(&bearer, asker).await {
        bearer = customer.bearer();
        answer = asker.ask(Method::GET, path_of("purchase", id), Some(&bearer), Bytes::new()).await.ok()?;
    }
    match answer.status {
        StatusCode::OK => match serde_json::from_slice::<Shown<'_>>(&answer.body).ok()?.state {
            "SUCCEEDED" => Some(true),
            "FAILED" | "CANCELLED" => Some(false),
            _ => None,
        },
        // A shop that cannot be asked for a purchase. That it has a payment says that it was committed; that it has none, nothing.
        StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => paid(asker, &bearer, id).await,
        _ => None,
    }
}

async fn paid(asker: &mut Asker, bearer: &HeaderValue, id: u64) -> Option<bool> {
    let answer = asker.ask(Method::GET, path_of("payment", id), Some(bearer), Bytes::new()).await.ok()?;
    (answer.status == StatusCode::OK).then_some(true)
}
