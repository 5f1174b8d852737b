//! The loop around a participant, on a real bus and a real database: what is answered, what comes again, what is parked.
//!
//! The tests play the orchestrator: they publish commands and read the replies. They wait for conditions, never for a time.
#![allow(clippy::unwrap_used, reason = "all of this file is tests, also what carries no test attribute")]

mod support;

use std::collections::HashMap;
use std::time::Duration;

use bus::{Bus, Consumer, Envelope, EnvelopeId, Limits, Parked, Subject, Verdict};
use bytes::Bytes;
use db::{Db, Error, Outage};
use drive::Book;
use participant::{Parts, Settings, barrier};
use saga::{Definition, Mode, Outcome, Path, Phase, Reason, StepIndex, Token};
use telemetry::Registry;
use telemetry::metrics::PubsubMetrics;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use wire::messages::{
    About, Carried, Command, Progress, Purge, Recorded, Reply, ToOrchestrator, ToParticipant,
};
use wire::time::Clock;

use support::{Counting, Input, MIGRATIONS, effects, effects_of, rows};
use testdb::{Bounds, TestDb};

testdb::on_both! {
    #[tokio::test]
    a_command_is_answered_with_what_it_carried_and_what_was_recorded,
    a_redelivered_command_gets_the_recorded_bytes,
    after_a_command_that_comes_again_the_barrier_is_read_first,
    what_passes_by_itself_comes_again_and_is_never_a_rejection,
    a_compensation_is_tried_until_it_is_done,
    what_cannot_be_understood_is_parked_alone_and_others_flow,
    a_command_that_meets_a_bug_is_parked_in_the_end_and_its_neighbours_are_answered,
    no_answer_yet_is_asked_for_again_for_ever,
    replies_that_are_refused_are_the_same_when_there_is_room,
    stopping_finishes_the_batch_in_hand,
    the_end_of_the_bus_ends_the_runner,
    a_runner_that_dies_between_commit_and_publish_has_answered_when_they_come_again,
    a_compensation_on_two_replicas_at_once_is_undone_once,
    a_purge_beside_commands_is_carried_out_and_not_answered,
    one_purge_goes_on_until_nothing_old_is_left,
    a_command_that_another_consumer_gave_back_is_answered,
    a_saga_that_is_known_here_is_driven_on_and_the_same_again,
    a_report_waits_and_what_it_reports_goes_on,
    what_no_queue_takes_comes_again_and_is_dropped_in_the_end,
    what_is_too_large_for_the_bus_is_parked_alone;
}

const COMMANDS: Subject = Subject("test.commands");
const REPLIES: Subject = Subject("test.replies");
/// Where the next step of a saga that the runner knows takes its commands, and where those sagas are reported.
const NEXT: Subject = Subject("test.next");
const PROGRESS: Subject = Subject("test.progress");
/// The deliveries after which a command is dropped whose next one finds no room.
const DROP_AFTER: u32 = 3;
/// Only a failing test waits this long.
const PATIENCE: Duration = Duration::from_secs(20);
const PARK_AFTER: u32 = 4;

const SETTINGS: Settings = Settings {
    batch_commands: 64,
    bounds: drive::Bounds {
        retry_delay_min: Duration::from_millis(1),
        retry_delay_max: Duration::from_millis(4),
        drop_after_deliveries: u32::MAX,
    },
    park_after_deliveries: PARK_AFTER,
    barrier_retention: Duration::from_secs(60),
    report_after: Duration::ZERO,
};

const LIMITS: Limits =
    Limits { queue_envelopes: 64, frame_envelopes: 32, body_bytes: 64 * 1024, parked_letters: 16 };

/// A participant under test, and what surrounds it.
struct Stage {
    participant: Counting,
    db: Db,
    bus: Bus,
    replies: Consumer,
    book: Book,
    settings: Settings,
    stop: CancellationToken,
}

impl Stage {
    /// With one thread that writes, so that what is written while it is held queues up.
    fn new(at: &TestDb) -> Stage {
        let bus = Bus::embedded(LIMITS);
        Stage {
            participant: Counting::default(),
            db: at.open_bounded(MIGRATIONS, Bounds { writers: 1, ..Bounds::default() }),
            replies: bus.subscribe(REPLIES),
            bus,
            book: Book::new(),
            settings: SETTINGS,
            stop: CancellationToken::new(),
        }
    }

