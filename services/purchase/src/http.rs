//! Purchases over HTTP: buy, follow, look up.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use axum::Router;
use axum::body::Body;
use axum::extract::{FromRef, FromRequestParts, RawQuery, State as Shared};
use axum::response::Response;
use axum::routing::{get, post};
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::request;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use saga::{Definition, Path};
use serde::{Deserialize, Serialize};
use serve::auth::{Customer, Verifier};
use serve::error::{ApiError, RETRY_AFTER_SECONDS};
use serve::extract::{Id, Json, Page};
use serve::random::Random;
use shop::calls::CheckProducts;
use shop::purchase::{Purchase, PurchaseStep};
use telemetry::TraceContext;
use telemetry::spans::{self, TRACEPARENT};
use tokio_util::sync::CancellationToken;
use wire::messages::decode_path;
use wire::time::Clock;

use crate::accept::{Accept, Accepted, NotAccepted, Request, millis, repeated};
use crate::admission::{Admission, Refused};
use crate::cursor::Cursor;
use crate::live::{Live, NoStream, Stopped};
use crate::model::{Cart, status_name};
use crate::reconcile::Reconciler;
use crate::store::{self, Key, Shown};
use crate::stream;

static IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
static TRACE: HeaderName = HeaderName::from_static(TRACEPARENT);

/// The longest Idempotency-Key, in characters.
const MAX_KEY_CHARS: usize = 255;
/// Purchases that a stream without a cursor looks back upon at most.
const MAX_LOOK_BACK: u32 = 1_000;
/// Purchases that are listed for an operator at most.
const MAX_LISTED_FOR_OPERATOR: u32 = 1_000;
/// The random bytes of a trace: its id and that of its first span.
const TRACE_BYTES: usize = 24;
/// How long a stream waits for what another replica has told its client already.
const REACH_PATIENCE: Duration = Duration::from_secs(5);

/// What the handlers work with. Every request gets a handle to it.
#[derive(Clone)]
pub(crate) struct Door(Arc<Parts>);

impl std::ops::Deref for Door {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0
    }
}

/// The parts of a [`Door`].
pub(crate) struct Parts {
    pub(crate) db: db::Db,
    pub(crate) clock: Clock,
    pub(crate) random: Random,
    pub(crate) verifier: Verifier,
    pub(crate) products: CheckProducts,
    pub(crate) definition: Arc<Definition<PurchaseStep>>,
    pub(crate) accept: Accept,
    pub(crate) admission: Admission,
    pub(crate) live: Live,
    pub(crate) max_cart_lines: usize,
    pub(crate) look_back: Duration,
    pub(crate) stop: CancellationToken,
}

impl FromRef<Door> for Verifier {
    fn from_ref(door: &Door) -> Verifier {
        door.verifier.clone()
    }
}

pub(crate) fn router(parts: Arc<Parts>) -> Router {
    Router::new()
        .route("/api/purchase", post(buy))
        .route("/api/purchase/result", get(results))
        .route("/api/purchase/{id}", get(show))
        .route("/api/purchases", get(list))
        .with_state(Door(parts))
}

/// For the admin listener: what was left to an operator, and trying it again.
pub(crate) fn operator_router(reconciler: Reconciler) -> Router {
    Router::new()
        .route("/purchases/parked", get(parked))
        .route("/purchases/{id}/retry", post(retry))
        .with_state(reconciler)
}

#[derive(Deserialize)]
struct PurchaseRequest {
    purchase_items: Vec<ItemRequest>,
    payment: PaymentRequest,
}

#[derive(Deserialize)]
struct ItemRequest {
    product_id: u64,
    amount: i64,
}

#[derive(Deserialize)]
struct PaymentRequest {
    currency_code: String,
}

#[derive(Serialize)]
struct Bought {
    purchase_id: u64,
}

/// The headers that say something about a purchase. Not all headers: they would be copied.
struct Wishes {
    key: Option<HeaderValue>,
    trace: Option<HeaderValue>,
}

impl<S: Sync> FromRequestParts<S> for Wishes {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut request::Parts, _: &S) -> Result<Wishes, Infallible> {
        let header = |name| parts.headers.get(name).cloned();
        Ok(Wishes { key: header(&IDEMPOTENCY_KEY), trace: header(&TRACE) })
    }
}

