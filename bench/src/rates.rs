//! How much: rates of the shop, in turns with the bare server or with itself.

use std::time::Duration;

use crate::Error;
use crate::bench::{Bench, PEAK};
use crate::load::{Latency, Run, Running};
use crate::record::{Asked, Figure, Findings, Unit};
use crate::server::{Server, Shop};
use crate::stock::{self, Market};
use crate::wrk::{self, Requests};

/// Customers that the buyers buy for: few, because each password costs a tenth of a second of processor time.
pub(crate) const CUSTOMERS: u32 = 16;
/// Products that purchases are spread over.
const PRODUCTS: usize = 100;
/// Buyers of a crowd: each batch has many of them.
const CROWD: u32 = 2_048;
/// Connections of the witness's crowd.
const WITNESS_CROWD: u32 = 1_024;

/// Purchases at the peak; the processor time and the memory that they cost.
pub(crate) async fn purchase(bench: &Bench) -> Result<Findings, Error> {
    let (shop, bare) = (bench.shop("purchase").await?, bench.bare().await?);
    let mut findings = Findings::default();
    let (mut ended, mut ended_beside) = (Vec::new(), Vec::new());
    let (mut crowd, mut crowd_beside) = (Vec::new(), Vec::new());
    let (mut answered, mut answered_beside) = (Vec::new(), Vec::new());
    let (mut cpu, mut cpu_beside) = (Vec::new(), Vec::new());
    let (mut load_cpu, mut load_cpu_beside) = (Vec::new(), Vec::new());
    for _ in 0..bench.pace.rounds {
        let load = bench.load(&shop.server.base).with(&at_the_peak()).start()?;
        let (run, cost) = cost_of_a_purchase(&shop, load).await?;
        ended.push(run.completed_per_second()?);
        cpu.push(micros(cost));
        load_cpu.push(run.own_micros_per_answer()?);
        findings.raw.push(run.raw());

        let (run, cost) = bare_purchases(bench, &bare, 512).await?;
        ended_beside.push(run.accepted_per_second()?);
        cpu_beside.push(micros(cost));
        load_cpu_beside.push(run.own_micros_per_answer()?);
        findings.raw.push(run.raw());

        let run = bench.load(&shop.server.base).with(&until_completed(CROWD)).run().await?;
        crowd.push(run.completed_per_second()?);
        findings.raw.push(run.raw());

        let (run, _) = bare_purchases(bench, &bare, CROWD).await?;
        crowd_beside.push(run.accepted_per_second()?);
        findings.raw.push(run.raw());

        let waits_for_answer = format!("--buyers 128 --customers {CUSTOMERS} --until accepted");
        let run = bench.load(&shop.server.base).with(&waits_for_answer).run().await?;
        answered.push(run.completed_per_second()?);
        findings.raw.push(run.raw());

        let (run, _) = bare_purchases(bench, &bare, 128).await?;
        answered_beside.push(run.accepted_per_second()?);
        findings.raw.push(run.raw());
    }
    let rate = |what: &str, runs: Vec<f64>, beside: Vec<f64>| {
        Figure::new(what, Unit::PerSecond, runs).beside(beside).asked(Asked::RatioAtLeast(0.5))
    };
    let peak_memory = |server: &Server| Ok::<_, Error>([server.memory()?.peak as f64]);
    let binary = std::fs::metadata(&bench.saga)?.len() as f64;
    findings.figures = vec![
        rate(&format!("completed purchases, {CROWD} buyers who wait for the end"), crowd, crowd_beside),
        rate(PEAK, ended, ended_beside),
        rate("completed purchases, 128 buyers who wait for the answer", answered, answered_beside),
        Figure::new("processor time of the server per purchase", Unit::Micros, cpu).beside(cpu_beside),
        Figure::new("processor time of the load generator per purchase", Unit::Micros, load_cpu)
            .beside(load_cpu_beside),
        Figure::new("peak memory of the process", Unit::Bytes, peak_memory(&shop.server)?)
            .beside(peak_memory(&bare)?),
        Figure::new("size of the program", Unit::Bytes, [binary]),
    ];
    findings.notes = vec![
        "Beside: the bare server's answers to the same POST, from as many buyers.".to_owned(),
        "The processor time of a purchase is that of the whole process while the purchases of a run left the \
         stock, over their number; signing customers up is not in it. It is in the peak of the memory: each password \
         that is hashed takes 19 MiB."
            .to_owned(),
    ];
    Ok(findings)
}

