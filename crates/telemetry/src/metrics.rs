//! The metrics of a service, under the names that existing dashboards know.
//!
//! Every service registers its families once, at start, in the one [`Registry`] of its process; the admin
//! door encodes it. What never happens: a time series whose labels come from a client. The label `handler` is
//! a matched route and the number of routes is bounded, `method` is one of a closed set, `code` is a status
//! that this program chose. Histograms keep bucket counts, never samples, so memory does not grow with traffic.
//!
//! The exposition is OpenMetrics 1.0. Counters are registered without `_total`, which the encoder adds, and
//! nothing is registered with a unit, because the encoder would append it to names that already end in one.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;

/// The content type of [`Registry::encode`]'s text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Upper bounds of the time histograms' buckets, in seconds. They start at 100 us, because a batch in this
/// system takes tens of microseconds to milliseconds.
pub const SECONDS_BUCKETS: [f64; 16] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Upper bounds of the response size histogram's buckets, in bytes.
pub const BYTES_BUCKETS: [f64; 6] = [100.0, 1e3, 1e4, 1e5, 1e6, 1e7];

/// Upper bounds of the batch size histogram's buckets, in messages.
pub const BATCH_BUCKETS: [f64; 12] =
    [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0];

/// A handler label beyond this many per method is counted as [`OTHER`].
pub const MAX_HANDLERS_PER_METHOD: usize = 256;

/// The label of what does not fit the closed set.
pub const OTHER: &str = "other";

const METHODS: [&str; 8] = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", OTHER];

/// The metrics of one process. Cloning gives another handle to the same registry.
#[derive(Clone)]
pub struct Registry {
    families: Arc<Mutex<prometheus_client::registry::Registry>>,
    batch_size: Histograms<BatchLabels>,
}

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct BatchLabels {
    service: Arc<str>,
}

impl Registry {
    /// An empty registry, but for `saga_batch_size`, which all services of the process share.
    pub fn new() -> Registry {
        let batch_size = Histograms::new_with_constructor(batches as fn() -> Histogram);
        let mut families = prometheus_client::registry::Registry::default();
        families.register("saga_batch_size", "Messages handled in one transaction", batch_size.clone());
        Registry { families: Arc::new(Mutex::new(families)), batch_size }
    }

    /// Registers further families. Each name must be registered once per process.
    pub fn with<T>(&self, register: impl FnOnce(&mut prometheus_client::registry::Registry) -> T) -> T {
        register(&mut self.families.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The whole registry as OpenMetrics text ([`CONTENT_TYPE`]).
    ///
    /// # Errors
    /// When a registered metric's own encoder fails; those of this crate do not.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        self.with(|families| prometheus_client::encoding::text::encode(&mut text, families))?;
        Ok(text)
    }
}

impl Default for Registry {
    fn default() -> Registry {
        Registry::new()
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Registry")
    }
}

/// A histogram of seconds with this crate's buckets, for families that a service registers itself.
pub fn seconds() -> Histogram {
    Histogram::new(SECONDS_BUCKETS)
}

fn bytes() -> Histogram {
    Histogram::new(BYTES_BUCKETS)
}

fn batches() -> Histogram {
    Histogram::new(BATCH_BUCKETS)
}

// HTTP.

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RouteLabels {
    handler: Arc<str>,
    method: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ResponseLabels {
    code: u16,
    handler: Arc<str>,
    method: &'static str,
}

/// `APP_http_request_duration_seconds`, `APP_http_requests_inflight` and `APP_http_response_size_bytes`.
///
/// A request takes two uncontended read locks and no allocation, once its route has been seen.
#[derive(Clone)]
pub struct HttpMetrics(Arc<HttpFamilies>);

struct HttpFamilies {
    duration_seconds: Histograms<ResponseLabels>,
    response_size_bytes: Histograms<ResponseLabels>,
    inflight: Family<RouteLabels, Gauge>,
    /// Indexed like `METHODS`; handler -> its series.
    routes: [RwLock<HashMap<Arc<str>, Arc<Route>>>; METHODS.len()],
}

struct Route {
    labels: RouteLabels,
    inflight: Gauge,
    /// A route answers with a handful of codes: a scan beats a hash.
    by_code: RwLock<Vec<ByCode>>,
}

#[derive(Clone)]
struct ByCode {
    code: u16,
    duration_seconds: Histogram,
    response_size_bytes: Histogram,
}

impl HttpMetrics {
    /// Registers the families of `app` (such as `account`). Call it once per process and app.
    pub fn new(registry: &Registry, app: &str) -> HttpMetrics {
        let families = HttpFamilies {
            duration_seconds: Histograms::new_with_constructor(seconds as fn() -> Histogram),
            response_size_bytes: Histograms::new_with_constructor(bytes as fn() -> Histogram),
            inflight: Family::default(),
            routes: std::array::from_fn(|_| RwLock::default()),
        };
        registry.with(|r| {
            r.register(
                format!("{app}_http_request_duration_seconds"),
                "Time from a request's head to its answer's head",
                families.duration_seconds.clone(),
            );
            r.register(
                format!("{app}_http_response_size_bytes"),
                "Size of an answer's body, where it is known beforehand",
                families.response_size_bytes.clone(),
            );
            r.register(
                format!("{app}_http_requests_inflight"),
                "Requests being handled",
                families.inflight.clone(),
            );
        });
        HttpMetrics(Arc::new(families))
    }

    /// Counts a request in. `handler` is the matched route, never the raw path.
    pub fn begin(&self, handler: &str, method: &str) -> InFlight {
        let route = self.0.route(handler, method);
        route.inflight.inc();
        InFlight { metrics: self.clone(), route, started: Instant::now() }
    }
}

impl fmt::Debug for HttpMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HttpMetrics")
    }
}

