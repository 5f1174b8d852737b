//! Money moves between two banks, each with a database of its own, and nothing that is killed in between makes or loses any.
//!
//! ```text
//! cargo run -p participant --example transfer -- /tmp/banks 2000     # kill -9 it as often as you like
//! cargo run -p participant --example transfer -- /tmp/banks 0        # goes on with what was open, and adds up
//! ```
//!
//! This is all that a saga of one's own needs, in the order in which one writes it:
//!
//! 1. [`transfer`]: what the steps are, and which of them decides. [`book`]: where each takes its commands.
//! 2. [`Bank`]: a participant, which has a step's effect and undoes it. What comes twice, late or too early is not its affair: see
//!    [`barrier`].
//! 3. [`Transfers`]: whoever starts sagas keeps a list of the open ones, on disk *before* the first message, hears of their ends, and
//!    starts again what is open for too long. That is all there is to recovery: the bus, which is in memory here, may forget everything.
//! 4. [`run`]: puts them together in one process. With [`Bus::nats`] and [`Db::connect`] each can be a process of its own, and a bank several.
//!    Several who start transfers would want ids from [`db::ids`], and locks on what they take up (`services/purchase`).
#![allow(clippy::print_stdout, reason = "it is an example: it shows something")]

use std::cell::Cell;
use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use bus::{Bus, Consumer, Envelope, EnvelopeId, Limits, Subject, Verdict};
use bytes::Bytes;
use db::{Db, Migration, Tx, Value};
use drive::{Book, Frames};
use participant::{BadInput, Outcome, Participant, Undone, Work, barrier};
use saga::{Definition, End, Mode, Position};
use telemetry::metrics::PubsubMetrics;
use telemetry::{Registry, Spans};
use tokio_util::sync::CancellationToken;
use wire::messages::{About, Pen, Progress, Purge, ToParticipant};
use wire::time::{Clock, UnixMillis};

type Failed = Box<dyn std::error::Error + Send + Sync>;

// 1. What a transfer is, and where its messages go.

/// The steps, by the bank that takes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Withdraw,
    Deposit,
}

const NAME: &str = "transfer";
/// Another one for each change of the steps: sagas that are under way are driven by the definition that they began with.
const VERSION: u32 = 1;
const WITHDRAWALS: Subject = Subject("transfer.withdraw");
const DEPOSITS: Subject = Subject("transfer.deposit");
const PROGRESS: Subject = Subject("transfer.progress");
/// Where replies of sagas go that are not in the book. There are none here.
const OTHERS: Subject = Subject("transfer.others");

/// A withdrawal can be undone. The deposit decides: once it is done, so is the transfer; if it is refused, the money goes back.
fn transfer() -> Definition<Step> {
    Definition::new(NAME, VERSION).compensatable(Step::Withdraw).pivot(Step::Deposit).build()
}

fn book() -> Book {
    let commands = |step| match step {
        Step::Withdraw => WITHDRAWALS,
        Step::Deposit => DEPOSITS,
    };
    Book::new().with(transfer(), commands, PROGRESS)
}

/// The input of the saga, which each step gets. Here a line of text; any bytes will do.
#[derive(Clone, Copy, Debug)]
struct Transfer {
    from: u64,
    to: u64,
    amount: i64,
}

impl fmt::Display for Transfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.from, self.to, self.amount)
    }
}

impl FromStr for Transfer {
    type Err = Failed;

    fn from_str(text: &str) -> Result<Transfer, Failed> {
        let mut words = text.split(' ');
        let mut next = || words.next().ok_or("three numbers are expected");
        Ok(Transfer { from: next()?.parse()?, to: next()?.parse()?, amount: next()?.parse()? })
    }
}

// 2. The participants.

/// Accounts at each bank.
const ACCOUNTS: u64 = 100;
/// What is in each of those that money comes from.
const AT_FIRST: i64 = 1_000;
/// One in so many of those that money goes to is closed.
const ONE_CLOSED_IN: u64 = 10;