async fn bare_purchases(bench: &Bench, bare: &Server, buyers: u32) -> Result<(Run, Duration), Error> {
    let before = bare.cpu_time()?;
    let options = format!("--buyers {buyers} --customers {CUSTOMERS} --until accepted --completion none");
    let run = bench.load(&bare.base).with(&options).run().await?;
    let cost = (bare.cpu_time()? - before).div_f64(run.accepted_in_all()?.max(1.0));
    Ok((run, cost))
}

fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

/// Follows a run from its first purchase to its end: processor time over what left the stock.
async fn cost_of_a_purchase(shop: &Shop, load: Running) -> Result<(Run, Duration), Error> {
    let client = shop.server.client();
    let begun = async {
        let left = stock::first_sale(&client).await?;
        Ok::<_, Error>((left, shop.server.cpu_time()?))
    };
    let (run, (before, cpu)) = load.after(begun).await?;
    let used = shop.server.cpu_time()? - cpu;
    let sold = before.sold_until(&stock::left(&client).await?).filter(|sold| *sold > 0);
    let sold = sold.ok_or("no purchase left the stock")?;
    Ok((run, used.div_f64(sold as f64)))
}

/// The witness: wrk instead of `saga load`, and the stock instead of anybody's count.
pub(crate) async fn witness(bench: &Bench) -> Result<Findings, Error> {
    let (shop, bare) = (bench.shop("witness").await?, bench.bare().await?);
    let client = shop.server.client();
    let here = Market::open(&client, PRODUCTS, CUSTOMERS as usize).await?;
    let there = Market::open(&bare.client(), PRODUCTS, CUSTOMERS as usize).await?;
    let scripts = bench.root.join("bench/wrk");
    let wrk = async |base: &str, connections, duration, requests| {
        wrk::run(&scripts, &bench.work, base, duration, requests, connections).await
    };
    let measure = async |base: &str, connections, requests| {
        wrk(base, connections, bench.pace.warm_up, requests).await?;
        wrk(base, connections, bench.pace.measure, requests).await
    };
    let mut findings = Findings::default();
    let mut crowds = [wrk::CONNECTIONS, WITNESS_CROWD]
        .map(|connections| Witnessed { connections, ..Witnessed::default() });
    let (mut reads, mut bare_reads, mut lost) = (vec![], vec![], vec![]);
    for _ in 0..bench.pace.rounds {
        for Witnessed { connections, sold, answered, bare: beside } in &mut crowds {
            let connections = *connections;
            wrk(&shop.server.base, connections, bench.pace.warm_up, here.purchases()).await?;
            shop.quiet().await?;
            let before = stock::left(&client).await?;
            let bought = wrk(&shop.server.base, connections, bench.pace.measure, here.purchases()).await?;
            let at_the_end = stock::left(&client).await?;
            shop.quiet().await?;
            let sold_until = |later| before.sold_until(later).ok_or("somebody created products");
            sold.push(sold_until(&at_the_end)? as f64 / bought.seconds);
            answered.push(bought.rate());
            let missing = bought.rate() * bought.seconds - sold_until(&stock::left(&client).await?)? as f64;
            lost.push(missing.max(0.0));
            beside.push(measure(&bare.base, connections, there.purchases()).await?.rate());
            findings.raw.push(serde_json::to_value(bought)?);
        }
        let [of_shop, of_bare] = [&here, &there].map(|market| Requests::Products(&market.products));
        reads.push(measure(&shop.server.base, wrk::CONNECTIONS, of_shop).await?.rate());
        bare_reads.push(measure(&bare.base, wrk::CONNECTIONS, of_bare).await?.rate());
    }
    for Witnessed { connections, sold, answered, bare } in crowds {
        let rate = |what: &str, runs| {
            Figure::new(format!("{connections} connections: {what}"), Unit::PerSecond, runs)
        };
        findings.figures.extend([
            rate("purchases that left the stock", sold).beside(bare.clone()).asked(Asked::RatioAtLeast(0.5)),
            rate("purchases answered 201", answered).beside(bare),
        ]);
    }
    findings.figures.extend([
        Figure::new("purchases answered 201 that never left the stock", Unit::Count, lost)
            .asked(Asked::AtMost(0.0)),
        Figure::new("GET /api/product/{id}", Unit::PerSecond, reads)
            .beside(bare_reads)
            .asked(Asked::RatioAtLeast(0.7)),
    ]);
    findings.notes = vec![format!(
        "wrk. What left the stock is the difference of two looks at GET /api/products, before the run and at its end. GET with {} \
         connections.",
        wrk::CONNECTIONS
    )];
    Ok(findings)
}

