//! Carries schedules out, one a saga, for as many sagas at once as wanted, and checks what must hold.
//!
//! All sagas go in step: in each round every saga delivers its next message, and the commands of one subject are handled as
//! one batch, in one transaction. What is checked:
//!
//! - at each reply: it is, byte for byte, what was replied to that step and phase before (I3);
//! - at each report of progress: no effect is announced that is not there; of two paths, one begins with the other, and
//!   so do the histories (I12);
//! - at the end: one end, everything done or nothing, each effect at most once (I3, I4); and a saga that is driven again
//!   after its end, in every mode, goes the same way and changes nothing.

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

use bus::{Envelope, EnvelopeId, Subject};
use bytes::Bytes;
use drive::{Book, Refused};
use saga::{End, Illegal, Mode, Outcome, Path, Phase, Position, Status};
use shop::purchase::ORCHESTRATOR;
use wire::messages::{Command, Pen, Progress, Reply, ToOrchestrator, ToParticipant};

use super::desks::{Desks, Script};
use super::faults::{Fault, Schedule};
use super::sagas::{self, Line, Saga};

/// More starts than this, and a saga does not end.
const MAX_STARTS: u32 = 1_000;
/// More messages of one saga than this at a time are more than any schedule here can bring about.
const MAX_MESSAGES: usize = 10_000;

/// A message that is under way.
#[derive(Clone, Debug)]
struct Parcel {
    to: Subject,
    envelope: Envelope,
}

/// One saga, its messages, and what it has been seen to do.
pub struct Run {
    pub id: u64,
    pub script: Script,
    saga: Rc<Saga>,
    input: Bytes,
    schedule: Schedule,
    /// Oldest first.
    pool: Vec<Parcel>,
    /// Held back until the delivery of this number is over.
    late: Vec<(u32, Parcel)>,
    deliveries: u32,
    starts: u32,
    /// Whether a driver was started in a mode that may end the saga early.
    cancelled: bool,
    /// Whether one was started in cancel mode although nothing had decided so.
    undecided: bool,
    /// The longest path that was told, and its history.
    told: Path,
    history: Vec<Line>,
    /// How it ended, as whoever started it has heard.
    heard: Option<End>,
    replies: HashMap<(u8, bool), Bytes>,
    sent: HashMap<(Subject, EnvelopeId), Bytes>,
}

/// A message at its receiver, and what happens there.
struct Delivery {
    parcel: Parcel,
    fault: Fault,
}

impl Run {
    fn new(id: u64, saga: Rc<Saga>, script: Script, input: Bytes, schedule: Schedule) -> Run {
        let mut run = Run {
            id,
            script,
            saga,
            input,
            schedule,
            pool: Vec::new(),
            late: Vec::new(),
            deliveries: 0,
            starts: 0,
            cancelled: false,
            undecided: false,
            told: Path::new(),
            history: Vec::new(),
            heard: None,
            replies: HashMap::new(),
            sent: HashMap::new(),
        };
        run.start(Mode::Execute);
        run
    }

    fn start(&mut self, mode: Mode) {
        self.starts += 1;
        assert!(self.starts < MAX_STARTS, "saga {} does not end: {:?}", self.id, self.told);
        self.cancelled |= mode != Mode::Execute;
        self.undecided |= mode == Mode::Cancel;
        let body = self.saga.start(self.id, mode, &self.input);
        self.send(ORCHESTRATOR, Envelope { id: EnvelopeId::of(self.id, mode as u64), body });
    }

    /// A message is published. Its id says what it says: one id, one meaning.
    fn send(&mut self, to: Subject, envelope: Envelope) {
        let known = self.sent.entry((to, envelope.id)).or_insert_with(|| envelope.body.clone());
        assert_eq!(*known, envelope.body, "two messages to {to} have the id {}", envelope.id);
        assert!(self.pool.len() < MAX_MESSAGES, "saga {} floods the bus", self.id);
        self.pool.push(Parcel { to, envelope });
    }

    /// The next message to deliver, or none when all is said.
    fn next(&mut self) -> Option<Delivery> {
        self.release();
        if self.pool.is_empty() && self.heard.is_none() {
            // As the reconciler does: what is not known to have ended is started again.
            self.start(Mode::Execute);
        }
        if self.pool.is_empty() {
            let (_, parcel) = self.late.pop()?;
            self.pool.push(parcel);
        }
        let number = self.deliveries;
        self.deliveries += 1;
        let (index, fault) = self.schedule.next(number, self.pool.len());
        let parcel = self.pool.remove(index);
        match fault {
            Fault::Twice => self.pool.push(parcel.clone()),
            Fault::Again { behind } => self.late.push((behind, parcel.clone())),
            Fault::Late { until } => {
                self.late.push((until, parcel));
                return self.next();
            }
            Fault::Lost => return self.next(),
            Fault::Killed { .. } | Fault::Fails => self.pool.push(parcel.clone()),
            Fault::Start(mode) => self.start(mode),
            Fault::Forgotten => {
                self.pool.clear();
                self.late.clear();
                return self.next();
            }
            Fault::None => {}
        }
        Some(Delivery { parcel, fault })
    }