async fn buy(
    Customer(customer_id): Customer,
    Shared(door): Shared<Door>,
    wishes: Wishes,
    Json(request): Json<PurchaseRequest>,
) -> Result<(StatusCode, Json<Bought>), ApiError> {
    let items = request.purchase_items.iter().map(|item| (item.product_id, item.amount));
    let cart = Cart::new(items, request.payment.currency_code, door.max_cart_lines)?;
    let key = idempotency_key(wishes.key.as_ref(), &cart)?;
    let place = match door.admission.enter(customer_id) {
        Ok(place) => place,
        Err(refused) => return answer(earlier(&door, customer_id, key).await?.ok_or_else(|| full(refused))?),
    };
    let prices = door.products.ask(cart.product_ids()).await.map_err(|unavailable| {
        tracing::warn!(%unavailable, "a cart cannot be priced");
        ApiError::unavailable("the catalogue is not available", RETRY_AFTER_SECONDS)
    })?;
    let purchase = cart.priced(customer_id, &prices)?;
    let trace = trace(wishes.trace.as_ref(), &door.random).to_string();
    answer(door.accept.accept(Request { purchase, key, trace, place }).await?)
}

fn answer(accepted: Accepted) -> Result<(StatusCode, Json<Bought>), ApiError> {
    match accepted {
        Accepted::As(purchase_id) => Ok((StatusCode::CREATED, Json(Bought { purchase_id }))),
        Accepted::OtherRequest(id) => Err(ApiError::unprocessable(format!(
            "the Idempotency-Key was used for purchase {id}, which was another request"
        ))),
    }
}

fn full(refused: Refused) -> ApiError {
    match refused {
        Refused::Shop => ApiError::unavailable("too many purchases are under way", RETRY_AFTER_SECONDS),
        Refused::Customer => ApiError::too_many_requests(RETRY_AFTER_SECONDS),
    }
}

/// What a request is that repeats an accepted one: it needs no room, so it is answered even if there is none.
async fn earlier(door: &Door, customer_id: u64, key: Option<Key>) -> Result<Option<Accepted>, ApiError> {
    let Some(key) = key else { return Ok(None) };
    let lookup = key.key.clone();
    let found = door.db.read(move |tx| store::by_keys(tx, std::iter::once((customer_id, lookup.as_str()))));
    let found = found.await.map_err(|error: db::Error| ApiError::from(error))?;
    Ok(found.into_values().next().map(|earlier| repeated(&key, &earlier)))
}

impl From<NotAccepted> for ApiError {
    fn from(error: NotAccepted) -> ApiError {
        match error {
            NotAccepted::QueueFull { .. } => {
                ApiError::unavailable("too many purchases are waiting", RETRY_AFTER_SECONDS)
            }
            NotAccepted::Stuck { .. } => {
                ApiError::unavailable("temporarily unavailable, try again", RETRY_AFTER_SECONDS)
            }
            NotAccepted::Stopping => ApiError::unavailable("the shop is stopping", RETRY_AFTER_SECONDS),
            NotAccepted::Ids(error) => error.into(),
            NotAccepted::Database(error) => error.into(),
        }
    }
}

/// The key of draft-ietf-httpapi-idempotency-key-header, in the bare form that clients send as well as in quotes.
fn idempotency_key(given: Option<&HeaderValue>, cart: &Cart) -> Result<Option<Key>, ApiError> {
    let Some(value) = given else { return Ok(None) };
    let text = value.to_str().unwrap_or_default();
    let key = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text);
    let printable = key.bytes().all(|byte| matches!(byte, b' '..=b'~'));
    if key.is_empty() || key.len() > MAX_KEY_CHARS || !printable {
        let problem = format!("1 to {MAX_KEY_CHARS} printable ASCII characters expected");
        return Err(ApiError::invalid_parameter("Idempotency-Key", problem));
    }
    let mut request_hash = [0; 32];
    request_hash.copy_from_slice(digest(&SHA256, &cart.canonical()).as_ref());
    Ok(Some(Key { key: key.to_owned(), request_hash }))
}

/// The trace of the request; where that is not recorded, the caller's, or a new one that nobody records.
fn trace(given: Option<&HeaderValue>, random: &Random) -> TraceContext {
    if let Some(request) = spans::current() {
        return request.first();
    }
    // A call of the generator costs the same for few bytes and for many.
    let (bytes, mut used) = (random.bytes::<TRACE_BYTES>(), 0);
    let fill = |wanted: &mut [u8]| {
        wanted.copy_from_slice(&bytes[used..used + wanted.len()]);
        used += wanted.len();
    };
    let given = given.and_then(|value| value.to_str().ok()?.parse().ok());
    match given {
        Some(caller) => TraceContext::child(&caller, fill),
        None => TraceContext::generate(fill, false),
    }
}

