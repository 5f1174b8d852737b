//! What a process is to be, and whether the settings are enough for it.

use std::fmt;

use super::servers::Service;
use super::{ADMIN_TOKEN_MIN_CHARS, CatalogWrite, Config};

/// What a process is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The whole shop: in this process, or in processes that this one starts.
    Shop,
    /// One replica of one service.
    Replica(Service),
    /// Who adds the demonstration's products and goes.
    Seeder,
}

/// What the settings lack for a role.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Lack {
    /// Nobody could create products.
    #[error(
        "catalog.admin_token is not set, and creating products needs it: {why}. Set catalog.admin_token \
         (SAGA_CATALOG__ADMIN_TOKEN, or a file's name in SAGA_CATALOG__ADMIN_TOKEN_FILE) to at least \
         {ADMIN_TOKEN_MIN_CHARS} characters, or let everybody create products with catalog.write = \"open\""
    )]
    AdminToken {
        /// Why not everybody may.
        why: String,
    },
    /// There is a broker or a cache, but not everything that the processes share.
    #[error(
        "{has} is set, but {lacks} is not: a shop is either all in one process, with its data in data_dir, or it has \
         mysql, nats and, if you like, redis"
    )]
    Half {
        /// A setting that is there.
        has: &'static str,
        /// One that is not.
        lacks: String,
    },
    /// Something that it cannot do without.
    #[error("{who} needs {setting} ({flag})")]
    Setting {
        /// Who needs it.
        who: String,
        /// The setting.
        setting: String,
        /// How else it can be given.
        flag: String,
    },
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Role::Shop => f.write_str("saga up --processes"),
            Role::Replica(service) => write!(f, "saga run {}", service.name()),
            Role::Seeder => f.write_str("saga seed"),
        }
    }
}

impl Config {
    /// Whether the services meet on servers, not in this process. The settings of one service's replica name its own servers only.
    pub(crate) fn is_distributed(&self) -> bool {
        self.nats.url.is_some() || Service::ALL.iter().any(|service| self.mysql.of(*service).is_some())
    }

    /// Whether everybody may create products.
    pub(crate) fn catalog_open(&self, role: Role) -> bool {
        match (self.catalog.write, role) {
            (CatalogWrite::Open, _) => true,
            (CatalogWrite::Admin, _) => false,
            // What is before a lone replica, it cannot know.
            (CatalogWrite::Auto, Role::Replica(_)) => false,
            // Who is told of a proxy is reached from wherever that is.
            (CatalogWrite::Auto, Role::Shop | Role::Seeder) => {
                self.listen.ip().is_loopback() && self.http.trusted_proxies == 0
            }
        }
    }

    /// What is missing for a role.
    pub(crate) fn lacks_for(&self, role: Role) -> Vec<Lack> {
        let mut lacks = Vec::new();
        match role {
            Role::Shop => {
                lacks.extend(self.admin_token_lacks(role));
                lacks.extend(self.half());
                if self.processes > 0 {
                    let services = Service::ALL.into_iter();
                    let all = services.flat_map(|service| self.service_lacks(role, service, false));
                    for lack in all {
                        if !lacks.contains(&lack) {
                            lacks.push(lack);
                        }
                    }
                }
            }
            Role::Replica(service) => {
                if service == Service::Product {
                    lacks.extend(self.admin_token_lacks(role));
                }
                lacks.extend(self.service_lacks(role, service, true));
            }
            // It writes to one database and asks nobody.
            Role::Seeder if self.mysql.of(Service::Product).is_some() => {}
            Role::Seeder => {
                lacks.extend(self.server().map(|has| Lack::Half { has, lacks: "mysql.product".to_owned() }))
            }
        }
        lacks
    }

