//! What the answers mean, and what to do. Pure.

use super::look::{Asked, Broker, DataDir, Database, Facts};
use super::{Finding, Verdict};
use crate::config::Config;
use crate::config::servers::Service;

/// How far a server's clock may be off. Replicas go by one clock, and ids and deadlines bear much more; logs and traces get hard to read.
const CLOCK_OFFSET_MILLIS: i64 = 500;

/// Connections that a process holds to its database beside those that the settings name: migrations, an operator.
const SPARE_CONNECTIONS: u64 = 10;

/// What is to be said of all that was found.
pub(super) fn findings(config: &Config, facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    findings.extend(facts.data_dir.iter().map(data_dir));
    for (service, database) in &facts.databases {
        match database {
            Database::File(pending) => findings.push(file(*service, pending)),
            Database::Server(answer) => findings.extend(server(config, *service, answer)),
        }
    }
    findings.extend(facts.nats.iter().flat_map(nats));
    findings.extend(facts.redis.iter().flat_map(redis));
    findings
}

fn data_dir(dir: &DataDir) -> Finding {
    let subject = "data directory";
    match &dir.written {
        Err(why) => Finding::not_ok(
            Verdict::Failure,
            subject,
            "writable",
            format!("{}: {why}", dir.path),
            "choose another one with --data-dir, or make room and let this user write there",
        ),
        Ok(()) if dir.exists => Finding::ok(subject, "writable", &*dir.path),
        Ok(()) => Finding::ok(subject, "writable", format!("{}, which the first start makes", dir.path)),
    }
}

fn file(service: Service, pending: &Result<Option<Vec<String>>, String>) -> Finding {
    let subject = format!("database {}", service.name());
    match pending {
        Ok(pending) => migrations(&subject, pending.as_deref()),
        Err(why) => Finding::not_ok(
            Verdict::Failure,
            &subject,
            "migrations",
            why.clone(),
            "a newer program has been here: update this one; or the file is damaged: restore the data directory from a backup",
        ),
    }
}

fn migrations(subject: &str, pending: Option<&[String]>) -> Finding {
    let found = match pending {
        None => "no database yet; the first start makes it".to_owned(),
        Some([]) => "all applied".to_owned(),
        Some(pending) => format!("the next start applies {}", pending.join(", ")),
    };
    Finding::ok(subject, "migrations", found)
}

fn server(
    config: &Config,
    service: Service,
    answer: &Result<Box<(db::mysql::Inspection, Asked)>, String>,
) -> Vec<Finding> {
    let subject = &format!("mysql {}", service.name());
    let (found, asked) = match answer {
        Ok(answer) => (&answer.0, answer.1),
        Err(why) => {
            let advice = "the reason says what; nothing starts without this database";
            return vec![Finding::not_ok(Verdict::Failure, subject, "reachable", why.clone(), advice)];
        }
    };
    let mut findings =
        vec![Finding::ok(subject, "reachable", format!("{} at {}", found.database, found.address))];
    findings.push(if found.version_fits {
        Finding::ok(subject, "version", &*found.version)
    } else {
        let advice = "update it to MySQL 8.0.19 or MariaDB 10.6 or newer";
        Finding::not_ok(Verdict::Failure, subject, "version", &*found.version, advice)
    });
    if found.read_only {
        let advice = "name the primary in mysql.url; this one refuses to write";
        findings.push(Finding::not_ok(Verdict::Failure, subject, "read_only", "1", advice));
    }
    let flush = found.flush_log_at_trx_commit;
    findings.push(match flush {
        1 => Finding::ok(subject, "innodb_flush_log_at_trx_commit", "1"),
        _ => Finding::not_ok(
            Verdict::Failure,
            subject,
            "innodb_flush_log_at_trx_commit",
            flush.to_string(),
            "set it to 1: a purchase that was answered 201 could be lost when the server's machine fails",
        ),
    });
    findings.push(match (found.log_bin, found.sync_binlog) {
        (false, _) => Finding::ok(subject, "sync_binlog", "there is no binary log"),
        (true, 1) => Finding::ok(subject, "sync_binlog", "1"),
        (true, other) => Finding::not_ok(
            Verdict::Warning,
            subject,
            "sync_binlog",
            other.to_string(),
            "set it to 1, or a replica of this server may lack what this server has, when its machine fails",
        ),
    });
    findings.push(Finding::ok(subject, "isolation", "READ COMMITTED, which each session asks for"));
    findings.push(connections(config, subject, found));
    findings.push(clock(subject, found.now_millis, asked));
    let named = |migration: &&'static db::Migration| format!("{} ({})", migration.number, migration.name);
    let pending: Option<Vec<String>> = found.pending.as_ref().map(|all| all.iter().map(named).collect());
    findings.push(migrations(subject, pending.as_deref()));
    findings
}