impl HttpFamilies {
    fn route(&self, handler: &str, method: &str) -> Arc<Route> {
        let index = METHODS.iter().position(|known| *known == method).unwrap_or(METHODS.len() - 1);
        let known = self.routes[index].read().unwrap_or_else(PoisonError::into_inner).get(handler).cloned();
        known.unwrap_or_else(|| self.add_route(index, handler))
    }

    fn add_route(&self, index: usize, handler: &str) -> Arc<Route> {
        let mut routes = self.routes[index].write().unwrap_or_else(PoisonError::into_inner);
        let handler = if routes.len() < MAX_HANDLERS_PER_METHOD { handler } else { OTHER };
        if let Some(route) = routes.get(handler) {
            return route.clone();
        }
        let labels = RouteLabels { handler: Arc::from(handler), method: METHODS[index] };
        let inflight = self.inflight.get_or_create_owned(&labels);
        let route = Arc::new(Route { labels, inflight, by_code: RwLock::default() });
        routes.insert(route.labels.handler.clone(), route.clone());
        route
    }

    fn by_code(&self, route: &Route, code: u16) -> ByCode {
        let known = route.by_code.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = known.iter().find(|series| series.code == code) {
            return found.clone();
        }
        drop(known);
        let labels =
            ResponseLabels { code, handler: route.labels.handler.clone(), method: route.labels.method };
        let series = ByCode {
            code,
            duration_seconds: self.duration_seconds.get_or_create_owned(&labels),
            response_size_bytes: self.response_size_bytes.get_or_create_owned(&labels),
        };
        let mut all = route.by_code.write().unwrap_or_else(PoisonError::into_inner);
        if !all.iter().any(|known| known.code == code) {
            all.push(series.clone());
        }
        series
    }
}

/// A request being handled. Dropping it without [`InFlight::finish`], as when the client has gone, counts it
/// out and records no duration, because there was no answer.
#[must_use]
pub struct InFlight {
    metrics: HttpMetrics,
    route: Arc<Route>,
    started: Instant,
}

impl InFlight {
    /// Records the answer. `response_bytes` is None for a body whose size is not known, such as a stream.
    pub fn finish(self, code: u16, response_bytes: Option<u64>) {
        let series = self.metrics.0.by_code(&self.route, code);
        series.duration_seconds.observe(self.started.elapsed().as_secs_f64());
        if let Some(bytes) = response_bytes {
            series.response_size_bytes.observe(bytes as f64);
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.route.inflight.dec();
    }
}

impl fmt::Debug for InFlight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InFlight({} {})", self.route.labels.method, self.route.labels.handler)
    }
}

