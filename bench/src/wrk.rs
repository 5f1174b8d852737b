//! `wrk`, the witness from outside: it knows nothing of the shop and nothing of `saga load`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::process::Command;

use crate::Error;

/// The connections that the witness opens, unless it is a crowd.
pub(crate) const CONNECTIONS: u32 = 128;
const THREADS: u32 = 2;

/// What the script's last line says.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Witness {
    /// Answers.
    pub(crate) requests: f64,
    /// Of them, refusals and errors: a status of 400 and above.
    pub(crate) refused: f64,
    /// Requests without an answer.
    pub(crate) failed: f64,
    /// How long it took, in seconds.
    pub(crate) seconds: f64,
}

impl Witness {
    /// Answers of success a second.
    pub(crate) fn rate(&self) -> f64 {
        (self.requests - self.refused) / self.seconds
    }
}

/// What is sent, in turn.
#[derive(Clone, Copy)]
pub(crate) enum Requests<'a> {
    /// GET of each of these products.
    Products(&'a [u64]),
    /// Purchases of each of these products, by each customer with one of these tokens.
    Purchases { tokens: &'a [String], products: &'a [u64] },
}

/// Sends requests for so long; `folder` takes the script's input.
///
/// # Errors
/// When wrk cannot be run, or does not say what it saw.
pub(crate) async fn run(
    scripts: &Path,
    folder: &Path,
    base: &str,
    duration: Duration,
    requests: Requests<'_>,
    connections: u32,
) -> Result<Witness, Error> {
    let (script, arguments): (&str, Vec<PathBuf>) = match requests {
        Requests::Products(products) => ("product.lua", vec![list(folder, "products", products)?]),
        Requests::Purchases { tokens, products } => {
            ("purchase.lua", vec![list(folder, "tokens", tokens)?, list(folder, "products", products)?])
        }
    };
    let mut command = Command::new("wrk");
    command.arg(format!("-t{THREADS}")).arg(format!("-c{connections}"));
    command.arg(format!("-d{}s", duration.as_secs().max(1))).arg("-s").arg(scripts.join(script));
    // The scripts share a file: Lua finds it by this.
    command.env("LUA_PATH", format!("{}/?.lua", scripts.display()));
    command.arg(base).arg("--").args(arguments).kill_on_drop(true);
    let output = command.output().await?;
    let text = String::from_utf8_lossy(&output.stdout);
    let last = text.lines().last().unwrap_or_default();
    serde_json::from_str(last).map_err(|error| {
        let stderr = String::from_utf8_lossy(&output.stderr);
        format!("wrk ({}) does not say what it saw: {error}\n{text}{stderr}", output.status).into()
    })
}

/// A file with one item a line.
fn list(folder: &Path, name: &str, items: &[impl ToString]) -> Result<PathBuf, Error> {
    let lines: String = items.iter().map(|item| item.to_string() + "\n").collect();
    let path = folder.join(name);
    std::fs::write(&path, lines)?;
    Ok(path)
}