/// With a server of its own a service needs fewer; told is what all take that the settings name, if they are on this one.
fn connections(config: &Config, subject: &str, found: &db::mysql::Inspection) -> Finding {
    let each = (config.mysql.writers + config.mysql.readers) as u64;
    let services =
        Service::ALL.into_iter().filter(|service| config.mysql.of(*service).is_some()).count() as u64;
    let needed = each * services * config.processes.max(1) as u64 + SPARE_CONNECTIONS;
    let said =
        format!("{} allowed, {} open, up to {needed} needed", found.max_connections, found.connections);
    if found.max_connections >= needed {
        return Finding::ok(subject, "max_connections", said);
    }
    let advice = format!(
        "set max_connections of the server to {needed} or more, or lower mysql.writers and mysql.readers"
    );
    Finding::not_ok(Verdict::Warning, subject, "max_connections", said, advice)
}

/// Nothing is said of what the time of asking may explain.
fn clock(subject: &str, there: i64, asked: Asked) -> Finding {
    let offset = match there {
        _ if there < asked.from => there - asked.from,
        _ if there > asked.to => there - asked.to,
        _ => 0,
    };
    let found = format!("{offset} ms from this machine's, asked for {} ms", asked.to - asked.from);
    if offset.abs() <= CLOCK_OFFSET_MILLIS {
        return Finding::ok(subject, "clock", found);
    }
    let advice = "let NTP set the clocks of both machines";
    Finding::not_ok(Verdict::Warning, subject, "clock", found, advice)
}

fn nats(answer: &Result<Broker, String>) -> Vec<Finding> {
    let Broker { servers, replicas: wanted, in_files, streams_bytes } = match answer {
        Ok(broker) => broker,
        Err(why) => {
            let advice = "correct this setting, or the file that it names, in the section nats";
            return vec![Finding::not_ok(Verdict::Failure, "nats", "settings", why.clone(), advice)];
        }
    };
    let mut findings = Vec::new();
    let reached = servers.iter().filter(|server| server.found.is_ok()).count();
    for server in servers {
        let subject = &format!("nats {}", server.server);
        match &server.found {
            Err(why) => {
                // A cluster works as long as most of it does.
                let verdict = if reached * 2 > servers.len() { Verdict::Warning } else { Verdict::Failure };
                let advice = "start it, or check the host, the port, the user and the password in nats.url, and the certificates";
                findings.push(Finding::not_ok(verdict, subject, "reachable", why.clone(), advice));
            }
            Ok(found) => {
                let cluster = found.cluster.as_deref().unwrap_or("no cluster");
                findings.push(Finding::ok(subject, "version", format!("{}, {cluster}", found.version)));
                findings.push(match &found.jetstream {
                    Ok(_) => Finding::ok(subject, "jetstream", "enabled"),
                    Err(why) => Finding::not_ok(
                        Verdict::Failure,
                        subject,
                        "jetstream",
                        why.clone(),
                        "start the server with --jetstream and a --store_dir, and let this user use it",
                    ),
                });
            }
        }
    }
    let seen = servers.iter().filter_map(|server| server.found.as_ref().ok()?.jetstream.as_ref().ok()).next();
    if let Some(jetstream) = seen {
        findings.push(room(jetstream, *streams_bytes));
        findings.extend(jetstream.streams.iter().map(|found| stream(found, *in_files)));
        if jetstream.streams.is_empty() {
            let found = format!("none yet; the first start makes them, with {wanted} copies of each message");
            findings.push(Finding::ok("nats", "streams", found));
        }
    }
    if *wanted > servers.len() {
        let found = format!("{wanted} copies of each message, {} servers", servers.len());
        let advice = "name all servers of the cluster in nats.url, or lower nats.replicas";
        findings.push(Finding::not_ok(Verdict::Warning, "nats", "replicas", found, advice));
    }
    findings
}