// Messages.

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ReceivedLabels {
    acked: &'static str,
    handler_name: Arc<str>,
    subscriber_name: Arc<str>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct HandledLabels {
    handler_name: Arc<str>,
    success: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct PublishedLabels {
    handler_name: Arc<str>,
    success: &'static str,
    publisher_name: Arc<str>,
}

#[derive(Clone)]
struct PubsubFamilies {
    received: Family<ReceivedLabels, Counter>,
    handled: Histograms<HandledLabels>,
    published: Histograms<PublishedLabels>,
}

/// `APP_pubsub_subscriber_messages_received_total`, `APP_pubsub_handler_execution_time_seconds`,
/// `APP_pubsub_publish_time_seconds` and the app's share of `saga_batch_size`. One call records one batch.
#[derive(Clone)]
pub struct PubsubMetrics {
    app: Arc<str>,
    families: PubsubFamilies,
    acked: Counter,
    nacked: Counter,
    handled: ByOutcome,
    published: ByOutcome,
    batch_size: Histogram,
}

#[derive(Clone)]
struct ByOutcome {
    success: Histogram,
    failure: Histogram,
}

impl ByOutcome {
    fn observe(&self, duration: Duration, success: bool) {
        let series = if success { &self.success } else { &self.failure };
        series.observe(duration.as_secs_f64());
    }
}

impl PubsubMetrics {
    /// Registers the families of `app`; handler, subscriber and publisher are named after it until
    /// [`PubsubMetrics::named`] says otherwise. Call it once per process and app.
    pub fn new(registry: &Registry, app: &str) -> PubsubMetrics {
        let families = PubsubFamilies {
            received: Family::default(),
            handled: Histograms::new_with_constructor(seconds as fn() -> Histogram),
            published: Histograms::new_with_constructor(seconds as fn() -> Histogram),
        };
        registry.with(|r| {
            r.register(
                format!("{app}_pubsub_subscriber_messages_received"),
                "Messages taken from the bus, by how they were answered",
                families.received.clone(),
            );
            r.register(
                format!("{app}_pubsub_handler_execution_time_seconds"),
                "Time to handle one batch",
                families.handled.clone(),
            );
            r.register(
                format!("{app}_pubsub_publish_time_seconds"),
                "Time until the bus has taken one frame",
                families.published.clone(),
            );
        });
        let app: Arc<str> = Arc::from(app);
        let batch_size = registry.batch_size.get_or_create_owned(&BatchLabels { service: app.clone() });
        PubsubMetrics::series(app.clone(), families, batch_size, app)
    }

    /// The same families for another handler of the same app.
    #[must_use]
    pub fn named(&self, handler_name: &'static str) -> PubsubMetrics {
        let batch_size = self.batch_size.clone();
        PubsubMetrics::series(self.app.clone(), self.families.clone(), batch_size, Arc::from(handler_name))
    }

    fn series(
        app: Arc<str>,
        families: PubsubFamilies,
        batch_size: Histogram,
        handler: Arc<str>,
    ) -> PubsubMetrics {
        let received = |acked| {
            let (handler_name, subscriber_name) = (handler.clone(), app.clone());
            families.received.get_or_create_owned(&ReceivedLabels { acked, handler_name, subscriber_name })
        };
        let handled = |success| {
            let handler_name = handler.clone();
            families.handled.get_or_create_owned(&HandledLabels { handler_name, success })
        };
        let published = |success| {
            let (handler_name, publisher_name) = (handler.clone(), app.clone());
            families.published.get_or_create_owned(&PublishedLabels { handler_name, success, publisher_name })
        };
        PubsubMetrics {
            acked: received("acked"),
            nacked: received("nacked"),
            handled: ByOutcome { success: handled("true"), failure: handled("false") },
            published: ByOutcome { success: published("true"), failure: published("false") },
            app,
            families,
            batch_size,
        }
    }

    /// Counts `messages` that were acknowledged (or given back, to come again).
    pub fn received(&self, acked: bool, messages: u64) {
        let counter = if acked { &self.acked } else { &self.nacked };
        counter.inc_by(messages);
    }

    /// Records the time that one batch took its handler.
    pub fn handled(&self, duration: Duration, success: bool) {
        self.handled.observe(duration, success);
    }

    /// Records the time until the bus had taken one frame, or refused it.
    pub fn published(&self, duration: Duration, success: bool) {
        self.published.observe(duration, success);
    }

    /// Records the size of one batch, in messages.
    pub fn batch(&self, messages: usize) {
        self.batch_size.observe(messages as f64);
    }
}

impl fmt::Debug for PubsubMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PubsubMetrics({})", self.app)
    }
}

// Outcomes.

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: &'static str,
}

/// A counter `NAME_total{outcome}`; the outcomes are constants of the program.
#[derive(Clone)]
pub struct OutcomeCounter(Family<OutcomeLabels, Counter>);

