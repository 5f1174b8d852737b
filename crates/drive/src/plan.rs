//! From one message, or one recorded reply, to the messages that it calls for: pure, so that a test can assert them.

use std::sync::Arc;

use bus::{Envelope, EnvelopeId, Subject};
use bytes::Bytes;
use saga::{Definition, Effects, Illegal, Mode, Phase, Standing, StepIndex, Token};
use wire::messages::{About, Carried, DecodeError, Pen, Recorded, Reply, Start, ToOrchestrator};

/// A message that cannot be acted upon, now or later.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// It cannot be understood.
    #[error(transparent)]
    Undecodable(#[from] DecodeError),
    /// Its saga is none of this book's.
    #[error("no definition {name:?} version {version} is known here")]
    UnknownDefinition {
        /// The definition's name.
        name: String,
        /// Its version.
        version: u32,
    },
    /// It is a reply that its saga cannot get.
    #[error("saga {saga}: {illegal}")]
    Illegal {
        /// The saga.
        saga: u64,
        /// Why not.
        illegal: Illegal,
    },
}

/// A message to be published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// Where to.
    pub subject: Subject,
    /// What.
    pub envelope: Envelope,
    /// Whether a later message of the saga says all that this one says. If the bus refuses it, it is not worth doing
    /// everything again.
    pub may_be_lost: bool,
}

/// The messages that one message calls for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Messages {
    /// To the one who started the saga.
    pub report: Option<Outgoing>,
    /// To the participant that is asked next.
    pub command: Option<Outgoing>,
    /// What their saga is about.
    pub about: About,
}

impl Messages {
    /// In the order in which they are published.
    pub fn outgoing(self) -> [Option<Outgoing>; 2] {
        [self.report, self.command]
    }
}

type Begin = Box<dyn Fn(u64, Mode, About, &mut Pen) -> Messages + Send + Sync>;
type Advance = Box<dyn Fn(Carried, Answered<'_>, &mut Pen) -> Result<Messages, Refused> + Send + Sync>;

/// A reply without the saga that it came with.
#[derive(Clone, Copy, Debug)]
pub struct Answered<'r> {
    /// The step that was asked for.
    pub step: StepIndex,
    /// What was asked.
    pub phase: Phase,
    /// The encoded [`Recorded`], byte for byte as the participant keeps it.
    pub recorded: &'r [u8],
}

/// The sagas that are driven here, by definition name and version. Cloning is cheap.
#[derive(Clone, Default)]
pub struct Book(Arc<Vec<Known>>);

/// A saga by its definition's name and version. There are few: a scan beats a hash.
struct Known {
    name: &'static str,
    version: u32,
    begin: Begin,
    advance: Advance,
}

impl Book {
    /// A book without sagas.
    pub fn new() -> Book {
        Book::default()
    }

