//! A collector of spans that only counts them, to measure what recording costs: prints its endpoint, and at the end of its standard
//! input how many spans of each service have come.

#![allow(clippy::print_stdout, reason = "it is what the program is for")]

use std::collections::BTreeMap;

use testkit::Collector;

#[tokio::main]
async fn main() {
    let collector = Collector::start().await;
    println!("{}", collector.endpoint());
    let waited = tokio::task::spawn_blocking(|| std::io::copy(&mut std::io::stdin(), &mut std::io::sink()));
    // However the input ends, the count is printed.
    let _ = waited.await;
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for span in collector.spans() {
        *counts.entry(span.service).or_default() += 1;
    }
    for (service, count) in counts {
        println!("{service} {count}");
    }
}
