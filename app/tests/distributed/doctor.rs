//! What `saga doctor` says of servers that are there.

use std::process::Command;

use serde_json::Value;
use servers::{MariaDb, Nats, shared};
use testkit::{Engines, Shop, TempDir};

use super::options;

/// One thing that it has looked at.
#[derive(Debug)]
struct Finding {
    subject: String,
    check: String,
    verdict: String,
    found: String,
    advice: String,
}

/// What it says, and whether it lets the shop run.
fn examine(variables: &[(String, String)], arguments: &[&str]) -> (bool, Vec<Finding>) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_saga"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("SAGA_")) {
        command.env_remove(name);
    }
    let variables = variables.iter().map(|(name, value)| (name, value));
    let output = command.args(["doctor", "--json"]).args(arguments).envs(variables).output().unwrap();
    let all: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    let text = |finding: &Value, field: &str| finding[field].as_str().unwrap_or_default().to_owned();
    let finding = |value: &Value| Finding {
        subject: text(value, "subject"),
        check: text(value, "check"),
        verdict: text(value, "verdict"),
        found: text(value, "found"),
        advice: text(value, "advice"),
    };
    (output.status.success(), all.iter().map(finding).collect())
}

fn ill(findings: &[Finding]) -> Vec<&Finding> {
    findings.iter().filter(|finding| finding.verdict != "ok").collect()
}

/// What was found of a check, of all subjects that begin so.
fn found<'f>(findings: &'f [Finding], subject: &str, check: &str) -> Vec<&'f str> {
    let of = |finding: &&Finding| finding.subject.starts_with(subject) && finding.check == check;
    findings.iter().filter(of).map(|finding| &*finding.found).collect()
}

