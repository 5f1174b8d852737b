//! Whether the servers that a process stands on answer. They are asked now and then, so that a probe need not wait for them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bus::Bus;
use db::Db;
use shop::purchase::ORCHESTRATOR;
use tokio_util::sync::CancellationToken;

/// The pause between two questions.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// How long an answer may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);

/// What did not answer last, and why. Clones tell the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Health(Arc<Mutex<BTreeMap<&'static str, String>>>);

impl Health {
    /// Ok, or what does not answer.
    ///
    /// # Errors
    /// Each of them with its reason.
    pub(super) fn check(&self) -> Result<(), String> {
        let silent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if silent.is_empty() {
            return Ok(());
        }
        Err(silent.iter().map(|(what, why)| format!("{what}: {why}")).collect::<Vec<_>>().join("; "))
    }

    fn heard(&self, what: &'static str, answer: Result<(), String>) {
        let mut silent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match answer {
            Ok(()) => {
                if silent.remove(what).is_some() {
                    tracing::info!(engine = what, "it answers again");
                }
            }
            Err(why) => {
                if !silent.contains_key(what) {
                    tracing::warn!(engine = what, %why, "it does not answer");
                }
                silent.insert(what, why);
            }
        }
    }

    /// Asks an engine again and again, until `stop`.
    pub(super) async fn watch(self, engine: Engine, stop: CancellationToken) {
        let again_and_again = async {
            loop {
                let late = |_| Err(format!("no answer within {ANSWER_WITHIN:?}"));
                let answer = tokio::time::timeout(ANSWER_WITHIN, engine.ask()).await.unwrap_or_else(late);
                self.heard(engine.name(), answer);
                tokio::time::sleep(ASK_EVERY).await;
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = again_and_again => {}
        }
    }
}

/// What is asked.
pub(super) enum Engine {
    /// A database on a server.
    Database(Db),
    /// The servers of a bus.
    Bus(Bus),
}

impl Engine {
    fn name(&self) -> &'static str {
        match self {
            Engine::Database(_) => "database",
            Engine::Bus(_) => "bus",
        }
    }

    async fn ask(&self) -> Result<(), String> {
        match self {
            Engine::Database(db) => {
                let one = db.read(|tx| tx.query_opt("SELECT 1", &[], |row| row.get::<i64>(0)));
                one.await.map(drop).map_err(|error: db::Error| error.to_string())
            }
            Engine::Bus(bus) => bus.depth(ORCHESTRATOR).await.map(drop).map_err(|error| error.to_string()),
        }
    }
}