/// A bank's tables: its own, and the barrier in the same database.
const BANK: &[Migration] = &[
    Migration {
        number: 1,
        name: "account",
        sqlite: "CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER NOT NULL CHECK (balance >= 0),
                                       closed INTEGER NOT NULL) STRICT;",
        mysql: "CREATE TABLE IF NOT EXISTS account (id BIGINT PRIMARY KEY, balance BIGINT NOT NULL CHECK (balance >= 0),
                                                    closed TINYINT NOT NULL);",
    },
    barrier::migration(2),
];

/// A bank as a participant of transfers.
struct Bank(Step);

impl Participant for Bank {
    type Input = Transfer;
    type Changes = ();

    fn read(&self, input: &Bytes) -> Result<Transfer, BadInput> {
        let text = std::str::from_utf8(input).map_err(|error| BadInput(Box::new(error)))?;
        text.parse().map_err(BadInput)
    }

    /// All of it in one transaction, with the answers. The shop's participants do a set in one statement.
    fn act(
        &self,
        tx: &mut Tx<'_>,
        work: &[Work<'_, Transfer>],
        (): &mut (),
    ) -> Result<Vec<Outcome>, db::Error> {
        let mut outcomes = Vec::with_capacity(work.len());
        for Work { input: Transfer { from, to, amount }, .. } in work {
            let (changed, refusal) = match self.0 {
                Step::Withdraw => (add(tx, *from, -amount)?, "not enough money"),
                Step::Deposit => (add(tx, *to, *amount)?, "the account is closed"),
            };
            outcomes.push(match changed {
                true => Outcome::Done(Vec::new()),
                // A business answer, for good. What may pass by itself is an error or a `Retry`, and comes again.
                false => Outcome::Rejected(refusal.to_owned()),
            });
        }
        Ok(outcomes)
    }

    fn undo(
        &self,
        tx: &mut Tx<'_>,
        work: &[Work<'_, Transfer>],
        (): &mut (),
    ) -> Result<Vec<Undone>, db::Error> {
        for Work { input: Transfer { from, amount, .. }, .. } in work {
            add(tx, *from, *amount)?;
        }
        Ok(vec![Undone::Done; work.len()])
    }
}

/// Whether there was such an account, open, with enough in it.
fn add(tx: &mut Tx<'_>, account: u64, amount: i64) -> Result<bool, db::Error> {
    let changed = tx.execute(
        "UPDATE account SET balance = balance + ? WHERE id = ? AND closed = 0 AND balance + ? >= 0",
        &[Value::from(amount), Value::from(account), Value::from(amount)],
    )?;
    Ok(changed == 1)
}

/// Opens a bank; one that is new gets its accounts.
async fn open_bank(dir: &Path, step: Step) -> Result<Db, Failed> {
    let (name, balance) = match step {
        Step::Withdraw => ("left", AT_FIRST),
        Step::Deposit => ("right", 0),
    };
    let db = Db::open(db::Settings::new(dir.join(format!("{name}.db")), name), BANK)?;
    let accounts = move |tx: &mut Tx<'_>| {
        if tx.query_opt("SELECT id FROM account LIMIT 1", &[], |row| row.get::<u64>(0))?.is_some() {
            return Ok(());
        }
        for id in 0..ACCOUNTS {
            let closed = step == Step::Deposit && id.is_multiple_of(ONE_CLOSED_IN);
            let row = [Value::from(id), Value::from(balance), Value::from(closed)];
            tx.execute("INSERT INTO account (id, balance, closed) VALUES (?, ?, ?)", &row)?;
        }
        Ok::<_, db::Error>(())
    };
    db.write(accounts).await?;
    Ok(db)
}

async fn money(db: &Db) -> Result<i64, db::Error> {
    let sum = db.read(|tx| tx.query_opt("SELECT SUM(balance) FROM account", &[], |row| row.get(0)));
    Ok(sum.await?.unwrap_or(0))
}

// 3. Whoever starts transfers.

/// Accepted and started together at most.
const BATCH: usize = 100;
/// What is open for so long is started again.
const START_AGAIN_MILLIS: u64 = 500;
/// What is open for so long is to end either way: where nothing is decided yet, it is cancelled.
const DEADLINE_MILLIS: u64 = 30_000;
/// How often it is looked at what is open.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Marks the messages that tell a bank what it may forget; a book's have other marks.
const PURGE: u64 = 9 << 40;

const LIST: &[Migration] = &[Migration {
    number: 1,
    name: "transfer",
    sqlite: "CREATE TABLE transfer (id INTEGER PRIMARY KEY, input TEXT NOT NULL, accepted_at INTEGER NOT NULL,
                                    start_again_at INTEGER, committed INTEGER) STRICT;
             CREATE INDEX transfer_open ON transfer (id) WHERE committed IS NULL;",
    mysql: "CREATE TABLE IF NOT EXISTS transfer (id BIGINT PRIMARY KEY, input TEXT NOT NULL, accepted_at BIGINT NOT NULL,
                                                 start_again_at BIGINT, committed TINYINT, KEY (committed));",
}];

