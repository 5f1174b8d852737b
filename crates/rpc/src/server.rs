//! What is offered: `auth.AuthService`, `product.ProductService` and reflection, as routes for the listener that serves the rest of
//! the API too. Health is in `health.rs`.

use axum::Router;
use axum::extract::Request as Call;
use axum::middleware::{Next, from_fn};
use axum::response::Response as Answer;
use serve::auth::{AuthError, Verifier};
use serve::deadline;
use shop::calls::{CheckProducts, GetProducts, ProductDetails, Unavailable};
use tokio::time::{Instant, timeout_at};
use tonic::{Request, Response, Status};
use tonic_reflection::pb::{v1, v1alpha};
use tonic_reflection::server::Builder;

use crate::generated::DESCRIPTORS;
use crate::generated::auth::auth_service_server::{AuthService, AuthServiceServer};
use crate::generated::auth::{AuthPayload, AuthResponse};
use crate::generated::product::product_service_server::{ProductService, ProductServiceServer};
use crate::generated::product::{
    CheckProductsRequest, CheckProductsResponse, GetProductsRequest, Product, ProductStatus, Products,
    Status as Existence,
};

/// Products in one question at most: more than any cart has.
const MAX_PRODUCTS: usize = 1_000;

/// Everything that `auth.AuthService` answers.
pub fn auth_service(verifier: Verifier) -> Router {
    in_time(
        Router::new().route_service("/auth.AuthService/{method}", AuthServiceServer::new(Tokens(verifier))),
    )
}

/// Everything that `product.ProductService` answers.
pub fn product_service(check: CheckProducts, get: GetProducts) -> Router {
    let catalogue = ProductServiceServer::new(Catalogue { check, get });
    in_time(Router::new().route_service("/product.ProductService/{method}", catalogue))
}

/// `grpc.reflection.v1.ServerReflection`, which says what is offered, and the same under the name that it had before,
/// `grpc.reflection.v1alpha.ServerReflection`: some clients know only that.
pub fn reflection() -> Router {
    let described = || {
        Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(v1::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(v1alpha::FILE_DESCRIPTOR_SET)
    };
    const GENERATED: &str = "the descriptors are those that the code was generated from";
    let of_today = described().build_v1().expect(GENERATED);
    let of_before = described().build_v1alpha().expect(GENERATED);
    in_time(
        Router::new()
            .route_service("/grpc.reflection.v1.ServerReflection/{method}", of_today)
            .route_service("/grpc.reflection.v1alpha.ServerReflection/{method}", of_before),
    )
}

/// Ends calls whose deadline has passed.
pub(crate) fn in_time(calls: Router) -> Router {
    calls.layer(from_fn(answer_in_time))
}

async fn answer_in_time(call: Call, next: Next) -> Answer {
    match deadline::of(call.headers()) {
        Ok(None) => next.run(call).await,
        Ok(Some(deadline)) if deadline <= Instant::now() => {
            Status::deadline_exceeded(deadline::EXCEEDED).into_http()
        }
        Ok(Some(deadline)) => match timeout_at(deadline, next.run(call)).await {
            Ok(answer) => answer.map(|messages| deadline::bounded(messages, deadline)),
            Err(_) => Status::deadline_exceeded(deadline::EXCEEDED).into_http(),
        },
        Err(invalid) => Status::invalid_argument(invalid.to_string()).into_http(),
    }
}

struct Tokens(Verifier);

#[tonic::async_trait]
impl AuthService for Tokens {
    async fn auth(&self, request: Request<AuthPayload>) -> Result<Response<AuthResponse>, Status> {
        match self.0.authenticate(&request.get_ref().access_token).await {
            Ok(claims) => Ok(Response::new(AuthResponse { customer_id: claims.customer_id, expired: false })),
            Err(AuthError::Expired) => Ok(Response::new(AuthResponse { customer_id: 0, expired: true })),
            Err(refused @ (AuthError::Missing | AuthError::Invalid | AuthError::UnknownKey)) => {
                Err(Status::unauthenticated(refused.to_string()))
            }
        }
    }
}

struct Catalogue {
    check: CheckProducts,
    get: GetProducts,
}

#[tonic::async_trait]
impl ProductService for Catalogue {
    async fn check_products(
        &self,
        request: Request<CheckProductsRequest>,
    ) -> Result<Response<CheckProductsResponse>, Status> {
        let items = request.into_inner().cart_items;
        let ids: Vec<u64> = items.iter().map(|item| item.product_id).collect();
        let prices = self.check.ask(few(ids)?).await.map_err(unavailable)?;
        let status = |(item, price): (&crate::generated::product::CartItem, Option<i64>)| ProductStatus {
            product_id: item.product_id,
            price: price.unwrap_or(0),
            status: if price.is_some() { Existence::Ok } else { Existence::NotFound } as i32,
        };
        let product_statuses = items.iter().zip(prices).map(status).collect();
        Ok(Response::new(CheckProductsResponse { product_statuses }))
    }

    async fn get_products(&self, request: Request<GetProductsRequest>) -> Result<Response<Products>, Status> {
        let known = self.get.ask(few(request.into_inner().product_ids)?).await.map_err(unavailable)?;
        let product = |details: ProductDetails| {
            let ProductDetails { id, name, description, brand_name, inventory, price } = details;
            Product { product_id: id, product_name: name, description, brand_name, inventory, price }
        };
        Ok(Response::new(Products { products: known.into_iter().map(product).collect() }))
    }
}

fn few(ids: Vec<u64>) -> Result<Vec<u64>, Status> {
    match ids.len() {
        0..=MAX_PRODUCTS => Ok(ids),
        count => Err(Status::invalid_argument(format!("{count} products, {MAX_PRODUCTS} at most"))),
    }
}

/// The reason is for the log: it may name servers.
fn unavailable(error: Unavailable) -> Status {
    tracing::warn!(%error, "a question over gRPC got no answer");
    Status::unavailable(format!("{} is not available", error.service))
}
