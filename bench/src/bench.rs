//! What all scenarios work with: where everything is, how long everything takes, who is measured beside whom.

use std::path::PathBuf;
use std::time::Duration;

use crate::Error;
use crate::load::Load;
use crate::record::Record;
use crate::server::{Server, Shop};

/// How long things take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// What is measured of each run.
    pub(crate) measure: Duration,
    /// What is not, before.
    pub(crate) warm_up: Duration,
    /// Runs of the shop and of what it is compared with, in turns.
    pub(crate) rounds: usize,
    /// The long, steady run.
    pub(crate) steady: Duration,
    /// The run with too much load.
    pub(crate) overload: Duration,
    /// The run with kills, and how many.
    pub(crate) crash: Duration,
    pub(crate) kills: u32,
    /// The run on servers, for each number of processes, and what is measured beside it.
    pub(crate) servers: Duration,
    pub(crate) beside: Duration,
    /// The run in which the broker is lost.
    pub(crate) broker: Duration,
    /// Finished purchases in the large database.
    pub(crate) finished: i64,
    /// Event streams.
    pub(crate) streams: u32,
    /// Options of the benches of the parts.
    pub(crate) criterion: &'static [&'static str],
}

impl Pace {
    /// For figures.
    pub(crate) const FULL: Pace = Pace {
        measure: Duration::from_secs(15),
        warm_up: Duration::from_secs(3),
        rounds: 3,
        steady: Duration::from_secs(600),
        overload: Duration::from_secs(120),
        crash: Duration::from_secs(60),
        kills: 10,
        servers: Duration::from_secs(300),
        beside: Duration::from_secs(5),
        broker: Duration::from_secs(60),
        finished: 1_000_000,
        streams: 10_000,
        criterion: &[],
    };

    /// To see that everything works; the figures mean nothing.
    pub(crate) const QUICK: Pace = Pace {
        measure: Duration::from_secs(2),
        warm_up: Duration::from_millis(500),
        rounds: 1,
        steady: Duration::from_secs(6),
        overload: Duration::from_secs(3),
        crash: Duration::from_secs(6),
        kills: 2,
        servers: Duration::from_secs(3),
        beside: Duration::from_secs(1),
        broker: Duration::from_secs(30),
        finished: 2_000,
        streams: 100,
        criterion: &["--warm-up-time", "0.1", "--measurement-time", "0.2", "--sample-size", "10"],
    };
}

/// What all scenarios work with.
pub(crate) struct Bench {
    /// The binary `saga`.
    pub(crate) saga: PathBuf,
    /// The binary `bare`.
    pub(crate) bare: PathBuf,
    /// The workspace.
    pub(crate) root: PathBuf,
    /// Where records are kept.
    pub(crate) records: PathBuf,
    /// Where shops have their data.
    pub(crate) work: PathBuf,
    pub(crate) pace: Pace,
}

impl Bench {
    /// A shop on an empty data directory; `name` tells it from others that are open.
    pub(crate) async fn shop(&self, name: &str) -> Result<Shop, Error> {
        Shop::open(&self.saga, self.work.join(format!("shop-{name}-{}", std::process::id()))).await
    }

    pub(crate) async fn bare(&self) -> Result<Server, Error> {
        Server::bare(&self.bare).await
    }

    /// `saga load` at the usual pace.
    pub(crate) fn load(&self, base: &str) -> Load {
        self.load_for(base, self.pace.measure)
    }

    /// `saga load` for another time.
    pub(crate) fn load_for(&self, base: &str, duration: Duration) -> Load {
        Load::new(&self.saga, base, self.pace.warm_up, duration)
    }

    /// Completed purchases a second at the peak, as the scenario `purchase` has measured it.
    ///
    /// # Errors
    /// When it has not.
    pub(crate) fn peak(&self) -> Result<f64, Error> {
        let record = Record::load(&self.records, "purchase")?;
        let figure = record.as_ref().and_then(|record| record.figure(PEAK));
        let peak = figure.and_then(|figure| figure.value());
        Ok(peak.ok_or("the peak rate is not known yet: run the scenario `purchase` first")?)
    }
}

/// The name of the figure that other scenarios go by.
pub(crate) const PEAK: &str = "completed purchases, 512 buyers who wait for the end";