/// What a server has room for it does not tell its users, only what their account may take.
fn room(jetstream: &bus::nats::JetStream, needed_bytes: u64) -> Finding {
    const MIB: u64 = 1024 * 1024;
    let (needed, others) = (needed_bytes.div_ceil(MIB), jetstream.others_bytes.div_ceil(MIB));
    let Some(limit) = jetstream.limit_bytes else {
        let found = format!("{needed} MiB for all copies of all streams; this account has no limit");
        return Finding::ok("nats", "room", found);
    };
    let found = format!(
        "{needed} MiB for all copies of all streams; this account may take {} MiB, others have {others} MiB of it",
        limit / MIB
    );
    if needed_bytes.saturating_add(jetstream.others_bytes) <= limit {
        return Finding::ok("nats", "room", found);
    }
    let advice =
        "lower nats.queue_mib, or let the account have more of JetStream: streams without room are not made";
    Finding::not_ok(Verdict::Failure, "nats", "room", found, advice)
}

fn stream(stream: &bus::nats::Stream, in_files: bool) -> Finding {
    let subject = &format!("nats stream {}", stream.name);
    let storage = if stream.in_files { "in files" } else { "in memory" };
    if stream.in_files != in_files {
        let advice = "set nats.storage to what it is, or delete the stream while the shop is stopped; what was in a queue is \
                      sent again, dead letters are gone";
        return Finding::not_ok(Verdict::Failure, subject, "storage", storage, advice);
    }
    let found =
        format!("{} of {} copies, {storage}, {} messages", stream.current, stream.replicas, stream.messages);
    match stream.current {
        current if current >= stream.replicas => Finding::ok(subject, "replicas", found),
        current if current * 2 > stream.replicas => {
            let advice = "start the server that is away, or wait until it has caught up";
            Finding::not_ok(Verdict::Warning, subject, "replicas", found, advice)
        }
        _ => {
            let advice = "start the servers that are away: most of them are needed";
            Finding::not_ok(Verdict::Failure, subject, "replicas", found, advice)
        }
    }
}

/// Nothing of it is a failure: without Redis the databases are asked.
fn redis(answer: &Result<Vec<(cache::redis::Inspection, Asked)>, String>) -> Vec<Finding> {
    let nodes = match answer {
        Ok(nodes) => nodes,
        Err(why) => {
            return vec![Finding::not_ok(
                Verdict::Failure,
                "redis",
                "settings",
                why.clone(),
                "correct redis.url",
            )];
        }
    };
    nodes.iter().flat_map(|(node, asked)| redis_node(node, *asked)).collect()
}

