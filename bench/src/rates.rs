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
/// The pause between two looks.
const LOOK: Duration = Duration::from_millis(20);

/// Purchases at the peak; the processor time and the memory that they cost.
pub(crate) async fn purchase(bench: &Bench) -> Result<Findings, Error> {
    let (shop, bare) = (bench.shop("purchase").await?, bench.bare().await?);
    let mut findings = Findings::default();
    let (mut ended, mut ended_beside) = (Vec::new(), Vec::new());
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
        let mut last = stock::left(&client).await?;
        loop {
            tokio::time::sleep(LOOK).await;
            let now = stock::left(&client).await?;
            if last.sold_until(&now).is_some_and(|sold| sold > 0) {
                return Ok::<_, Error>((now, shop.server.cpu_time()?));
            }
            last = now;
        }
    };
    let finish = load.finish();
    tokio::pin!(finish);
    let (before, cpu) = tokio::select! {
        begun = begun => begun?,
        run = &mut finish => return Err(format!("nothing was sold: {}", run?.raw()).into()),
    };
    let run = finish.await?;
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
    let wrk = async |base: &str, duration, requests| {
        wrk::run(&scripts, &bench.work, base, duration, requests).await
    };
    let measure = async |base: &str, requests| {
        wrk(base, bench.pace.warm_up, requests).await?;
        wrk(base, bench.pace.measure, requests).await
    };
    let mut findings = Findings::default();
    let (mut sold_rate, mut bare_rate, mut answered, mut lost) = (vec![], vec![], vec![], vec![]);
    let (mut reads, mut bare_reads) = (vec![], vec![]);
    for _ in 0..bench.pace.rounds {
        wrk(&shop.server.base, bench.pace.warm_up, here.purchases()).await?;
        shop.quiet().await?;
        let before = stock::left(&client).await?;
        let bought = wrk(&shop.server.base, bench.pace.measure, here.purchases()).await?;
        let at_the_end = stock::left(&client).await?;
        shop.quiet().await?;
        let sold = |later| before.sold_until(later).ok_or("somebody created products");
        sold_rate.push(sold(&at_the_end)? as f64 / bought.seconds);
        answered.push(bought.rate());
        let missing = bought.rate() * bought.seconds - sold(&stock::left(&client).await?)? as f64;
        lost.push(missing.max(0.0));

        bare_rate.push(measure(&bare.base, there.purchases()).await?.rate());
        reads.push(measure(&shop.server.base, Requests::Products(&here.products)).await?.rate());
        bare_reads.push(measure(&bare.base, Requests::Products(&there.products)).await?.rate());
        findings.raw.push(serde_json::to_value(bought)?);
    }
    findings.figures = vec![
        Figure::new("purchases that left the stock", Unit::PerSecond, sold_rate)
            .beside(bare_rate.clone())
            .asked(Asked::RatioAtLeast(0.5)),
        Figure::new("purchases answered 201", Unit::PerSecond, answered).beside(bare_rate),
        Figure::new("purchases answered 201 that never left the stock", Unit::Count, lost)
            .asked(Asked::AtMost(0.0)),
        Figure::new("GET /api/product/{id}", Unit::PerSecond, reads)
            .beside(bare_reads)
            .asked(Asked::RatioAtLeast(0.7)),
    ];
    findings.notes = vec![format!(
        "wrk with {} connections. What left the stock is the difference of two looks at GET /api/products, before \
         the run and at its end.",
        wrk::CONNECTIONS
    )];
    Ok(findings)
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
    format!("--buyers 512 --customers {CUSTOMERS} --until completed")
}
