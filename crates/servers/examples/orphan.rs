//! Starts one server of each kind, says so, and waits for its end: to show that nothing outlives it.

#![allow(clippy::print_stdout, reason = "whoever started it waits for the line")]

use servers::{Error, MariaDb, Nats, Redis};

fn main() -> Result<(), Error> {
    let mariadb = MariaDb::start()?;
    let nats = Nats::start(1)?;
    let redis = Redis::start()?;
    let pids = [mariadb.pid(), nats.nodes()[0].pid(), redis.pid()].into_iter().flatten();
    println!("{}", pids.map(|pid| pid.to_string()).collect::<Vec<_>>().join(" "));
    loop {
        std::thread::park();
    }
}