async fn results(
    Customer(customer_id): Customer,
    Shared(door): Shared<Door>,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    let cursor = cursor(&headers, query.as_deref())?;
    if let Some(cursor) = &cursor {
        reach(&door, cursor).await?;
    }
    let subscription = door.live.subscribe(customer_id).await.map_err(|no_stream| match no_stream {
        NoStream::TooMany => ApiError::unavailable("too many streams are open", RETRY_AFTER_SECONDS),
        NoStream::TooManyOfCustomer => ApiError::too_many_requests(RETRY_AFTER_SECONDS),
        NoStream::Stopped => ApiError::unavailable("the shop is stopping", RETRY_AFTER_SECONDS),
    })?;
    let announced = subscription.announced;
    let cursor = match cursor {
        Some(cursor) if cursor.finished() <= announced => cursor,
        // A number that was never given out comes from another database: it says nothing about this one.
        Some(_) | None => Cursor::after(look_back(&door, customer_id, announced).await?),
    };
    let (db, definition, stop) = (door.db.clone(), Arc::clone(&door.definition), door.stop.clone());
    let parts = stream::Parts { db, definition, customer_id, cursor, subscription, stop };
    let mut response = Response::new(Body::from_stream(stream::events(parts)));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

/// A client that comes from another replica may have been told of ends that were not heard of here yet. Its stream begins once
/// they are: before, what has ended would be told to it as open.
async fn reach(door: &Door, cursor: &Cursor) -> Result<(), ApiError> {
    if cursor.finished() <= door.live.announced() {
        return Ok(());
    }
    let last = door.db.read(store::last_finished_no).await;
    if cursor.finished() > last.map_err(|error: db::Error| ApiError::from(error))? {
        // It comes from another database; there is nothing to wait for.
        return Ok(());
    }
    match tokio::time::timeout(REACH_PATIENCE, door.live.reach(cursor.finished())).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(Stopped)) => Err(ApiError::unavailable("the shop is stopping", RETRY_AFTER_SECONDS)),
        Err(_) => {
            Err(ApiError::unavailable("what other replicas did cannot be read now", RETRY_AFTER_SECONDS))
        }
    }
}

/// Where a client is that does not say so: before the purchases that ended a moment ago, so that one who buys first and listens
/// then misses nothing.
async fn look_back(door: &Door, customer_id: u64, announced: u64) -> Result<u64, ApiError> {
    let since = door.clock.now().saturating_sub(millis(door.look_back));
    let first = door
        .db
        .read(move |tx| store::first_finished_since(tx, customer_id, since, MAX_LOOK_BACK))
        .await
        .map_err(|error: db::Error| ApiError::from(error))?;
    Ok(first.map_or(announced, |first| first.saturating_sub(1).min(announced)))
}

/// The client's place in its stream. A library that reads streams in place of the browser's `EventSource`, so that it can send a token,
/// appends `lastEventId` when it reconnects: that is newer than what the page gave it to begin with. So is the header of a browser
/// newer than `last_event_id`, with which a client begins that can set no header.
fn cursor(headers: &HeaderMap, query: Option<&str>) -> Result<Option<Cursor>, ApiError> {
    let query = query.unwrap_or_default();
    let parameter = |name| query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
    let header = || headers.get("last-event-id").map(|value| value.to_str().unwrap_or("?"));
    match parameter("lastEventId").or_else(header).or_else(|| parameter("last_event_id")) {
        None | Some("") => Ok(None),
        Some(text) => match Cursor::parse(text) {
            Ok(cursor) => Ok(Some(cursor)),
            Err(no_cursor) => Err(ApiError::bad_request(no_cursor.to_string())),
        },
    }
}

#[derive(Serialize)]
struct PurchaseView {
    id: u64,
    state: &'static str,
    created_at: u64,
    finished_at: Option<u64>,
    items: Vec<ItemView>,
    payment: PaymentView,
    #[serde(skip_serializing_if = "Option::is_none")]
    steps: Option<Vec<StepView>>,
    reason: Option<String>,
}

#[derive(Serialize)]
struct ItemView {
    product_id: u64,
    amount: i64,
    price: i64,
}

#[derive(Serialize)]
struct PaymentView {
    currency_code: String,
    amount: i64,
}

#[derive(Serialize)]
struct StepView {
    step: &'static str,
    status: &'static str,
    timestamp: u64,
}

