//! Orders over HTTP.

use std::collections::HashMap;

use axum::Router;
use axum::extract::{FromRef, State};
use axum::routing::get;
use serde::Serialize;
use serve::auth::{Customer, Verifier};
use serve::error::{ApiError, RETRY_AFTER_SECONDS};
use serve::extract::{Id, Json};
use shop::calls::{GetProducts, ProductDetails};

use crate::copies::Copies;
use crate::store::{self, Line};

#[derive(Clone)]
pub(crate) struct Door {
    pub(crate) db: db::Db,
    pub(crate) copies: Option<Copies>,
    pub(crate) verifier: Verifier,
    pub(crate) products: GetProducts,
}

impl FromRef<Door> for Verifier {
    fn from_ref(door: &Door) -> Verifier {
        door.verifier.clone()
    }
}

pub(crate) fn router(door: Door) -> Router {
    Router::new().route("/api/order/{id}", get(show)).with_state(door)
}

#[derive(Serialize)]
struct Shown {
    id: u64,
    purchased_items: Vec<Item>,
}

#[derive(Serialize)]
struct Item {
    product_id: u64,
    name: String,
    description: String,
    brand_name: String,
    price: i64,
    amount: i64,
}

/// Somebody else's order is answered like one that does not exist, and so is an id that no order can have.
async fn show(
    customer: Customer,
    State(door): State<Door>,
    id: Result<Id, ApiError>,
) -> Result<Json<Shown>, ApiError> {
    let not_found = || ApiError::not_found("order not found");
    let Customer(customer_id) = customer;
    let Id(id) = id.map_err(|_| not_found())?;
    let found = match &door.copies {
        Some(copies) => copies.order(&door.db, id).await?,
        None => door.db.read(move |tx| store::by_id(tx, id)).await?,
    };
    let own = found.filter(|order| order.customer_id == customer_id).ok_or_else(not_found)?;
    let lines: Vec<Line> = serde_json::from_str(&own.items)
        .map_err(|error| ApiError::internal(format_args!("the lines of order {id}: {error}")))?;
    let purchased_items = describe(lines, &door.products).await?;
    Ok(Json(Shown { id, purchased_items }))
}

/// Puts names to what was bought. The price stays the one that was paid.
async fn describe(lines: Vec<Line>, products: &GetProducts) -> Result<Vec<Item>, ApiError> {
    let ids = lines.iter().map(|(product_id, _, _)| *product_id).collect();
    let known = products.ask(ids).await.map_err(|unavailable| {
        tracing::warn!(%unavailable, "the products of an order cannot be named");
        ApiError::unavailable("the catalogue is not available", RETRY_AFTER_SECONDS)
    })?;
    let mut known: HashMap<u64, ProductDetails> =
        known.into_iter().map(|product| (product.id, product)).collect();
    let item = |(product_id, amount, price): Line| match known.remove(&product_id) {
        Some(ProductDetails { name, description, brand_name, .. }) => {
            Ok(Item { product_id, name, description, brand_name, price, amount })
        }
        None => Err(ApiError::internal(format_args!("product {product_id} was sold and is unknown"))),
    };
    lines.into_iter().map(item).collect()
}
