//! The SQL of products and stock, one function a question.

use db::{Error, Row, Set, Tx, Value};

/// A product as it is sold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Product {
    pub(crate) id: u64,
    pub(crate) name: String,
    pub(crate) description: String,
    pub(crate) brand_name: String,
    pub(crate) price: i64,
    pub(crate) inventory: i64,
}

/// A line of the catalogue.
pub(crate) struct Listed {
    pub(crate) id: u64,
    pub(crate) name: String,
    pub(crate) inventory: i64,
    pub(crate) price: i64,
}

pub(crate) fn insert(tx: &mut Tx<'_>, product: &Product) -> Result<(), Error> {
    tx.execute(
        "INSERT INTO product (id, name, description, brand_name, price, inventory) VALUES (?, ?, ?, ?, ?, ?)",
        &[
            Value::from(product.id),
            Value::from(&product.name),
            Value::from(&product.description),
            Value::from(&product.brand_name),
            Value::from(product.price),
            Value::from(product.inventory),
        ],
    )?;
    Ok(())
}

/// Inserts these products if there are none; false, if there are. Of several replicas that do it at once, one does: each has
/// leased a worker number before, so there are rows that they can all lock.
pub(crate) fn insert_if_empty(tx: &mut Tx<'_>, products: &[Product]) -> Result<bool, Error> {
    tx.query("SELECT worker FROM id_lease ORDER BY worker {for update}", &[], |_| Ok(()))?;
    let empty = tx.query_opt("SELECT 1 FROM product LIMIT 1", &[], |_| Ok(()))?.is_none();
    if empty {
        products.iter().try_for_each(|product| insert(tx, product))?;
    }
    Ok(empty)
}

/// A product, and the version of what is left of it.
pub(crate) fn by_id(tx: &mut Tx<'_>, id: u64) -> Result<Option<(u64, Product)>, Error> {
    tx.query_opt(
        "SELECT id, name, description, brand_name, price, inventory, version FROM product WHERE id = ?",
        &[Value::from(id)],
        |row| Ok((row.get(6)?, product(row)?)),
    )
}

/// The ids of products above one and up to another, in their order, the first `limit` of them.
pub(crate) fn page_of_ids(tx: &mut Tx<'_>, above: u64, up_to: u64, limit: u32) -> Result<Vec<u64>, Error> {
    tx.query(
        "SELECT id FROM product WHERE id > ? AND id <= ? ORDER BY id LIMIT ?",
        &[Value::from(above), Value::from(up_to), Value::from(limit)],
        |row| row.get(0),
    )
}

fn product(row: &Row<'_>) -> Result<Product, Error> {
    Ok(Product {
        id: row.get(0)?,
        name: row.get(1)?,
        description: row.get(2)?,
        brand_name: row.get(3)?,
        price: row.get(4)?,
        inventory: row.get(5)?,
    })
}

pub(crate) fn list(tx: &mut Tx<'_>, offset: u64, size: u64) -> Result<Vec<Listed>, Error> {
    tx.query(
        "SELECT id, name, inventory, price FROM product ORDER BY id LIMIT ? OFFSET ?",
        &[Value::from(size), Value::from(offset)],
        |row| Ok(Listed { id: row.get(0)?, name: row.get(1)?, inventory: row.get(2)?, price: row.get(3)? }),
    )
}

pub(crate) fn products(tx: &mut Tx<'_>, ids: &[u64]) -> Result<Vec<Product>, Error> {
    tx.query(
        "SELECT p.id, p.name, p.description, p.brand_name, p.price, p.inventory
         {from set(id INT) AS s join product AS p on p.id = s.id}",
        &[Value::from(&id_set(ids.iter().copied()))],
        product,
    )
}

/// What is left of a product, and the version of that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stock {
    pub(crate) id: u64,
    pub(crate) amount: i64,
    pub(crate) version: u64,
}

/// What is left of these products, locked in the order of the ids where the database has row locks. Ids that do not
/// exist are left out. The ids must be sorted, so that two transactions lock in one order.
pub(crate) fn lock_stock(tx: &mut Tx<'_>, ids: impl Iterator<Item = u64>) -> Result<Vec<Stock>, Error> {
    tx.query(
        "SELECT p.id, p.inventory, p.version
         {from set(id INT) AS s join product AS p on p.id = s.id} {for update}",
        &[Value::from(&id_set(ids))],
        |row| Ok(Stock { id: row.get(0)?, amount: row.get(1)?, version: row.get(2)? }),
    )
}

