//! The catalogue over HTTP.

use aws_lc_rs::constant_time;
use axum::Router;
use axum::extract::{FromRequestParts, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http::header::AUTHORIZATION;
use http::request::Parts;
use http::{HeaderMap, StatusCode};
use serde::{Deserialize, Serialize};
use serve::error::{ApiError, RETRY_AFTER_SECONDS};
use serve::extract::{Id, Json, Page};

use crate::cache::Known;
use crate::catalogue::CreateError;
use crate::store::{self, Product};
use crate::{CatalogWrite, MAX_AMOUNT, MAX_TEXT_CHARS, Service};

pub(crate) fn router(service: Service) -> Router {
    Router::new()
        .route("/api/product", post(create))
        .route("/api/product/{id}", get(show))
        .route("/api/products", get(list))
        .with_state(service)
}

#[derive(Deserialize)]
struct NewProduct {
    name: String,
    description: String,
    brand_name: String,
    price: i64,
    inventory: i64,
}

impl NewProduct {
    fn check(&self) -> Result<(), ApiError> {
        let texts =
            [("name", &self.name), ("description", &self.description), ("brand_name", &self.brand_name)];
        for (name, text) in texts {
            let length = text.chars().count();
            if text.trim().is_empty() || length > MAX_TEXT_CHARS {
                let problem = format!("{length} characters, 1 to {MAX_TEXT_CHARS} expected");
                return Err(ApiError::invalid_parameter(name, problem));
            }
        }
        for (name, value) in [("price", self.price), ("inventory", self.inventory)] {
            if !(0..=MAX_AMOUNT).contains(&value) {
                let problem = format!("{value}, 0 to {MAX_AMOUNT} expected");
                return Err(ApiError::invalid_parameter(name, problem));
            }
        }
        Ok(())
    }
}

impl From<CreateError> for ApiError {
    fn from(error: CreateError) -> ApiError {
        match error {
            CreateError::Ids(error) => error.into(),
            CreateError::Database(error) => error.into(),
            CreateError::TooLate => ApiError::unavailable(error.to_string(), RETRY_AFTER_SECONDS),
        }
    }
}

#[derive(Serialize)]
struct Created {
    id: u64,
}

async fn create(
    State(service): State<Service>,
    _: Writer,
    Json(new): Json<NewProduct>,
) -> Result<(StatusCode, Json<Created>), ApiError> {
    new.check()?;
    let NewProduct { name, description, brand_name, price, inventory } = new;
    let product = Product { id: 0, name, description, brand_name, price, inventory };
    let id = service.catalogue.create(product).await?;
    Ok((StatusCode::CREATED, Json(Created { id })))
}

/// A caller that may create products. An extractor, so that nobody else's body is looked at.
struct Writer;

impl FromRequestParts<Service> for Writer {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, service: &Service) -> Result<Writer, ApiError> {
        may_write(&service.write, &parts.headers).map(|()| Writer)
    }
}

/// Who may write: everybody, or who has the admin token.
fn may_write(write: &CatalogWrite, headers: &HeaderMap) -> Result<(), ApiError> {
    let CatalogWrite::Admin { token } = write else { return Ok(()) };
    let given = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    let given = given.and_then(|value| value.split_once(' '));
    match given {
        None => Err(ApiError::unauthorized("products are created with the admin token")),
        Some((scheme, given)) if scheme.eq_ignore_ascii_case("bearer") => {
            match constant_time::verify_slices_are_equal(given.trim().as_bytes(), token.as_bytes()) {
                Ok(()) => Ok(()),
                Err(_) => Err(ApiError::forbidden("this token may not create products")),
            }
        }
        Some(_) => Err(ApiError::unauthorized("the authorization scheme is not bearer")),
    }
}

#[derive(Serialize)]
struct Shown<'a> {
    id: u64,
    name: &'a str,
    description: &'a str,
    brand_name: &'a str,
    price: i64,
    inventory: i64,
}

async fn show(State(service): State<Service>, Id(id): Id) -> Result<Response, ApiError> {
    let found = service.catalogue.product(id).await?;
    let (product, inventory) = found.ok_or_else(|| ApiError::not_found("product not found"))?;
    let Known { name, description, brand_name, price, .. } = &*product;
    Ok(Json(Shown { id, name, description, brand_name, price: *price, inventory }).into_response())
}

#[derive(Serialize)]
struct Catalogs {
    catalogs: Vec<Line>,
}

#[derive(Serialize)]
struct Line {
    id: u64,
    name: String,
    inventory: i64,
    price: i64,
}

async fn list(State(service): State<Service>, page: Page) -> Result<Json<Catalogs>, ApiError> {
    let Page { offset, size } = page;
    let lines = service.catalogue.db.read(move |tx| store::list(tx, offset, size)).await?;
    let line = |store::Listed { id, name, inventory, price }| Line { id, name, inventory, price };
    Ok(Json(Catalogs { catalogs: lines.into_iter().map(line).collect() }))
}
