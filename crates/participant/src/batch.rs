//! One batch of commands in one transaction: read the barrier where there may be something, decide, have the effects, record the replies.

use bytes::Bytes;
use db::Tx;
use foldhash::{HashMap, HashMapExt};
use saga::{Phase, Reason, StepIndex, Token};
use wire::messages::Recorded;
use wire::time::UnixMillis;

use crate::barrier::{self, Decision, Key, Records, Row};
use crate::{Outcome, Participant, Undone, Work};

/// A command as its participant sees it.
#[derive(Debug)]
pub struct Command<I> {
    /// The saga: its id, how it is driven, the replies so far.
    pub token: Token,
    /// The step asked for.
    pub step: StepIndex,
    /// What is asked.
    pub phase: Phase,
    /// What the saga is about.
    pub input: I,
}

impl<I> Command<I> {
    fn key(&self) -> Key {
        Key { saga: self.token.saga, step: self.step }
    }
}

/// What a command gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A reply, as recorded: it may be sent once the transaction has committed.
    Reply(Bytes),
    /// Nothing was done or recorded; the command must come again.
    Retry(String),
    /// The barrier's rows contradict each other; an operator has to look.
    Park(String),
}

/// Handles a batch inside a transaction. One answer for each command, in their order; none of them may be sent unless
/// the transaction commits, and then [`Participant::committed`] is owed what has been noted in `changes`.
///
/// A batch may hold a command twice, or an action beside its own compensation: what is on one step is handled one
/// after the other, each seeing what the one before it has recorded.
///
/// # Errors
/// When the database fails; then the transaction must be rolled back.
pub fn handle<P: Participant>(
    participant: &P,
    tx: &mut Tx<'_>,
    commands: &[Command<P::Input>],
    now: UnixMillis,
    changes: &mut P::Changes,
) -> Result<Vec<Answer>, db::Error> {
    let mut batch = InHand::new(participant, tx, commands, now, changes);
    for round in rounds(commands) {
        let found = barrier::load(batch.tx, round.iter().map(|index| commands[*index].key()))?;
        batch.round(&round, &found)?;
    }
    Ok(batch.answers())
}

/// Handles a batch as [`handle`] does, but without reading the barrier: all of it is taken to come for the first time, as it nearly
/// always does. None if that cannot be: a compensation has its action before it, and so has a saga that is in the batch twice.
///
/// Whatever is decided about a step of which there is nothing, its action's row is written. So where there is something after all, the
/// barrier's primary key objects, if not a key of the participant's own before that: nothing has its effect twice. Only of what is to
/// be retried nothing is written, so it may be what was answered before: when it comes again, it must be looked up.
///
/// # Errors
/// When the database fails, and when something in the batch was answered before. The transaction must be rolled back; after an
/// error that is not transient, [`handle`] finds out what it was.
pub fn handle_unseen<P: Participant>(
    participant: &P,
    tx: &mut Tx<'_>,
    commands: &[Command<P::Input>],
    now: UnixMillis,
    changes: &mut P::Changes,
) -> Option<Result<Vec<Answer>, db::Error>> {
    if commands.iter().any(|command| command.phase != Phase::Action) {
        return None;
    }
    let rounds = rounds(commands);
    let [round] = &rounds[..] else { return None };
    let mut batch = InHand::new(participant, tx, commands, now, changes);
    Some(batch.round(round, &HashMap::new()).map(|()| batch.answers()))
}

/// Splits a batch so that no saga is in one round twice: the first round has each saga's first command, the next
/// one its second, and so on. Nearly always there is one round.
fn rounds<I>(commands: &[Command<I>]) -> Vec<Vec<usize>> {
    let mut rounds: Vec<Vec<usize>> = Vec::new();
    let mut seen: HashMap<u64, usize> = HashMap::with_capacity(commands.len());
    for (index, command) in commands.iter().enumerate() {
        let times = seen.entry(command.token.saga).or_default();
        if rounds.len() == *times {
            rounds.push(Vec::with_capacity(commands.len() - index));
        }
        rounds[*times].push(index);
        *times += 1;
    }
    rounds
}

/// A batch, its transaction, and what has become of the two so far.
struct InHand<'a, 'tx, P: Participant> {
    participant: &'a P,
    tx: &'a mut Tx<'tx>,
    commands: &'a [Command<P::Input>],
    now: UnixMillis,
    changes: &'a mut P::Changes,
    /// One for each command, in their order.
    answers: Vec<Option<Answer>>,
}

impl<'a, 'tx, P: Participant> InHand<'a, 'tx, P> {
    fn new(
        participant: &'a P,
        tx: &'a mut Tx<'tx>,
        commands: &'a [Command<P::Input>],
        now: UnixMillis,
        changes: &'a mut P::Changes,
    ) -> Self {
        InHand { participant, tx, commands, now, changes, answers: vec![None; commands.len()] }
    }

