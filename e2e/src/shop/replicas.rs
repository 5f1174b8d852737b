//! Further replicas of the purchase service on its database, each with connections of its own, as another process has.

use super::{Purchases, Shop, open_purchases};
use crate::api::Api;

impl Shop {
    /// Starts one more replica of the purchase service. Replicas are numbered in the order of their starts; the one that the shop opened
    /// with is 0.
    pub async fn add_purchases(&mut self) -> usize {
        let db = open_purchases(self.on_server.as_ref(), &self.folder);
        let purchases = self.purchases_on(&db).await;
        self.others.push(Some((purchases, db)));
        self.others.len()
    }

    /// A client of this replica's doors.
    pub fn api_of(&self, replica: usize) -> Api {
        self.replica(replica).api.clone()
    }

    /// The value of one of this replica's metrics; of one with labels, its name is that in braces.
    pub fn metric_of(&self, replica: usize, name: &str) -> f64 {
        self.replica(replica).metric(name)
    }

    /// Stops a replica, other than 0, with its work done.
    pub async fn stop_replica(&mut self, replica: usize) {
        let (purchases, db) = self.others[replica - 1].take().expect("it is running");
        purchases.stop().await;
        db.close().await;
    }

    /// Ends a replica, other than 0, in the middle of whatever it does.
    pub fn kill_replica(&mut self, replica: usize) {
        let (purchases, _) = self.others[replica - 1].take().expect("it is running");
        purchases.kill();
    }

    pub(super) async fn stop_others(&mut self) {
        for (purchases, db) in self.others.drain(..).flatten() {
            purchases.stop().await;
            db.close().await;
        }
    }

    fn replica(&self, replica: usize) -> &Purchases {
        match replica.checked_sub(1) {
            None => self.purchases.as_ref().expect("it is running"),
            Some(other) => &self.others[other].as_ref().expect("it is running").0,
        }
    }
}