fn redis_node(node: &cache::redis::Inspection, asked: Asked) -> Vec<Finding> {
    let subject = &format!("redis {}", node.node);
    let found = match &node.found {
        Ok(found) => found,
        Err(why) => {
            let advice = "start it, or check redis.url; until then the databases are asked, which is slower";
            return vec![Finding::not_ok(Verdict::Warning, subject, "reachable", why.clone(), advice)];
        }
    };
    let mut findings = vec![Finding::ok(subject, "version", &*found.version)];
    findings.push(match found.cluster_state.as_deref() {
        None => Finding::ok(subject, "cluster", "a Redis alone"),
        Some("ok") => Finding::ok(subject, "cluster", "ok"),
        Some(state) => {
            let advice = "see CLUSTER INFO and CLUSTER NODES: some slots have no primary";
            Finding::not_ok(Verdict::Warning, subject, "cluster", state, advice)
        }
    });
    let policy = found.maxmemory_policy.as_deref();
    findings.push(match (found.maxmemory, policy) {
        (Some(0), _) => Finding::not_ok(
            Verdict::Warning,
            subject,
            "maxmemory",
            "no limit",
            "set maxmemory, with maxmemory-policy allkeys-lru: copies would otherwise fill the machine",
        ),
        (_, Some(policy)) if !policy.starts_with("allkeys-") => Finding::not_ok(
            Verdict::Warning,
            subject,
            "maxmemory",
            format!("maxmemory-policy {policy}"),
            "set maxmemory-policy to allkeys-lru: when it is full, a copy should give way to a newer one",
        ),
        (_, Some(policy)) => Finding::ok(subject, "maxmemory", policy),
        (_, None) => Finding::ok(subject, "maxmemory", "it does not let itself be asked"),
    });
    let known = match (found.bloom, found.cuckoo) {
        (true, true) => "this server's BF.* and CF.* are not used",
        (true, false) => "this server's BF.* are not used",
        (false, true) => "this server's CF.* are not used",
        (false, false) => "this server has neither BF.* nor CF.*, and need not",
    };
    findings.push(Finding::ok(subject, "filters", format!("each process has its own; {known}")));
    findings.push(clock(subject, found.now_millis, asked));
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::secret::ServerUrl;

    fn verdict_of(findings: &[Finding], check: &str) -> Verdict {
        findings.iter().find(|finding| finding.check == check).unwrap_or_else(|| panic!("no {check}")).verdict
    }

    fn good_server() -> db::mysql::Inspection {
        db::mysql::Inspection {
            address: "db:3306".to_owned(),
            database: "saga_order".to_owned(),
            version: "10.11.6-MariaDB".to_owned(),
            version_fits: true,
            flush_log_at_trx_commit: 1,
            log_bin: true,
            sync_binlog: 1,
            read_only: false,
            max_connections: 1_000,
            connections: 1,
            max_allowed_packet: 1 << 24,
            now_millis: 10_000,
            pending: Some(Vec::new()),
        }
    }

    const ASKED: Asked = Asked { from: 9_990, to: 10_010 };

    fn judged(found: db::mysql::Inspection) -> Vec<Finding> {
        server(&Config::default(), Service::Order, &Ok(Box::new((found, ASKED))))
    }

    #[test]
    fn a_good_server_is_good() {
        let findings = judged(good_server());
        assert!(findings.iter().all(|finding| finding.verdict == Verdict::Ok), "{findings:?}");
    }

    #[test]
    fn what_loses_purchases_is_a_failure() {
        let bad = db::mysql::Inspection { flush_log_at_trx_commit: 2, sync_binlog: 0, ..good_server() };
        let findings = judged(bad);
        assert_eq!(verdict_of(&findings, "innodb_flush_log_at_trx_commit"), Verdict::Failure);
        assert_eq!(verdict_of(&findings, "sync_binlog"), Verdict::Warning);
        let no_log = db::mysql::Inspection { log_bin: false, sync_binlog: 0, ..good_server() };
        assert_eq!(verdict_of(&judged(no_log), "sync_binlog"), Verdict::Ok);
        let old = db::mysql::Inspection { version_fits: false, ..good_server() };
        assert_eq!(verdict_of(&judged(old), "version"), Verdict::Failure);
    }

    #[test]
    fn connections_are_counted_for_all_processes() {
        let few = db::mysql::Inspection { max_connections: 60, ..good_server() };
        let answer = Ok(Box::new((few, ASKED)));
        let verdict =
            |config: &Config| verdict_of(&server(config, Service::Order, &answer), "max_connections");
        let mut config = Config::default();
        config.mysql.url = Some(ServerUrl::new("mysql://db"));
        assert_eq!(verdict(&config), Verdict::Ok);
        config.processes = 2;
        assert_eq!(verdict(&config), Verdict::Warning);
        // Its own server is all that one service's replica is told of.
        config.mysql.order = config.mysql.url.take();
        assert_eq!(verdict(&config), Verdict::Ok);
    }

    #[test]
    fn a_clock_is_off_by_what_asking_does_not_explain() {
        for (there, verdict) in [
            (9_990, Verdict::Ok),
            (10_010 + CLOCK_OFFSET_MILLIS, Verdict::Ok),
            (10_011 + CLOCK_OFFSET_MILLIS, Verdict::Warning),
            (9_989 - CLOCK_OFFSET_MILLIS, Verdict::Warning),
        ] {
            assert_eq!(clock("x", there, ASKED).verdict, verdict, "{there}");
        }
    }

    #[test]
    fn most_of_a_cluster_is_enough() {
        let up = bus::nats::Found {
            version: "2.15.0".to_owned(),
            cluster: Some("shop".to_owned()),
            jetstream: Ok(bus::nats::JetStream { limit_bytes: None, others_bytes: 0, streams: Vec::new() }),
        };
        let nats = |servers| nats(&Ok(Broker { servers, replicas: 3, in_files: true, streams_bytes: 0 }));
        let server = |found: Result<bus::nats::Found, String>| bus::nats::Inspection {
            server: "a:1".to_owned(),
            found,
        };
        let down = || server(Err("connection refused".to_owned()));
        let most = nats(vec![server(Ok(up.clone())), server(Ok(up.clone())), down()]);
        assert!(super::super::healthy(&most), "{most:?}");
        assert_eq!(verdict_of(&most, "reachable"), Verdict::Warning);
        let few = nats(vec![server(Ok(up)), down(), down()]);
        assert!(!super::super::healthy(&few), "{few:?}");
        let of = |current| {
            let name = "saga_x".to_owned();
            let found = bus::nats::Stream { name, replicas: 3, current, in_files: true, messages: 0 };
            stream(&found, true).verdict
        };
        assert_eq!([3, 2, 1, 0].map(of), [Verdict::Ok, Verdict::Warning, Verdict::Failure, Verdict::Failure]);
    }

    #[test]
    fn streams_and_what_others_have_must_fit_into_the_account() {
        let of = |limit_bytes, others_bytes| {
            let streams = Vec::new();
            room(&bus::nats::JetStream { limit_bytes, others_bytes, streams }, 600).verdict
        };
        assert_eq!([of(None, 0), of(Some(600), 0), of(Some(700), 100)], [Verdict::Ok; 3]);
        assert_eq!([of(Some(599), 0), of(Some(700), 101), of(Some(0), 0)], [Verdict::Failure; 3]);
    }

    #[test]
    fn nothing_about_redis_keeps_a_shop_from_running() {
        let found = cache::redis::Found {
            version: "7.0.15".to_owned(),
            cluster_state: Some("fail".to_owned()),
            maxmemory: Some(0),
            maxmemory_policy: Some("noeviction".to_owned()),
            bloom: false,
            cuckoo: false,
            now_millis: 0,
        };
        let node = |found| (cache::redis::Inspection { node: "a:1".to_owned(), found }, ASKED);
        let findings = redis(&Ok(vec![node(Ok(found)), node(Err("connection refused".to_owned()))]));
        assert!(super::super::healthy(&findings), "{findings:?}");
        for check in ["cluster", "maxmemory", "clock", "reachable"] {
            assert_eq!(verdict_of(&findings, check), Verdict::Warning, "{check}");
        }
    }

    #[test]
    fn a_full_disk_or_a_newer_database_is_a_failure() {
        let full =
            DataDir { path: "/data".to_owned(), exists: true, written: Err("no space left".to_owned()) };
        assert_eq!(data_dir(&full).verdict, Verdict::Failure);
        assert_eq!(file(Service::Order, &Err("newer".to_owned())).verdict, Verdict::Failure);
        assert_eq!(file(Service::Order, &Ok(None)).verdict, Verdict::Ok);
    }
}
