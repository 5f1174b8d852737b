//! Which processes a distributed shop on one machine consists of, and what each is told. Pure: no process is started here.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use crate::config::servers::Service;

/// One process to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// What it runs.
    pub service: Service,
    /// Its name in logs: the service and a number from 1.
    pub name: String,
    /// Where its API will listen.
    pub api: SocketAddr,
    /// Where its operator's door will listen.
    pub admin: SocketAddr,
}

/// Every process by service and number: `replicas` of each service, and one gateway.
pub(super) fn processes(replicas: usize) -> Vec<(Service, usize)> {
    let count = |service| if service == Service::Gateway { 1 } else { replicas };
    Service::ALL.iter().flat_map(|service| (1..=count(*service)).map(|number| (*service, number))).collect()
}

/// Its name in logs.
pub(super) fn name(service: Service, number: usize) -> String {
    match service {
        Service::Gateway => service.name().to_owned(),
        _ => format!("{}-{number}", service.name()),
    }
}

/// The services that stop together, in this order: nothing new comes in, then what is in hand is finished.
pub(super) const STOP_ORDER: [&[Service]; 3] = [
    &[Service::Gateway],
    &[Service::Purchase],
    &[Service::Orchestrator, Service::Account, Service::Product, Service::Order, Service::Payment],
];

/// How long a process of this service may take to stop. The three stages together leave the supervisor time to stop itself.
pub(super) fn stop_within(service: Service) -> Duration {
    match service {
        Service::Gateway => Duration::from_millis(4_500),
        Service::Purchase => Duration::from_millis(2_500),
        _ => Duration::from_millis(2_000),
    }
}

/// What of the time to stop is not for requests in flight, but for what comes behind them.
const STOP_MARGIN: Duration = Duration::from_millis(1_000);

/// What all processes are told alike.
pub(super) struct Common {
    /// The supervisor's own settings that are not defaults, as variables.
    pub settings: BTreeMap<String, String>,
    /// The data directory, absolute.
    pub data_dir: String,
    /// The folder of the signing keys, absolute.
    pub key_dir: String,
    /// Whether everybody may create products.
    pub catalog_open: bool,
    /// Whether a shop without products gets some.
    pub demo_data: bool,
    /// `human` or `json`.
    pub log_format: &'static str,
    /// The time that requests in flight get.
    pub drain_timeout_ms: u64,
    /// Proxies in front of the gateway.
    pub trusted_proxies: usize,
}

/// A process's variables.
pub(super) fn variables(common: &Common, place: &Place, all: &[Place]) -> BTreeMap<String, String> {
    let mut variables = common.settings.clone();
    variables.remove("SAGA_PROCESSES");
    let drain = stop_within(place.service).saturating_sub(STOP_MARGIN);
    let drain_ms = u64::try_from(drain.as_millis()).unwrap_or(u64::MAX).min(common.drain_timeout_ms);
    // One of them is enough: two would both find that there is nothing.
    let seeds = common.demo_data && place.name == name(Service::Product, 1);
    let gateway = usize::from(place.service != Service::Gateway);
    let set = [
        ("SAGA_LISTEN", place.api.to_string()),
        ("SAGA_ADMIN_LISTEN", place.admin.to_string()),
        ("SAGA_DATA_DIR", common.data_dir.clone()),
        ("SAGA_KEY_DIR", common.key_dir.clone()),
        ("SAGA_CATALOG__WRITE", if common.catalog_open { "open" } else { "admin" }.to_owned()),
        ("SAGA_DEMO_DATA", seeds.to_string()),
        ("SAGA_LOG__FORMAT", common.log_format.to_owned()),
        ("SAGA_HTTP__DRAIN_TIMEOUT_MS", drain_ms.to_string()),
        ("SAGA_HTTP__TRUSTED_PROXIES", (common.trusted_proxies + gateway).to_string()),
    ];
    variables.extend(set.map(|(name, value)| (name.to_owned(), value)));
    for service in Service::ALL.into_iter().filter(|service| service.needs().database) {
        let of_service = all.iter().filter(|place| place.service == service);
        let list = of_service.map(|place| place.api.to_string()).collect::<Vec<_>>().join(",");
        variables.insert(format!("SAGA_PEERS__{}", service.name().to_uppercase()), list);
    }
    variables
}

