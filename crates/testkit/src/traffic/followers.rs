//! Following a customer's stream of events, from its beginning, through every crash.

use std::sync::Arc;
use std::time::Duration;

use super::ledger::Look;
use super::{Address, Customer, Ledger};
use crate::client::Client;
use crate::dice::Dice;

/// The id of one who has been sent nothing: the stream begins with the first purchase ever.
const FROM_THE_BEGINNING: &str = "0";
/// How long a stream may be silent before it is looked whether all is over.
const LISTEN: Duration = Duration::from_millis(200);
/// Out of a hundred announced effects, those that are looked for at once.
const SPOT_CHECK_PERCENT: u64 = 50;

/// Follows the stream until all is over: after each break it goes on behind the last event that came.
pub async fn follow_until_closed(
    mut address: Address,
    customer: Customer,
    ledger: Arc<Ledger>,
    mut dice: Dice,
) {
    let mut last = FROM_THE_BEGINNING.to_owned();
    while let Some(client) = address.for_something_begun().await {
        let mut events = match client.events(&customer.token, Some(&last)).await {
            Ok(events) => events,
            Err(crate::ClientError::Refused(answer)) if answer.status != 503 => {
                ledger.fault(format!("I12: the stream behind {last:?} was refused: {answer:?}"));
                address.moved().await;
                continue;
            }
            Err(_) => {
                address.moved().await;
                continue;
            }
        };
        ledger.stream_opened();
        while !events.ended() && !address.is_closed() {
            let Some(event) = events.next(LISTEN).await else { continue };
            let look = ledger.told(customer.number, &event);
            last = event.id;
            if let Some(look) = look.filter(|_| dice.chance(SPOT_CHECK_PERCENT)) {
                spot_check(&client, &customer, &ledger, look).await;
            }
        }
    }
}

/// What says "not now" and nothing about what was asked for.
fn is_no_answer(status: u16) -> bool {
    matches!(status, 502 | 503)
}

/// An event never precedes its effect. No answer is no answer: the shop may just have died, or a part of it.
async fn spot_check(client: &Client, customer: &Customer, ledger: &Ledger, look: Look) {
    let token = Some(customer.token.as_str());
    let status = async |path: String| {
        let status = client.get(&path, token).await.ok()?.status;
        (!is_no_answer(status)).then_some(status)
    };
    let state = async |id: u64| {
        let answer = client.get(&format!("/api/purchase/{id}"), token).await.ok()?;
        match answer.status {
            200 => answer.json()["state"].as_str().map(str::to_owned),
            status if is_no_answer(status) => None,
            status => Some(format!("answered {status}")),
        }
    };
    match look {
        Look::AtOrder(id) => match status(format!("/api/order/{id}")).await {
            // One that is being rolled back may be gone already; whether it was, its end tells.
            Some(404) => ledger.order_missing(id),
            Some(200) | None => {}
            Some(other) => ledger.fault(format!("order {id} was announced and is answered {other}")),
        },
        Look::AtEnd { purchase: id, succeeded } => {
            if let Some(state) = state(id).await
                && !matches!(
                    (succeeded, state.as_str()),
                    (true, "SUCCEEDED") | (false, "FAILED" | "CANCELLED")
                )
            {
                ledger.fault(format!("I12: the end of purchase {id} was announced, and it is {state}"));
            }
            if succeeded
                && let Some(other) = status(format!("/api/payment/{id}")).await.filter(|it| *it != 200)
            {
                ledger.fault(format!("I12: payment {id} was announced and is answered {other}"));
            }
        }
    }
    ledger.spot_checked();
}
