//! The shop on servers: `saga up --processes N` on a MariaDB, three NATS nodes with JetStream and a Redis Cluster of six, with the load
//! generator, all on this machine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ::servers::{MariaDb, Nats, RedisCluster};
use testkit::{Engines, Options, Shop, TempDir};

use crate::Error;
use crate::bench::Bench;
use crate::endurance::{INTERVAL_COLUMNS, intervals, wrong};
use crate::load::Latency;
use crate::process;
use crate::record::{Asked, Figure, Findings, Series, Unit};
use crate::server::SHOP_SETTINGS;
use crate::stock::{self, Market};
use crate::wrk;

/// Processes of each service that are measured.
const PROCESSES: [usize; 3] = [1, 2, 4];
/// What is asked: 8,000 purchases a second where the bare server answers 118,000 requests to the same witness.
const PART_OF_BARE: f64 = 8_000.0 / 118_000.0;
/// What is asked of a lone purchase, in milliseconds.
const LONE_MILLIS: f64 = 8.0;
/// Room for a queue in MiB, as it comes: tests take less.
const QUEUE_MIB: &str = "256";
/// MariaDB as one would run it for a load.
const MARIADB: [&str; 2] = ["--innodb-buffer-pool-size=2G", "--innodb-log-file-size=512M"];
const BUYERS: &str = "--buyers 128";

/// The servers. They are stopped when this is dropped.
struct Site {
    mariadb: MariaDb,
    nats: Nats,
    redis: RedisCluster,
}

impl Site {
    async fn open() -> Result<Arc<Site>, Error> {
        let open = || {
            let (mariadb, nats) = (MariaDb::start_with(&MARIADB)?, Nats::start(3)?);
            Ok::<_, ::servers::Error>(Site { mariadb, nats, redis: RedisCluster::start()? })
        };
        Ok(Arc::new(tokio::task::spawn_blocking(open).await??))
    }

    /// A shop of so many processes of each service, on empty databases.
    async fn shop(&self, bench: &Bench, processes: usize) -> Result<Distributed, Error> {
        let engines =
            Engines::new(self.mariadb.address().clone(), &self.nats.urls(), Some(&self.redis.urls()));
        let dir = TempDir::new();
        let options = Options::new(&bench.saga, dir.path()).on(&engines, processes).arg("--no-demo-data");
        let options =
            SHOP_SETTINGS.iter().fold(options, |options, (name, value, _)| options.env(*name, *value));
        let shop = Shop::start(options.env("SAGA_NATS__QUEUE_MIB", QUEUE_MIB)).await?;
        Ok(Distributed { shop, _engines: engines, _dir: dir })
    }