    fn release(&mut self) {
        let deliveries = self.deliveries;
        for (_, parcel) in self.late.extract_if(.., |(until, _)| *until < deliveries) {
            self.pool.push(parcel);
        }
    }

    /// What a handler that dies, or fails, gets to publish.
    fn publish(&mut self, messages: Vec<(Subject, Envelope)>, fault: Fault) {
        let published = match fault {
            Fault::Killed { published } => published,
            Fault::Fails => 0,
            _ => usize::MAX,
        };
        for (to, envelope) in messages.into_iter().take(published) {
            self.send(to, envelope);
        }
    }

    /// I3: one question, one answer.
    fn replied(&mut self, command: &Command, recorded: Bytes) {
        let row = (command.step.0, command.phase == Phase::Compensation);
        let known = self.replies.entry(row).or_insert_with(|| recorded.clone());
        assert_eq!(*known, recorded, "saga {}: two answers of step {}", self.id, command.step);
    }

    /// Somebody announces this path: I12, and what of I4 can be seen on the way.
    fn announced(&mut self, path: &Path, desks: &mut impl Desks) {
        let (position, history) = self.saga.read(path).unwrap();
        let common = path.len().min(self.told.len());
        assert_eq!(path.entries()[..common], self.told.entries()[..common], "saga {} has two paths", self.id);
        let lines = history.len().min(self.history.len());
        assert_eq!(history[..lines], self.history[..lines], "saga {} has two histories", self.id);
        for entry in path.entries() {
            let effects = desks.effects(self.id, entry.step.0);
            let undone = path
                .entries()
                .iter()
                .any(|later| later.step == entry.step && matches!(later.outcome, Outcome::Compensated));
            let what = format!("saga {}, step {}: {effects:?}, told {path:?}", self.id, entry.step);
            match entry.outcome {
                Outcome::Done(_) if position == Position::Ended(End::Committed) => {
                    assert!(effects.live(), "a success has no effect: {what}");
                }
                Outcome::Done(_) if !undone && effects.undone == 0 && effects.acted == 0 => {
                    // A driver behind the others may tell of an effect that they have undone by now.
                    assert!(self.is_undone(entry.step.0), "done is told of what is not: {what}");
                }
                Outcome::Done(_) => {}
                Outcome::Rejected(_) | Outcome::Compensated => {
                    assert!(!effects.live(), "an effect is there that is told not to be: {what}");
                }
            }
        }
        if path.len() > self.told.len() {
            self.told = path.clone();
            self.history = history;
        }
    }

    /// Whether the step's compensation has been answered.
    fn is_undone(&self, step: u8) -> bool {
        self.replies.contains_key(&(step, true))
    }

    /// A report of progress has arrived where the saga was started.
    fn hear(&mut self, path: &Path) {
        if let (Position::Ended(end), _) = self.saga.read(path).unwrap() {
            assert!(self.heard.is_none_or(|heard| heard == end), "saga {} ends in two ways", self.id);
            self.heard = Some(end);
        }
    }

    /// Only a driver that cancels although the pivot was never asked can be wrong about it.
    fn refused(&self, refused: &Refused) {
        let excused = self.undecided
            && matches!(refused, Refused::Illegal { illegal: Illegal::CommittedWhileCancelled, .. })
            && self.replies.contains_key(&(self.saga.decider().0, false));
        assert!(excused, "saga {}: {refused}", self.id);
    }

    /// What must hold once all is quiet.
    fn check_end(&self, desks: &mut impl Desks) {
        let Some(end) = self.heard else { panic!("saga {} has not ended", self.id) };
        let what = format!("saga {} ({}), {end:?}, {:?}", self.id, self.saga.name, self.history);
        for (step, _) in (0..).zip(&self.saga.kinds) {
            let effects = desks.effects(self.id, step);
            assert!(
                effects.acted <= 1 && effects.undone <= effects.acted,
                "step {step}: {effects:?}: {what}"
            );
            assert_eq!(effects.live(), end == End::Committed, "step {step}: {effects:?}: {what}");
        }
        let statuses: Vec<(usize, Status)> =
            self.history.iter().map(|(step, status, _)| (*step, *status)).collect();
        let expected = self.saga.expected(self.script.refuses);
        if !self.cancelled {
            assert_eq!(statuses, expected, "{what}");
        } else if end == End::Committed {
            assert_eq!(self.script.refuses, None, "{what}");
            assert_eq!(statuses, expected, "{what}");
        }
    }
}

/// The commands of one round by their subject, apart from those whose transaction is to fail: which run's they are,
/// and what happens to each.
type Batches = BTreeMap<(Subject, bool), Vec<(usize, Command, Fault)>>;

/// Sagas, and what they run on.
pub struct World<D> {
    pub desks: D,
    book: Book,
    runs: Vec<Run>,
    next_saga: u64,
    now: u64,
}

impl<D: Desks> World<D> {
    pub fn new(desks: D) -> World<D> {
        World { desks, book: sagas::book(), runs: Vec::new(), next_saga: 1, now: sagas::STARTED_AT }
    }

