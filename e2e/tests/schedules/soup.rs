//! All schedules at once: the messages of a saga as a soup to which everything that was ever sent is added, and from which
//! nothing is ever taken.
//!
//! Any message of it may arrive at any time, any number of times, or never. So it holds every repetition, delay,
//! loss and overtaking, every death of an orchestrator or a participant before, between and after what it publishes (what was not
//! published is what does not arrive), and every restart from the start. What is left to chance is only in which order
//! the commands arrive that change a participant's barrier; all of these orders are tried, each state once.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use bytes::Bytes;
use drive::{Answered, Book, Refused};
use participant::barrier::{Decision, Found};
use saga::{End, Illegal, Mode, Path, Position, Status};
use wire::messages::{Command, Pen, Progress, Reply, ToOrchestrator, ToParticipant};

use super::desks::{Desks, InMemory, Script};
use super::sagas::{self, Saga};

/// More states than a saga of four steps can have.
const MAX_STATES: usize = 1_000_000;

const SAGA: u64 = 1;

/// Everything that may happen to a saga from now on follows from this.
#[derive(Clone)]
struct State {
    desks: InMemory,
    /// The commands that were sent, encoded.
    sent: BTreeSet<Bytes>,
    /// Those of them that have been answered: whatever came of it is in the soup, too.
    answered: BTreeSet<Bytes>,
    /// The longest path that was told; all others are its beginnings.
    told: Path,
    end: Option<End>,
}

type Rows = BTreeMap<(u64, u8), (Option<Bytes>, Option<Bytes>)>;

/// A history without its times.
pub type History = Vec<(usize, Status)>;

/// Visits every state that a saga can get into.
pub struct Explorer<'s> {
    saga: &'s Saga,
    book: Book,
    /// Whether a driver cancels although nothing has decided so.
    undecided: bool,
    visited: HashSet<(Rows, BTreeSet<Bytes>)>,
    histories: HashSet<(bool, History)>,
}

impl<'s> Explorer<'s> {
    /// Starts the saga in each of these modes and visits everything that can follow. Returns the number of states, and
    /// the histories that the saga can have: whether it commits, and how.
    pub fn explore(saga: &'s Saga, script: Script, modes: &[Mode]) -> (usize, Vec<(bool, History)>) {
        let mut desks = InMemory::default();
        let input = desks.input(SAGA, script);
        let mut explorer = Explorer {
            saga,
            book: sagas::book(),
            undecided: modes.contains(&Mode::Cancel),
            visited: HashSet::new(),
            histories: HashSet::new(),
        };
        let (sent, answered) = (BTreeSet::new(), BTreeSet::new());
        let mut state = State { desks, sent, answered, told: Path::new(), end: None };
        for mode in modes {
            explorer.plan(&mut state, saga.start(SAGA, *mode, &input));
        }
        explorer.visit(state);
        (explorer.visited.len(), explorer.histories.into_iter().collect())
    }

    fn visit(&mut self, mut state: State) {
        self.answer_what_changes_nothing(&mut state);
        let rows = |found: &Found| (found.action.clone(), found.compensation.clone());
        let found = state.desks.found.iter().map(|(place, found)| (*place, rows(found))).collect();
        if !self.visited.insert((found, state.sent.clone())) {
            return;
        }
        assert!(self.visited.len() < MAX_STATES, "a saga has too many states");
        self.check(&mut state);
        let waiting: Vec<Bytes> = state.sent.difference(&state.answered).cloned().collect();
        if waiting.is_empty() {
            self.check_end(&state);
        }
        for body in waiting {
            let mut next = state.clone();
            self.deliver(&mut next, body);
            self.visit(next);
        }
    }

    /// What a barrier answers without a change may as well be answered at once: it only adds to the soup.
    fn answer_what_changes_nothing(&self, state: &mut State) {
        loop {
            let waiting = state.sent.difference(&state.answered);
            let is_answer = |body: &&Bytes| matches!(state.desks.decide(&command(body)), Decision::Answer(_));
            let Some(body) = waiting.into_iter().find(is_answer).cloned() else { return };
            self.deliver(state, body);
        }
    }

