//! What is known of products: from copies, where they are as good as the database.

use std::collections::HashMap;
use std::sync::Arc;

use ::cache::Looked;
use db::ids::{Ids, IdsError};
use db::{Db, Error};

use crate::cache::{Known, ProductCache};
use crate::shared::{Left, Shared};
use crate::store::{self, Product};

/// How often a creation takes another id, because it took too long with the one it had.
const CREATE_TRIES: u32 = 5;

/// Answers questions about products.
#[derive(Clone)]
pub(crate) struct Catalogue {
    pub(crate) db: Db,
    /// Copies in this process; amounts only where nobody else sells from the database.
    pub(crate) cache: ProductCache,
    /// Where others sell from the database.
    pub(crate) shared: Option<Shared>,
    pub(crate) ids: Ids,
}

impl Catalogue {
    /// A product, and what is left of it.
    pub(crate) async fn product(&self, id: u64) -> Result<Option<(Arc<Known>, i64)>, Error> {
        let Some(shared) = &self.shared else { return self.product_alone(id).await };
        if !shared.members.may_have(id) {
            return Ok(None);
        }
        let known = async {
            match (self.cache.facts(id), &shared.facts) {
                (None, Some(facts)) => Some(self.cache.keep_known(id, facts.get(id).await?)),
                (known, _) => known,
            }
        };
        // At once: one round trip.
        let (known, looked) = tokio::join!(known, shared.amounts.look(id));
        let ticket = match (known, looked) {
            (Some(known), Looked::Found(Left(left))) => return Ok(Some((known, left))),
            (None, Looked::Found(_)) => None,
            (_, Looked::Ask(ticket)) => Some(ticket),
        };
        let Some((version, product)) = self.db.read(move |tx| store::by_id(tx, id)).await? else {
            return Ok(None);
        };
        let left = product.inventory;
        if let Some(ticket) = ticket {
            shared.amounts.keep(ticket, id, version, &Left(left));
        }
        Ok(Some((self.keep_facts(shared, product), left)))
    }

    async fn product_alone(&self, id: u64) -> Result<Option<(Arc<Known>, i64)>, Error> {
        if let Some(known) = self.cache.get(id) {
            return Ok(Some(known));
        }
        let before = self.cache.before(id);
        let found = self.db.read(move |tx| store::by_id(tx, id)).await?;
        Ok(found.map(|(_, product)| {
            let left = product.inventory;
            (self.cache.keep(before, product), left)
        }))
    }

    /// The prices of products, none for those that do not exist.
    pub(crate) async fn prices(&self, ids: Vec<u64>) -> Result<Vec<Option<i64>>, Error> {
        let prices: Vec<Option<i64>> = ids.iter().map(|id| self.cache.price(*id)).collect();
        if prices.iter().all(Option::is_some) {
            return Ok(prices);
        }
        let known = self.facts(&ids).await?;
        Ok(ids.iter().map(|id| known.get(id).map(|known| known.price)).collect())
    }

    /// What these products are, those that exist.
    pub(crate) async fn facts(&self, ids: &[u64]) -> Result<HashMap<u64, Arc<Known>>, Error> {
        let mut known = HashMap::with_capacity(ids.len());
        let mut missing = Vec::new();
        for id in ids {
            match self.cache.facts(*id) {
                Some(copy) => _ = known.insert(*id, copy),
                None => missing.push(*id),
            }
        }
        if let Some(shared) = &self.shared {
            missing.retain(|id| shared.members.may_have(*id));
            if let Some(facts) = shared.facts.as_ref().filter(|_| !missing.is_empty()) {
                let found = facts.get_many(&missing).await;
                let mut still_missing = Vec::new();
                for (id, found) in missing.into_iter().zip(found) {
                    match found {
                        Some(copy) => _ = known.insert(id, self.cache.keep_known(id, copy)),
                        None => still_missing.push(id),
                    }
                }
                missing = still_missing;
            }
        }
        if missing.is_empty() {
            return Ok(known);
        }
        let products = self.db.read(move |tx| store::products(tx, &missing)).await?;
        let read: Vec<(u64, Arc<Known>)> =
            products.into_iter().map(|product| (product.id, self.cache.keep_facts(product))).collect();
        if let Some(facts) = self.shared.as_ref().and_then(|shared| shared.facts.as_ref()) {
            facts.put_many(&read.iter().map(|(id, copy)| (*id, &**copy)).collect::<Vec<_>>());
        }
        known.extend(read);
        Ok(known)
    }

    fn keep_facts(&self, shared: &Shared, product: Product) -> Arc<Known> {
        let id = product.id;
        if let Some(known) = self.cache.facts(id) {
            return known;
        }
        let known = self.cache.keep_facts(product);
        if let Some(facts) = &shared.facts {
            facts.put_many(&[(id, &*known)]);
        }
        known
    }

    /// Creates a product under a new id, which it returns.
    pub(crate) async fn create(&self, mut product: Product) -> Result<u64, CreateError> {
        for _ in 0..CREATE_TRIES {
            product.id = self.ids.next().await?;
            let (id, new) = (product.id, product.clone());
            let created = match &self.shared {
                Some(shared) => shared.create(&self.db, new).await?,
                None => self.db.write(move |tx| store::insert(tx, &new).map(|()| true)).await?,
            };
            if created {
                return Ok(id);
            }
        }
        Err(CreateError::TooLate)
    }
}

/// Why a product was not created.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CreateError {
    #[error(transparent)]
    Ids(#[from] IdsError),
    #[error(transparent)]
    Database(#[from] Error),
    #[error("{CREATE_TRIES} ids were too old by the time that they could be used")]
    TooLate,
}
