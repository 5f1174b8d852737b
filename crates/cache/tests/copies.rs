//! Copies of what never changes, in two processes' worth of caches on one Redis.

mod support;

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use cache::{Copies, Level2, Loaded, Redis};
use futures_util::future::join_all;
use servers::{Proxy, unique_name};
use support::{Left, PATIENCE, connected, settings};
use tokio::sync::Semaphore;

const LOCAL_BYTES: u64 = 1 << 20;

async fn redis(prefix: &str) -> Redis {
    connected(settings(servers::shared::redis(), prefix)).await
}

fn copies(redis: &Redis) -> Copies<Left> {
    Copies::new(Some(redis.clone()), "thing", LOCAL_BYTES)
}

/// A database that counts questions, and answers them when it is let.
struct Source {
    asked: AtomicUsize,
    may_answer: Semaphore,
}

impl Source {
    fn quick() -> Source {
        Source { asked: AtomicUsize::new(0), may_answer: Semaphore::new(Semaphore::MAX_PERMITS) }
    }

    fn held() -> Source {
        Source { asked: AtomicUsize::new(0), may_answer: Semaphore::new(0) }
    }

    async fn answer<T>(&self, answer: T) -> Result<T, Infallible> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let _permit = self.may_answer.acquire().await.expect("never closed");
        Ok(answer)
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

async fn get(copies: &Copies<Left>, id: u64, source: &Source, amount: i64) -> i64 {
    let load = || source.answer(Loaded::Final(Left { amount }));
    copies.get(id, load).await.expect("never fails").expect("is there").amount
}

/// Waits until another process finds it in Redis.
async fn until_shared(level: &Level2<Left>, id: u64, amount: i64) {
    let looking = async { while level.get(id).await != Some(Left { amount }) {} };
    tokio::time::timeout(PATIENCE, looking).await.expect("it is not shared");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_process_has_loaded_no_other_loads_again() {
    for urls in [servers::shared::redis().to_owned(), servers::shared::redis_cluster().join(",")] {
        let redis = connected(settings(&urls, &unique_name())).await;
        let (one, two, source) = (copies(&redis), copies(&redis), Source::quick());
        for id in 1..=50 {
            assert_eq!(get(&one, id, &source, 7).await, 7);
            until_shared(&Level2::new(redis.clone(), "thing"), id, 7).await;
            assert_eq!(get(&two, id, &source, 8).await, 7);
            assert_eq!(get(&one, id, &source, 9).await, 7);
        }
        assert_eq!(source.asked(), 50);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_who_miss_at_once_ask_the_database_once() {
    let redis = redis(&unique_name()).await;
    let (one, two, source) = (copies(&redis), copies(&redis), Arc::new(Source::held()));
    let asking = (0..20).map(|number| {
        let (copies, source) = (if number % 2 == 0 { one.clone() } else { two.clone() }, source.clone());
        tokio::spawn(async move { get(&copies, 7, &source, 30).await })
    });
    let asking: Vec<_> = asking.collect();
    let first = async {
        while source.asked() == 0 {
            tokio::task::yield_now().await
        }
    };
    tokio::time::timeout(PATIENCE, first).await.expect("one asks");
    source.may_answer.add_permits(100);
    for answer in join_all(asking).await {
        assert_eq!(answer.expect("an answer"), 30);
    }
    // The other process waits for a moment, and asks by itself after that.
    assert!(source.asked() <= 2, "{} asked", source.asked());
}

/// One that is stopped in the middle, or loses Redis, holds up nobody.
#[tokio::test(flavor = "multi_thread")]
async fn a_lock_that_is_not_released_costs_a_second_question_and_nothing_else() {
    let redis = redis(&unique_name()).await;
    let (one, two) = (copies(&redis), copies(&redis));
    let stuck = Arc::new(Source::held());
    let (asking, source) = (one.clone(), stuck.clone());
    let never = tokio::spawn(async move { get(&asking, 7, &source, 1).await });
    let first = async {
        while stuck.asked() == 0 {
            tokio::task::yield_now().await
        }
    };
    tokio::time::timeout(PATIENCE, first).await.expect("one asks");
    let quick = Source::quick();
    assert_eq!(get(&two, 7, &quick, 30).await, 30);
    assert_eq!(quick.asked(), 1);
    never.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_or_may_go_is_never_remembered() {
    let redis = redis(&unique_name()).await;
    let (one, two, source) = (copies(&redis), copies(&redis), Source::quick());
    for copies in [&one, &two, &one] {
        let missing = copies.get(7, || source.answer(Loaded::<Left>::Missing)).await.expect("never fails");
        assert_eq!(missing, None);
        let passing = copies.get(7, || source.answer(Loaded::Passing(Left { amount: 5 }))).await;
        assert_eq!(*passing.expect("never fails").expect("is there"), Left { amount: 5 });
    }
    assert_eq!(source.asked(), 6);
    let load = || async { Err::<Loaded<Left>, _>("the database is down") };
    assert_eq!(one.get(7, load).await, Err("the database is down"));
    assert_eq!(get(&one, 7, &source, 30).await, 30, "nor is a failure");
}

/// Who comes later may know more than who asked first: that there is nothing is true only of the moment of one's own question.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_told_that_nothing_is_there_by_an_older_question() {
    let redis = redis(&unique_name()).await;
    let copies = copies(&redis);
    let early = Arc::new(Source::held());
    let (asking, source) = (copies.clone(), early.clone());
    let first = tokio::spawn(async move { asking.get(7, || source.answer(Loaded::<Left>::Missing)).await });
    let asked = async {
        while early.asked() == 0 {
            tokio::task::yield_now().await
        }
    };
    tokio::time::timeout(PATIENCE, asked).await.expect("it is asked");
    // Now it is created, and its creator looks for it.
    let source = Source::quick();
    let mut second = std::pin::pin!(get(&copies, 7, &source, 30));
    let waits = std::future::poll_fn(|context| Poll::Ready(second.as_mut().poll(context).is_pending()));
    assert!(waits.await, "it waits for the answer to the first question");
    early.may_answer.add_permits(1);
    let (first, second) = tokio::join!(first, second);
    assert_eq!(first.expect("an answer"), Ok(None));
    assert_eq!(second, 30);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_redis_each_process_loads_for_itself() {
    let server = servers::Redis::start().expect("a Redis");
    let proxy = Proxy::start(server.socket_addr()).expect("a proxy");
    let mut through = settings(&format!("redis://{}", proxy.socket_addr()), &unique_name());
    through.command_timeout = Duration::from_millis(200);
    let redis = connected(through).await;
    let (one, two, source) = (copies(&redis), copies(&redis), Source::quick());
    proxy.stall().expect("stalled");
    for id in 1..=50 {
        assert_eq!((get(&one, id, &source, 7).await, get(&two, id, &source, 7).await), (7, 7));
        assert_eq!((get(&one, id, &source, 7).await, get(&two, id, &source, 7).await), (7, 7));
    }
    assert_eq!(source.asked(), 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_copies_are_asked_for_at_once() {
    for urls in [servers::shared::redis().to_owned(), servers::shared::redis_cluster().join(",")] {
        let level: Level2<Left> = Level2::new(connected(settings(&urls, &unique_name())).await, "thing");
        let there: Vec<(u64, Left)> = (0..200).map(|id| (2 * id, Left { amount: id as i64 })).collect();
        level.put_many(&there.iter().map(|(id, left)| (*id, left)).collect::<Vec<_>>());
        for (id, left) in &there {
            until_shared(&level, *id, left.amount).await;
        }
        let found = level.get_many(&(0..400).collect::<Vec<_>>()).await;
        for (id, found) in found.into_iter().enumerate() {
            let expected = (id % 2 == 0).then_some(Left { amount: id as i64 / 2 });
            assert_eq!(found, expected, "{id}");
        }
        assert!(level.get_many(&[]).await.is_empty());
    }
}

/// A process of another version has written it, or somebody by hand.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_is_a_miss() {
    let server = servers::Redis::start().expect("a Redis");
    let redis = connected(settings(&server.url(), &unique_name())).await;
    let level: Level2<Left> = Level2::new(redis.clone(), "thing");
    level.put_many(&[(7, &Left { amount: 30 })]);
    until_shared(&level, 7, 30).await;
    let servers::Reply::List(keys) = server.call(&["KEYS", "*:thing:7"]).expect("keys") else {
        panic!("no list of keys")
    };
    let [servers::Reply::Text(key)] = &keys[..] else { panic!("{keys:?}") };
    for (wrong, amount) in [("nonsense", 31), ("", 32)] {
        server.call(&["SET", key, wrong]).expect("written");
        assert_eq!(level.get(7).await, None);
        assert_eq!(level.get_many(&[7]).await, [None]);
        assert_eq!(get(&copies(&redis), 7, &Source::quick(), amount).await, amount);
        until_shared(&level, 7, amount).await;
    }
    server.call(&["DEL", key]).expect("deleted");
    server.call(&["LPUSH", key, "a list"]).expect("written");
    assert_eq!(level.get(7).await, None);
    assert_eq!(get(&copies(&redis), 7, &Source::quick(), 33).await, 33);
}
