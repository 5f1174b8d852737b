//! How long, how much too much, how large, how many listeners, and through how many deaths.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Error;
use crate::bench::Bench;
use crate::load::{Latency, Load, Run};
use crate::rates::{CUSTOMERS, at_the_peak};
use crate::record::{Asked, Figure, Findings, Series, Unit, median};
use crate::server::Shop;

/// Rows that a long series has at most.
const ROWS: u32 = 40;
/// Connections of an open loop: enough that none has to wait for a free one.
const CONNECTIONS: u32 = 1_024;
/// Connections of an overload: as many requests are at the shop at once.
const CONNECTIONS_TOO_MANY: u32 = 4_096;
/// Writes that the disk is tried with, and the bytes of each.
const DISK_WRITES: usize = 100;
const DISK_WRITE_BYTES: usize = 4_096;
/// The gauges that are looked at during a long run.
const GAUGES: [&str; 2] = ["saga_in_flight", "saga_oldest_unfinished_seconds"];

/// One buyer at an idle shop, each purchase after the end of the one before.
pub(crate) async fn lone(bench: &Bench) -> Result<Findings, Error> {
    let shop = bench.shop("lone").await?;
    let options = "--buyers 1 --until completed";
    let what = "completion of a lone purchase";
    let mut findings = latencies(bench, &shop, options, what, [("p50", Some(3.0)), ("p99", None)]).await?;
    let file = bench.work.join("disk");
    let times = tokio::task::spawn_blocking(move || disk(&file)).await??;
    findings.figures.push(Figure::new("a write that is made durable, on the same disk", Unit::Millis, times));
    findings.notes.push(
        "A purchase waits for five of them: acceptance, stock, order, payment, and its end.".to_owned(),
    );
    Ok(findings)
}

/// How long the disk takes to make a write durable, in milliseconds each.
fn disk(path: &Path) -> std::io::Result<Vec<f64>> {
    let mut file = File::create(path)?;
    let mut write = || {
        let begun = Instant::now();
        file.write_all(&[7; DISK_WRITE_BYTES])?;
        file.sync_data()?;
        Ok(begun.elapsed().as_secs_f64() * 1e3)
    };
    (0..DISK_WRITES).map(|_| write()).collect()
}

/// An open loop at a fifth of the peak.
pub(crate) async fn fifth(bench: &Bench) -> Result<Findings, Error> {
    let rate = bench.peak()? / 5.0;
    let shop = bench.shop("fifth").await?;
    let options = open_loop(rate, CONNECTIONS);
    let what = "completion at a fifth of the peak";
    let mut findings =
        latencies(bench, &shop, &options, what, [("p50", Some(5.0)), ("p99", Some(25.0))]).await?;
    findings.notes.push(format!("Open loop, {rate:.0} a second, timed from when each was due."));
    Ok(findings)
}

fn open_loop(rate: f64, connections: u32) -> String {
    format!("--rate {rate:.0} --buyers {connections} --customers {CUSTOMERS}")
}

async fn latencies(
    bench: &Bench,
    shop: &Shop,
    options: &str,
    what: &str,
    quantiles: [(&str, Option<f64>); 2],
) -> Result<Findings, Error> {
    let mut findings = Findings::default();
    let mut runs = Vec::new();
    for _ in 0..bench.pace.rounds {
        runs.push(bench.load(&shop.server.base).with(options).run().await?);
    }
    for (quantile, at_most) in quantiles {
        let times: Vec<f64> =
            runs.iter().map(|run| run.latency(Latency::Completion, quantile)).collect::<Result<_, _>>()?;
        let figure = Figure::new(format!("{what}, {quantile}"), Unit::Millis, times);
        findings.figures.push(Figure { asked: at_most.map(Asked::AtMost), ..figure });
    }
    findings.raw = runs.iter().map(Run::raw).collect();
    Ok(findings)
}

