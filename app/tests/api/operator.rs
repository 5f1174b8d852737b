//! The operator's door: health, metrics, what was left to somebody; and that none of it is open to customers.

use std::collections::BTreeMap;

use serde_json::json;
use testkit::until;

use crate::fixture::{PATIENCE, cart, run, shop, shop_with};

const OPERATOR_PATHS: [(&str, &str); 6] = [
    ("GET", "/metrics"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/purchases/parked"),
    ("POST", "/purchases/1/retry"),
    ("GET", "/bus/parked"),
];

#[test]
fn the_operator_s_door_says_how_the_shop_is() {
    run(async {
        let shop = shop().await;
        for path in ["/healthz", "/readyz"] {
            let answer = shop.ask_admin("GET", path).send().await;
            assert_eq!((answer.status, answer.body.as_str()), (200, r#"{"msg":"ok"}"#), "{path}");
        }
        for path in ["/purchases/parked", "/bus/parked"] {
            let answer = shop.ask_admin("GET", path).send().await;
            assert_eq!((answer.status, answer.json()), (200, json!([])), "{path}");
        }
        let unknown = shop.ask_admin("POST", "/purchases/17/retry");
        unknown.refused(404, "no purchase 17 was left to an operator").await;
        let range = "expected an integer from 0 to 9007199254740991";
        let nonsense = shop.ask_admin("POST", "/purchases/x/retry");
        nonsense.refused(400, &format!("invalid parameter: id: \"x\", {range}")).await;
        shop.ask_admin("DELETE", "/metrics").refused(405, "method not allowed on this path").await;
    });
}

#[test]
fn neither_door_opens_what_is_behind_the_other() {
    run(async {
        let shop = shop().await;
        let customer = shop.sign_up().await;
        for (method, path) in OPERATOR_PATHS {
            for path in [path.to_owned(), format!("/api{path}")] {
                shop.ask(method, &path).bearer(&customer.token).refused(404, "no such path").await;
            }
        }
        for path in ["/api/products?size=1", "/api/purchases?size=1", "/api/account/info/person", "/"] {
            shop.ask_admin("GET", path).bearer(&customer.token).refused(404, "no such path").await;
        }
    });
}

type Labels = BTreeMap<String, String>;

/// A scrape: the samples by name, each with its labels and its value.
struct Scrape(BTreeMap<String, Vec<(Labels, f64)>>);

impl Scrape {
    /// Reads the text format. The values of this shop's labels have no escapes.
    fn read(text: &str) -> Scrape {
        let mut samples: BTreeMap<String, Vec<_>> = BTreeMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
            let labels = labels.strip_suffix('}').unwrap();
            let pair = |pair: &str| {
                let (name, value) = pair.split_once("=\"").unwrap_or_else(|| panic!("{line}"));
                (name.to_owned(), value.trim_end_matches('"').to_owned())
            };
            let labels = labels.split("\",").filter(|pair| !pair.is_empty()).map(pair).collect();
            samples.entry(name.to_owned()).or_default().push((labels, value.parse().unwrap()));
        }
        Scrape(samples)
    }

    /// The sum of the samples that have these labels. All samples of the name must have exactly the labels `names`.
    #[track_caller]
    fn sum(&self, name: &str, names: &[&str], with: &[(&str, &str)]) -> f64 {
        let samples = self.0.get(name).unwrap_or_else(|| panic!("no {name}"));
        for (labels, _) in samples {
            assert_eq!(labels.keys().map(String::as_str).collect::<Vec<_>>(), names, "{name}");
        }
        let fits = |labels: &Labels| {
            with.iter().all(|(name, value)| labels.get(*name).is_some_and(|label| label == value))
        };
        samples.iter().filter(|(labels, _)| fits(labels)).map(|(_, value)| value).sum()
    }
}

#[test]
fn the_metrics_have_the_names_that_dashboards_know() {
    run(async {
        let shop = shop_with(&[]).await;
        let customer = shop.sign_up().await;
        let product = shop.new_product(5, 1).await;
        let id = shop.buy(&customer, &cart(product, 1)).await;
        shop.ended(&customer, id).await;
        let sold_out = shop.buy(&customer, &cart(product, 1)).await;
        shop.ended(&customer, sold_out).await;
        for kind in ["order", "payment"] {
            assert_eq!(shop.get_as(&customer, &format!("/api/{kind}/{id}")).await.status, 200);
        }
        shop.get("/api/product/x").await;
        shop.get("/api/no/such/path").await;

        let scrape = async || {
            let answer = shop.ask_admin("GET", "/metrics").send().await;
            assert_eq!(answer.status, 200);
            let kind = answer.headers["content-type"].to_str().unwrap();
            assert_eq!(kind, "application/openmetrics-text; version=1.0.0; charset=utf-8");
            assert!(answer.body.ends_with("# EOF\n"));
            assert!(!answer.body.contains("/no/such"), "a raw path is no label");
            Scrape::read(&answer.body)
        };
        // The gauges are looked after now and then.
        until("nothing is in flight", PATIENCE, async || {
            scrape().await.sum("saga_in_flight", &[], &[]) == 0.0
        })
        .await;
        let scrape = scrape().await;

        let http = ["code", "handler", "method"];
        for (app, code, handler, method, count) in [
            ("account", "201", "/api/account/auth/signup", "POST", 1.0),
            ("product", "201", "/api/product", "POST", 1.0),
            ("product", "400", "/api/product/{id}", "GET", 1.0),
            ("order", "200", "/api/order/{id}", "GET", 1.0),
            ("payment", "200", "/api/payment/{id}", "GET", 1.0),
            ("purchase", "201", "/api/purchase", "POST", 2.0),
        ] {
            let labels = [("code", code), ("handler", handler), ("method", method)];
            for family in ["request_duration_seconds", "response_size_bytes"] {
                let name = format!("{app}_http_{family}");
                assert_eq!(scrape.sum(&format!("{name}_count"), &http, &labels), count, "{name} {labels:?}");
                assert!(scrape.sum(&format!("{name}_sum"), &http, &labels) > 0.0, "{name} {labels:?}");
                let bucket = ["code", "handler", "le", "method"];
                let all = [labels.as_slice(), &[("le", "+Inf")]].concat();
                assert_eq!(scrape.sum(&format!("{name}_bucket"), &bucket, &all), count, "{name} {labels:?}");
            }
            let inflight = format!("{app}_http_requests_inflight");
            assert_eq!(scrape.sum(&inflight, &["handler", "method"], &labels[1..]), 0.0);
        }

        // An orchestrator is told of what has to be taken up again: here nothing has, if all goes fast.
        for (app, works) in [
            ("product", true),
            ("order", true),
            ("payment", true),
            ("purchase", true),
            ("orchestrator", false),
        ] {
            let received = format!("{app}_pubsub_subscriber_messages_received_total");
            let names = ["acked", "handler_name", "subscriber_name"];
            let messages = scrape.sum(&received, &names, &[("acked", "acked"), ("subscriber_name", app)]);
            assert!(messages > 0.0 || !works, "{received}");
            assert_eq!(scrape.sum(&received, &names, &[("acked", "nacked")]), 0.0, "{received}");
            let handled = format!("{app}_pubsub_handler_execution_time_seconds_count");
            let handled_well = scrape.sum(&handled, &["handler_name", "success"], &[("success", "true")]);
            assert!(handled_well > 0.0 || !works, "{handled}");
            assert_eq!(
                scrape.sum(&handled, &["handler_name", "success"], &[("success", "false")]),
                0.0,
                "{handled}"
            );
            let published = format!("{app}_pubsub_publish_time_seconds_count");
            let names = ["handler_name", "publisher_name", "success"];
            scrape.sum(&published, &names, &[("success", "true"), ("publisher_name", app)]);
            let batches = scrape.sum("saga_batch_size_count", &["service"], &[("service", app)]);
            assert!(batches > 0.0 || !works, "{app}");
        }

        assert_eq!(scrape.sum("saga_started_total", &[], &[]), 2.0);
        for outcome in ["succeeded", "failed"] {
            let label = [("outcome", outcome)];
            assert_eq!(scrape.sum("saga_finished_total", &["outcome"], &label), 1.0, "{outcome}");
            assert_eq!(scrape.sum("saga_duration_seconds_count", &["outcome"], &label), 1.0, "{outcome}");
        }
        assert_eq!(scrape.sum("saga_oldest_unfinished_seconds", &[], &[]), 0.0);
        assert_eq!(scrape.sum("saga_parked", &[], &[]), 0.0);
    });
}