    fn admin_token_lacks(&self, role: Role) -> Option<Lack> {
        let why = match self.catalog.write {
            CatalogWrite::Admin => "catalog.write = \"admin\"".to_owned(),
            _ if matches!(role, Role::Replica(_)) => {
                "a replica cannot know who reaches it, and catalog.write = \"auto\"".to_owned()
            }
            _ if self.listen.ip().is_loopback() => {
                format!("others come through http.trusted_proxies = {}", self.http.trusted_proxies)
            }
            _ => format!("listen = {} can be reached from other machines", self.listen),
        };
        (!self.catalog_open(role) && self.catalog.admin_token.is_none()).then_some(Lack::AdminToken { why })
    }

    /// The setting that names a server, if any does.
    fn server(&self) -> Option<&'static str> {
        match () {
            () if Service::ALL.into_iter().any(|service| self.mysql.of(service).is_some()) => Some("mysql"),
            () if self.nats.url.is_some() => Some("nats.url"),
            () if self.redis.url.is_some() => Some("redis.url"),
            () => None,
        }
    }

    /// All in one process, or nothing: services that do not share a broker would not hear each other.
    fn half(&self) -> Option<Lack> {
        let has = self.server()?;
        let databases = Service::ALL.into_iter().filter(|service| service.needs().database);
        let (with, without): (Vec<_>, Vec<_>) =
            databases.partition(|service| self.mysql.of(*service).is_some());
        let lacks = match (&without[..], &self.nats.url) {
            ([], Some(_)) => return None,
            ([], None) => "nats.url".to_owned(),
            ([one, ..], _) if !with.is_empty() => format!("mysql.{}", one.name()),
            ([..], _) => "mysql.url".to_owned(),
        };
        Some(Lack::Half { has, lacks })
    }

    fn service_lacks(&self, role: Role, service: Service, alone: bool) -> Vec<Lack> {
        let needs = service.needs();
        let lack = |setting: &str, flag: &str| Lack::Setting {
            who: role.to_string(),
            setting: setting.to_owned(),
            flag: flag.to_owned(),
        };
        let mut lacks = Vec::new();
        if needs.database && self.mysql.of(service).is_none() {
            lacks.push(lack("mysql.url", "--mysql mysql://USER:PASSWORD@HOST:PORT, or SAGA_MYSQL"));
        }
        if needs.bus && self.nats.url.is_none() {
            lacks.push(lack("nats.url", "--nats nats://HOST:PORT, or SAGA_NATS"));
        }
        for peer in needs.peers.iter().filter(|peer| alone && self.peers.of(**peer).is_none()) {
            let (setting, name) = (format!("peers.{}", peer.name()), peer.name().to_uppercase());
            lacks.push(lack(&setting, &format!("SAGA_PEERS__{name}=HOST:PORT,...")));
        }
        lacks
    }
}

#[cfg(test)]
mod tests {
    use super::super::secret::{Secret, ServerUrl};
    use super::*;

    fn texts(config: &Config, role: Role) -> Vec<String> {
        config.lacks_for(role).iter().map(Lack::to_string).collect()
    }

    #[test]
    fn an_embedded_shop_needs_nothing() {
        assert_eq!(Config::default().lacks_for(Role::Shop), []);
        assert_eq!(Config::default().lacks_for(Role::Seeder), []);
    }

    #[test]
    fn the_catalog_is_open_on_loopback_only_unless_told_otherwise() {
        let mut config = Config { listen: "[::1]:80".parse().unwrap(), ..Config::default() };
        assert!(config.catalog_open(Role::Shop));
        assert!(!config.catalog_open(Role::Replica(Service::Product)));
        config.http.trusted_proxies = 1;
        assert!(!config.catalog_open(Role::Shop), "others come through a proxy");
        let [Lack::AdminToken { why }] = &config.lacks_for(Role::Shop)[..] else {
            panic!("a token is missing")
        };
        assert_eq!(why, "others come through http.trusted_proxies = 1");
        config.http.trusted_proxies = 0;
        config.listen = "0.0.0.0:80".parse().unwrap();
        assert!(!config.catalog_open(Role::Shop));
        let lacks = texts(&config, Role::Shop);
        assert!(lacks.len() == 1 && lacks[0].contains("listen = 0.0.0.0:80"), "{lacks:?}");
        config.catalog.admin_token = Some(Secret::new("0123456789abcdef"));
        assert_eq!(config.lacks_for(Role::Shop), []);
        config.catalog.write = CatalogWrite::Open;
        assert!(config.catalog_open(Role::Replica(Service::Product)));
    }

