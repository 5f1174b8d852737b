//! From one message to the messages that it calls for: pure, so that a test can assert them.

use bus::{Envelope, EnvelopeId, Subject};
use bytes::Bytes;
use saga::{Definition, Effects, Illegal, Phase, Standing, StepIndex};
use wire::messages::{About, Carried, DecodeError, Pen, Recorded, Reply, Start, ToOrchestrator};

/// A message that an orchestrator cannot act upon, now or later.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// It cannot be understood.
    #[error(transparent)]
    Undecodable(#[from] DecodeError),
    /// Its saga is none of this orchestrator's.
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

impl IntoIterator for Messages {
    type Item = Outgoing;
    type IntoIter = std::iter::Chain<std::option::IntoIter<Outgoing>, std::option::IntoIter<Outgoing>>;

    fn into_iter(self) -> Self::IntoIter {
        self.report.into_iter().chain(self.command)
    }
}

type Drive = Box<dyn Fn(Carried, Option<Answered>, &mut Pen) -> Result<Messages, Refused> + Send + Sync>;

/// A reply without the saga that it came with.
struct Answered {
    step: StepIndex,
    phase: Phase,
    recorded: Bytes,
}

/// The sagas that an orchestrator drives, by definition name and version.
#[derive(Default)]
pub struct Book(Vec<Known>);

/// A saga by its definition's name and version. There are few: a scan beats a hash.
struct Known {
    name: &'static str,
    version: u32,
    drive: Drive,
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
    /// When the definition's name and version are in the book already.
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
        let drive = move |carried: Carried, answered: Option<Answered>, pen: &mut Pen| {
            let Carried { token, about } = carried;
            let saga = token.saga;
            let effects = match answered {
                None => saga::start(&definition, saga, token.mode),
                Some(Answered { step, phase, recorded }) => {
                    let Recorded { outcome, at } = Recorded::decode(&recorded)?;
                    let reply = saga::Reply { step, phase, outcome, at };
                    saga::advance(&definition, token, reply)
                        .map_err(|illegal| Refused::Illegal { saga, illegal })?
                }
            };
            Ok(messages(effects, about, commands, progress, pen))
        };
        self.0.push(Known { name, version, drive: Box::new(drive) });
        self
    }

    /// The messages that one message calls for, written with this pen.
    ///
    /// # Errors
    /// [`Refused`] when nothing can ever be done about it.
    pub fn plan(&self, body: Bytes, pen: &mut Pen) -> Result<Messages, Refused> {
        let (carried, answered) = match ToOrchestrator::decode(body)? {
            ToOrchestrator::Start(Start { carried }) => (carried, None),
            ToOrchestrator::Reply(Reply { carried, step, phase, recorded }) => {
                (carried, Some(Answered { step, phase, recorded }))
            }
        };
        match self.0.iter().find(|known| carried.about.is_of(known.name, known.version)) {
            Some(known) => (known.drive)(carried, answered, pen),
            None => Err(Refused::UnknownDefinition {
                name: carried.about.definition().to_owned(),
                version: carried.about.version(),
            }),
        }
    }
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
    let place = u64::from(u8::try_from(token.path.len()).unwrap_or(u8::MAX)) | (token.mode as u64) << 8;
    let report = tell.map(|standing| {
        let body = pen.progress(&token, &about);
        let envelope = Envelope { id: EnvelopeId::of(saga, 2 << 40 | place), body };
        Outgoing { subject: progress, envelope, may_be_lost: standing == Standing::Open }
    });
    let command = ask.map(|ask| {
        let tag = 3 << 40 | u64::from(ask.index.0) << 32 | (ask.phase as u64) << 16 | place;
        let body = pen.command(&token, &about, ask.index, ask.phase);
        let envelope = Envelope { id: EnvelopeId::of(saga, tag), body };
        Outgoing { subject: commands(ask.step), envelope, may_be_lost: false }
    });
    Messages { report, command, about }
}
