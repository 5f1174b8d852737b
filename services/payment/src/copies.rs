//! Copies of payments, in this process and in Redis. A payment decides its purchase: once it is there it neither changes nor goes.

use cache::record::{Reader, Record, Writer};
use cache::{Loaded, Redis};
use db::{Db, Error};

use crate::store::{self, Payment};

/// The copies kept in this process, in bytes.
const LOCAL_BYTES: u64 = 16 << 20;

/// Copies of payments. Clones share them.
#[derive(Clone)]
pub struct Copies(cache::Copies<Payment>);

impl Copies {
    /// Copies that the replicas share in Redis.
    pub fn new(redis: Redis) -> Copies {
        Copies(cache::Copies::new(Some(redis), "payment", LOCAL_BYTES))
    }

    /// A payment, whoever's it is.
    pub(crate) async fn payment(&self, db: &Db, id: u64) -> Result<Option<Payment>, Error> {
        let load = || async {
            let found = db.read(move |tx| store::by_id(tx, id)).await?;
            Ok(found.map_or(Loaded::Missing, Loaded::Final))
        };
        Ok(self.0.get(id, load).await?.map(|payment| (*payment).clone()))
    }
}

impl Record for Payment {
    const FORMAT: u8 = 1;

    fn write(&self, to: &mut Writer) {
        to.number(self.customer_id);
        to.text(&self.currency_code);
        to.signed(self.amount);
    }

    fn read(from: &mut Reader<'_>) -> Option<Payment> {
        Some(Payment { customer_id: from.number()?, currency_code: from.text()?, amount: from.signed()? })
    }
}