/// A transfer that has not ended, as far as is known here.
struct Open {
    id: u64,
    input: String,
    accepted_at: UnixMillis,
}

/// The list of transfers, and what is done about the open ones.
struct Transfers {
    db: Db,
    bus: Bus,
    book: Book,
    definition: Definition<Step>,
    clock: Clock,
    metrics: PubsubMetrics,
    /// What the banks were told last.
    told_below: Cell<u64>,
}

impl Transfers {
    /// Accepts transfers: once this returns, each of them will end, whatever happens.
    async fn accept(&self, wanted: Vec<Transfer>) -> Result<(), Failed> {
        let now = self.clock.now();
        let accepted = self.db.write(move |tx| {
            let last = tx.query_opt("SELECT MAX(id) FROM transfer", &[], |row| row.get::<Option<u64>>(0))?;
            let mut accepted = Vec::with_capacity(wanted.len());
            for (id, transfer) in (last.flatten().unwrap_or(0) + 1..).zip(&wanted) {
                let input = transfer.to_string();
                tx.execute(
                    "INSERT INTO transfer (id, input, accepted_at, start_again_at) VALUES (?, ?, ?, ?)",
                    &[
                        Value::from(id),
                        Value::from(&input),
                        Value::from(now),
                        Value::from(now + START_AGAIN_MILLIS),
                    ],
                )?;
                accepted.push(Open { id, input, accepted_at: now });
            }
            Ok::<_, db::Error>(accepted)
        });
        self.start(&accepted.await?).await;
        Ok(())
    }

    /// Starts them, for the first time or again: whoever has answered before answers the same.
    async fn start(&self, open: &[Open]) {
        let (now, mut pen) = (self.clock.now(), Pen::for_messages(open.len()));
        let mut traced = Spans::off().handle(open.len());
        let mut frames = Frames::of_batch(open.len(), &self.bus);
        for (place, Open { id, input, accepted_at }) in open.iter().enumerate() {
            let late = now > accepted_at + DEADLINE_MILLIS;
            let mode = if late { Mode::Decide } else { Mode::Execute };
            let about = About::new(NAME, VERSION, *accepted_at, input.as_bytes(), b"");
            let messages = self.book.start(*id, mode, &about, &mut pen).expect("transfers are in the book");
            frames.add(place, messages.outgoing(), &mut traced).expect("an input is short");
        }
        // What the bus has no room for is on the list.
        for refusal in frames.publish(&self.bus, &self.metrics, &mut traced).await {
            println!("{} transfers will be started later: {}", refusal.causes.len(), refusal.error);
        }
    }

    /// Starts again what is open for too long, and tells the banks what nobody will ask them about any more. Returns how many are open.
    async fn look(&self) -> Result<u64, Failed> {
        let now = self.clock.now();
        let due = self.db.write(move |tx| {
            let due = tx.query(
                "SELECT id, input, accepted_at FROM transfer
                 WHERE committed IS NULL AND start_again_at <= ? ORDER BY id LIMIT 100",
                &[Value::from(now)],
                |row| Ok(Open { id: row.get(0)?, input: row.get(1)?, accepted_at: row.get(2)? }),
            )?;
            for Open { id, .. } in &due {
                let later = [Value::from(now + START_AGAIN_MILLIS), Value::from(*id)];
                tx.execute("UPDATE transfer SET start_again_at = ? WHERE id = ?", &later)?;
            }
            Ok::<_, db::Error>(due)
        });
        self.start(&due.await?).await;
        let (open, below) = self.db.read(open_and_below).await?;
        if below == self.told_below.replace(below) {
            return Ok(open);
        }
        for commands in [WITHDRAWALS, DEPOSITS] {
            let body = ToParticipant::Purge(Purge { below }).encode();
            let envelope = Envelope { id: EnvelopeId::of(below, PURGE), body };
            // The next one says the same and more.
            let _ = self.bus.publish(commands, vec![envelope]).await;
        }
        Ok(open)
    }