    fn answers(self) -> Vec<Answer> {
        let missing = || Answer::Retry("the participant gave no answer".to_owned());
        self.answers.into_iter().map(|answer| answer.unwrap_or_else(missing)).collect()
    }

    /// Handles those of its commands that have these places, no two of one saga, by what the barrier has of them.
    fn round(&mut self, places: &[usize], found: &HashMap<Key, barrier::Found>) -> Result<(), db::Error> {
        let mut records = Records::default();
        let (acts, undos) = self.decide(places, found, &mut records);
        if !acts.is_empty() {
            self.act(&acts, &mut records)?;
        }
        if !undos.is_empty() {
            self.undo(&undos, &mut records)?;
        }
        records.write(self.tx)
    }

    /// Answers what needs no effect. Returns the places of what is to be done, and of what is to be undone.
    fn decide(
        &mut self,
        places: &[usize],
        found: &HashMap<Key, barrier::Found>,
        records: &mut Records,
    ) -> (Vec<usize>, Vec<usize>) {
        let (nothing, now) = (barrier::Found::default(), self.now);
        let (mut acts, mut undos) = (Vec::new(), Vec::new());
        for &place in places {
            let command = &self.commands[place];
            let key = command.key();
            let answer = match barrier::decide(key, command.phase, found.get(&key).unwrap_or(&nothing)) {
                Err(corrupt) => Answer::Park(corrupt.to_string()),
                Ok(Decision::Answer(reply)) => Answer::Reply(reply),
                Ok(Decision::Bury) => {
                    let reply = barrier::tombstone(now);
                    records.push(key, Row::Action, &reply, now);
                    Answer::Reply(reply)
                }
                Ok(Decision::BuryAndCompensate) => {
                    records.push(key, Row::Action, &barrier::tombstone(now), now);
                    let reply = barrier::compensated(now);
                    records.push(key, Row::Compensation, &reply, now);
                    Answer::Reply(reply)
                }
                Ok(Decision::NothingToUndo) => {
                    let reply = barrier::compensated(now);
                    records.push(key, Row::Compensation, &reply, now);
                    Answer::Reply(reply)
                }
                Ok(Decision::Act) => {
                    acts.push(place);
                    continue;
                }
                Ok(Decision::Undo) => {
                    undos.push(place);
                    continue;
                }
            };
            self.answers[place] = Some(answer);
        }
        (acts, undos)
    }

    fn act(&mut self, places: &[usize], records: &mut Records) -> Result<(), db::Error> {
        let work = work(self.commands, places, self.now);
        let outcomes = self.participant.act(self.tx, &work, self.changes)?;
        assert_eq!(outcomes.len(), places.len(), "a participant owes one outcome per command");
        for (&place, outcome) in places.iter().zip(outcomes) {
            self.answers[place] = Some(match acted(outcome, self.now) {
                Ok(reply) => {
                    records.push(self.commands[place].key(), Row::Action, &reply, self.now);
                    Answer::Reply(reply)
                }
                Err(why) => Answer::Retry(why),
            });
        }
        Ok(())
    }

    fn undo(&mut self, places: &[usize], records: &mut Records) -> Result<(), db::Error> {
        let work = work(self.commands, places, self.now);
        let outcomes = self.participant.undo(self.tx, &work, self.changes)?;
        assert_eq!(outcomes.len(), places.len(), "a participant owes one outcome per command");
        for (&place, undone) in places.iter().zip(outcomes) {
            self.answers[place] = Some(match undone {
                Undone::Done => {
                    let reply = barrier::compensated(self.now);
                    records.push(self.commands[place].key(), Row::Compensation, &reply, self.now);
                    Answer::Reply(reply)
                }
                Undone::Retry(why) => Answer::Retry(why),
            });
        }
        Ok(())
    }
}

fn work<'a, I>(commands: &'a [Command<I>], places: &[usize], now: UnixMillis) -> Vec<Work<'a, I>> {
    let one = |&place: &usize| {
        let Command { token, step, input, .. } = &commands[place];
        Work { saga: token.saga, step: *step, path: &token.path, input, now }
    };
    places.iter().map(one).collect()
}

/// The reply to record, or why there is none yet.
fn acted(outcome: Outcome, now: UnixMillis) -> Result<Bytes, String> {
    let outcome = match outcome {
        Outcome::Done(data) => saga::Outcome::Done(data),
        Outcome::Rejected(why) => saga::Outcome::Rejected(Reason::Refused(why)),
        Outcome::Retry(why) => return Err(why),
    };
    Ok(Recorded { outcome, at: now }.encode())
}
