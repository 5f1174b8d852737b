//! Payments over HTTP.

use axum::Router;
use axum::extract::{FromRef, State};
use axum::routing::get;
use serde::Serialize;
use serve::auth::{Customer, Verifier};
use serve::error::ApiError;
use serve::extract::{Id, Json};

use crate::copies::Copies;
use crate::store::{self, Payment};

#[derive(Clone)]
pub(crate) struct Door {
    pub(crate) db: db::Db,
    pub(crate) copies: Option<Copies>,
    pub(crate) verifier: Verifier,
}

impl FromRef<Door> for Verifier {
    fn from_ref(door: &Door) -> Verifier {
        door.verifier.clone()
    }
}

pub(crate) fn router(door: Door) -> Router {
    Router::new().route("/api/payment/{id}", get(show)).with_state(door)
}

#[derive(Serialize)]
struct Shown {
    id: u64,
    currency_code: String,
    amount: i64,
}

/// Somebody else's payment is answered like one that does not exist, and so is an id that no payment can have.
async fn show(
    customer: Customer,
    State(door): State<Door>,
    id: Result<Id, ApiError>,
) -> Result<Json<Shown>, ApiError> {
    let not_found = || ApiError::not_found("payment not found");
    let Customer(customer_id) = customer;
    let Id(id) = id.map_err(|_| not_found())?;
    let found = match &door.copies {
        Some(copies) => copies.payment(&door.db, id).await?,
        None => door.db.read(move |tx| store::by_id(tx, id)).await?,
    };
    let own = found.filter(|payment| payment.customer_id == customer_id);
    let Payment { currency_code, amount, .. } = own.ok_or_else(not_found)?;
    Ok(Json(Shown { id, currency_code, amount }))
}