/// A long run at half the peak, with how everything that could grow does not.
pub(crate) async fn steady(bench: &Bench) -> Result<Findings, Error> {
    let rate = bench.peak()? / 2.0;
    let shop = bench.shop("steady").await?;
    const FILE: &str = "steady.ndjson";
    let load = bench.load_for(&shop.server.base, bench.pace.steady).with(&open_loop(rate, CONNECTIONS));
    let load = load.series(&bench.work, FILE);
    let finish = load.start()?.finish();
    tokio::pin!(finish);
    let begun = Instant::now();
    let mut looks = tokio::time::interval((bench.pace.steady / ROWS).max(Duration::from_secs(1)));
    let mut seen = Vec::new();
    let run = loop {
        tokio::select! {
            run = &mut finish => break run?,
            _ = looks.tick() => {
                let gauges = shop.gauges(&GAUGES).await?;
                let memory = shop.server.memory()?.resident as f64;
                let row = vec![begun.elapsed().as_secs_f64(), memory / MIB, shop.wal_bytes()? as f64 / MIB];
                seen.push([row, gauges].concat());
            }
        }
    };
    let latencies = intervals(&std::fs::read_to_string(bench.work.join(FILE))?)?;
    for row in &mut seen {
        // The load's second that is closest to this look.
        let closest = latencies.iter().min_by(|a, b| (a[0] - row[0]).abs().total_cmp(&(b[0] - row[0]).abs()));
        row.extend(closest.map_or(vec![0.0; INTERVAL.len() - 1], |interval| interval[1..].to_vec()));
    }
    let columns = ["seconds", "resident MiB", "WAL MiB", "sagas under way", "oldest, seconds"];
    let columns =
        columns.into_iter().chain(INTERVAL_COLUMNS.into_iter().skip(1)).map(str::to_owned).collect();
    Ok(Findings {
        figures: vec![
            Figure::new(
                "completed purchases at half the peak",
                Unit::PerSecond,
                [run.completed_per_second()?],
            )
            .beside([rate]),
            Figure::new("completion, p99", Unit::Millis, [run.latency(Latency::Completion, "p99")?]),
            Figure::new("memory in the last quarter, beside the second", Unit::Bytes, quarter(&seen, 3))
                .beside(quarter(&seen, 1)),
        ],
        notes: vec![format!(
            "Open loop, {rate:.0} a second for {} s; beside its rate: what was asked for. The latencies are of the \
             second closest to each look. What waits in the bus and for the databases is no metric of the shop: \
             purchases under way bound it.",
            bench.pace.steady.as_secs()
        )],
        series: Some(Series { columns, rows: seen }),
        raw: vec![run.raw()],
    })
}

const MIB: f64 = 1024.0 * 1024.0;

/// The memory in bytes in one of the four quarters of a series.
fn quarter(rows: &[Vec<f64>], number: usize) -> Vec<f64> {
    let range = rows.len() * number / 4..rows.len() * (number + 1) / 4;
    rows[range].iter().map(|row| row[1] * MIB).collect()
}

/// Where in a line of the load's series the columns of ours are, the time first.
/// Each with what makes its number ours.
const INTERVAL: [(&str, f64); 4] =
    [("/t", 1.0), ("/completed", 1.0), ("/completion_us/p50", 1e-3), ("/completion_us/p99", 1e-3)];

/// What the columns of [`intervals`] are.
pub(crate) const INTERVAL_COLUMNS: [&str; INTERVAL.len()] = ["seconds", "completed/s", "p50 ms", "p99 ms"];

/// A row for each second of a load's series.
pub(crate) fn intervals(lines: &str) -> Result<Vec<Vec<f64>>, Error> {
    let line = |line: &str| {
        let said: Value = serde_json::from_str(line)?;
        // A second in which nothing ended has no latency.
        let number = |(at, factor)| said.pointer(at).and_then(Value::as_f64).unwrap_or_default() * factor;
        Ok(INTERVAL.into_iter().map(number).collect())
    };
    lines.lines().map(line).collect()
}

/// Three times the peak.
pub(crate) async fn overload(bench: &Bench) -> Result<Findings, Error> {
    let peak = bench.peak()?;
    let shop = bench.shop("overload").await?;
    let mut findings = Findings::default();
    // The peak of this hour, beside which the overload is judged.
    let usual = bench.load(&shop.server.base).with(&at_the_peak()).run().await?;
    let options = format!("{} --verify", open_loop(3.0 * peak, CONNECTIONS_TOO_MANY));
    let load = bench.load_for(&shop.server.base, bench.pace.overload).with(&options);
    let run = load.run().await?;
    findings.figures = vec![
        Figure::new(
            "completed purchases at three times the peak",
            Unit::PerSecond,
            [run.completed_per_second()?],
        )
        .beside([usual.completed_per_second()?])
        .asked(Asked::RatioAtLeast(0.9)),
        Figure::new("requests that were due", Unit::PerSecond, [run.offered_per_second()?])
            .beside([3.0 * peak]),
        Figure::new("refused with 503 or 429", Unit::PerSecond, [run.refused_per_second()?]),
        Figure::new("never sent: no connection was free", Unit::PerSecond, [run.not_sent_per_second()?]),
        Figure::new(
            "completion of what was accepted, p99, from when it was due",
            Unit::Millis,
            [run.latency(Latency::Completion, "p99")?],
        ),
        wrong(&run),
    ];
    findings.notes = vec![format!(
        "Open loop, {:.0} a second wanted for {} s. What finds none of {CONNECTIONS_TOO_MANY} connections free waits \
         in the load generator, and the wait counts.",
        3.0 * peak,
        bench.pace.overload.as_secs()
    )];
    findings.raw = vec![usual.raw(), run.raw()];
    Ok(findings)
}

/// What `--verify` says of a run.
pub(crate) fn wrong(run: &Run) -> Figure {
    let wrong = if run.passed { 0.0 } else { 1.0 };
    Figure::new("runs whose stock, orders and payments do not add up", Unit::Count, [wrong])
        .asked(Asked::AtMost(0.0))
}