    #[test]
    fn a_shop_has_all_servers_or_none() {
        let mut config = Config::default();
        let half = |config: &Config| match &config.lacks_for(Role::Shop)[..] {
            [Lack::Half { has, lacks }] => format!("{has} without {lacks}"),
            other => format!("{other:?}"),
        };
        config.redis.url = Some(ServerUrl::new("redis://a"));
        assert_eq!(half(&config), "redis.url without mysql.url");
        config.nats.url = Some(ServerUrl::new("nats://a"));
        assert_eq!(half(&config), "nats.url without mysql.url");
        config.mysql.order = Some(ServerUrl::new("mysql://a/order"));
        assert_eq!(half(&config), "mysql without mysql.account");
        config.mysql.url = Some(ServerUrl::new("mysql://a"));
        assert_eq!(config.lacks_for(Role::Shop), []);
        config.nats.url = None;
        assert_eq!(half(&config), "mysql without nats.url");
    }

    #[test]
    fn who_seeds_needs_the_products_database_alone_where_there_are_servers() {
        let mut config = Config::default();
        config.mysql.order = Some(ServerUrl::new("mysql://a/order"));
        config.nats.url = Some(ServerUrl::new("nats://a"));
        let lacks = config.lacks_for(Role::Seeder);
        assert_eq!(lacks, [Lack::Half { has: "mysql", lacks: "mysql.product".to_owned() }]);
        config.mysql.order = None;
        let lacks = config.lacks_for(Role::Seeder);
        assert_eq!(lacks, [Lack::Half { has: "nats.url", lacks: "mysql.product".to_owned() }]);
        config.mysql.product = Some(ServerUrl::new("mysql://a/product"));
        assert_eq!(config.lacks_for(Role::Seeder), []);
        config.nats.url = None;
        assert_eq!(config.lacks_for(Role::Seeder), []);
    }

    #[test]
    fn processes_need_servers_and_each_lack_is_told_once() {
        let config = Config { processes: 2, ..Config::default() };
        let lacks = texts(&config, Role::Shop);
        assert_eq!(lacks.len(), 2, "{lacks:?}");
        assert!(lacks[0].starts_with("saga up --processes needs mysql.url (--mysql "), "{lacks:?}");
        assert!(lacks[1].starts_with("saga up --processes needs nats.url (--nats "), "{lacks:?}");
    }

    #[test]
    fn a_replica_names_what_it_cannot_do_without() {
        let mut config = Config::default();
        let lacks = texts(&config, Role::Replica(Service::Purchase));
        assert_eq!(lacks.len(), 4, "{lacks:?}");
        assert_eq!(lacks[3], "saga run purchase needs peers.product (SAGA_PEERS__PRODUCT=HOST:PORT,...)");
        config.mysql.purchase = Some(ServerUrl::new("mysql://a/purchase"));
        config.nats.url = Some(ServerUrl::new("nats://a"));
        config.peers.account = "a:1".parse().ok();
        config.peers.product = "b:1".parse().ok();
        assert_eq!(config.lacks_for(Role::Replica(Service::Purchase)), []);
        assert_eq!(config.lacks_for(Role::Replica(Service::Orchestrator)), []);
        assert_eq!(texts(&config, Role::Replica(Service::Gateway)).len(), 3);
        assert!(matches!(config.lacks_for(Role::Replica(Service::Product))[0], Lack::AdminToken { .. }));
    }
}
