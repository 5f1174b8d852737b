//! The two sagas under test.

use bus::Subject;
use drive::Book;
use saga::{Definition, Illegal, Kind, Mode, Path, Position, Status, StepIndex, Token};
use shop::purchase::{ORCHESTRATOR, PURCHASE_PROGRESS, PurchaseStep, purchase_saga};
use wire::messages::{About, Carried, Start, ToOrchestrator};

/// The time at which each saga is accepted.
pub const STARTED_AT: u64 = 1;

/// Where a trip's traveller hears of it.
pub const TRIP_PROGRESS: Subject = Subject("trip.progress");

/// A step of a trip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TripStep {
    Flight,
    Hotel,
    Card,
    Mail,
}

impl TripStep {
    fn commands(self) -> Subject {
        Subject(match self {
            TripStep::Flight => "trip.flight",
            TripStep::Hotel => "trip.hotel",
            TripStep::Card => "trip.card",
            TripStep::Mail => "trip.mail",
        })
    }
}

fn trip_saga() -> Definition<TripStep> {
    Definition::new("trip", 1)
        .compensatable(TripStep::Flight)
        .compensatable(TripStep::Hotel)
        .pivot(TripStep::Card)
        .retriable(TripStep::Mail)
        .build()
}

/// The orchestrator that drives both.
pub fn book() -> Book {
    Book::new().with(purchase_saga(), PurchaseStep::commands, PURCHASE_PROGRESS).with(
        trip_saga(),
        TripStep::commands,
        TRIP_PROGRESS,
    )
}

/// One line of a history: the step's place, what happened, and when.
pub type Line = (usize, Status, u64);

/// What a path says: where the saga stands, and its history.
type Reading = Box<dyn Fn(&Path) -> Result<(Position, Vec<Line>), Illegal>>;

/// A saga under test, with its steps by their places.
pub struct Saga {
    pub name: &'static str,
    version: u32,
    pub kinds: Vec<Kind>,
    pub commands: Vec<Subject>,
    pub progress: Subject,
    reading: Reading,
}

impl Saga {
    /// The shop's.
    pub fn shop() -> Saga {
        Saga::of(purchase_saga(), PurchaseStep::commands, PURCHASE_PROGRESS)
    }

    /// A trip's, with a retriable step behind the pivot.
    pub fn trip() -> Saga {
        Saga::of(trip_saga(), TripStep::commands, TRIP_PROGRESS)
    }

    fn of<S: Copy + PartialEq + 'static>(
        definition: Definition<S>,
        commands: fn(S) -> Subject,
        progress: Subject,
    ) -> Saga {
        let kinds = definition.steps().map(|(_, _, kind)| kind).collect();
        let subjects = definition.steps().map(|(_, step, _)| commands(step)).collect();
        let (name, version) = (definition.name(), definition.version());
        let reading = move |path: &Path| {
            let place = |step: S| definition.steps().position(|(_, other, _)| other == step).unwrap();
            let events = saga::events(&definition, STARTED_AT, path)?;
            let lines = events.iter().map(|event| (place(event.step), event.status, event.at)).collect();
            Ok((path.position(&definition)?, lines))
        };
        Saga { name, version, kinds, commands: subjects, progress, reading: Box::new(reading) }
    }

    /// How many steps it has.
    pub fn len(&self) -> usize {
        self.kinds.len()
    }

    /// The steps that may say no.
    pub fn may_refuse(&self) -> impl Iterator<Item = u8> + '_ {
        (0..).zip(&self.kinds).filter(|(_, kind)| **kind != Kind::Retriable).map(|(step, _)| step)
    }

    /// The step that decides.
    pub fn decider(&self) -> StepIndex {
        StepIndex(self.may_refuse().last().unwrap())
    }

    /// What a path of this saga says.
    pub fn read(&self, path: &Path) -> Result<(Position, Vec<Line>), Illegal> {
        (self.reading)(path)
    }

    /// What becomes of it when nobody cancels it: forward to the step that refuses, then back.
    pub fn expected(&self, refuses: Option<u8>) -> Vec<(usize, Status)> {
        let no = refuses.map_or(self.len(), usize::from);
        let mut lines: Vec<_> =
            (0..no).flat_map(|step| [(step, Status::Execute), (step, Status::Success)]).collect();
        if refuses.is_some() {
            lines.extend([(no, Status::Execute), (no, Status::Failed)]);
            lines.extend((0..no).rev().map(|step| (step, Status::RolledBack)));
        }
        lines
    }

    /// A message that starts it, or starts it again.
    pub fn start(&self, saga: u64, mode: Mode, input: &bytes::Bytes) -> bytes::Bytes {
        let carried = Carried {
            token: Token { saga, mode, path: Path::new() },
            about: About::new(self.name, self.version, STARTED_AT, input, b""),
        };
        ToOrchestrator::Start(Start { carried }).encode()
    }

    /// Whether messages on this subject are commands; the others go to the orchestrator or tell of progress.
    pub fn takes_commands(&self, subject: Subject) -> bool {
        debug_assert!(
            subject == ORCHESTRATOR || subject == self.progress || self.commands.contains(&subject)
        );
        self.commands.contains(&subject)
    }
}