impl OutcomeCounter {
    /// Registers the counter under `name`, without `_total`. Call it once per process and name.
    pub fn new(registry: &Registry, name: &'static str, help: &'static str) -> OutcomeCounter {
        let family = Family::default();
        registry.with(|r| r.register(name, help, Family::clone(&family)));
        OutcomeCounter(family)
    }

    /// Counts one.
    pub fn count(&self, outcome: &'static str) {
        self.0.get_or_create(&OutcomeLabels { outcome }).inc();
    }
}

impl fmt::Debug for OutcomeCounter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OutcomeCounter")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line<'a>(text: &'a str, start: &str) -> &'a str {
        text.lines().find(|l| l.starts_with(start)).unwrap_or_else(|| panic!("no {start:?} in\n{text}"))
    }

    #[test]
    fn http_names_and_labels_are_those_of_the_dashboards() {
        let registry = Registry::new();
        let metrics = HttpMetrics::new(&registry, "account");
        metrics.begin("/api/order/{id}", "GET").finish(404, Some(120));
        let open = metrics.begin("/api/order/{id}", "GET");
        let text = registry.encode().unwrap();
        let labels = r#"{code="404",handler="/api/order/{id}",method="GET"} "#;
        assert!(line(&text, &format!("account_http_request_duration_seconds_count{labels}")).ends_with(" 1"));
        assert!(line(&text, &format!("account_http_response_size_bytes_sum{labels}")).ends_with(" 120.0"));
        let inflight = r#"account_http_requests_inflight{handler="/api/order/{id}",method="GET"} "#;
        assert!(line(&text, inflight).ends_with(" 1"));
        drop(open);
        assert!(line(&registry.encode().unwrap(), inflight).ends_with(" 0"));
    }

    #[test]
    fn pubsub_names_and_labels_are_those_of_the_dashboards() {
        let registry = Registry::new();
        let metrics = PubsubMetrics::new(&registry, "payment");
        metrics.received(true, 7);
        metrics.received(false, 2);
        metrics.batch(9);
        metrics.handled(Duration::from_millis(3), true);
        metrics.named("rollback").published(Duration::from_millis(3), false);
        let text = registry.encode().unwrap();
        for expected in [
            r#"payment_pubsub_subscriber_messages_received_total{acked="acked",handler_name="payment",subscriber_name="payment"} 7"#,
            r#"payment_pubsub_subscriber_messages_received_total{acked="nacked",handler_name="payment",subscriber_name="payment"} 2"#,
            r#"payment_pubsub_handler_execution_time_seconds_count{handler_name="payment",success="true"} 1"#,
            r#"payment_pubsub_publish_time_seconds_count{handler_name="rollback",success="false",publisher_name="payment"} 1"#,
            r#"saga_batch_size_sum{service="payment"} 9.0"#,
        ] {
            line(&text, expected);
        }
    }

    #[test]
    fn outcomes_are_counted_apart() {
        let registry = Registry::new();
        let logins = OutcomeCounter::new(&registry, "account_logins", "Logins tried");
        logins.count("success");
        logins.count("failed");
        logins.count("failed");
        let text = registry.encode().unwrap();
        line(&text, r#"account_logins_total{outcome="success"} 1"#);
        line(&text, r#"account_logins_total{outcome="failed"} 2"#);
    }

    #[test]
    fn the_shared_family_is_exposed_once_however_many_services_use_it() {
        let registry = Registry::new();
        for app in ["order", "payment"] {
            PubsubMetrics::new(&registry, app).batch(1);
        }
        let text = registry.encode().unwrap();
        assert_eq!(text.matches("# TYPE saga_batch_size").count(), 1);
        assert_eq!(text.matches("saga_batch_size_count").count(), 2);
    }

    #[test]
    fn handlers_and_methods_beyond_the_bound_share_a_label() {
        let registry = Registry::new();
        let metrics = HttpMetrics::new(&registry, "x");
        for n in 0..2 * MAX_HANDLERS_PER_METHOD {
            metrics.begin(&format!("/{n}"), "BREW").finish(200, None);
        }
        let text = registry.encode().unwrap();
        let series = text.matches("x_http_request_duration_seconds_count").count();
        assert_eq!(series, MAX_HANDLERS_PER_METHOD + 1);
        let overflow = r#"x_http_request_duration_seconds_count{code="200",handler="other",method="other"}"#;
        assert!(line(&text, overflow).ends_with(&format!(" {MAX_HANDLERS_PER_METHOD}")));
    }
}
