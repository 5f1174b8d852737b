//! Requests whose connections died: whether they had an effect is told by their customers' streams, and by what the shop shows of
//! those purchases.

use std::collections::BTreeSet;

use bytes::Bytes;
use http::{HeaderValue, Method, StatusCode};
use serde::Deserialize;

use crate::ask::{Asker, path_of};
use crate::desk::Plan;
use crate::worker::Harvest;

#[derive(Deserialize)]
struct Purchase {
    items: Vec<Item>,
}

#[derive(Deserialize)]
struct Order {
    purchased_items: Vec<Item>,
}

#[derive(Deserialize)]
struct Item {
    product_id: u64,
}

/// Finds out what became of requests of unknown effect, as far as that can be found out. How many it was.
pub(crate) async fn resolve(plan: &Plan, harvest: &mut Harvest) -> u64 {
    if harvest.ledger.unknown.is_empty() {
        return 0;
    }
    let mut asker = Asker::new(&plan.options.url, plan.options.request_timeout);
    let mut resolved = 0;
    for (id, customer, outcome) in std::mem::take(&mut harvest.unanswered) {
        let bearer = &harvest.bearers[customer as usize];
        let Some(bought) = products_of(&mut asker, bearer, id).await else { continue };
        let has_products = |cart: u32| {
            let cart = &plan.carts.all()[cart as usize];
            let products = cart.products.iter().map(|place| plan.products.all()[*place as usize].id);
            products.collect::<BTreeSet<u64>>() == bought
        };
        resolved += u64::from(harvest.ledger.resolve(id, customer, outcome, has_products));
    }
    resolved
}

/// The products of a purchase, from the purchase itself or, in a shop that does not show those, from its order.
async fn products_of(asker: &mut Asker, bearer: &HeaderValue, id: u64) -> Option<BTreeSet<u64>> {
    for kind in ["purchase", "order"] {
        let answer = asker.ask(Method::GET, path_of(kind, id), Some(bearer), Bytes::new()).await.ok()?;
        if answer.status != StatusCode::OK {
            continue;
        }
        let items = match kind {
            "purchase" => serde_json::from_slice::<Purchase>(&answer.body).ok()?.items,
            _ => serde_json::from_slice::<Order>(&answer.body).ok()?.purchased_items,
        };
        return Some(items.into_iter().map(|item| item.product_id).collect());
    }
    None
}
