//! The HTTP door: `/api/account/...`.
//!
//! A handler parses, asks the store, answers. Everything here is about one customer, so no answer may be
//! kept by a cache on the way.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::Router;
use axum::extract::{ConnectInfo, FromRef, FromRequestParts, State};
use axum::middleware::map_response;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use db::ids::Ids;
use http::StatusCode;
use http::header::{CACHE_CONTROL, HeaderValue};
use http::request::Parts;
use serde::{Deserialize, Serialize};
use serve::auth::{AuthError, Customer, Verifier};
use serve::error::Msg;
use serve::keys::JWKS_PATH;
use serve::{ApiError, Json};
use telemetry::Registry;
use telemetry::metrics::OutcomeCounter;

use crate::limits::Limiter;
use crate::model::{Email, Password, Person, Shipping};
use crate::password::Passwords;
use crate::store::{SignUp, Store, is_duplicate};
use crate::tokens::{Issuer, RefreshToken, Verdict};

/// All that the handlers work with.
pub(crate) struct Service {
    pub(crate) store: Store,
    pub(crate) ids: Ids,
    pub(crate) verifier: Verifier,
    pub(crate) issuer: Issuer,
    pub(crate) passwords: Passwords,
    pub(crate) limiter: Limiter,
    pub(crate) metrics: Metrics,
}

/// `account_logins_total{outcome}` and `account_refreshes_total{outcome}`.
pub(crate) struct Metrics {
    logins: OutcomeCounter,
    refreshes: OutcomeCounter,
}

impl Metrics {
    pub(crate) fn new(registry: &Registry) -> Metrics {
        Metrics {
            logins: OutcomeCounter::new(registry, "account_logins", "Logins tried"),
            refreshes: OutcomeCounter::new(registry, "account_refreshes", "Refresh tokens presented"),
        }
    }
}

type Shared = Arc<Service>;

#[derive(Clone)]
struct Door(Shared);

impl FromRef<Door> for Verifier {
    fn from_ref(door: &Door) -> Verifier {
        door.0.verifier.clone()
    }
}

impl FromRef<Door> for Shared {
    fn from_ref(door: &Door) -> Shared {
        door.0.clone()
    }
}

pub(crate) fn router(service: Shared) -> Router {
    Router::new()
        .route("/api/account/auth/signup", post(sign_up))
        .route("/api/account/auth/login", post(log_in))
        .route("/api/account/auth/refresh", post(refresh))
        .route("/api/account/auth/logout", post(log_out))
        .route("/api/account/info/person", get(get_person).put(put_person))
        .route("/api/account/info/shipping", get(get_shipping).put(put_shipping))
        .layer(map_response(no_store))
        .route(JWKS_PATH, get(public_keys))
        .with_state(Door(service))
}

/// The keys that access tokens are verified with, for whoever wants to. Nobody may keep the answer: it is asked for when a new key is
/// looked for.
async fn public_keys(State(service): State<Shared>) -> impl IntoResponse {
    ([(CACHE_CONTROL, HeaderValue::from_static("no-cache"))], Json(service.issuer.public_keys().to_jwks()))
}

