//! The servers that a distributed shop stands on, and where its own processes are.

use std::path::PathBuf;

use peers::Addresses;
use serde::{Deserialize, Serialize};

use super::secret::ServerUrl;

/// A service of the shop: what `saga run` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Service {
    /// Customers, passwords, tokens.
    Account,
    /// Products and stock.
    Product,
    /// Orders.
    Order,
    /// Payments.
    Payment,
    /// Purchases and their event streams.
    Purchase,
    /// Drives sagas; keeps nothing.
    Orchestrator,
    /// One port before all of them.
    Gateway,
}

impl Service {
    /// All of them, in the order in which a purchase needs them.
    pub(crate) const ALL: [Service; 7] = [
        Service::Account,
        Service::Product,
        Service::Order,
        Service::Payment,
        Service::Purchase,
        Service::Orchestrator,
        Service::Gateway,
    ];

    /// Its name on the command line, in logs, and of its database.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Service::Account => "account",
            Service::Product => "product",
            Service::Order => "order",
            Service::Payment => "payment",
            Service::Purchase => "purchase",
            Service::Orchestrator => "orchestrator",
            Service::Gateway => "gateway",
        }
    }

    /// The section or sections of the settings without which it cannot run.
    pub(crate) fn needs(self) -> Needs {
        use Service::{Account, Order, Payment, Product, Purchase};
        match self {
            Account => Needs { database: true, bus: false, peers: &[] },
            Product => Needs { database: true, bus: true, peers: &[] },
            Order => Needs { database: true, bus: true, peers: &[Account, Product] },
            Payment => Needs { database: true, bus: true, peers: &[Account] },
            Purchase => Needs { database: true, bus: true, peers: &[Account, Product] },
            Service::Orchestrator => Needs { database: false, bus: true, peers: &[] },
            Service::Gateway => {
                Needs { database: false, bus: false, peers: &[Account, Product, Order, Payment, Purchase] }
            }
        }
    }
}

/// What a service stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Needs {
    /// A database of its own.
    pub database: bool,
    /// The broker.
    pub bus: bool,
    /// Services that it asks.
    pub peers: &'static [Service],
}

/// MySQL or MariaDB. Without it each service has a SQLite file in the data directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Mysql {
    /// One server for all services: `mysql://USER:PASSWORD@HOST:PORT`. Each service has a database of its own there,
    /// `saga_account` and so on, which is created if it is missing and the user may. `?tls=true` behind it encrypts, and so does
    /// `?root_cert_path=FILE`, which names the authorities that vouch for the server.
    pub url: Option<ServerUrl>,
    /// The account service's own server and database, instead of the one at `url`.
    pub account: Option<ServerUrl>,
    /// The product service's.
    pub product: Option<ServerUrl>,
    /// The order service's.
    pub order: Option<ServerUrl>,
    /// The payment service's.
    pub payment: Option<ServerUrl>,
    /// The purchase service's.
    pub purchase: Option<ServerUrl>,
    /// What the names of the databases at `url` begin with.
    pub database_prefix: String,
    /// Connections that write, of each process to a service's database.
    pub writers: usize,
    /// Connections that read, likewise.
    pub readers: usize,
}

impl Mysql {
    /// Where a service's database is, if any place was named for it.
    pub(crate) fn of(&self, service: Service) -> Option<Database<'_>> {
        let own = match service {
            Service::Account => &self.account,
            Service::Product => &self.product,
            Service::Order => &self.order,
            Service::Payment => &self.payment,
            Service::Purchase => &self.purchase,
            Service::Orchestrator | Service::Gateway => return None,
        };
        match (own, &self.url) {
            (Some(url), _) => Some(Database::Own(url)),
            (None, Some(url)) => {
                Some(Database::Shared { url, name: format!("{}{}", self.database_prefix, service.name()) })
            }
            (None, None) => None,
        }
    }
}

impl Database<'_> {
    /// Its URL, with the database in it.
    pub(crate) fn url(&self) -> String {
        match self {
            Database::Own(url) => url.expose().to_owned(),
            Database::Shared { url, name } => {
                let (server, options) = match url.expose().split_once('?') {
                    Some((server, options)) => (server, format!("?{options}")),
                    None => (url.expose(), String::new()),
                };
                format!("{}/{name}{options}", server.trim_end_matches('/'))
            }
        }
    }
}

/// Where a service's database is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Database<'c> {
    /// At a URL of its own, which names the database.
    Own(&'c ServerUrl),
    /// On a server with others, under this name.
    Shared {
        /// The server.
        url: &'c ServerUrl,
        /// The database.
        name: String,
    },
}