    /// With a runner that knows the saga of [`ask_known`].
    fn knowing(at: &TestDb) -> Stage {
        let known = Definition::new("known", 1).compensatable(COMMANDS).pivot(NEXT).build();
        Stage { book: Book::new().with(known, |subject| subject, PROGRESS), ..Stage::new(at) }
    }

    /// The envelopes that wait in a queue, so many.
    async fn take(&self, subject: Subject, count: usize) -> Vec<Envelope> {
        let mut taken = Vec::new();
        let mut consumer = self.bus.subscribe(subject);
        while taken.len() < count {
            let batch = tokio::time::timeout(PATIENCE, consumer.next(LIMITS.frame_envelopes)).await;
            let batch = batch.expect("messages come").unwrap();
            taken.extend(batch.deliveries().iter().map(|delivery| delivery.envelope.clone()));
            batch.ack_all().await.unwrap();
        }
        assert_eq!(taken.len(), count, "{taken:?}");
        taken
    }

    /// Starts a runner; there may be several.
    fn run(&self) -> JoinHandle<()> {
        let parts = Parts {
            participant: self.participant.clone(),
            db: self.db.clone(),
            bus: self.bus.clone(),
            commands: COMMANDS,
            book: self.book.clone(),
            replies: REPLIES,
            clock: Clock::from_fn(|| 1_000_000),
            metrics: PubsubMetrics::new(&Registry::new(), "test"),
            spans: telemetry::Spans::off(),
            settings: self.settings,
        };
        tokio::spawn(participant::run(parts, self.stop.clone()))
    }

    async fn publish(&self, frame: impl IntoIterator<Item = Envelope>) {
        self.bus.publish(COMMANDS, frame.into_iter().collect()).await.unwrap();
    }

    /// The next replies, so many, as they come.
    async fn replies(&mut self, count: usize) -> Vec<Reply> {
        let mut replies = Vec::new();
        while replies.len() < count {
            let batch = tokio::time::timeout(PATIENCE, self.replies.next(LIMITS.frame_envelopes));
            let batch = batch.await.expect("replies come").unwrap();
            for delivery in batch.deliveries() {
                match ToOrchestrator::decode(delivery.envelope.body.clone()).unwrap() {
                    ToOrchestrator::Reply(reply) => replies.push(reply),
                    other => panic!("a participant replies: {other:?}"),
                }
            }
            batch.ack_all().await.unwrap();
        }
        assert_eq!(replies.len(), count, "{replies:?}");
        replies
    }

    async fn reply(&mut self) -> Reply {
        self.replies(1).await.remove(0)
    }

    /// Waits until the participant has nothing in its queue, in hand or delayed.
    async fn quiet(&self) {
        self.until("the commands are all settled", async || {
            self.bus.depth(COMMANDS).await.unwrap().held() == 0
        })
        .await;
    }