    /// Writes down how transfers end, as long as there is a bus. A bank may be ahead of this; never the other way round.
    async fn hear(&self, mut news: Consumer) {
        while let Ok(batch) = news.next(BATCH).await {
            let (mut ends, mut verdicts) = (Vec::new(), Vec::new());
            for delivery in batch.deliveries() {
                let ended = self.ended(delivery.envelope.body.clone());
                verdicts.push(match ended {
                    Ok(end) => {
                        ends.extend(end);
                        Verdict::Ack
                    }
                    Err(error) => Verdict::Park { reason: error.to_string() },
                });
            }
            let written = self.db.write(move |tx| {
                for (id, end) in &ends {
                    tx.execute(
                        "UPDATE transfer SET committed = ?, start_again_at = NULL WHERE id = ? AND committed IS NULL",
                        &[Value::from(*end == End::Committed), Value::from(*id)],
                    )?;
                }
                Ok::<_, db::Error>(())
            });
            match written.await {
                // What was not acknowledged in time is heard again.
                Ok(()) => drop(batch.settle(verdicts).await),
                Err(error) => println!("news will be heard again: {error}"),
            }
        }
    }

    /// How a transfer has ended, if this piece of news says so.
    fn ended(&self, news: Bytes) -> Result<Option<(u64, End)>, Failed> {
        let token = Progress::decode(news)?.carried.token;
        match token.path.position(&self.definition)? {
            Position::Ended(end) => Ok(Some((token.saga, end))),
            _ => Ok(None),
        }
    }
}

/// How many are open, and below which id all have ended.
fn open_and_below(tx: &mut Tx<'_>) -> Result<(u64, u64), db::Error> {
    let number = |row: &db::Row<'_>| row.get::<Option<u64>>(0);
    let open = tx.query_opt("SELECT COUNT(*) FROM transfer WHERE committed IS NULL", &[], number)?;
    let oldest = tx.query_opt("SELECT MIN(id) FROM transfer WHERE committed IS NULL", &[], number)?;
    let last = tx.query_opt("SELECT MAX(id) FROM transfer", &[], number)?;
    let below = oldest.flatten().unwrap_or(last.flatten().unwrap_or(0) + 1);
    Ok((open.flatten().unwrap_or(0), below))
}

// 4. All of it, in one process.

/// What there is when nothing is open.
#[derive(Debug, PartialEq, Eq)]
struct Sum {
    left: i64,
    right: i64,
    /// Transfers that came about, what they moved, and those that did not.
    committed: u64,
    moved: i64,
    aborted: u64,
}

