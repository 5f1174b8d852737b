//! `cargo run --package servers`: one server of each kind that tests share, for as long as this runs.
//!
//! It prints what to put into the environment, so that `cargo test` in another terminal needs to start none.

#![allow(clippy::print_stdout, reason = "whoever started it needs the addresses")]

use servers::{Error, TestServers};

fn main() -> Result<(), Error> {
    let servers = TestServers::start()?;
    for (variable, address) in servers.variables() {
        println!("export {variable}={address}");
    }
    println!("# until Ctrl-C");
    loop {
        std::thread::park();
    }
}