fn with(engines: &Engines, further: &[(&str, &str)]) -> Vec<(String, String)> {
    let further = further.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    engines.variables().into_iter().chain(further).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn good_servers_are_well_before_and_after_the_first_start() {
    let (dir, engines) = (TempDir::new(), Engines::shared());
    let in_memory = [("SAGA_NATS__STORAGE", "memory"), ("SAGA_NATS__DEAD_LETTER_REPLICAS", "1")];
    let variables = with(&engines, &in_memory);
    let (healthy, findings) = examine(&variables, &[]);
    assert!(healthy && ill(&findings).is_empty(), "{:#?}", ill(&findings));
    assert_eq!(found(&findings, "mysql ", "innodb_flush_log_at_trx_commit"), ["1"; 5]);
    let migrations = found(&findings, "mysql ", "migrations");
    assert_eq!(migrations, ["no database yet; the first start makes it"; 5]);
    assert_eq!(found(&findings, "nats ", "jetstream"), ["enabled"; 3]);
    // Five queues and the dead letters, of 8 MiB each.
    let room = found(&findings, "nats", "room");
    assert_eq!(room, ["48 MiB for all copies of all streams; this account has no limit"]);
    assert_eq!(found(&findings, "redis ", "cluster"), ["ok"; 6]);
    assert!(found(&findings, "redis ", "filters")[0].starts_with("each process has its own; "));
    assert_eq!(found(&findings, "data", "writable"), [""; 0]);
    assert_eq!(found(&findings, "database", "migrations"), [""; 0]);

    let options = in_memory
        .into_iter()
        .fold(options(&dir, &engines, 0), |options, (name, value)| options.env(name, value));
    let _shop = Shop::start(options).await.unwrap();
    let (healthy, findings) = examine(&variables, &[]);
    assert!(healthy && ill(&findings).is_empty(), "{:#?}", ill(&findings));
    assert_eq!(found(&findings, "mysql ", "migrations"), ["all applied"; 5]);
    let streams = found(&findings, "nats stream ", "replicas");
    assert_eq!(streams.len(), 6, "{streams:?}");
    assert!(streams.iter().all(|found| found.starts_with("1 of 1 copies, in memory, ")), "{streams:?}");

    // They would stay where they are.
    let (healthy, findings) = examine(&engines.variables(), &[]);
    assert!(!healthy);
    assert_eq!(found(&findings, "nats stream ", "storage"), ["in memory"; 6]);
    assert!(ill(&findings).iter().all(|finding| finding.advice.contains("nats.storage")), "{findings:#?}");
}

/// A replica's file, as `deploy/README.md` has it.
#[tokio::test(flavor = "multi_thread")]
async fn of_one_service_only_its_own_servers_are_examined() {
    let (dir, engines) = (TempDir::new(), Engines::shared());
    let file = dir.path().join("saga.toml");
    let subjects = |sections: &[String]| -> Vec<String> {
        std::fs::write(&file, sections.concat()).unwrap();
        let (healthy, findings) = examine(&[], &["--config", file.to_str().unwrap()]);
        assert!(healthy && ill(&findings).is_empty(), "{:#?}", ill(&findings));
        let kind = |finding: &Finding| match finding.subject.split_once(' ') {
            Some((kind @ ("nats" | "redis"), _)) => kind.to_owned(),
            _ => finding.subject.clone(),
        };
        let mut kinds: Vec<String> = findings.iter().map(kind).collect();
        kinds.dedup();
        kinds
    };
    let url = engines.mysql().database_url(&engines.database("product"));
    let mysql = |service: &str| format!("[mysql]\n{service} = {url:?}\n");
    let nats = format!("[nats]\nurl = {:?}\n", shared::nats().join(","));
    let redis = format!("[redis]\nurl = {:?}\n", shared::redis_cluster().join(","));
    assert_eq!(
        subjects(&[mysql("product"), nats.clone(), redis.clone()]),
        ["mysql product", "nats", "redis"]
    );
    assert_eq!(subjects(&[mysql("account"), redis]), ["mysql account", "redis"]);
    assert_eq!(subjects(&[nats]), ["nats"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_server_is_named_with_what_to_do() {
    let mariadb = MariaDb::start_with(&["--innodb-flush-log-at-trx-commit=2"]).unwrap();
    let accounts = r#"accounts {
        SHOP { jetstream { max_file: 50M, max_mem: 0 }, users: [{ user: shop, password: s3cr3t }] }
        OTHER { users: [{ user: other, password: s3cr3t }] }
    }"#;
    let nats = Nats::start_with(1, accounts).unwrap();
    let of = |user: &str, queue_mib: &str| {
        let address = nats.nodes()[0].socket_addr();
        let engines =
            Engines::new(mariadb.address().clone(), &[format!("nats://{user}:s3cr3t@{address}")], None);
        examine(&with(&engines, &[("SAGA_NATS__QUEUE_MIB", queue_mib)]), &[])
    };
    let named = |findings: &[Finding], subject: &str, check: &str, advice: &str| {
        let ill = ill(findings);
        let (here, elsewhere): (Vec<&Finding>, Vec<&Finding>) =
            ill.into_iter().partition(|finding| finding.subject.starts_with(subject));
        assert!(elsewhere.iter().all(|finding| finding.check == "innodb_flush_log_at_trx_commit"));
        let [finding] = here[..] else { panic!("{subject}: {here:#?}") };
        assert_eq!((&*finding.check, &*finding.verdict), (check, "failure"), "{finding:?}");
        assert!(finding.advice.contains(advice), "{finding:?}");
    };

    let (healthy, findings) = of("shop", "7");
    assert!(!healthy);
    for service in ["account", "product", "order", "payment", "purchase"] {
        let subject = format!("mysql {service}");
        named(&findings, &subject, "innodb_flush_log_at_trx_commit", "set it to 1: a purchase that was");
    }
    assert_eq!(ill(&findings).len(), 5, "{:#?}", ill(&findings));

    mariadb.address().run("SET GLOBAL innodb_flush_log_at_trx_commit = 1").unwrap();
    let (healthy, findings) = of("shop", "7");
    assert!(healthy && ill(&findings).is_empty(), "{:#?}", ill(&findings));
    let (healthy, findings) = of("shop", "9");
    assert!(!healthy);
    named(&findings, "nats", "room", "lower nats.queue_mib");
    let (healthy, findings) = of("other", "7");
    assert!(!healthy);
    named(&findings, "nats", "jetstream", "let this user use it");
}
