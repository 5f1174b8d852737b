//! The command line: what it takes, and nothing of what is done with it.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

use crate::config::layers::{FILE_VARIABLE, FlagSetting};
use crate::config::servers::Service;

/// What a supervisor says to the processes that it starts.
pub(crate) const SUPERVISED: &str = "--supervised";

/// A shop backend: accounts, products, orders, payments, and purchases that happen exactly once.
#[derive(Debug, Parser)]
#[command(name = "saga", version, after_help = AFTER_HELP)]
pub(crate) struct Cli {
    /// What to do; `up` if nothing is said.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Settings given on the command line.
    #[command(flatten)]
    pub settings: Settings,
}

const AFTER_HELP: &str = "\
Each setting comes from its flag, or else from its environment variable (payment.limit is
SAGA_PAYMENT__LIMIT), or else from the configuration file, or else it has its default.
`saga config show` lists all of them.

Exit codes:
    0  done; for `saga up`: stopped by SIGTERM or SIGINT, everything accepted is on disk
    1  could not start or had to stop; the reason is the log's last line.
       For `saga load`: no result, or --verify found what does not add up.
       For `saga doctor`: the shop would not run, or would lose data
    2  wrong usage or a setting that is not allowed
    3  another process uses the data directory
  130  a second signal cut the stop short; the next start goes on from what is on disk";

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start the shop and run it until SIGTERM or SIGINT [the default]
    ///
    /// All of it in this process, with its data in files; or, with --mysql and --nats, on those servers; or, with --processes
    /// too, as so many processes of each service, kept alive by this one.
    Up,
    /// Run one replica of one service until SIGTERM or SIGINT
    ///
    /// It waits for its servers: /readyz on --admin-listen says for which. Where the other services are is told by peers.account
    /// and so on (SAGA_PEERS__ACCOUNT=HOST:PORT,...).
    Run {
        /// Which service
        service: Service,
        /// End when standard input ends; share the addresses with who holds them
        #[arg(long, hide = true)]
        supervised: bool,
    },
    /// Check every configured server and say what to do
    ///
    /// Whether it is reached, its version, the settings that data survives by, migrations, and the clock. Exit code 1 if anything
    /// keeps the shop from running.
    Doctor {
        /// Print a JSON array of {subject, check, verdict, found, advice}
        #[arg(long)]
        json: bool,
    },
    /// Ask the process on this machine whether it is ready: exit code 0 or 1
    ///
    /// It is found by its admin_listen; for a container's health check.
    Health,
    /// Look after the keys that access tokens are signed with
    #[command(subcommand)]
    Keys(KeysCommand),
    /// Look at the settings
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Add the demonstration's products to a shop that has none; one that has its data in files must not be running
    Seed,
    /// Put a running shop under load, time every answer and every end of a purchase, and check that it all adds up
    Load(Box<load::Options>),
    /// Print a completion script: source <(saga completions bash)
    Completions {
        /// The shell that will read the script
        shell: Shell,
    },
}

/// What to do with the signing keys.
#[derive(Debug, Subcommand)]
pub(crate) enum KeysCommand {
    /// Add a key. Running replicas publish it within seconds and sign with it after five minutes; the older ones verify until
    /// their files are deleted
    New,
}

/// What to do with the settings.
#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Print every setting, its value, and where the value comes from; secrets are masked
    Show {
        /// Print a JSON array of {key, value, source: {kind, name}}
        #[arg(long)]
        json: bool,
    },
}

/// Settings given on the command line.
#[derive(Debug, Args)]
pub(crate) struct Settings {
    /// Where the shop's API listens [env: SAGA_LISTEN] [default: 127.0.0.1:8080]
    #[arg(long, global = true, value_name = "IP:PORT")]
    listen: Option<String>,
    /// Where /metrics, /healthz and /readyz listen [env: SAGA_ADMIN_LISTEN] [default: 127.0.0.1:8081]
    #[arg(long, global = true, value_name = "IP:PORT")]
    admin_listen: Option<String>,
    /// The folder of the databases and keys [env: SAGA_DATA_DIR] [default: ./saga-data]
    #[arg(long, global = true, value_name = "DIR")]
    data_dir: Option<String>,
    /// MySQL or MariaDB, mysql://USER:PASSWORD@HOST:PORT, in place of files [env: SAGA_MYSQL]
    #[arg(long, global = true, value_name = "URL")]
    mysql: Option<String>,
    /// NATS with JetStream, nats://HOST:PORT,... [env: SAGA_NATS]
    #[arg(long, global = true, value_name = "URL")]
    nats: Option<String>,
    /// Redis, a cluster or a node, redis://HOST:PORT,... [env: SAGA_REDIS]
    #[arg(long, global = true, value_name = "URL")]
    redis: Option<String>,
    /// Replicas of each service to start as processes of their own; needs --mysql and --nats [env: SAGA_PROCESSES]
    #[arg(long, global = true, value_name = "N")]
    processes: Option<usize>,
    /// Leave a new shop empty
    #[arg(long, global = true)]
    no_demo_data: bool,
    /// A TOML file with settings
    #[arg(long, global = true, value_name = "FILE", env = FILE_VARIABLE, hide_env_values = true)]
    pub config: Option<PathBuf>,
}

impl Settings {
    /// What was given, as a layer of the configuration.
    pub(crate) fn given(&self) -> Vec<FlagSetting> {
        let text = |key, flag, value: &Option<String>| {
            value.as_deref().map(|value| FlagSetting { key, flag, value: value.into() })
        };
        let processes =
            |number: usize| FlagSetting { key: "processes", flag: "--processes", value: number.into() };
        let no_demo_data = FlagSetting { key: "demo_data", flag: "--no-demo-data", value: false.into() };
        [
            text("listen", "--listen", &self.listen),
            text("admin_listen", "--admin-listen", &self.admin_listen),
            text("data_dir", "--data-dir", &self.data_dir),
            text("mysql.url", "--mysql", &self.mysql),
            text("nats.url", "--nats", &self.nats),
            text("redis.url", "--redis", &self.redis),
            self.processes.map(processes),
            self.no_demo_data.then_some(no_demo_data),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn settings_may_stand_before_or_after_the_command() {
        for line in [["saga", "--listen", "[::1]:1", "up"], ["saga", "up", "--listen", "[::1]:1"]] {
            let given = Cli::parse_from(line).settings.given();
            assert_eq!(given.len(), 1);
            assert_eq!((given[0].key, given[0].value.as_str()), ("listen", Some("[::1]:1")));
        }
    }
}