    /// A command arrives, and so does its reply. Whoever drives the saga on then, a participant or an orchestrator, says the same.
    fn deliver(&self, state: &mut State, body: Bytes) {
        let command = command(&body);
        if state.desks.decide(&command) == Decision::Act {
            assert_ne!(state.end, Some(End::Aborted), "something is done for a dead saga: {:?}", state.told);
        }
        // A function of the place, so that two orders that come to the same are the same state.
        let now = 1_000 + 10 * u64::from(command.step.0) + command.phase as u64;
        let recorded = state.desks.handle(&command, now).expect("nobody is silent here");
        state.answered.insert(body);
        let Command { carried, step, phase } = command;
        let answered = Answered { step, phase, recorded: &recorded };
        let by_participant =
            self.book.answered(&carried.token, &carried.about, answered, &mut Pen::for_messages(2));
        let by_participant = by_participant.expect("its saga is in the book").map_err(|why| why.to_string());
        let reply = ToOrchestrator::Reply(Reply { carried, step, phase, recorded }).encode();
        let by_orchestrator = self.book.plan(reply.clone(), &mut Pen::for_messages(2));
        assert_eq!(by_participant, by_orchestrator.map_err(|why| why.to_string()));
        self.plan(state, reply);
    }

    /// A message arrives at an orchestrator.
    fn plan(&self, state: &mut State, body: Bytes) {
        let messages = match self.book.plan(body, &mut Pen::for_messages(2)) {
            Ok(messages) => messages,
            Err(Refused::Illegal { illegal: Illegal::CommittedWhileCancelled, .. }) if self.undecided => {
                return;
            }
            Err(refused) => panic!("{refused}"),
        };
        for drive::Outgoing { subject: to, envelope, .. } in messages.outgoing().into_iter().flatten() {
            if self.saga.takes_commands(to) {
                state.sent.insert(envelope.body);
            } else {
                self.tell(state, Progress::decode(envelope.body).unwrap().carried.token.path);
            }
        }
    }

    fn tell(&self, state: &mut State, path: Path) {
        let common = path.len().min(state.told.len());
        assert_eq!(path.entries()[..common], state.told.entries()[..common], "a saga has two paths");
        let (position, history) = self.saga.read(&path).unwrap();
        let (_, told) = self.saga.read(&state.told).unwrap();
        let lines = history.len().min(told.len());
        assert_eq!(history[..lines], told[..lines], "a saga has two histories");
        if let Position::Ended(end) = position {
            assert!(state.end.is_none_or(|other| other == end), "a saga ends in two ways");
            state.end = Some(end);
        }
        if path.len() > state.told.len() {
            state.told = path;
        }
    }

    /// What holds at any time.
    fn check(&self, state: &mut State) {
        let live: Vec<bool> = (0..)
            .zip(&self.saga.kinds)
            .map(|(step, _)| {
                let effects = state.desks.effects(SAGA, step);
                assert!(effects.acted <= 1 && effects.undone <= effects.acted, "step {step}: {effects:?}");
                effects.live()
            })
            .collect();
        match state.end {
            Some(End::Committed) => assert!(live.iter().all(|live| *live), "{live:?}: {:?}", state.told),
            Some(End::Aborted) => assert!(live.iter().all(|live| !live), "{live:?}: {:?}", state.told),
            None => {}
        }
    }

    /// Nothing is left to happen.
    fn check_end(&mut self, state: &State) {
        let end = state.end.expect("a saga of which every message has arrived has ended");
        let (_, history) = self.saga.read(&state.told).unwrap();
        let history = history.into_iter().map(|(step, status, _)| (step, status)).collect();
        self.histories.insert((end == End::Committed, history));
    }
}

fn command(body: &Bytes) -> Command {
    match ToParticipant::decode(body.clone()).unwrap() {
        ToParticipant::Command(command) => command,
        ToParticipant::Purge(purge) => panic!("an orchestrator purges nothing: {purge:?}"),
    }
}