/// Somebody else's purchase is answered like one that does not exist, and so is an id that no purchase can have.
async fn show(
    Customer(customer_id): Customer,
    Shared(door): Shared<Door>,
    id: Result<Id, ApiError>,
) -> Result<Json<PurchaseView>, ApiError> {
    let not_found = || ApiError::not_found("purchase not found");
    let Id(id) = id.map_err(|_| not_found())?;
    let live = door.live.path(id).await.ok().flatten();
    let found = door.db.read(move |tx| store::by_id(tx, id, customer_id)).await;
    let shown = found.map_err(|error: db::Error| ApiError::from(error))?.ok_or_else(not_found)?;
    let path = path_of(&shown, live)?;
    let steps = steps(&door.definition, &shown, &path)?;
    let mut view = view(shown, &path)?;
    view.steps = Some(steps);
    Ok(Json(view))
}

#[derive(Serialize)]
struct Purchases {
    purchases: Vec<PurchaseView>,
}

async fn list(
    Customer(customer_id): Customer,
    Shared(door): Shared<Door>,
    page: Page,
) -> Result<Json<Purchases>, ApiError> {
    let Page { offset, size } = page;
    let mut live = door.live.paths_of(customer_id).await.unwrap_or_default();
    let found = door.db.read(move |tx| store::list(tx, customer_id, offset, size)).await;
    let found = found.map_err(|error: db::Error| ApiError::from(error))?;
    let one = |shown: Shown| {
        let path = path_of(&shown, live.remove(&shown.id))?;
        view(shown, &path)
    };
    Ok(Json(Purchases { purchases: found.into_iter().map(one).collect::<Result<_, _>>()? }))
}

/// How far a purchase is: from the database when it has ended, else as far as is known here.
fn path_of(shown: &Shown, live: Option<Path>) -> Result<Path, ApiError> {
    let kept = match &shown.path {
        Some(bytes) => decode_path(bytes).map_err(|error| {
            ApiError::internal(format_args!("the path of purchase {}: {error}", shown.id))
        })?,
        None => Path::new(),
    };
    // Of two paths of one saga the longer one tells more. One that was left to an operator has a kept one, too.
    Ok(live.filter(|live| live.len() > kept.len()).unwrap_or(kept))
}

fn steps(
    definition: &Definition<PurchaseStep>,
    shown: &Shown,
    path: &Path,
) -> Result<Vec<StepView>, ApiError> {
    let events = saga::events(definition, shown.created_at, path).map_err(|illegal| {
        ApiError::internal(format_args!("the path of purchase {}: {illegal}", shown.id))
    })?;
    let step = |event: saga::Event<'_, PurchaseStep>| StepView {
        step: event.step.name(),
        status: status_name(event.status),
        timestamp: event.at / 1000,
    };
    Ok(events.into_iter().map(step).collect())
}

/// A purchase without its steps.
fn view(shown: Shown, path: &Path) -> Result<PurchaseView, ApiError> {
    let Shown { id, state, input, created_at, finished_at, reason, .. } = shown;
    let purchase = Purchase::from_input(&input.into())
        .map_err(|error| ApiError::internal(format_args!("the input of purchase {id}: {error}")))?;
    let item = |item: &shop::purchase::PurchasedItem| ItemView {
        product_id: item.product_id,
        amount: item.amount,
        price: item.price,
    };
    Ok(PurchaseView {
        id,
        state: state.name(path.rejection().is_some()),
        created_at: created_at / 1000,
        finished_at: finished_at.map(|at| at / 1000),
        items: purchase.items.iter().map(item).collect(),
        payment: PaymentView { currency_code: purchase.currency_code, amount: purchase.total },
        steps: None,
        reason: reason.or_else(|| path.rejection().map(ToString::to_string)),
    })
}

#[derive(Serialize)]
struct ParkedView {
    id: u64,
    customer_id: u64,
    created_at: u64,
    reason: Option<String>,
}

async fn parked(Shared(reconciler): Shared<Reconciler>) -> Result<Json<Vec<ParkedView>>, ApiError> {
    let found = reconciler.db.read(|tx| store::left_to_operator(tx, MAX_LISTED_FOR_OPERATOR)).await;
    let found = found.map_err(|error: db::Error| ApiError::from(error))?;
    let view = |left: store::LeftToOperator| {
        let store::LeftToOperator { id, customer_id, created_at, reason } = left;
        ParkedView { id, customer_id, created_at: created_at / 1000, reason }
    };
    Ok(Json(found.into_iter().map(view).collect()))
}

async fn retry(
    Shared(reconciler): Shared<Reconciler>,
    Id(id): Id,
) -> Result<Json<serde_json::Value>, ApiError> {
    if reconciler.retry(id).await? {
        Ok(Json(serde_json::json!({ "msg": "ok" })))
    } else {
        Err(ApiError::not_found(format!("no purchase {id} was left to an operator")))
    }
}