/// What the witness has seen with so many connections, one number a run.
#[derive(Default)]
struct Witnessed {
    connections: u32,
    /// Purchases a second that left the stock.
    sold: Vec<f64>,
    /// Those answered 201.
    answered: Vec<f64>,
    /// Answers of the bare server a second.
    bare: Vec<f64>,
}

/// Everybody wants the same product, in turns with everybody wanting one of many.
pub(crate) async fn hot(bench: &Bench) -> Result<Findings, Error> {
    let shop = bench.shop("hot").await?;
    let mut findings = Findings::default();
    let (mut hot, mut spread) = (vec![], vec![]);
    for _ in 0..bench.pace.rounds {
        for (products, rates) in [(1, &mut hot), (PRODUCTS, &mut spread)] {
            let run =
                bench.load(&shop.server.base).with(&at_the_peak()).with(&format!("--products {products}"));
            let run = run.run().await?;
            rates.push(run.completed_per_second()?);
            findings.raw.push(run.raw());
        }
    }
    findings.figures = vec![
        Figure::new("completed purchases of one product", Unit::PerSecond, hot)
            .beside(spread)
            .asked(Asked::RatioAtLeast(0.8)),
    ];
    findings.notes = vec![format!("Beside: the same load spread over {PRODUCTS} products.")];
    Ok(findings)
}

/// GET of products.
pub(crate) async fn product(bench: &Bench) -> Result<Findings, Error> {
    reads(bench, "product", "GET /api/product/{id}", Some(Asked::RatioAtLeast(0.7))).await
}

/// GET of a page of the catalogue.
pub(crate) async fn catalogue(bench: &Bench) -> Result<Findings, Error> {
    reads(bench, "catalogue", "GET /api/products?size=100", None).await
}

async fn reads(
    bench: &Bench,
    scenario: &'static str,
    what: &str,
    asked: Option<Asked>,
) -> Result<Findings, Error> {
    let (shop, bare) = (bench.shop(scenario).await?, bench.bare().await?);
    let mut findings = Findings::default();
    let (mut rates, mut p99, mut bare_rates, mut bare_p99) = (vec![], vec![], vec![], vec![]);
    for _ in 0..bench.pace.rounds {
        for (base, rates, p99) in
            [(&shop.server.base, &mut rates, &mut p99), (&bare.base, &mut bare_rates, &mut bare_p99)]
        {
            let options = format!("--scenario {scenario} --buyers 128 --products {PRODUCTS}");
            let run = bench.load(base).with(&options).run().await?;
            rates.push(run.accepted_per_second()?);
            p99.push(run.latency(Latency::Acceptance, "p99")?);
            findings.raw.push(run.raw());
        }
    }
    let rate = Figure::new(what, Unit::PerSecond, rates).beside(bare_rates);
    findings.figures = vec![
        Figure { asked, ..rate },
        Figure::new(format!("{what}, p99"), Unit::Millis, p99).beside(bare_p99),
    ];
    findings.notes = vec!["128 connections.".to_owned()];
    Ok(findings)
}

/// The options of a load that keeps the shop busy and never refused.
pub(crate) fn at_the_peak() -> String {
    until_completed(512)
}

fn until_completed(buyers: u32) -> String {
    format!("--buyers {buyers} --customers {CUSTOMERS} --until completed")
}