    /// Each kind of server, with its processes.
    fn processes(&self) -> [(&'static str, Vec<u32>); 3] {
        [
            ("MariaDB", self.mariadb.pid().into_iter().collect()),
            ("NATS, three nodes", self.nats.nodes().iter().filter_map(|node| node.pid()).collect()),
            ("Redis, six nodes", self.redis.nodes().iter().filter_map(|node| node.pid()).collect()),
        ]
    }
}

/// A shop as processes. They end before its databases are dropped.
struct Distributed {
    shop: Shop,
    _engines: Engines,
    _dir: TempDir,
}

impl Distributed {
    fn base(&self) -> String {
        self.shop.client().base().to_owned()
    }
}

/// How many purchases end each second, with one, two and four processes of each service; and where the time goes.
pub(crate) async fn servers(bench: &Bench) -> Result<Findings, Error> {
    let (site, bare) = (Site::open().await?, bench.bare().await?);
    let market = Market::open(&bare.client(), 16, 16).await?;
    let scripts = bench.root.join("bench/wrk");
    let answered = async || {
        let (measure, requests) = (bench.pace.beside, market.purchases());
        Ok::<_, Error>(
            wrk::run(&scripts, &bench.work, &bare.base, measure, requests, wrk::CONNECTIONS).await?.rate(),
        )
    };
    let mut findings = Findings::default();
    for processes in PROCESSES {
        let distributed = site.shop(bench, processes).await?;
        if processes == 1 {
            findings.figures.extend(costs(bench, &site, &distributed).await?);
        }
        let before = answered().await?;
        let load = bench.load_for(&distributed.base(), bench.pace.servers).with(BUYERS).with("--verify");
        let run = load.run().await?;
        let beside = [before, answered().await?];
        let of = format!("{processes} of each service");
        let completed = run.completed_per_second()?;
        let rate =
            Figure::new(format!("{of}: completed purchases"), Unit::PerSecond, [completed]).beside(beside);
        findings.figures.push(if processes == 1 {
            rate.asked(Asked::RatioAtLeast(PART_OF_BARE))
        } else {
            rate
        });
        for (what, latency) in [("answered", Latency::Acceptance), ("completed", Latency::Completion)] {
            for quantile in ["p50", "p99"] {
                let name = format!("{of}: {what}, {quantile}");
                findings.figures.push(Figure::new(name, Unit::Millis, [run.latency(latency, quantile)?]));
            }
        }
        let all = Figure::new(format!("{of}: purchases"), Unit::Count, [run.completed_in_all()?]);
        let wrong = wrong(&run);
        findings.figures.extend([all, Figure { what: format!("{of}: {}", wrong.what), ..wrong }]);
        findings.raw.push(run.raw());
    }
    findings.notes = vec![format!(
        "{BUYERS}, each of whom waits for the answer and is told of the end by an event stream, {} s each. Beside: what the bare \
         server answered to wrk with {} connections right before and right after. What is asked is 8,000/s where that makes 118,000/s, \
         as on the machine of the design.",
        bench.pace.servers.as_secs(),
        wrk::CONNECTIONS
    )];
    Ok(findings)
}

/// Processor time that each kind of process takes for a purchase, signing the buyers up left out.
async fn costs(bench: &Bench, site: &Site, distributed: &Distributed) -> Result<Vec<Figure>, Error> {
    let client = distributed.shop.client();
    let mut kinds: Vec<(String, Vec<u32>)> =
        site.processes().into_iter().map(|(kind, pids)| (kind.to_owned(), pids)).collect();
    let replicas = distributed.shop.replicas().await;
    kinds.extend(replicas.into_iter().filter_map(|replica| Some((replica.service, vec![replica.pid?]))));
    let used = || {
        let of =
            |pids: &Vec<u32>| pids.iter().map(|pid| process::cpu_time(*pid)).sum::<Result<Duration, _>>();
        kinds.iter().map(|(_, pids)| of(pids)).collect::<Result<Vec<_>, _>>()
    };
    let load = bench.load(&distributed.base()).with(BUYERS).start()?;
    let begun = async {
        let left = stock::first_sale(&client).await?;
        Ok::<_, Error>((left, used()?))
    };
    let (run, (before, at_the_beginning)) = load.after(begun).await?;
    let at_the_end = used()?;
    let sold = before.sold_until(&stock::left(&client).await?).filter(|sold| *sold > 0);
    let sold = sold.ok_or("no purchase left the stock")? as f64;
    let figure = |what: &str, micros: f64| {
        Figure::new(format!("processor time of a purchase: {what}"), Unit::Micros, [micros])
    };
    let mut figures = Vec::new();
    let mut together = run.own_micros_per_answer()?;
    for ((kind, _), (end, begin)) in kinds.iter().zip(at_the_end.iter().zip(&at_the_beginning)) {
        let micros = (*end - *begin).as_secs_f64() * 1e6 / sold;
        together += micros;
        figures.push(figure(kind, micros));
    }
    figures.push(figure("load generator", run.own_micros_per_answer()?));
    figures.push(figure("together", together));
    Ok(figures)
}

/// One buyer, each purchase after the end of the one before.
pub(crate) async fn lone(bench: &Bench) -> Result<Findings, Error> {
    let site = Site::open().await?;
    let distributed = site.shop(bench, 1).await?;
    let mut findings = Findings::default();
    let (mut answered, mut p50, mut p99) = (vec![], vec![], vec![]);
    for _ in 0..bench.pace.rounds {
        let run = bench.load(&distributed.base()).with("--buyers 1 --until completed").run().await?;
        answered.push(run.latency(Latency::Acceptance, "p50")?);
        p50.push(run.latency(Latency::Completion, "p50")?);
        p99.push(run.latency(Latency::Completion, "p99")?);
        findings.raw.push(run.raw());
    }
    findings.figures = vec![
        Figure::new("answer to a lone purchase, p50", Unit::Millis, answered),
        Figure::new("completion of a lone purchase, p50", Unit::Millis, p50)
            .asked(Asked::AtMost(LONE_MILLIS)),
        Figure::new("completion of a lone purchase, p99", Unit::Millis, p99),
    ];
    findings.notes = vec!["One process of each service, an idle machine.".to_owned()];
    Ok(findings)
}

/// All NATS nodes are killed at the peak, what they keep is deleted, and they are started again.
pub(crate) async fn broker(bench: &Bench) -> Result<Findings, Error> {
    const FILE: &str = "broker.ndjson";
    let site = Site::open().await?;
    let distributed = site.shop(bench, 1).await?;
    let options = format!("{BUYERS} --retry --verify");
    let load = bench.load_for(&distributed.base(), bench.pace.broker).with(&options);
    let load = load.series(&bench.work, FILE).start()?;
    let client = distributed.shop.client();
    let loss = async {
        stock::first_sale(&client).await?;
        tokio::time::sleep(bench.pace.broker / 2).await;
        let (site, begun) = (Arc::clone(&site), Instant::now());
        let lose = move || {
            site.nats.kill()?;
            site.nats.wipe()?;
            site.nats.restart()
        };
        tokio::task::spawn_blocking(lose).await??;
        Ok::<_, Error>(begun.elapsed().as_secs_f64() * 1e3)
    };
    let (run, away) = load.after(loss).await?;
    let restarts: u64 = distributed.shop.replicas().await.iter().map(|replica| replica.restarts).sum();
    let rows = intervals(&std::fs::read_to_string(bench.work.join(FILE))?)?;
    Ok(Findings {
        figures: vec![
            Figure::new("from the kill until all nodes are there again, empty", Unit::Millis, [away]),
            wrong(&run),
            Figure::new("purchases completed", Unit::Count, [run.completed_in_all()?]),
            Figure::new("accepted purchases whose end was not told", Unit::Count, [run.unresolved()?])
                .asked(Asked::AtMost(0.0)),
            Figure::new("processes of the shop that were started again", Unit::Count, [restarts as f64])
                .asked(Asked::AtMost(0.0)),
            Figure::new("completion, the longest", Unit::Millis, [run.latency(Latency::Completion, "max")?]),
        ],
        notes: vec![format!(
            "{BUYERS} for {} s, one process of each service, with Idempotency-Keys and again until there is an answer. Purchases are \
             accepted without a broker, and wait.",
            bench.pace.broker.as_secs()
        )],
        series: Some(Series { columns: INTERVAL_COLUMNS.map(str::to_owned).to_vec(), rows }),
        raw: vec![run.raw()],
    })
}
