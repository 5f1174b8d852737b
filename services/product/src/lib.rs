//! The product service: products and what is left of them.
//!
//! It owns the tables `product` and its barrier. Stock changes only in the transactions of the purchase saga: a
//! reservation takes, its compensation gives back.
//!
//! What never happens: stock below zero, a cart that is reserved in part, stock given back twice, an answer from a
//! copy that is older than a purchase whose end anybody was told of.

mod cache;
mod catalogue;
mod http;
mod shared;
mod stock;
mod store;

use ::cache::Redis;
use ::cache::members::hold_open;
use axum::Router;
use bus::Bus;
use db::Db;
use db::ids::{Ids, IdsError};
use participant::{Book, barrier};
use shop::calls::{CheckProducts, GetProducts, ProductDetails, Unavailable};
use shop::purchase::{INVENTORY_COMMANDS, ORCHESTRATOR};
use telemetry::Spans;
use telemetry::metrics::PubsubMetrics;
use tokio_util::sync::CancellationToken;
use wire::time::Clock;

pub use cache::ProductCache;
use catalogue::Catalogue;
use shared::Shared;
use store::Product;

/// The largest price and the largest inventory: what a JSON number carries through JavaScript, 2^53 - 1.
pub const MAX_AMOUNT: i64 = (1 << 53) - 1;

/// The longest name, description and brand name, in characters.
pub const MAX_TEXT_CHARS: usize = 4_096;

/// The schema of the service's database.
pub const MIGRATIONS: &[db::Migration] = &[
    db::Migration {
        number: 1,
        name: "product",
        sqlite: include_str!("../migrations/sqlite/0001_product.sql"),
        mysql: include_str!("../migrations/mysql/0001_product.sql"),
    },
    barrier::migration(2),
    db::ids::migration(3),
    db::Migration {
        number: 4,
        name: "version",
        sqlite: include_str!("../migrations/sqlite/0004_version.sql"),
        mysql: include_str!("../migrations/mysql/0004_version.sql"),
    },
    ::cache::mark::migration(5),
];

/// Who may create products.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CatalogWrite {
    /// Everybody who reaches the API.
    Open,
    /// Who has this bearer token.
    Admin {
        /// The token.
        token: String,
    },
}

/// What the service is made of.
pub struct Parts {
    /// Its database, opened with [`MIGRATIONS`].
    pub db: Db,
    /// Its copies of products: one for all in this process that work on this database.
    pub cache: ProductCache,
    /// Where the replicas share copies, if others work on this database, too. All of them must use the same, or none.
    pub redis: Option<Redis>,
    /// Where its commands come from.
    pub bus: Bus,
    /// The time.
    pub clock: Clock,
    /// Who may create products.
    pub write: CatalogWrite,
    /// The sagas that its participant drives on when it has recorded a reply.
    pub book: Book,
    /// Counts what its participant does.
    pub metrics: PubsubMetrics,
    /// Records what its participant does for sampled sagas.
    pub spans: Spans,
    /// The bounds of its participant.
    pub settings: participant::Settings,
}

#[derive(Clone)]
struct Service {
    catalogue: Catalogue,
    write: CatalogWrite,
}

/// The service, ready to be reached through its doors.
pub struct ProductService {
    service: Service,
    stock: participant::Parts<stock::Stock>,
}

/// Prepares the service.
///
/// # Errors
/// When no worker id for its ids can be had.
pub async fn start(parts: Parts) -> Result<ProductService, IdsError> {
    let Parts { db, cache, redis, bus, clock, write, book, metrics, spans, settings } = parts;
    let ids = Ids::lease(db.clone(), clock.clone()).await?;
    let shared = match db.is_shared() {
        true => Some(Shared::start(&db, redis, clock.clone()).await?),
        false => None,
    };
    let amounts = shared.as_ref().map(|shared| shared.amounts.clone());
    let catalogue = Catalogue { db: db.clone(), cache: cache.clone(), shared, ids };
    let stock = participant::Parts {
        participant: stock::Stock { cache, shared: amounts },
        db,
        bus,
        commands: INVENTORY_COMMANDS,
        book,
        replies: ORCHESTRATOR,
        clock,
        metrics,
        spans,
        settings,
    };
    Ok(ProductService { service: Service { catalogue, write }, stock })
}

impl ProductService {
    /// Its HTTP routes.
    pub fn router(&self) -> Router {
        http::router(self.service.clone())
    }

    /// Answers which products exist, and at which price.
    pub fn check_products(&self) -> CheckProducts {
        let catalogue = self.service.catalogue.clone();
        CheckProducts::new(move |ids: Vec<u64>| {
            let catalogue = catalogue.clone();
            async move { catalogue.prices(ids).await.map_err(unavailable) }
        })
    }

    /// Answers what is known of products.
    pub fn get_products(&self) -> GetProducts {
        let db = self.service.catalogue.db.clone();
        GetProducts::new(move |ids: Vec<u64>| {
            let db = db.clone();
            async move {
                let products = db.read(move |tx| store::products(tx, &ids)).await.map_err(unavailable)?;
                let details = |Product { id, name, description, brand_name, inventory, price }: Product| {
                    ProductDetails { id, name, description, brand_name, inventory, price }
                };
                Ok(products.into_iter().map(details).collect())
            }
        })
    }

    /// Creates a few products to look at, unless there are some already. Returns how many were created.
    ///
    /// # Errors
    /// When the database fails, or no ids can be had.
    pub async fn seed(&self) -> Result<usize, SeedError> {
        let Catalogue { db, shared, ids, .. } = &self.service.catalogue;
        let mut products = demo_products();
        for (product, id) in products.iter_mut().zip(ids.take(DEMO_PRODUCTS).await?) {
            product.id = id;
        }
        let holds = shared.is_some();
        let created = db.write(move |tx| {
            if !store::insert_if_empty(tx, &products)? {
                return Ok::<_, db::Error>(0);
            }
            for product in &products {
                if holds && !hold_open(tx, product.id)? {
                    return Err(db::Error::PutOff {
                        why: "the ids of the first products are too old by now",
                    });
                }
            }
            Ok(products.len())
        });
        Ok(created.await?)
    }

    /// Takes part in purchase sagas until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        participant::run(self.stock, stop).await;
    }
}

/// Why there is no demo data.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// No ids could be had.
    #[error(transparent)]
    Ids(#[from] IdsError),
    /// The database failed.
    #[error(transparent)]
    Database(#[from] db::Error),
}

fn unavailable(error: db::Error) -> Unavailable {
    Unavailable { service: "product", why: error.to_string() }
}

const DEMO_PRODUCTS: u32 = 5;

fn demo_products() -> [Product; DEMO_PRODUCTS as usize] {
    let product = |name: &str, description: &str, brand_name: &str, price, inventory| Product {
        id: 0,
        name: name.to_owned(),
        description: description.to_owned(),
        brand_name: brand_name.to_owned(),
        price,
        inventory,
    };
    [
        product("Oak longship model", "A ship to build in a week of evenings", "Drakkar", 4_900, 1_000),
        product("Rune notebook", "160 dotted pages, lies flat", "Futhark", 1_200, 5_000),
        product("Wool blanket", "Two layers, woven in one piece", "Fjord", 8_900, 300),
        product("Drinking horn", "Holds half a litre; the last three", "Mead & Sons", 2_500, 3),
        product("Golden arm ring", "Above the limit: a payment that is declined", "Draupnir", 2_000_000, 10),
    ]
}
