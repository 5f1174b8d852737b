//! The link to Redis, on real servers: one that is not there, stalls, is emptied, or fails over.

use std::time::Duration;

use cache::redis::{Begin, Entry, Redis, Settings, Unanswered};
use servers::{Proxy, RedisCluster, unique_name};

/// How long a server, or a cluster, may take to be there again on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn settings(urls: &str) -> Settings {
    let mut settings = Settings::parse(urls).expect("an address");
    settings.prefix = unique_name();
    // A debug build on a busy machine.
    settings.command_timeout = Duration::from_secs(2);
    settings
}

async fn connected(settings: Settings) -> Redis {
    let redis = Redis::connect(settings);
    assert!(redis.wait_until_up(PATIENCE).await, "{:?} does not answer", redis.settings());
    redis
}

fn texts(entries: &[Entry]) -> Vec<String> {
    entries.iter().map(|entry| String::from_utf8_lossy(&entry.bytes).into_owned()).collect()
}

/// Reads on, over lost connections, until an entry is `last`.
async fn read_until(follower: &mut cache::redis::Follower, last: &str) -> Vec<String> {
    let mut read = Vec::new();
    let reading = async {
        while read.last().is_none_or(|text| text != last) {
            if let Ok(entries) = follower.next().await {
                read.extend(texts(&entries));
            }
        }
    };
    tokio::time::timeout(PATIENCE, reading).await.unwrap_or_else(|_| panic!("no {last:?} came"));
    read
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_appended_is_read_by_all_that_follow() {
    for (urls, cluster) in
        [(servers::shared::redis().to_owned(), false), (servers::shared::redis_cluster().join(","), true)]
    {
        let redis = connected(settings(&urls)).await;
        assert_eq!(redis.is_cluster(), Some(cluster));
        let first = redis.append("news", b"one", 100).await.expect("appended");
        let second = redis.append("news", b"two", 100).await.expect("appended");
        assert!(first < second);
        let mut behind_first = redis.follow("news", Begin::After(first));
        let mut from_the_beginning = redis.follow("news", Begin::After(Default::default()));
        let mut other = redis.follow("other", Begin::After(Default::default()));
        assert_eq!(read_until(&mut behind_first, "two").await, ["two"]);
        assert_eq!(read_until(&mut from_the_beginning, "two").await, ["one", "two"]);
        redis.append("news", b"three", 100).await.expect("appended");
        redis.append("other", b"four", 100).await.expect("appended");
        assert_eq!(read_until(&mut behind_first, "three").await, ["three"]);
        assert_eq!(read_until(&mut from_the_beginning, "three").await, ["three"]);
        assert_eq!(read_until(&mut other, "four").await, ["four"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_keeps_about_its_newest_entries() {
    let redis = connected(settings(servers::shared::redis())).await;
    for number in 0..2_000 {
        redis.append("news", format!("{number}").as_bytes(), 100).await.expect("appended");
    }
    let mut follower = redis.follow("news", Begin::After(Default::default()));
    let kept = read_until(&mut follower, "1999").await;
    // Redis trims whole nodes of a hundred entries.
    assert!((100..=300).contains(&kept.len()), "{} entries are kept", kept.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_redis_every_command_fails_at_once_until_it_is_there() {
    let server = servers::Redis::start().expect("a Redis");
    server.kill().expect("killed");
    let redis = Redis::connect(settings(&server.url()));
    for _ in 0..100 {
        assert_eq!(redis.append("news", b"lost", 100).await, Err(Unanswered::Down));
    }
    server.restart().expect("restarted");
    assert!(redis.wait_until_up(PATIENCE).await);
    redis.append("news", b"kept", 100).await.expect("appended");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_redis_costs_the_first_one_a_time_out_and_nobody_else() {
    let server = servers::Redis::start().expect("a Redis");
    let proxy = Proxy::start(server.socket_addr()).expect("a proxy");
    let mut settings = settings(&format!("redis://{}", proxy.socket_addr()));
    settings.command_timeout = Duration::from_millis(200);
    let redis = connected(settings).await;
    redis.append("news", b"one", 100).await.expect("appended");
    proxy.stall().expect("stalled");
    let first = redis.append("news", b"two", 100).await;
    assert!(matches!(first, Err(Unanswered::Broken(_))), "{first:?}");
    for _ in 0..100 {
        assert_eq!(redis.append("news", b"three", 100).await, Err(Unanswered::Down));
    }
    proxy.heal().expect("healed");
    assert!(redis.wait_until_up(PATIENCE).await);
    redis.append("news", b"four", 100).await.expect("appended");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_commands_are_on_their_way_than_allowed() {
    let server = servers::Redis::start().expect("a Redis");
    let proxy = Proxy::start(server.socket_addr()).expect("a proxy");
    let mut settings = settings(&format!("redis://{}", proxy.socket_addr()));
    settings.commands_in_flight = 2;
    let redis = connected(settings).await;
    proxy.stall().expect("stalled");
    let append = || redis.append("news", b"one", 100);
    let (first, second, third) = tokio::join!(append(), append(), append());
    assert!(matches!(first, Err(Unanswered::Broken(_))), "{first:?}");
    assert!(matches!(second, Err(Unanswered::Broken(_) | Unanswered::Down)), "{second:?}");
    assert_eq!(third, Err(Unanswered::Busy { bound: 2 }));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_says_that_it_was_cut_off_and_misses_nothing_that_is_still_there() {
    let server = servers::Redis::start().expect("a Redis");
    let proxy = Proxy::start(server.socket_addr()).expect("a proxy");
    let direct = connected(settings(&server.url())).await;
    let mut through = settings(&format!("redis://{}", proxy.socket_addr()));
    through.prefix.clone_from(&direct.settings().prefix);
    let proxied = connected(through).await;
    let mut follower = proxied.follow("news", Begin::After(Default::default()));
    direct.append("news", b"one", 100).await.expect("appended");
    assert_eq!(read_until(&mut follower, "one").await, ["one"]);
    for (round, broken) in
        [Proxy::cut, |proxy: &Proxy| proxy.stall().expect("stalled")].into_iter().enumerate()
    {
        broken(&proxy);
        let lost = tokio::time::timeout(PATIENCE, follower.next()).await.expect("the loss is told");
        assert!(lost.is_err(), "{lost:?}");
        let meanwhile = format!("meanwhile {round}");
        direct.append("news", meanwhile.as_bytes(), 100).await.expect("appended");
        proxy.heal().expect("healed");
        assert_eq!(read_until(&mut follower, &meanwhile).await, [meanwhile]);
    }
}

/// An emptied stream begins anew, and with a clock that was set back, below what the follower has seen.
#[tokio::test(flavor = "multi_thread")]
async fn a_follower_goes_on_when_redis_was_emptied() {
    let server = servers::Redis::start().expect("a Redis");
    let redis = connected(settings(&server.url())).await;
    let mut follower = redis.follow("news", Begin::After(Default::default()));
    redis.append("news", b"one", 100).await.expect("appended");
    let servers::Reply::List(keys) = server.call(&["KEYS", "*:stream:news"]).expect("keys") else {
        panic!("no list of keys")
    };
    let [servers::Reply::Text(key)] = &keys[..] else { panic!("{keys:?}") };
    server.call(&["XADD", key, "99999999999999-0", "d", "from the future"]).expect("appended");
    read_until(&mut follower, "from the future").await;
    server.flush_all().expect("emptied");
    redis.append("news", b"below", 100).await.expect("appended");
    assert_eq!(read_until(&mut follower, "below").await, ["below"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn when_a_primary_dies_the_others_serve_on_and_its_replica_takes_over() {
    let cluster = RedisCluster::start().expect("a cluster");
    let redis = connected(settings(&cluster.urls().join(","))).await;
    let streams: Vec<String> = (0..32).map(|number| format!("stream {number}")).collect();
    for stream in &streams {
        redis.append(stream, b"before", 100).await.expect("appended");
    }
    cluster.nodes()[0].kill().expect("killed");
    let mut appended = 0;
    let mut refused = 0;
    for stream in &streams {
        match redis.append(stream, b"meanwhile", 100).await {
            Ok(_) => appended += 1,
            Err(_) => refused += 1,
        }
    }
    assert!(appended > 0 && refused > 0, "{appended} were appended, {refused} were not");
    cluster.wait_until_ready().expect("the replica takes over");
    assert!(redis.wait_until_up(PATIENCE).await);
    for stream in &streams {
        redis.append(stream, b"after", 100).await.expect("appended");
    }
}

/// SIGSTOP: connections stay open, and nobody answers.
#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_hangs_closes_its_own_lanes_only() {
    let cluster = RedisCluster::start().expect("a cluster");
    let mut settings = settings(&cluster.urls().join(","));
    settings.command_timeout = Duration::from_millis(500);
    let redis = connected(settings).await;
    let streams: Vec<String> = (0..32).map(|number| format!("stream {number}")).collect();
    cluster.nodes()[1].pause().expect("paused");
    let answers =
        futures_util::future::join_all(streams.iter().map(|stream| redis.append(stream, b"news", 100))).await;
    let answered: Vec<bool> = answers.iter().map(Result::is_ok).collect();
    assert!(answered.contains(&true) && answered.contains(&false), "{answered:?}");
    // Now all of its lanes are known to be closed, unless its replica has taken over.
    for (stream, answered) in streams.iter().zip(&answered) {
        let again = redis.append(stream, b"news", 100).await;
        assert!(!answered || again.is_ok(), "{stream} answered before, and now {again:?}");
        assert!(again.is_ok() || again == Err(Unanswered::Down), "{again:?}");
    }
    cluster.nodes()[1].resume().expect("resumed");
    assert!(redis.wait_until_up(PATIENCE).await);
    for stream in &streams {
        redis.append(stream, b"after", 100).await.expect("appended");
    }
}