    /// Adds a definition: `commands` says where each step's participant takes its commands, `progress` where the one
    /// who starts these sagas hears of them.
    ///
    /// # Panics
    /// When the definition's name and version are in the book already, or the book has been cloned.
    #[must_use]
    pub fn with<S: Copy + Send + Sync + 'static>(
        mut self,
        definition: Definition<S>,
        commands: fn(S) -> Subject,
        progress: Subject,
    ) -> Book {
        let (name, version) = (definition.name(), definition.version());
        assert!(
            !self.0.iter().any(|known| known.name == name && known.version == version),
            "definition {name:?} version {version} is in the book twice"
        );
        let started = definition.clone();
        let begin = move |saga: u64, mode: Mode, about: About, pen: &mut Pen| {
            messages(saga::start(&started, saga, mode), about, commands, progress, pen)
        };
        let advance = move |carried: Carried, answered: Answered<'_>, pen: &mut Pen| {
            let (Carried { token, about }, Answered { step, phase, recorded }) = (carried, answered);
            let saga = token.saga;
            let Recorded { outcome, at } = Recorded::decode(recorded)?;
            let reply = saga::Reply { step, phase, outcome, at };
            let effects = saga::advance(&definition, token, reply)
                .map_err(|illegal| Refused::Illegal { saga, illegal })?;
            Ok(messages(effects, about, commands, progress, pen))
        };
        let known = Known { name, version, begin: Box::new(begin), advance: Box::new(advance) };
        Arc::get_mut(&mut self.0).expect("a book is written before it is handed out").push(known);
        self
    }

    /// The messages that one message calls for, written with this pen.
    ///
    /// # Errors
    /// [`Refused`] when nothing can ever be done about it.
    pub fn plan(&self, body: Bytes, pen: &mut Pen) -> Result<Messages, Refused> {
        match ToOrchestrator::decode(body)? {
            ToOrchestrator::Start(Start { carried: Carried { token, about } }) => {
                let known = self.find(&about).ok_or_else(|| unknown(&about))?;
                Ok((known.begin)(token.saga, token.mode, about, pen))
            }
            ToOrchestrator::Reply(Reply { carried, step, phase, recorded }) => {
                let known = self.find(&carried.about).ok_or_else(|| unknown(&carried.about))?;
                (known.advance)(carried, Answered { step, phase, recorded: &recorded }, pen)
            }
        }
    }

    /// The messages that start a saga; None when it is not in the book, and an orchestrator has to be told.
    pub fn start(&self, saga: u64, mode: Mode, about: &About, pen: &mut Pen) -> Option<Messages> {
        let known = self.find(about)?;
        Some((known.begin)(saga, mode, about.clone(), pen))
    }

    /// The messages that a reply calls for that was recorded here; None when its saga is not in the book, and somebody else has to
    /// be told.
    ///
    /// # Errors
    /// As [`Book::plan`].
    pub fn answered(
        &self,
        token: &Token,
        about: &About,
        answered: Answered<'_>,
        pen: &mut Pen,
    ) -> Option<Result<Messages, Refused>> {
        let known = self.find(about)?;
        let carried = Carried { token: token.clone(), about: about.clone() };
        Some((known.advance)(carried, answered, pen))
    }

    fn find(&self, about: &About) -> Option<&Known> {
        self.0.iter().find(|known| about.is_of(known.name, known.version))
    }
}

fn unknown(about: &About) -> Refused {
    Refused::UnknownDefinition { name: about.definition().to_owned(), version: about.version() }
}

/// What the id of a report says of it beside its saga.
const REPORT: u64 = 2;
/// Set in the id of a report whose saga goes on.
const OPEN_BIT: u32 = 16;

/// How many replies a path has, as far as an id can tell.
fn replies_in_id(replies: usize) -> u8 {
    u8::try_from(replies).unwrap_or(u8::MAX)
}

/// Whether a report is of a saga that goes on, and of a time at which it had fewer replies than this: whoever has heard of so many has heard
/// all that it says, for a saga has one path. Its id is enough to tell, so it need not be read. False for the report of an end, which may be
/// another end than the one that was heard of, and where the id does not tell.
pub fn is_old_report(id: EnvelopeId, replies: usize) -> bool {
    let (_, tag) = id.parts();
    let goes_on = tag >> OPEN_BIT & 1 == 1;
    tag >> 40 == REPORT && goes_on && (tag as u8) < replies_in_id(replies)
}

/// Effects as messages. Each carries the saga as it now stands; its id is a function of what it says.
fn messages<S: Copy>(
    effects: Effects<S>,
    about: About,
    commands: fn(S) -> Subject,
    progress: Subject,
    pen: &mut Pen,
) -> Messages {
    let Effects { token, ask, tell } = effects;
    let saga = token.saga;
    let place = u64::from(replies_in_id(token.path.len())) | (token.mode as u64) << 8;
    let report = tell.map(|standing| {
        let body = pen.progress(&token, &about);
        let open = standing == Standing::Open;
        let tag = REPORT << 40 | u64::from(open) << OPEN_BIT | place;
        let envelope = Envelope { id: EnvelopeId::of(saga, tag), body };
        Outgoing { subject: progress, envelope, may_be_lost: open }
    });
    let command = ask.map(|ask| {
        let tag = 3 << 40 | u64::from(ask.index.0) << 32 | (ask.phase as u64) << 16 | place;
        let body = pen.command(&token, &about, ask.index, ask.phase);
        let envelope = Envelope { id: EnvelopeId::of(saga, tag), body };
        Outgoing { subject: commands(ask.step), envelope, may_be_lost: false }
    });
    Messages { report, command, about }
}

#[cfg(test)]
mod tests {
    use saga::{Outcome, Path, Reason};

    use super::*;

