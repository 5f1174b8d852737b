//! From one message to the messages that it calls for: pure, so that a test can assert them.

use bus::{Envelope, EnvelopeId, Subject};
use bytes::Bytes;
use saga::{Definition, Effects, Illegal, Phase, Standing, StepIndex};
use wire::messages::{self, About, Carried, DecodeError, Recorded, Reply, Start, ToOrchestrator};

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

/// The messages to publish for one.
type Messages = Vec<Outgoing>;
type Drive = Box<dyn Fn(Carried, Option<Answered>) -> Result<Messages, Refused> + Send + Sync>;

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
            self.find(name, version).is_none(),
            "definition {name:?} version {version} is in the book twice"
        );
        let drive = move |carried: Carried, answered: Option<Answered>| {
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
            Ok(messages(effects, &about, commands, progress))
        };
        self.0.push(Known { name, version, drive: Box::new(drive) });
        self
    }

    /// The messages that one message calls for.
    ///
    /// # Errors
    /// [`Refused`] when nothing can ever be done about it.
    pub fn plan(&self, body: Bytes) -> Result<Messages, Refused> {
        let (carried, answered) = match ToOrchestrator::decode(body)? {
            ToOrchestrator::Start(Start { carried }) => (carried, None),
            ToOrchestrator::Reply(Reply { carried, step, phase, recorded }) => {
                (carried, Some(Answered { step, phase, recorded }))
            }
        };
        let (name, version) = (carried.about.definition(), carried.about.version());
        match self.find(name, version) {
            Some(known) => (known.drive)(carried, answered),
            None => Err(Refused::UnknownDefinition { name: name.to_owned(), version }),
        }
    }

    fn find(&self, name: &str, version: u32) -> Option<&Known> {
        self.0.iter().find(|known| known.name == name && known.version == version)
    }
}

/// Effects as messages. Each carries the saga as it now stands; its id is a function of what it says.
fn messages<S: Copy>(
    effects: Effects<S>,
    about: &About,
    commands: fn(S) -> Subject,
    progress: Subject,
) -> Messages {
    let Effects { token, ask, tell } = effects;
    let saga = token.saga;
    let place = u64::from(u8::try_from(token.path.len()).unwrap_or(u8::MAX)) | (token.mode as u64) << 8;
    let mut outgoing = Vec::with_capacity(2);
    if let Some(standing) = tell {
        let body = messages::progress(&token, about);
        let envelope = Envelope { id: EnvelopeId::of(saga, 2 << 40 | place), body };
        let may_be_lost = standing == Standing::Open;
        outgoing.push(Outgoing { subject: progress, envelope, may_be_lost });
    }
    if let Some(ask) = ask {
        let tag = 3 << 40 | u64::from(ask.index.0) << 32 | (ask.phase as u64) << 16 | place;
        let body = messages::command(&token, about, ask.index, ask.phase);
        let envelope = Envelope { id: EnvelopeId::of(saga, tag), body };
        outgoing.push(Outgoing { subject: commands(ask.step), envelope, may_be_lost: false });
    }
    outgoing
}