/// RFC 6749, section 5.1, asks it of token answers.
async fn no_store(mut response: Response) -> Response {
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// The client's address, where the server knows it.
struct Client(Option<IpAddr>);

impl<S: Send + Sync> FromRequestParts<S> for Client {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Client, Self::Rejection> {
        Ok(Client(parts.extensions.get().map(|ConnectInfo(peer): &ConnectInfo<SocketAddr>| peer.ip())))
    }
}

#[derive(Serialize)]
struct TokenPair {
    refresh_token: String,
    access_token: String,
}

impl Service {
    fn pair(&self, customer_id: u64, refresh_token: &RefreshToken) -> Result<TokenPair, ApiError> {
        let access_token = self.issuer.access_token(customer_id).map_err(ApiError::internal)?;
        Ok(TokenPair { refresh_token: refresh_token.to_text(), access_token })
    }

    async fn new_id(&self) -> Result<u64, ApiError> {
        let mut ids = self.ids.take(1).await?;
        ids.next().ok_or_else(|| ApiError::internal("one id was asked for and none was given"))
    }
}

fn duplicate_or(error: db::Error) -> ApiError {
    if is_duplicate(&error) { ApiError::bad_request("duplicate entry") } else { error.into() }
}

#[derive(Deserialize)]
struct SignUpBody {
    password: String,
    firstname: String,
    lastname: String,
    email: String,
    address: String,
    phone_number: String,
}

async fn sign_up(
    State(service): State<Shared>,
    Json(body): Json<SignUpBody>,
) -> Result<(StatusCode, Json<TokenPair>), ApiError> {
    let password = Password::parse(body.password)?;
    let person = Person::parse(&body.firstname, &body.lastname, &body.email)?;
    let shipping = Shipping::parse(&body.address, &body.phone_number)?;

    let password_hash = service.passwords.hash(password).await?;
    let (customer_id, family_id) = (service.new_id().await?, service.new_id().await?);
    let (refresh_token, token) = service.issuer.refresh_token();
    let now = service.issuer.now_seconds();
    let new = SignUp { customer_id, family_id, person, shipping, password_hash, token, now };
    // Signed before the customer exists, so that nothing can fail once it does.
    let pair = service.pair(customer_id, &refresh_token)?;
    service.store.sign_up(new).await.map_err(duplicate_or)?;
    Ok((StatusCode::CREATED, Json(pair)))
}

#[derive(Deserialize)]
struct LogInBody {
    email: String,
    password: String,
}

async fn log_in(
    State(service): State<Shared>,
    Client(client): Client,
    Json(body): Json<LogInBody>,
) -> Result<Json<TokenPair>, ApiError> {
    let email = Email::parse(&body.email)?;
    let password = Password::attempt(body.password)?;
    if let Err(too_often) = service.limiter.check(client, &email) {
        service.metrics.logins.count("limited");
        return Err(ApiError::too_many_requests(too_often.retry_after_seconds));
    }

    let credentials = service.store.credentials(email.key().to_owned()).await?;
    let (customer_id, stored) = credentials.map(|known| (known.customer_id, known.password_hash)).unzip();
    let proven = service.passwords.verify(password, stored).await?;
    let Some(customer_id) = customer_id.filter(|_| proven) else {
        service.metrics.logins.count("failed");
        return Err(ApiError::unauthorized("authentication failed"));
    };

    let (refresh_token, token) = service.issuer.refresh_token();
    let pair = service.pair(customer_id, &refresh_token)?;
    service.store.begin_family(service.new_id().await?, customer_id, token).await?;
    service.metrics.logins.count("success");
    Ok(Json(pair))
}

#[derive(Deserialize)]
struct RefreshTokenBody {
    refresh_token: String,
}

async fn refresh(
    State(service): State<Shared>,
    Json(body): Json<RefreshTokenBody>,
) -> Result<Json<TokenPair>, ApiError> {
    let presented = RefreshToken::parse(&body.refresh_token).ok_or(AuthError::Invalid)?;
    let (refresh_token, successor) = service.issuer.refresh_token();
    let now = service.issuer.now_seconds();
    match service.store.rotate(presented.hash(), successor, now).await? {
        Verdict::Rotate { customer_id, .. } => {
            service.metrics.refreshes.count("success");
            service.pair(customer_id, &refresh_token).map(Json)
        }
        Verdict::Reuse { family_id } => {
            service.metrics.refreshes.count("reused");
            tracing::warn!(family_id, "a spent refresh token came again; its family is revoked");
            Err(AuthError::Invalid.into())
        }
        Verdict::Expired => {
            service.metrics.refreshes.count("expired");
            Err(AuthError::Expired.into())
        }
        Verdict::Invalid => {
            service.metrics.refreshes.count("invalid");
            Err(AuthError::Invalid.into())
        }
    }
}

async fn log_out(
    State(service): State<Shared>,
    Customer(customer_id): Customer,
    Json(body): Json<RefreshTokenBody>,
) -> Result<Json<Msg>, ApiError> {
    let presented = RefreshToken::parse(&body.refresh_token).ok_or(AuthError::Invalid)?;
    let now = service.issuer.now_seconds();
    if service.store.log_out(presented.hash(), customer_id, now).await? {
        Ok(Msg::ok())
    } else {
        Err(AuthError::Invalid.into())
    }
}

#[derive(Serialize, Deserialize)]
struct PersonBody {
    firstname: String,
    lastname: String,
    email: String,
}

async fn get_person(
    State(service): State<Shared>,
    Customer(customer_id): Customer,
) -> Result<Json<PersonBody>, ApiError> {
    let person = service.store.customer(customer_id).await?.ok_or(AuthError::Invalid)?;
    Ok(Json(PersonBody { firstname: person.firstname, lastname: person.lastname, email: person.email }))
}

async fn put_person(
    State(service): State<Shared>,
    Customer(customer_id): Customer,
    Json(body): Json<PersonBody>,
) -> Result<Json<Msg>, ApiError> {
    let person = Person::parse(&body.firstname, &body.lastname, &body.email)?;
    let known = service.store.set_person(customer_id, person).await.map_err(duplicate_or)?;
    if known { Ok(Msg::ok()) } else { Err(AuthError::Invalid.into()) }
}

#[derive(Serialize, Deserialize)]
struct ShippingBody {
    address: String,
    phone_number: String,
}

async fn get_shipping(
    State(service): State<Shared>,
    Customer(customer_id): Customer,
) -> Result<Json<ShippingBody>, ApiError> {
    let shipping = service.store.customer(customer_id).await?.ok_or(AuthError::Invalid)?;
    Ok(Json(ShippingBody { address: shipping.address, phone_number: shipping.phone_number }))
}

async fn put_shipping(
    State(service): State<Shared>,
    Customer(customer_id): Customer,
    Json(body): Json<ShippingBody>,
) -> Result<Json<Msg>, ApiError> {
    let shipping = Shipping::parse(&body.address, &body.phone_number)?;
    let known = service.store.set_shipping(customer_id, shipping).await.map_err(duplicate_or)?;
    if known { Ok(Msg::ok()) } else { Err(AuthError::Invalid.into()) }
}