    const FIRST: Subject = Subject("test.first");
    const SECOND: Subject = Subject("test.second");
    const PROGRESS: Subject = Subject("test.progress");

    fn book() -> Book {
        let definition = Definition::new("trip", 2).compensatable(FIRST).pivot(SECOND).build();
        Book::new().with(definition, |subject| subject, PROGRESS)
    }

    fn about(version: u32) -> About {
        About::new("trip", version, 7, b"input", b"trace")
    }

    fn recorded(outcome: Outcome) -> Bytes {
        Recorded { outcome, at: 11 }.encode()
    }

    fn answer(step: u8, phase: Phase, recorded: &[u8]) -> Answered<'_> {
        Answered { step: StepIndex(step), phase, recorded }
    }

    fn reply(token: &Token, about: &About, answered: Answered<'_>) -> Bytes {
        let Answered { step, phase, recorded } = answered;
        Pen::for_messages(1).reply(token, about, step, phase, recorded)
    }

    /// From its start to its end, by those who are told of it and by those who have what it needs.
    #[test]
    fn a_saga_gets_the_same_messages_whoever_drives_it_on() {
        let done = recorded(Outcome::Done(b"seat 3".to_vec()));
        let declined = recorded(Outcome::Rejected(Reason::Refused("no".to_owned())));
        let undone = recorded(Outcome::Compensated);
        let answers = [
            answer(0, Phase::Action, &done),
            answer(1, Phase::Action, &declined),
            answer(0, Phase::Compensation, &undone),
        ];
        let (book, about, pen) = (book(), about(2), &mut Pen::for_messages(8));
        let mut token = Token { saga: 5, mode: Mode::Execute, path: Path::new() };
        for mode in [Mode::Execute, Mode::Decide, Mode::Cancel] {
            let told = book.plan(pen.start(&Token { mode, ..token.clone() }, &about), pen).unwrap();
            assert_eq!(Some(told), book.start(5, mode, &about, pen));
        }
        for answered in answers {
            let told = book.plan(reply(&token, &about, answered), pen).unwrap();
            let recorded = book.answered(&token, &about, answered, pen).unwrap().unwrap();
            assert_eq!(told, recorded);
            let Envelope { id, body } = recorded.report.unwrap().envelope;
            let report = wire::messages::Progress::decode(body).unwrap();
            assert_eq!(report.carried.token.path.len(), token.path.len() + 1);
            let goes_on = recorded.command.is_some();
            let is_old = |replies| is_old_report(id, replies);
            assert_eq!((is_old(token.path.len() + 1), is_old(token.path.len() + 2)), (false, goes_on));
            let command = recorded.command.map(|command| command.envelope.id);
            assert!(!command.is_some_and(|id| is_old_report(id, 9)), "a command is none");
            token = report.carried.token;
        }
        assert_eq!(token.path.len(), 3);
    }

    #[test]
    fn another_version_is_left_to_others() {
        let token = Token { saga: 5, mode: Mode::Execute, path: Path::new() };
        let done = recorded(Outcome::Done(Vec::new()));
        let answered = answer(0, Phase::Action, &done);
        let pen = &mut Pen::for_messages(1);
        assert!(book().answered(&token, &about(3), answered, pen).is_none());
        assert!(Book::new().answered(&token, &about(2), answered, pen).is_none());
        assert!(book().start(5, Mode::Execute, &about(3), pen).is_none());
        let refused = book().plan(reply(&token, &about(3), answered), pen);
        assert!(matches!(refused, Err(Refused::UnknownDefinition { version: 3, .. })), "{refused:?}");
    }

    #[test]
    fn a_reply_to_what_was_not_asked_is_refused_by_both() {
        let token = Token { saga: 5, mode: Mode::Execute, path: Path::new() };
        let done = recorded(Outcome::Done(Vec::new()));
        let answered = answer(1, Phase::Action, &done);
        let (book, pen) = (book(), &mut Pen::for_messages(1));
        let told = book.plan(reply(&token, &about(2), answered), pen);
        let recorded = book.answered(&token, &about(2), answered, pen).unwrap();
        assert!(matches!(told, Err(Refused::Illegal { saga: 5, .. })), "{told:?}");
        assert!(matches!(recorded, Err(Refused::Illegal { saga: 5, .. })), "{recorded:?}");
    }
}