/// Writes what is left of these products.
pub(crate) fn set_stock(tx: &mut Tx<'_>, left: impl Iterator<Item = Stock>) -> Result<(), Error> {
    let mut set = Set::new();
    for Stock { id, amount, version } in left {
        set.push(&[Value::from(id), Value::from(amount), Value::from(version)]);
    }
    if !set.is_empty() {
        tx.execute(
            "{update product AS p join set(id INT, inventory INT, version INT) AS s on p.id = s.id
              set inventory = s.inventory, version = s.version}",
            &[Value::from(&set)],
        )?;
    }
    Ok(())
}

fn id_set(ids: impl Iterator<Item = u64>) -> Set {
    let mut set = Set::new();
    for id in ids {
        set.push(&[Value::from(id)]);
    }
    set
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use db::Db;
    use testdb::TestDb;
    use tokio::sync::Barrier;

    use super::*;
    use crate::MIGRATIONS;

    testdb::on_both! {
        #[tokio::test]
        what_is_inserted_is_found,
        a_statement_over_products_leaves_the_others_alone;
        #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
        replicas_that_sell_the_same_products_sell_what_there_is_and_no_more,
        of_replicas_that_seed_at_once_one_does;
    }

    fn product(id: u64, inventory: i64) -> Product {
        let text = |what: &str| format!("{what} {id} \u{1F980} \"\\ ");
        let (name, description, brand_name) = (text("name"), text(""), text("brand"));
        Product { id, name, description, brand_name, price: 3, inventory }
    }

    /// What is left of a product of the first version.
    fn stock((id, amount): (u64, i64)) -> Stock {
        Stock { id, amount, version: 0 }
    }

    /// What is left, whatever its version.
    fn amounts(stock: Vec<Stock>) -> Vec<(u64, i64)> {
        stock.into_iter().map(|Stock { id, amount, .. }| (id, amount)).collect()
    }

    async fn open(at: &TestDb, products: impl Iterator<Item = (u64, i64)>) -> Db {
        let db = at.open(MIGRATIONS);
        let products: Vec<Product> = products.map(|(id, inventory)| product(id, inventory)).collect();
        db.write(move |tx| products.iter().try_for_each(|product| insert(tx, product)))
            .await
            .expect("products");
        db
    }

    async fn what_is_inserted_is_found(at: &TestDb) {
        let db = open(at, [(7, 0), (9, i64::MAX), (8, 5)].into_iter()).await;
        let found = db.read(|tx| by_id(tx, 9)).await.expect("an answer");
        assert_eq!(found.map(|(_, product)| product), Some(product(9, i64::MAX)));
        assert_eq!(db.read(|tx| by_id(tx, 10)).await, Ok(None));
        let listed = db.read(|tx| list(tx, 1, 5)).await.expect("a list");
        assert_eq!(listed.iter().map(|listed| listed.id).collect::<Vec<_>>(), [8, 9]);
        assert_eq!(
            db.read(|tx| products(tx, &[9, 10, 7])).await,
            Ok(vec![product(9, i64::MAX), product(7, 0)])
        );
        let negative = db.write(|tx| set_stock(tx, [(8, -1)].into_iter().map(stock))).await;
        assert!(matches!(negative, Err(Error::Sql { .. })), "{negative:?}");
        let again = db.write(|tx| insert(tx, &product(7, 1))).await;
        assert!(again.as_ref().is_err_and(|error| error.violates("product.id")), "{again:?}");
    }

    async fn a_statement_over_products_leaves_the_others_alone(at: &TestDb) {
        let db = open(at, (1..=5).map(|id| (id, 10))).await;
        let left = db
            .write(|tx| {
                set_stock(tx, [(2, 3), (4, 0), (99, 7)].into_iter().map(stock))?;
                lock_stock(tx, (1..=9).chain([99]))
            })
            .await;
        assert_eq!(left.map(amounts), Ok(vec![(1, 10), (2, 3), (3, 10), (4, 0), (5, 10)]));
    }

    /// Reserves one of each of these, as the participant does: all or nothing.
    async fn reserve(db: &Db, mut ids: Vec<u64>) -> bool {
        ids.sort_unstable();
        let reserved = db.write(move |tx| {
            let stock = lock_stock(tx, ids.iter().copied())?;
            let enough = stock.iter().all(|left| left.amount > 0);
            if enough {
                set_stock(tx, stock.into_iter().map(|left| Stock { amount: left.amount - 1, ..left }))?;
            }
            Ok::<_, Error>(enough)
        });
        reserved.await.expect("whoever is in the way, it is tried again")
    }

    /// Rows 11 and 12 of the fault list: few units, and carts with the same products.
    async fn replicas_that_sell_the_same_products_sell_what_there_is_and_no_more(at: &TestDb) {
        const REPLICAS: u64 = 4;
        const UNITS: i64 = 30;
        let db = open(at, (1..=3).map(|id| (id, UNITS))).await;
        let start = Arc::new(Barrier::new(REPLICAS as usize));
        let mut tasks = Vec::new();
        for replica in 0..REPLICAS {
            let (db, start) = (at.open(MIGRATIONS), start.clone());
            tasks.push(tokio::spawn(async move {
                start.wait().await;
                let mut sold = 0;
                for cart in 0..20 {
                    let ids = [vec![1, 2], vec![2, 1], vec![3, 2, 1], vec![2]]
                        [((cart + replica) % 4) as usize]
                        .clone();
                    sold += i64::from(reserve(&db, ids).await);
                }
                sold
            }));
        }
        let mut sold = 0;
        for task in tasks {
            sold += task.await.expect("a replica");
        }
        assert_eq!(sold, UNITS, "each cart has one of product 2");
        let left = amounts(db.write(|tx| lock_stock(tx, 1..=3)).await.expect("what is left"));
        assert_eq!(left[1], (2, 0));
        assert!(left.iter().all(|(_, left)| (0..=UNITS).contains(left)), "{left:?}");
    }

    async fn of_replicas_that_seed_at_once_one_does(at: &TestDb) {
        const REPLICAS: u64 = 4;
        let db = open(at, std::iter::empty()).await;
        let lease = "INSERT INTO id_lease (worker, owner, expires_at_millis, reserved_until_second) VALUES (1, 1, 1, 1)";
        db.write(move |tx| tx.execute(lease, &[]).map(drop))
            .await
            .map_err(|error: Error| error)
            .expect("a lease");
        let start = Arc::new(Barrier::new(REPLICAS as usize));
        let mut tasks = Vec::new();
        for replica in 0..REPLICAS {
            let (db, start) = (at.open(MIGRATIONS), start.clone());
            tasks.push(tokio::spawn(async move {
                let products: Vec<Product> = (1..=5).map(|id| product(replica * 10 + id, 1)).collect();
                start.wait().await;
                db.write(move |tx| insert_if_empty(tx, &products)).await.expect("it is tried again")
            }));
        }
        let mut seeded = 0;
        for task in tasks {
            seeded += usize::from(task.await.expect("a replica"));
        }
        assert_eq!(seeded, 1);
        assert_eq!(db.read(|tx| list(tx, 0, 99)).await.expect("a list").len(), 5);
    }

    /// How many transactions on this database wait for a row.
    fn waiting(at: &TestDb) -> u32 {
        let TestDb::MariaDb(database) = at else { panic!("SQLite has no row locks") };
        let count = format!(
            "SELECT COUNT(*) FROM information_schema.innodb_trx AS t JOIN information_schema.processlist AS p
             ON p.id = t.trx_mysql_thread_id WHERE t.trx_state = 'LOCK WAIT' AND p.db = '{}'",
            database.name()
        );
        database.address().run(&count).expect("a count").trim().parse().expect("a number")
    }

    /// In a table that is small enough for a server to prefer reading all of it.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn rows_are_locked_in_the_order_of_their_ids_and_no_others_are() {
        let at = TestDb::mariadb();
        let db = open(&at, (1..=4).map(|id| (id, 10))).await;
        let (tell, locked) = tokio::sync::oneshot::channel();
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let (holder, mut tell) = (at.open(MIGRATIONS), Some(tell));
        let holding = tokio::spawn(async move {
            holder
                .write(move |tx| {
                    lock_stock(tx, [2].into_iter())?;
                    set_stock(tx, [(2, 5)].into_iter().map(stock))?;
                    if let Some(tell) = tell.take() {
                        tell.send(()).expect("somebody listens");
                        wait.recv().expect("somebody lets it go");
                    }
                    Ok::<_, Error>(())
                })
                .await
        });
        locked.await.expect("it has locked");
        let waiter = at.open(MIGRATIONS);
        let blocked = tokio::spawn(async move { waiter.write(|tx| lock_stock(tx, 1..=4)).await });
        while waiting(&at) == 0 {
            tokio::task::yield_now().await;
        }
        // It has 1 and waits for 2: so 3 and 4 are free, and what they are set to is seen by it.
        let free = db.write(|tx| {
            lock_stock(tx, [3, 4].into_iter())?;
            set_stock(tx, [(3, 6)].into_iter().map(stock))
        });
        assert_eq!(free.await, Ok(()));
        assert_eq!(waiting(&at), 1);
        go.send(()).expect("it waits");
        assert_eq!(holding.await.expect("it ends"), Ok(()));
        assert_eq!(blocked.await.expect("it ends").map(amounts), Ok(vec![(1, 10), (2, 5), (3, 6), (4, 10)]));
    }
}