/// NATS with JetStream. Without it messages travel in the memory of one process.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Nats {
    /// The servers of one cluster: `nats://HOST:PORT`, separated by commas; `nats://USER:PASSWORD@HOST:PORT`, or
    /// `tls://` for TLS.
    pub url: Option<ServerUrl>,
    /// A file with a user's JWT and key, as `nsc` writes it.
    pub credentials_file: Option<PathBuf>,
    /// A file with the certificates, in PEM, of the authorities that vouch for the servers; unless set, those that the operating system
    /// trusts. This file and the next protect all connections, as `tls://` does.
    pub root_certificates: Option<PathBuf>,
    /// A file with a certificate to show to servers that ask for one, in PEM, with what vouches for it behind it.
    pub client_certificate: Option<PathBuf>,
    /// A file with its private key, in PEM.
    pub client_key: Option<PathBuf>,
    /// Where the servers keep messages. Streams that exist are not moved: they have to be deleted first.
    pub storage: Storage,
    /// On how many servers each message is kept: 1, 3 or 5. One is enough: what a server loses is sent again from a database. More spare
    /// the seconds that this takes, and cost several times the work.
    pub replicas: usize,
    /// On how many servers each dead letter is kept: 1, 3 or 5. 0: on three where `url` names as many, or else as each message. Nobody has a
    /// dead letter a second time.
    pub dead_letter_replicas: usize,
    /// What one queue may take on each server that keeps it, in MiB, and so may all dead letters. The servers set it aside at once: they
    /// need room for six times as much.
    pub queue_mib: u64,
    /// What a process has taken and not spoken of for so long is delivered to another. A living one speaks of it every third of that.
    pub ack_wait_seconds: u64,
    /// Frames, of up to a batch of messages each, that may be out of one queue at a time, taken or delayed, over all processes. What comes
    /// behind them waits.
    pub max_ack_pending: usize,
    /// Frames of a process that may be on their way to the servers at a time. A further one waits its turn.
    pub publishes_in_flight: usize,
    /// Under load a service takes its messages at most every so many milliseconds: a rarer batch is a larger one, and costs less a purchase.
    /// 0: at once, always. It begins at 32 messages in that time. Requests to purchase gather for a quarter of it.
    pub gather_ms: u64,
    /// What the names of subjects and streams begin with, so that several shops can share a cluster.
    pub prefix: String,
}

/// Where NATS keeps messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Storage {
    /// In files, which the servers sync when they like.
    File,
    /// In memory.
    Memory,
}

/// Redis, a cluster or a single node. It holds copies only: without it, or while it is down, the databases are asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Redis {
    /// Some of the nodes: `redis://HOST:PORT`, separated by commas; `redis://:PASSWORD@HOST:PORT`.
    pub url: Option<ServerUrl>,
    /// What the names of keys begin with, so that several shops can share a Redis.
    pub prefix: String,
}

/// Where the other processes of the shop are: `HOST:PORT`, separated by commas. A name may stand for several addresses.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Peers {
    /// Replicas of the account service.
    pub account: Option<Addresses>,
    /// Of the product service.
    pub product: Option<Addresses>,
    /// Of the order service.
    pub order: Option<Addresses>,
    /// Of the payment service.
    pub payment: Option<Addresses>,
    /// Of the purchase service.
    pub purchase: Option<Addresses>,
}

impl Peers {
    /// A service's replicas.
    pub(crate) fn of(&self, service: Service) -> Option<&Addresses> {
        match service {
            Service::Account => self.account.as_ref(),
            Service::Product => self.product.as_ref(),
            Service::Order => self.order.as_ref(),
            Service::Payment => self.payment.as_ref(),
            Service::Purchase => self.purchase.as_ref(),
            Service::Orchestrator | Service::Gateway => None,
        }
    }
}

impl Default for Mysql {
    fn default() -> Mysql {
        Mysql {
            url: None,
            account: None,
            product: None,
            order: None,
            payment: None,
            purchase: None,
            database_prefix: "saga_".to_owned(),
            writers: 4,
            readers: 4,
        }
    }
}

impl Default for Nats {
    fn default() -> Nats {
        Nats {
            url: None,
            credentials_file: None,
            root_certificates: None,
            client_certificate: None,
            client_key: None,
            storage: Storage::File,
            replicas: 1,
            dead_letter_replicas: 0,
            queue_mib: 256,
            ack_wait_seconds: 10,
            max_ack_pending: 65_536,
            publishes_in_flight: 256,
            gather_ms: 30,
            prefix: "saga".to_owned(),
        }
    }
}

impl Default for Redis {
    fn default() -> Redis {
        Redis { url: None, prefix: "saga".to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_s_own_server_goes_before_the_common_one() {
        let mut mysql = Mysql::default();
        assert_eq!(mysql.of(Service::Order), None);
        let (common, own) = (ServerUrl::new("mysql://a"), ServerUrl::new("mysql://b/orders"));
        mysql.url = Some(common.clone());
        let name = "saga_order".to_owned();
        assert_eq!(mysql.of(Service::Order), Some(Database::Shared { url: &common, name }));
        mysql.order = Some(own.clone());
        assert_eq!(mysql.of(Service::Order), Some(Database::Own(&own)));
        assert_eq!(mysql.of(Service::Gateway), None);
    }

    #[test]
    fn a_database_s_url_names_it() {
        for (server, database) in [
            ("mysql://u:p@h:1", "mysql://u:p@h:1/saga_order"),
            ("mysql://u:p@h:1/", "mysql://u:p@h:1/saga_order"),
            ("mysql://u:p@h:1?tls=true", "mysql://u:p@h:1/saga_order?tls=true"),
        ] {
            let mysql = Mysql { url: Some(ServerUrl::new(server)), ..Mysql::default() };
            assert_eq!(mysql.of(Service::Order).expect("there is a server").url(), database);
        }
    }

    #[test]
    fn names_are_those_of_the_command_line() {
        use clap::ValueEnum;
        for service in Service::ALL {
            assert_eq!(service.to_possible_value().expect("none is hidden").get_name(), service.name());
        }
        assert_eq!(Service::value_variants(), Service::ALL);
    }
}