/// The pause before a process is started again for the first time.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// The longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// The pause before a process is started again that has died so many times in a row, soon after its start.
pub(super) fn pause(deaths: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(1 << deaths.saturating_sub(1).min(16)).min(LONGEST_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(replicas: usize) -> Vec<Place> {
        let ports = (1..).map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        let make = |((service, number), api): ((Service, usize), SocketAddr)| Place {
            service,
            name: name(service, number),
            api,
            admin: SocketAddr::from(([127, 0, 0, 1], 1000 + api.port())),
        };
        processes(replicas).into_iter().zip(ports).map(make).collect()
    }

    fn common() -> Common {
        Common {
            settings: [("SAGA_MYSQL__URL", "mysql://a"), ("SAGA_PROCESSES", "2"), ("SAGA_LISTEN", "x")]
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into(),
            data_dir: "/data".to_owned(),
            key_dir: "/data/keys".to_owned(),
            catalog_open: true,
            demo_data: true,
            log_format: "json",
            drain_timeout_ms: 8_000,
            trusted_proxies: 1,
        }
    }

    #[test]
    fn each_service_has_its_replicas_and_there_is_one_gateway() {
        let places = places(2);
        let names: Vec<&str> = places.iter().map(|place| place.name.as_str()).collect();
        assert_eq!(names.len(), 13);
        assert_eq!(names[..3], ["account-1", "account-2", "product-1"]);
        assert_eq!(names[12], "gateway");
    }

    #[test]
    fn each_is_told_where_the_others_are_and_one_seeds() {
        let places = places(2);
        let all: Vec<_> = places.iter().map(|place| variables(&common(), place, &places)).collect();
        for (place, told) in places.iter().zip(&all) {
            assert_eq!(told["SAGA_PEERS__PRODUCT"], "127.0.0.1:3,127.0.0.1:4");
            assert_eq!(told["SAGA_LISTEN"], place.api.to_string());
            assert_eq!(told["SAGA_MYSQL__URL"], "mysql://a");
            assert_eq!(told["SAGA_CATALOG__WRITE"], "open");
            assert!(!told.contains_key("SAGA_PROCESSES"));
            let proxies = if place.service == Service::Gateway { "1" } else { "2" };
            assert_eq!(told["SAGA_HTTP__TRUSTED_PROXIES"], proxies);
            let drain: u64 = told["SAGA_HTTP__DRAIN_TIMEOUT_MS"].parse().unwrap();
            assert!(Duration::from_millis(drain) < stop_within(place.service));
        }
        let seeders: Vec<&str> = (places.iter().zip(&all))
            .filter(|(_, told)| told["SAGA_DEMO_DATA"] == "true")
            .map(|(place, _)| place.name.as_str())
            .collect();
        assert_eq!(seeders, ["product-1"]);
    }

    #[test]
    fn every_service_stops_once_and_all_in_time() {
        let mut stopped = STOP_ORDER.concat();
        stopped.sort_unstable();
        assert_eq!(stopped, Service::ALL);
        let longest = |stage: &&[Service]| stage.iter().map(|service| stop_within(*service)).max();
        let all: Duration = STOP_ORDER.iter().filter_map(longest).sum();
        assert!(all < crate::STOP_DEADLINE, "{all:?}");
    }

    #[test]
    fn pauses_grow_to_a_bound() {
        let pauses: Vec<u64> = (1..9).map(|deaths| pause(deaths).as_millis() as u64).collect();
        assert_eq!(pauses, [200, 400, 800, 1_600, 3_200, 6_400, 10_000, 10_000]);
        assert_eq!(pause(u32::MAX), LONGEST_PAUSE);
    }
}