/// Many who listen: what each costs, and what they cost the rate.
pub(crate) async fn streams(bench: &Bench) -> Result<Findings, Error> {
    let shop = bench.shop("streams").await?;
    let mut findings = Findings::default();
    let streams = bench.pace.streams;
    let (mut with, mut without) = (vec![], vec![]);
    // Once before anything is measured, so that what a busy shop keeps is there.
    bench.load(&shop.server.base).with(&at_the_peak()).run().await?;
    shop.quiet().await?;
    let before = shop.server.memory()?.resident as f64;
    let load = bench.load(&shop.server.base).with(&format!("--rate 1 --buyers 1 --streams {streams}"));
    let (run, listening) = memory_while_measured(bench, &shop, load).await?;
    findings.raw.push(run.raw());
    for _ in 0..bench.pace.rounds {
        for (options, rates) in [(format!("--streams {streams}"), &mut with), (String::new(), &mut without)] {
            let run = bench.load(&shop.server.base).with(&at_the_peak()).with(&options).run().await?;
            rates.push(run.completed_per_second()?);
            findings.raw.push(run.raw());
        }
    }
    let each = (listening - before) / f64::from(streams);
    findings.figures = vec![
        Figure::new("memory per listening client", Unit::Bytes, [each]),
        Figure::new(format!("completed purchases with {streams} event streams open"), Unit::PerSecond, with)
            .beside(without),
    ];
    findings.notes = vec![format!(
        "The memory of the process with {streams} streams open at a nearly idle shop, less what it was before, \
         over their number. Beside the rate: the same without them."
    )];
    Ok(findings)
}

/// Runs a load, and tells how much memory the shop had while it was measured, in bytes: the median of many looks.
async fn memory_while_measured(bench: &Bench, shop: &Shop, load: Load) -> Result<(Run, f64), Error> {
    const LOOK: Duration = Duration::from_millis(100);
    let finish = load.start()?.finish();
    tokio::pin!(finish);
    let mut looks = tokio::time::interval(LOOK);
    let mut seen = Vec::new();
    let run = loop {
        tokio::select! {
            run = &mut finish => break run?,
            _ = looks.tick() => seen.push(shop.server.memory()?.resident as f64),
        }
    };
    // What is measured is the end of the run. Before it customers sign up, whose passwords take memory to hash.
    let measured = bench.pace.measure.as_millis() / LOOK.as_millis();
    let measured = seen.len().saturating_sub(measured as usize);
    Ok((run, median(&seen[measured..]).ok_or("the run was too short to look at it")?))
}

/// A large database beside an empty one.
pub(crate) async fn million(bench: &Bench) -> Result<Findings, Error> {
    let large = bench.shop("large").await?;
    let mut findings = Findings::default();
    let mut finished = 0;
    while finished < bench.pace.finished {
        let run = bench.load(&large.server.base).with(&at_the_peak()).run().await?;
        finished += run.completed_in_all()? as i64;
    }
    let (mut rates, mut empty_rates) = (vec![], vec![]);
    for _ in 0..bench.pace.rounds {
        let run = bench.load(&large.server.base).with(&at_the_peak()).run().await?;
        rates.push(run.completed_per_second()?);
        findings.raw.push(run.raw());
        let empty = bench.shop("empty").await?;
        let run = bench.load(&empty.server.base).with(&at_the_peak()).run().await?;
        empty_rates.push(run.completed_per_second()?);
        findings.raw.push(run.raw());
    }
    findings.figures = vec![
        Figure::new(format!("completed purchases after {finished} finished ones"), Unit::PerSecond, rates)
            .beside(empty_rates)
            .asked(Asked::RatioAtLeast(0.9)),
    ];
    findings.notes = vec!["Beside: shops that were started empty for each run.".to_owned()];
    Ok(findings)
}

/// Killed again and again at full rate.
pub(crate) async fn crash(bench: &Bench) -> Result<Findings, Error> {
    let mut shop = bench.shop("crash").await?;
    let options = format!("{} --retry --verify", at_the_peak());
    let load = bench.load_for(&shop.server.base, bench.pace.crash).with(&options);
    let finish = load.start()?.finish();
    tokio::pin!(finish);
    tokio::select! {
        begun = selling(&shop) => begun?,
        run = &mut finish => return Err(format!("nothing was bought: {}", run?.raw()).into()),
    }
    let pause = bench.pace.crash / (bench.pace.kills + 1);
    let mut down = Vec::new();
    let mut killed = 0;
    let run = loop {
        tokio::select! {
            run = &mut finish => break run?,
            () = tokio::time::sleep(pause), if killed < bench.pace.kills => {
                let begun = Instant::now();
                shop.kill_and_restart().await?;
                down.push(begun.elapsed().as_secs_f64() * 1e3);
                killed += 1;
            }
        }
    };
    Ok(Findings {
        figures: vec![
            Figure::new("deaths by SIGKILL", Unit::Count, [f64::from(killed)]),
            wrong(&run),
            Figure::new("purchases completed", Unit::Count, [run.completed_in_all()?]),
            Figure::new("from the kill until it answers again", Unit::Millis, down),
        ],
        notes: vec!["Buyers who send again, with the same Idempotency-Key, what got no answer.".to_owned()],
        series: None,
        raw: vec![run.raw()],
    })
}

/// Waits until a load has begun to buy.
async fn selling(shop: &Shop) -> Result<(), Error> {
    while shop.gauges(&["saga_in_flight"]).await? == [0.0] {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}