/// Opens what is in the folder, goes on with what is open there, makes so many transfers more, and returns once all have ended.
async fn run(dir: &Path, transfers: usize) -> Result<Sum, Failed> {
    let (left, right) = (open_bank(dir, Step::Withdraw).await?, open_bank(dir, Step::Deposit).await?);
    let list = Db::open(db::Settings::new(dir.join("transfers.db"), "transfers"), LIST)?;
    let (bus, registry, stop) = (Bus::embedded(Limits::default()), Registry::new(), CancellationToken::new());
    let metrics = PubsubMetrics::new(&registry, "transfer");
    let bank = |step, db: &Db, commands| participant::Parts {
        participant: Bank(step),
        db: db.clone(),
        bus: bus.clone(),
        commands,
        book: book(),
        replies: OTHERS,
        clock: Clock::system(),
        metrics: metrics.clone(),
        spans: Spans::off(),
        settings: participant::Settings::default(),
    };
    let desk = Transfers {
        db: list.clone(),
        bus: bus.clone(),
        book: book(),
        definition: transfer(),
        clock: Clock::system(),
        metrics: metrics.clone(),
        told_below: Cell::new(0),
    };
    let business = async {
        for number in (0..transfers).step_by(BATCH) {
            let count = BATCH.min(transfers - number);
            desk.accept(std::iter::repeat_with(any).take(count).collect()).await?;
            println!("{} of {transfers} accepted, {} open", number + count, desk.look().await?);
        }
        let mut looks = tokio::time::interval(LOOK_EVERY);
        while desk.look().await? > 0 {
            looks.tick().await;
        }
        bus.close().await;
        stop.cancel();
        Ok::<_, Failed>(())
    };
    let ((), (), (), done) = tokio::join!(
        participant::run(bank(Step::Withdraw, &left, WITHDRAWALS), stop.clone()),
        participant::run(bank(Step::Deposit, &right, DEPOSITS), stop.clone()),
        desk.hear(bus.subscribe(PROGRESS)),
        business,
    );
    done?;
    let ended = list.read(|tx| {
        tx.query("SELECT input, committed FROM transfer", &[], |row| {
            Ok((row.get::<String>(0)?, row.get::<bool>(1)?))
        })
    });
    let mut sum =
        Sum { left: money(&left).await?, right: money(&right).await?, committed: 0, moved: 0, aborted: 0 };
    for (input, committed) in ended.await.map_err(|error: db::Error| error)? {
        if committed {
            sum.committed += 1;
            sum.moved += input.parse::<Transfer>()?.amount;
        } else {
            sum.aborted += 1;
        }
    }
    for db in [left, right, list] {
        db.close().await;
    }
    Ok(sum)
}

/// Some transfer. Not all are possible.
fn any() -> Transfer {
    use std::hash::{BuildHasher, Hasher, RandomState};
    let dice = || RandomState::new().build_hasher().finish();
    let (from, to) = (dice() % ACCOUNTS, dice() % ACCOUNTS);
    Transfer { from, to, amount: i64::try_from(dice() % 200).unwrap_or(0) }
}

/// No money is made or lost, and what has arrived is what was moved.
fn adds_up(sum: &Sum) -> bool {
    sum.left + sum.right == ACCOUNTS as i64 * AT_FIRST && sum.right == sum.moved
}

#[tokio::main]
async fn main() -> Result<(), Failed> {
    let mut arguments = std::env::args().skip(1);
    let (Some(dir), Some(transfers)) = (arguments.next(), arguments.next()) else {
        return Err("transfer FOLDER NUMBER".into());
    };
    std::fs::create_dir_all(&dir)?;
    let sum = run(Path::new(&dir), transfers.parse()?).await?;
    println!("{sum:?}");
    if adds_up(&sum) { Ok(()) } else { Err("it does not add up".into()) }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    use super::*;

    const FOLDER: &str = "TRANSFER_TEST_FOLDER";
    /// Only a failing test waits this long.
    const PATIENCE: Duration = Duration::from_secs(60);
    /// Who is killed, and after how many lines.
    const KILLED_AFTER: [usize; 6] = [1, 2, 3, 5, 8, 13];

    /// No test: the process that the next one kills.
    #[tokio::test]
    #[ignore = "it is started by the test below"]
    async fn somebody_who_is_killed() {
        let Some(dir) = std::env::var_os(FOLDER) else { return };
        run(Path::new(&dir), 1_000_000).await.unwrap();
    }

    #[tokio::test]
    async fn whoever_is_killed_leaves_nothing_that_does_not_end_and_no_money_is_made_or_lost() {
        let dir = std::env::temp_dir().join(format!("transfer-{}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        for lines in KILLED_AFTER {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "tests::somebody_who_is_killed", "--ignored", "--nocapture"])
                .env(FOLDER, &dir)
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let said = BufReader::new(child.stdout.take().unwrap()).lines();
            let accepted = said.map_while(Result::ok).filter(|line| line.contains("accepted")).take(lines);
            assert_eq!(accepted.count(), lines, "it ended too early");
            child.kill().unwrap();
            child.wait().unwrap();
        }
        let sum = tokio::time::timeout(PATIENCE, run(&dir, 0)).await.expect("each transfer ends").unwrap();
        assert!(adds_up(&sum), "{sum:?}");
        let accepted: usize = KILLED_AFTER.iter().sum::<usize>() * BATCH;
        assert!(sum.committed + sum.aborted >= accepted as u64, "{sum:?}");
        assert!(sum.committed > 0 && sum.aborted > 0, "{sum:?}");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