    async fn until(&self, what: &str, condition: impl AsyncFn() -> bool) {
        let wait = async {
            while !condition().await {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("never: {what}"));
    }

    /// The dead letters, by saga.
    async fn parked(&self) -> HashMap<u64, Parked> {
        self.bus
            .parked()
            .await
            .unwrap()
            .into_iter()
            .map(|letter| (letter.envelope.id.parts().0, letter))
            .collect()
    }
}

fn envelope(saga: u64, body: impl Into<Bytes>) -> Envelope {
    Envelope { id: EnvelopeId::of(saga, 1), body: body.into() }
}

fn ask(saga: u64, phase: Phase, input: impl Into<Bytes>) -> Envelope {
    let carried = Carried {
        token: Token { saga, mode: Mode::Execute, path: Path::new() },
        about: About::new("test", 1, 1, &input.into(), b"trace"),
    };
    envelope(saga, ToParticipant::Command(Command { carried, step: StepIndex(3), phase }).encode())
}

/// Asks for the first step of a saga that the runner may know.
fn ask_known(saga: u64, trace: &[u8]) -> Envelope {
    let carried = Carried {
        token: Token { saga, mode: Mode::Execute, path: Path::new() },
        about: About::new("known", 1, 1, &Input::Accept.bytes(), trace),
    };
    let command = Command { carried, step: StepIndex(0), phase: Phase::Action };
    envelope(saga, ToParticipant::Command(command).encode())
}

fn act(saga: u64, input: Input) -> Envelope {
    ask(saga, Phase::Action, input.bytes())
}

fn outcome(reply: &Reply) -> Outcome {
    Recorded::decode(&reply.recorded).unwrap().outcome
}

fn done(saga: u64) -> Outcome {
    Outcome::Done(format!("3 of {saga}").into_bytes())
}

fn sagas(replies: &[Reply]) -> Vec<u64> {
    let mut sagas: Vec<u64> = replies.iter().map(|reply| reply.carried.token.saga).collect();
    sagas.sort_unstable();
    sagas
}

fn sagas_of(messages: &[Envelope]) -> Vec<u64> {
    messages.iter().map(|message| message.id.parts().0).collect()
}

async fn a_command_is_answered_with_what_it_carried_and_what_was_recorded(at: &TestDb) {
    let mut stage = Stage::new(at);
    stage.run();
    stage.publish([act(1, Input::Accept)]).await;
    let reply = stage.reply().await;
    assert_eq!((outcome(&reply), reply.step, reply.phase), (done(1), StepIndex(3), Phase::Action));
    assert_eq!(reply.carried.about.trace(), b"trace");
    assert_eq!(&rows(&stage.db).await[0].3, &reply.recorded.to_vec());
    stage.quiet().await;
}

async fn a_redelivered_command_gets_the_recorded_bytes(at: &TestDb) {
    let mut stage = Stage::new(at);
    stage.run();
    stage.publish([act(1, Input::Accept), act(2, Input::Refuse)]).await;
    let mut first = stage.replies(2).await;
    stage.publish([act(2, Input::Refuse), act(1, Input::Accept), act(1, Input::Accept)]).await;
    let again = stage.replies(3).await;
    first.sort_by_key(|reply| reply.carried.token.saga);
    for reply in &again {
        let saga = reply.carried.token.saga;
        assert_eq!(reply, &first[usize::try_from(saga).unwrap() - 1]);
    }
    assert_eq!(effects_of(&stage.db, 1, 3).await.acted, 1);
}

async fn after_a_command_that_comes_again_the_barrier_is_read_first(at: &TestDb) {
    let mut stage = Stage::new(at);
    stage.run();
    let mut acts = Vec::new();
    for saga in [1, 1, 1, 2] {
        stage.publish([act(saga, Input::Accept)]).await;
        assert_eq!(outcome(&stage.reply().await), done(saga));
        acts.push(stage.participant.acts());
    }
    assert_eq!(acts, [1, 2, 2, 3], "the second was tried in vain, the third was looked up");
    assert_eq!(effects_of(&stage.db, 1, 3).await.acted, 1);
    stage.quiet().await;
}

async fn what_passes_by_itself_comes_again_and_is_never_a_rejection(at: &TestDb) {
    let mut stage = Stage::new(at);
    let outages = [
        Error::Full,
        Error::Unavailable(Outage::Busy),
        Error::Overloaded { database: "test", queue: "write", bound_jobs: 1 },
    ];
    // More often than what will never mend may fail: this is tried for ever.
    stage.participant.fail_with(outages.into_iter().cycle().take(3 * PARK_AFTER as usize).map(Some));
    stage.run();
    stage.publish([act(1, Input::Accept)]).await;
    assert_eq!(outcome(&stage.reply().await), done(1));
    stage.quiet().await;
    assert_eq!(stage.participant.failures_left(), 0);
    assert!(stage.parked().await.is_empty());
    assert_eq!(effects_of(&stage.db, 1, 3).await.acted, 1, "each try but the last was rolled back");
}

async fn a_compensation_is_tried_until_it_is_done(at: &TestDb) {
    let mut stage = Stage::new(at);
    stage.run();
    stage.publish([act(1, Input::Accept)]).await;
    stage.reply().await;
    stage.participant.fail_with(vec![Some(Error::Full); 2 * PARK_AFTER as usize]);
    stage.publish([ask(1, Phase::Compensation, Input::Accept.bytes())]).await;
    assert_eq!(outcome(&stage.reply().await), Outcome::Compensated);
    assert_eq!(effects_of(&stage.db, 1, 3).await.undone, 1);
}

/// Row 8 of the fault list.
async fn what_cannot_be_understood_is_parked_alone_and_others_flow(at: &TestDb) {
    let mut stage = Stage::new(at);
    // Format 99, as a Protocol Buffers varint in field 1.
    let unknown_format = Bytes::from_static(&[0x08, 99]);
    stage
        .publish([
            act(1, Input::Accept),
            envelope(2, Bytes::from_static(b"\xff\xffnot a message")),
            envelope(3, unknown_format),
            ask(4, Phase::Action, Bytes::from_static(b"no such input")),
            act(5, Input::Accept),
        ])
        .await;
    stage.run();
    assert_eq!(sagas(&stage.replies(2).await), [1, 5]);
    stage.publish([act(6, Input::Accept)]).await;
    assert_eq!(sagas(&stage.replies(1).await), [6]);
    stage.quiet().await;
    let parked = stage.parked().await;
    assert_eq!(parked.len(), 3);
    assert!(parked[&2].reason.starts_with("not a command message"), "{}", parked[&2].reason);
    assert_eq!(parked[&3].reason, "a command message of format 99; this version reads format 2");
    assert!(parked[&4].reason.contains("input of the saga cannot be read"), "{}", parked[&4].reason);
    assert!(parked.values().all(|letter| letter.count == 1), "trying again would not help");
    assert_eq!(stage.bus.stats().redelivered, 0);
    assert_eq!(rows(&stage.db).await.len(), 3, "what was parked has left no trace");
}

async fn a_command_that_meets_a_bug_is_parked_in_the_end_and_its_neighbours_are_answered(at: &TestDb) {
    for input in [Input::Bug, Input::Panic] {
        let fresh = at.another();
        let mut stage = Stage::new(&fresh);
        stage.publish([act(1, Input::Accept), act(2, input), act(3, Input::Refuse)]).await;
        stage.run();
        let replies = stage.replies(2).await;
        assert_eq!(sagas(&replies), [1, 3]);
        stage.quiet().await;
        let parked = stage.parked().await;
        assert_eq!(parked.keys().collect::<Vec<_>>(), [&2]);
        assert_eq!(parked[&2].count, PARK_AFTER);
        assert_eq!(rows(&stage.db).await.iter().map(|row| row.0).collect::<Vec<_>>(), [1, 3]);
        assert_eq!(effects_of(&stage.db, 1, 3).await.acted, 1);
        // A bug alone in its batch has no neighbours to be told from.
        stage.publish([act(4, input)]).await;
        stage.until("the bug is parked", async || stage.parked().await.contains_key(&4)).await;
        stage.publish([act(5, Input::Accept)]).await;
        assert_eq!(sagas(&stage.replies(1).await), [5]);
    }
}

async fn no_answer_yet_is_asked_for_again_for_ever(at: &TestDb) {
    let mut stage = Stage::new(at);
    stage.publish([act(1, Input::Later), act(2, Input::Accept)]).await;
    stage.run();
    assert_eq!(sagas(&stage.replies(1).await), [2]);
    stage.until("it came again", async || stage.bus.stats().redelivered > u64::from(2 * PARK_AFTER)).await;
    assert!(stage.parked().await.is_empty());
    // A cancellation settles it: its action, which still comes again, is answered now.
    stage.publish([ask(1, Phase::Cancel, Input::Accept.bytes())]).await;
    for reply in stage.replies(2).await {
        assert_eq!(outcome(&reply), Outcome::Rejected(Reason::Cancelled));
    }
    stage.quiet().await;
    assert!(!effects(&stage.db).await.contains_key(&(1, 3)));
}

async fn replies_that_are_refused_are_the_same_when_there_is_room(at: &TestDb) {
    let mut stage = Stage::new(at);
    let filler: Vec<Envelope> = (0..32).map(|number| envelope(900 + number, Bytes::new())).collect();
    stage.bus.publish(REPLIES, filler.clone()).await.unwrap();
    stage.bus.publish(REPLIES, filler).await.unwrap();
    stage.run();
    stage.publish([act(1, Input::Accept), act(2, Input::Refuse)]).await;
    stage.until("the replies were refused", async || stage.bus.stats().refused >= 4).await;
    let recorded: Vec<Vec<u8>> = rows(&stage.db).await.into_iter().map(|row| row.3).collect();
    assert_eq!(recorded.len(), 2, "what was done is recorded, whether or not it was answered");
    for _ in 0..2 {
        stage.replies.next(LIMITS.frame_envelopes).await.unwrap().ack_all().await.unwrap();
    }
    let mut replies = stage.replies(2).await;
    replies.sort_by_key(|reply| reply.carried.token.saga);
    assert_eq!(replies.iter().map(|reply| reply.recorded.to_vec()).collect::<Vec<_>>(), recorded);
    stage.quiet().await;
    assert_eq!(effects_of(&stage.db, 1, 3).await.acted, 1);
}

/// Holds the writer of a database, so that what is written after it waits.
async fn hold(db: &Db) -> std::sync::mpsc::Sender<()> {
    let (go, wait) = std::sync::mpsc::channel();
    let (started, has_started) = tokio::sync::oneshot::channel();
    let (db, mut started) = (db.clone(), Some(started));
    tokio::spawn(async move {
        db.write(move |_| {
            started.take().unwrap().send(()).unwrap();
            // An error: the test has failed and dropped its end.
            let _ = wait.recv();
            Ok::<(), Error>(())
        })
        .await
    });
    has_started.await.unwrap();
    go
}

async fn stopping_finishes_the_batch_in_hand(at: &TestDb) {
    let mut stage = Stage::new(at);
    let go = hold(&stage.db).await;
    let runner = stage.run();
    stage.publish([act(1, Input::Accept), act(2, Input::Accept)]).await;
    stage.until("the batch waits for the database", async || stage.db.stats().queued_writes == 1).await;
    stage.stop.cancel();
    stage.publish([act(3, Input::Accept)]).await;
    assert!(!runner.is_finished());
    go.send(()).unwrap();
    tokio::time::timeout(PATIENCE, runner).await.expect("it ends").unwrap();
    assert_eq!(sagas(&stage.replies(2).await), [1, 2]);
    let left = stage.bus.depth(COMMANDS).await.unwrap();
    assert_eq!((left.ready, left.held()), (1, 1), "what came after is for the next one");
}

async fn the_end_of_the_bus_ends_the_runner(at: &TestDb) {
    let stage = Stage::new(at);
    let runner = stage.run();
    stage.bus.close().await;
    tokio::time::timeout(PATIENCE, runner).await.expect("it ends").unwrap();
}

/// The transaction runs to its end on the database's thread although nobody waits for it any more; the commands come
/// again and find it.
async fn a_runner_that_dies_between_commit_and_publish_has_answered_when_they_come_again(at: &TestDb) {
    let mut stage = Stage::new(at);
    let go = hold(&stage.db).await;
    let runner = stage.run();
    stage.publish([act(1, Input::Accept), act(2, Input::Refuse)]).await;
    stage.until("the batch waits for the database", async || stage.db.stats().queued_writes == 1).await;
    runner.abort();
    assert!(runner.await.unwrap_err().is_cancelled());
    go.send(()).unwrap();
    // Behind the batch in the writer's queue, so it is committed when this is.
    let committed: Result<(), Error> = stage.db.write(|_| Ok(())).await;
    committed.unwrap();
    let recorded: Vec<Vec<u8>> = rows(&stage.db).await.into_iter().map(|row| row.3).collect();
    assert_eq!(recorded.len(), 2);
    assert_eq!(stage.bus.depth(REPLIES).await.unwrap().held(), 0, "nobody was answered");

    stage.run();
    let mut replies = stage.replies(2).await;
    replies.sort_by_key(|reply| reply.carried.token.saga);
    assert_eq!(replies.iter().map(|reply| reply.recorded.to_vec()).collect::<Vec<_>>(), recorded);
    stage.quiet().await;
    assert_eq!(effects_of(&stage.db, 1, 3).await.acted, 1);
}

/// Row 6 of the fault list, and row 10: two runners with the same command in hand at once.
async fn a_compensation_on_two_replicas_at_once_is_undone_once(at: &TestDb) {
    let mut stage = Stage::new(at);
    stage.run();
    stage.publish([act(1, Input::Accept)]).await;
    stage.reply().await;
    stage.quiet().await;
    stage.stop.cancel();
    stage.stop = CancellationToken::new();

    let go = hold(&stage.db).await;
    let undo = || ask(1, Phase::Compensation, Input::Accept.bytes());
    for replicas in 1..=2 {
        stage.run();
        stage.publish([undo()]).await;
        stage
            .until("each has one in hand", async || {
                stage.bus.depth(COMMANDS).await.unwrap().in_hand == replicas
            })
            .await;
        stage.until("each waits for the database", async || stage.db.stats().queued_writes == replicas).await;
    }
    go.send(()).unwrap();
    let replies = stage.replies(2).await;
    assert_eq!(replies[0], replies[1]);
    assert_eq!(effects_of(&stage.db, 1, 3).await.undone, 1);
}

async fn a_purge_beside_commands_is_carried_out_and_not_answered(at: &TestDb) {
    let mut stage = Stage::new(at);
    stage.run();
    stage.publish([act(7, Input::Accept)]).await;
    stage.reply().await;
    let old = stage.db.write(|tx| tx.execute("UPDATE saga_barrier SET recorded_at = 1", &[])).await;
    assert_eq!(old, Ok::<_, Error>(1));
    let purge = |below| envelope(below, ToParticipant::Purge(Purge { below }).encode());
    stage.publish([act(8, Input::Accept), purge(7)]).await;
    assert_eq!(sagas(&stage.replies(1).await), [8]);
    assert_eq!(rows(&stage.db).await.len(), 2, "saga 7 has not ended");
    stage.publish([purge(8)]).await;
    stage.quiet().await;
    assert_eq!(rows(&stage.db).await.iter().map(|row| row.0).collect::<Vec<_>>(), [8]);
    assert_eq!(stage.bus.depth(REPLIES).await.unwrap().held(), 0);
    assert_eq!(stage.bus.parked().await.unwrap(), []);
}

async fn one_purge_goes_on_until_nothing_old_is_left(at: &TestDb) {
    let stage = Stage::new(at);
    let written = stage.db.write(|tx| {
        let mut records = barrier::Records::default();
        for saga in 1..=2 * u64::from(barrier::PURGE_ROWS) + 10 {
            let key = barrier::Key { saga, step: StepIndex(3) };
            records.push(key, barrier::Row::Action, &barrier::tombstone(1), 1);
        }
        records.write(tx)
    });
    assert_eq!(written.await, Ok::<(), Error>(()));
    stage.run();
    let below = u64::from(u32::MAX);
    stage.publish([envelope(below, ToParticipant::Purge(Purge { below }).encode())]).await;
    let wait = async {
        while !rows(&stage.db).await.is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("everything old is purged");
}

async fn a_command_that_another_consumer_gave_back_is_answered(at: &TestDb) {
    let mut stage = Stage::new(at);
    let mut other = stage.bus.subscribe(COMMANDS);
    stage.publish([act(1, Input::Accept)]).await;
    let batch = other.next(1).await.unwrap();
    batch.settle(vec![Verdict::Retry { after: Duration::ZERO }]).await.unwrap();
    stage.run();
    assert_eq!(outcome(&stage.reply().await), done(1));
}

async fn a_saga_that_is_known_here_is_driven_on_and_the_same_again(at: &TestDb) {
    let mut stage = Stage::knowing(at);
    stage.run();
    stage.publish([ask_known(1, b"trace"), act(2, Input::Accept)]).await;
    assert_eq!(sagas(&stage.replies(1).await), [2], "what is not known here is somebody else's");
    let (asked, told) = (stage.take(NEXT, 1).await, stage.take(PROGRESS, 1).await);
    let Ok(ToParticipant::Command(next)) = ToParticipant::decode(asked[0].body.clone()) else {
        panic!("no command: {asked:?}")
    };
    assert_eq!((next.step, next.phase), (StepIndex(1), Phase::Action));
    let path = &next.carried.token.path;
    assert_eq!(path.data(StepIndex(0)), Some(&b"0 of 1"[..]), "{path:?}");
    assert_eq!(next.carried.about.trace(), b"trace");
    assert_eq!(Progress::decode(told[0].body.clone()).unwrap().carried, next.carried);

    stage.publish([ask_known(1, b"trace")]).await;
    assert_eq!((stage.take(NEXT, 1).await, stage.take(PROGRESS, 1).await), (asked, told));
    assert_eq!(effects_of(&stage.db, 1, 0).await.acted, 1);
    stage.quiet().await;
    assert_eq!(stage.bus.depth(REPLIES).await.unwrap().held(), 0);
}

/// Until its time comes, though nothing else does, or the service stops; the command that the step calls for does not.
async fn a_report_waits_and_what_it_reports_goes_on(at: &TestDb) {
    let mut stage = Stage::knowing(at);
    stage.settings.report_after = Duration::from_millis(1);
    let runner = stage.run();
    stage.publish([ask_known(1, b"")]).await;
    assert_eq!(stage.take(PROGRESS, 1).await[0].id.parts().0, 1);
    stage.take(NEXT, 1).await;
    stage.stop.cancel();
    runner.await.unwrap();

    stage.settings.report_after = Duration::from_secs(60 * 60);
    stage.stop = CancellationToken::new();
    let runner = stage.run();
    stage.publish([ask_known(2, b""), ask_known(3, b"")]).await;
    assert_eq!(sagas_of(&stage.take(NEXT, 2).await), [2, 3]);
    stage.quiet().await;
    assert_eq!(stage.bus.depth(PROGRESS).await.unwrap().held(), 0);
    stage.stop.cancel();
    runner.await.unwrap();
    assert_eq!(sagas_of(&stage.take(PROGRESS, 2).await), [2, 3]);
}

async fn what_no_queue_takes_comes_again_and_is_dropped_in_the_end(at: &TestDb) {
    let mut stage = Stage::knowing(at);
    stage.settings.bounds.drop_after_deliveries = DROP_AFTER;
    let filler: Vec<Envelope> = (0..32).map(|number| envelope(900 + number, Bytes::new())).collect();
    stage.bus.publish(NEXT, filler.clone()).await.unwrap();
    stage.bus.publish(NEXT, filler).await.unwrap();
    stage.run();
    stage.publish([ask_known(1, b""), ask_known(2, b"")]).await;
    stage.quiet().await;
    assert_eq!(stage.bus.stats().redelivered, u64::from(2 * (DROP_AFTER - 1)));
    assert!(stage.parked().await.is_empty(), "whoever keeps the list of open sagas starts them again");
    assert_eq!(effects(&stage.db).await.len(), 2, "what was done is done once");
    stage.take(NEXT, 64).await;
    stage.publish([ask_known(2, b""), ask_known(1, b"")]).await;
    let asked = stage.take(NEXT, 2).await;
    assert_eq!(sagas_of(&asked), [2, 1]);
    assert_eq!(effects(&stage.db).await.len(), 2);
}

/// The command itself fits; with the reply in its path it does not.
async fn what_is_too_large_for_the_bus_is_parked_alone(at: &TestDb) {
    let stage = Stage::knowing(at);
    let limit = LIMITS.body_bytes;
    let without = ask_known(1, b"").body.len();
    let large = ask_known(1, &vec![b'x'; limit - without - 8]);
    assert!((limit - 8..=limit).contains(&large.body.len()), "{}", large.body.len());
    stage.run();
    stage.publish([large, ask_known(2, b"")]).await;
    let asked = stage.take(NEXT, 1).await;
    assert_eq!(asked[0].id.parts().0, 2);
    stage.quiet().await;
    let parked = stage.parked().await;
    assert_eq!(parked.keys().collect::<Vec<_>>(), [&1]);
    let reason = &parked[&1].reason;
    assert!(reason.ends_with(&format!("above the bus's limit of {limit}")), "{reason}");
}
