//! Opens buses of one backend, and cleans up behind them.

use std::sync::Mutex;
use std::time::Duration;

use bus::{Bus, Limits};
use futures_util::TryStreamExt;

use super::{OTHER, WORK};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Backend {
    Embedded,
    /// Of three servers, of which so many keep each stream.
    Nats {
        replicas: usize,
    },
}

pub(super) struct Stage {
    backend: Backend,
    prefixes: Mutex<Vec<String>>,
}

impl Stage {
    pub(super) fn new(backend: Backend) -> Stage {
        Stage { backend, prefixes: Mutex::default() }
    }

    pub(super) async fn open(&self, limits: Limits) -> Bus {
        match self.backend {
            Backend::Embedded => Bus::embedded(limits),
            Backend::Nats { replicas } => {
                let prefix = servers::unique_name();
                self.prefixes.lock().unwrap().push(prefix.clone());
                let servers = servers::shared::nats().join(",");
                let settings = bus::nats::Settings {
                    prefix,
                    replicas,
                    // On a busy machine, an answer takes as long as it takes.
                    publish_timeout: Duration::from_secs(20),
                    duplicate_window: Duration::from_secs(30),
                    ack_wait: Duration::from_secs(60),
                    ..bus::nats::Settings::from_urls(&servers).unwrap()
                };
                Bus::nats(settings, limits, &[WORK, OTHER]).await.unwrap()
            }
        }
    }

    /// Whether what happens at once takes no time at all: on a paused clock. In real time that would be a statement on the machine.
    pub(super) fn is_punctual(&self) -> bool {
        self.backend == Backend::Embedded
    }

    /// How many of `envelopes` make a race worth its time: a round trip takes longer than a lock.
    pub(super) fn volume(&self, envelopes: u64) -> u64 {
        match self.backend {
            Backend::Embedded => envelopes,
            Backend::Nats { .. } => envelopes / 10,
        }
    }

    /// Deletes what the buses have left on the servers.
    pub(super) async fn clean_up(&self) {
        let prefixes = self.prefixes.lock().unwrap().clone();
        if prefixes.is_empty() {
            return;
        }
        let client = async_nats::connect(servers::shared::nats()).await.unwrap();
        let jetstream = async_nats::jetstream::new(client);
        let streams: Vec<String> = jetstream.stream_names().try_collect().await.unwrap();
        let ours = |name: &String| prefixes.iter().any(|prefix| name.starts_with(prefix));
        for stream in streams.into_iter().filter(ours) {
            jetstream.delete_stream(stream).await.unwrap();
        }
    }
}