    /// Adds a saga, to be run on this schedule.
    pub fn add(&mut self, saga: &Rc<Saga>, script: Script, schedule: Schedule) {
        let id = self.next_saga;
        self.next_saga += 1;
        let input = self.desks.input(id, script);
        self.runs.push(Run::new(id, Rc::clone(saga), script, input, schedule));
    }

    /// Runs all sagas to their end and checks them; then drives each again, in every mode, and checks that nothing
    /// has changed. Returns how many messages each took to its first end.
    pub fn run(&mut self) -> Vec<u32> {
        self.settle();
        let mut deliveries = Vec::new();
        let mut before = Vec::new();
        for run in &mut self.runs {
            run.check_end(&mut self.desks);
            deliveries.push(run.deliveries);
            before.push((run.told.clone(), run.cancelled));
            run.schedule = Schedule::calm();
            run.start(Mode::Execute);
            run.start(Mode::Decide);
            if run.heard == Some(End::Aborted) {
                run.start(Mode::Cancel);
            }
        }
        self.settle();
        for (run, (told, cancelled)) in self.runs.iter_mut().zip(before) {
            assert_eq!(run.told, told, "saga {} went on after its end", run.id);
            // A decision after the end is none.
            run.cancelled = cancelled;
            run.check_end(&mut self.desks);
        }
        self.runs.clear();
        deliveries
    }

    /// Rounds, until there is nothing to deliver.
    fn settle(&mut self) {
        loop {
            self.now += 1;
            let mut batches: Batches = BTreeMap::new();
            let mut delivered = 0;
            for index in 0..self.runs.len() {
                let at_once = self.runs[index].schedule.at_once();
                for delivery in (0..at_once).map_while(|_| self.runs[index].next()).collect::<Vec<_>>() {
                    delivered += 1;
                    let Delivery { parcel, fault } = delivery;
                    if self.runs[index].saga.takes_commands(parcel.to) {
                        let ToParticipant::Command(command) =
                            ToParticipant::decode(parcel.envelope.body).unwrap()
                        else {
                            panic!("an orchestrator purges nothing");
                        };
                        let batch = batches.entry((parcel.to, fault == Fault::Fails)).or_default();
                        batch.push((index, command, fault));
                    } else {
                        self.deliver(index, parcel, fault);
                    }
                }
            }
            for ((subject, fails), batch) in batches {
                self.handle(subject, fails, batch);
            }
            if delivered == 0 {
                return;
            }
        }
    }

    /// To the orchestrator, or to whoever started the saga.
    fn deliver(&mut self, index: usize, parcel: Parcel, fault: Fault) {
        let run = &mut self.runs[index];
        if parcel.to == ORCHESTRATOR {
            match self.book.plan(parcel.envelope.body, &mut Pen::for_messages(2)) {
                Ok(messages) => {
                    let messages = messages.outgoing().into_iter().flatten();
                    let messages: Vec<_> =
                        messages.map(|message| (message.subject, message.envelope)).collect();
                    for (to, envelope) in &messages {
                        if *to == run.saga.progress {
                            let path = Progress::decode(envelope.body.clone()).unwrap().carried.token.path;
                            run.announced(&path, &mut self.desks);
                        }
                    }
                    run.publish(messages, fault);
                }
                Err(refused) => run.refused(&refused),
            }
        } else if !matches!(fault, Fault::Killed { published: 0 } | Fault::Fails) {
            let path = Progress::decode(parcel.envelope.body).unwrap().carried.token.path;
            run.hear(&path);
        }
    }

    /// One batch of commands.
    fn handle(&mut self, subject: Subject, fails: bool, batch: Vec<(usize, Command, Fault)>) {
        let commands: Vec<Command> = batch.iter().map(|(_, command, _)| command.clone()).collect();
        if fails {
            self.desks.fail(subject, &commands, self.now);
            return;
        }
        let answers = self.desks.answer(subject, &commands, self.now);
        assert_eq!(answers.len(), commands.len());
        for ((index, command, fault), answer) in batch.into_iter().zip(answers) {
            let run = &mut self.runs[index];
            match answer {
                Some(recorded) => {
                    run.replied(&command, recorded.clone());
                    let envelope = reply(command, recorded);
                    run.publish(vec![(ORCHESTRATOR, envelope)], fault);
                }
                None => {
                    let id = EnvelopeId::of(run.id, u64::from(run.deliveries) << 48);
                    let body = ToParticipant::Command(command).encode();
                    run.pool.push(Parcel { to: subject, envelope: Envelope { id, body } });
                }
            }
        }
    }
}

/// A participant's reply, with an id that differs where it says something else.
fn reply(command: Command, recorded: Bytes) -> Envelope {
    let Command { carried, step, phase } = command;
    let place = carried.token.path.len() as u64 | (carried.token.mode as u64) << 8 | (phase as u64) << 16;
    let id = EnvelopeId::of(carried.token.saga, 1 << 40 | place | u64::from(step.0) << 24);
    let body = ToOrchestrator::Reply(Reply { carried, step, phase, recorded }).encode();
    Envelope { id, body }
}
