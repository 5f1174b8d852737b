//! Before the load: customers are signed up, products are created.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use http::{HeaderValue, Method, StatusCode, Uri};
use serde::{Deserialize, Serialize};

use crate::ask::{Asker, is_busy};
use crate::backoff::Backoff;
use crate::carts::Product;
use crate::record::Failure;
use crate::target::Target;

/// Customers that are signed up at a time: each keeps a core of the shop busy for a while.
const SIGN_UPS_AT_A_TIME: usize = 8;
/// Products that are created at a time.
const PRODUCTS_AT_A_TIME: usize = 32;
/// How long a shop may say that it is busy.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a request may take here.
const LIMIT: Duration = Duration::from_secs(30);

/// Why there is nothing to put load on.
#[derive(Debug, thiserror::Error)]
pub enum SetupFailed {
    /// There is no answer.
    #[error("{target} does not answer {what}: {failure}")]
    NoAnswer {
        /// The shop.
        target: Target,
        /// What was asked.
        what: &'static str,
        /// What went wrong.
        failure: String,
    },
    /// It is answered in a way that does not help.
    #[error("{target} answers {what} with {status}: {body}")]
    Refused {
        /// The shop.
        target: Target,
        /// What was asked.
        what: &'static str,
        /// The status code.
        status: u16,
        /// The beginning of the body.
        body: String,
    },
}

/// A customer's tokens.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Tokens {
    pub(crate) access_token: String,
    pub(crate) refresh_token: String,
}

#[derive(Serialize)]
struct SignUp {
    password: String,
    firstname: &'static str,
    lastname: String,
    email: String,
    address: &'static str,
    phone_number: String,
}

#[derive(Serialize)]
struct NewProduct<'a> {
    name: String,
    description: &'a str,
    brand_name: &'a str,
    price: u64,
    inventory: u64,
}

#[derive(Deserialize)]
struct Created {
    id: u64,
}

/// Signs up so many customers. `run` tells their names from those of any other run.
///
/// # Errors
/// [`SetupFailed`], the first one.
pub(crate) async fn customers(target: &Target, count: u32, run: u64) -> Result<Vec<Tokens>, SetupFailed> {
    let sign_up = async |number| {
        let customer = SignUp {
            password: format!("load-{run:016x}"),
            firstname: "Load",
            lastname: format!("Customer {number}"),
            email: format!("load-{run:016x}-{number}@example.com"),
            address: "1 Load Road",
            // As unlikely to be somebody's as the run's number is to come twice.
            phone_number: format!("{:09}{number:06}", run % 1_000_000_000),
        };
        let body = serde_json::to_vec(&customer).expect("texts can be written as JSON");
        let path = Uri::from_static("/api/account/auth/signup");
        created(&mut Asker::new(target, LIMIT), "a sign-up", path, None, body.into()).await
    };
    stream::iter(0..count).map(sign_up).buffered(SIGN_UPS_AT_A_TIME).try_collect().await
}

/// Creates products, and gives them their numbers.
///
/// # Errors
/// [`SetupFailed`], the first one.
pub(crate) async fn products(
    target: &Target,
    products: &mut [Product],
    admin_token: Option<&str>,
    run: u64,
) -> Result<(), SetupFailed> {
    let bearer = admin_token.and_then(|token| HeaderValue::try_from(format!("bearer {token}")).ok());
    let bearer = bearer.as_ref();
    let part = products.len().div_ceil(PRODUCTS_AT_A_TIME).max(1);
    let create = async |(part_number, part): (usize, &mut [Product])| {
        let mut asker = Asker::new(target, LIMIT);
        for (number, product) in part.iter_mut().enumerate() {
            let new = NewProduct {
                name: format!("Load {:08x}-{part_number}-{number}", run as u32),
                description: "A product that is bought by a load generator",
                brand_name: "Load",
                price: product.price,
                inventory: product.stock,
            };
            let body = serde_json::to_vec(&new).expect("texts and numbers can be written as JSON");
            let path = Uri::from_static("/api/product");
            let Created { id } = created(&mut asker, "a new product", path, bearer, body.into()).await?;
            product.id = id;
        }
        Ok(())
    };
    stream::iter(products.chunks_mut(part).enumerate())
        .map(create)
        .buffer_unordered(PRODUCTS_AT_A_TIME)
        .try_collect()
        .await
}

async fn created<T: for<'de> Deserialize<'de>>(
    asker: &mut Asker,
    what: &'static str,
    path: Uri,
    bearer: Option<&HeaderValue>,
    body: Bytes,
) -> Result<T, SetupFailed> {
    let (begun, mut backoff) = (Instant::now(), Backoff::default());
    let target = asker.target().clone();
    loop {
        let answer = match asker.ask(Method::POST, path.clone(), bearer, body.clone()).await {
            Ok(answer) => answer,
            Err(failure) => {
                return Err(SetupFailed::NoAnswer { target, what, failure: failure.to_string() });
            }
        };
        if is_busy(answer.status) && begun.elapsed() < PATIENCE {
            tokio::time::sleep(backoff.next(answer.retry_after)).await;
            continue;
        }
        let (status, body) = (answer.status.as_u16(), String::from_utf8_lossy(&answer.body));
        if answer.status != StatusCode::CREATED {
            let body = body.chars().take(200).collect();
            return Err(SetupFailed::Refused { target, what, status, body });
        }
        return serde_json::from_slice(&answer.body).map_err(|_| SetupFailed::NoAnswer {
            target,
            what,
            failure: Failure::Unreadable.to_string(),
        });
    }
}
