//! What the replicas of this service share in Redis, where others sell from the same database.

use ::cache::mark::Mark;
use ::cache::members::hold_open;
use ::cache::record::{Reader, Record, Writer};
use ::cache::{Fenced, Level2, Life, Members, Redis};
use db::{Db, Error};
use wire::time::Clock;

use crate::cache::Known;
use crate::store::{self, Product};

/// What the replicas share.
#[derive(Clone)]
pub(crate) struct Shared {
    /// What products are. None without Redis.
    pub(crate) facts: Option<Level2<Known>>,
    /// What is left of them.
    pub(crate) amounts: Fenced<Left>,
    /// Which there are.
    pub(crate) members: Members,
}

/// What is left of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Left(pub(crate) i64);

impl Record for Left {
    const FORMAT: u8 = 1;

    fn write(&self, to: &mut Writer) {
        to.signed(self.0);
    }

    fn read(from: &mut Reader<'_>) -> Option<Left> {
        from.signed().map(Left)
    }
}

impl Shared {
    pub(crate) async fn start(db: &Db, redis: Option<Redis>, clock: Clock) -> Result<Shared, Error> {
        db.write(|tx| Mark::Closed.ensure(tx)).await?;
        let life = Life::start(db.clone(), redis.clone()).await?;
        Ok(Shared {
            facts: redis.map(|redis| Level2::new(redis, "product")),
            amounts: Fenced::new(life, "left"),
            members: Members::start(db.clone(), clock, store::page_of_ids),
        })
    }

    /// Creates the product, if its id may still be used; tells whether it was.
    pub(crate) async fn create(&self, db: &Db, product: Product) -> Result<bool, Error> {
        db.write(move |tx| {
            if !hold_open(tx, product.id)? {
                return Ok(false);
            }
            store::insert(tx, &product)?;
            Ok(true)
        })
        .await
    }
}
