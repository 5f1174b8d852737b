//! Where a bench has its files and its tasks, and what it talks about.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use db::Db;
use saga::{Entry, Mode, Outcome, StepIndex, Token};
use shop::purchase::{PURCHASE_SAGA, PURCHASE_SAGA_VERSION, Purchase, PurchasedItem};
use tokio::runtime::Runtime;
use wire::messages::{About, Carried};

/// An empty folder on the disk of the target directory, removed when this is dropped. Not in the system's folder for
/// such things: that may be in memory, where an fsync costs nothing.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new(bench: &str) -> Folder {
        let path =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("bench-{bench}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a folder in the target directory");
        Folder(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// A database as the services have theirs: durable at each commit.
    pub(crate) fn open(&self, name: &'static str, migrations: &'static [db::Migration]) -> Db {
        let path = self.0.join(name).with_extension("db");
        Db::open(db::Settings::new(path, name), migrations).expect("a new database")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left does no harm there.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Threads as the shop has them.
pub(crate) fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime")
}

/// A purchase of one unit of one product.
pub(crate) fn purchase(product_id: u64) -> Purchase {
    Purchase {
        customer_id: 7,
        items: vec![PurchasedItem { product_id, amount: 1, price: 100 }],
        currency_code: "NT".to_owned(),
        total: 100,
    }
}

/// What travels with a message of the purchase saga `saga` that has `steps` steps behind it.
pub(crate) fn carried(saga: u64, steps: u8, input: Bytes) -> Carried {
    let done =
        |step| Entry { step: StepIndex(step), outcome: Outcome::Done(Vec::new()), at: 1_800_000_000_000 };
    Carried {
        token: Token { saga, mode: Mode::Execute, path: (0..steps).map(done).collect() },
        about: About::new(
            PURCHASE_SAGA,
            PURCHASE_SAGA_VERSION,
            1_800_000_000_000,
            &input,
            b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ),
    }
}
