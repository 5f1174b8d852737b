//! A trip: a flight and a hotel, which can be given back, a card, whose payment decides, and a mail, which is sent in
//! the end, however long that takes.
//!
//! ```text
//! cargo run -p saga --example trip            # a schedule by seed 1
//! cargo run -p saga --example trip -- 7       # another one; the histories stay the same
//! ```
//!
//! The example plays everything that surrounds the engine, each part in its simplest form:
//!
//! - [`Desk`]: a participant. It keeps every reply that it has ever given and gives it again when it is asked again.
//! - [`Air`]: a network that loses messages, brings them twice and in any order.
//! - [`World`]: carries out the engine's [`Effects`], and starts a saga again whenever nothing is in the air.
//!
//! Whatever the air does with the messages, a trip has one history, which this prints.
#![allow(clippy::print_stdout, reason = "it is an example: it shows something")]

use std::collections::HashMap;

use saga::{
    Ask, Definition, Effects, End, Illegal, Mode, Outcome, Path, Phase, Position, Reason, Reply, Token,
    advance, events, start,
};

/// The caller's own names for the steps. The engine hands them back in each [`Ask`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    Flight,
    Hotel,
    Card,
    Mail,
}

/// What a trip is. Flight and hotel can be given back. Once the card has paid, the trip takes place, so the mail must
/// get through some time.
fn trip() -> Definition<Step> {
    Definition::new("trip", 1)
        .compensatable(Step::Flight)
        .compensatable(Step::Hotel)
        .pivot(Step::Card)
        .retriable(Step::Mail)
        .build()
}

/// How a desk takes a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    /// It agrees.
    Agrees,
    /// It has a reason to say no. That is a business answer, and final.
    Refuses(&'static str),
    /// It gives no answer so many times, as a server that is down. That is no business answer: nothing is
    /// recorded, and it must be asked again.
    Silent { times: u32 },
}

/// A participant: what it has answered, and what it has done.
///
/// A real one keeps both in one database and writes them in one transaction. A map that survives everything does here.
#[derive(Debug)]
struct Desk {
    manner: Manner,
    silences: u32,
    /// The recorded replies to actions. A [`Reason::Cancelled`] is a tombstone: it stands for an action that never was
    /// and never will be.
    actions: HashMap<u64, (Outcome, u64)>,
    /// The recorded replies to compensations.
    compensations: HashMap<u64, (Outcome, u64)>,
    /// For whom there is a seat, a room, a payment, a mail.
    booked: Vec<u64>,
}

impl Desk {
    fn new(manner: Manner) -> Desk {
        let (actions, compensations) = (HashMap::new(), HashMap::new());
        Desk { manner, silences: 0, actions, compensations, booked: Vec::new() }
    }

    /// The barrier: has an effect at most once, and answers what it has answered before. None is no answer.
    fn ask(&mut self, saga: u64, phase: Phase, now: u64) -> Option<(Outcome, u64)> {
        let acted = self.actions.get(&saga).cloned();
        match (phase, acted) {
            // Whoever asks for the second time, or only wants to know, gets the first answer.
            (Phase::Action | Phase::Cancel, Some(recorded)) => Some(recorded),
            (Phase::Action, None) => {
                let outcome = self.act(saga)?;
                Some(self.actions.entry(saga).or_insert((outcome, now)).clone())
            }
            // A cancellation that comes first buries the action for good.
            (Phase::Cancel, None) => {
                let tombstone = (Outcome::Rejected(Reason::Cancelled), now);
                Some(self.actions.entry(saga).or_insert(tombstone).clone())
            }
            (Phase::Compensation, acted) => {
                if let Some(recorded) = self.compensations.get(&saga) {
                    return Some(recorded.clone());
                }
                match acted {
                    // So does a compensation.
                    None => drop(self.actions.insert(saga, (Outcome::Rejected(Reason::Cancelled), now))),
                    Some((Outcome::Done(_), _)) => self.booked.retain(|booked| *booked != saga),
                    Some(_) => {}
                }
                Some(self.compensations.entry(saga).or_insert((Outcome::Compensated, now)).clone())
            }
        }
    }

    fn act(&mut self, saga: u64) -> Option<Outcome> {
        match self.manner {
            Manner::Silent { times } if self.silences < times => {
                self.silences += 1;
                None
            }
            Manner::Agrees | Manner::Silent { .. } => {
                self.booked.push(saga);
                Some(Outcome::Done(format!("booking {saga}").into_bytes()))
            }
            Manner::Refuses(why) => Some(Outcome::Rejected(Reason::Refused(why.to_owned()))),
        }
    }
}

/// A message on its way. The saga's whole state is in it; nobody keeps it in between.
#[derive(Clone, Debug)]
enum Message {
    /// To the orchestrator: drive this saga from its first step.
    Start { saga: u64, mode: Mode },
    /// To a desk.
    Command { token: Token, ask: Ask<Step> },
    /// To the orchestrator.
    Reply { token: Token, reply: Reply },
    /// To the traveller: how far the trip is.
    Progress { path: Path },
}

/// A network without manners.
#[derive(Debug)]
struct Air {
    messages: Vec<Message>,
    random: Random,
}

impl Air {
    fn send(&mut self, message: Message) {
        self.messages.push(message);
    }

    /// Any of the messages, in no order: one in eight is lost, one in four will come again.
    fn deliver(&mut self) -> Option<Message> {
        let message = self.messages.swap_remove(self.random.below(self.messages.len())?);
        match self.random.below(8)? {
            0 => return self.deliver(),
            1 | 2 => self.messages.push(message.clone()),
            _ => {}
        }
        Some(message)
    }
}

/// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): the same seed, the same schedule.
#[derive(Debug)]
struct Random(u64);

impl Random {
    /// A number below `bound`, or None when there is none.
    fn below(&mut self, bound: usize) -> Option<usize> {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        z.checked_rem(bound as u64).map(|number| number as usize)
    }
}

/// Everything around the engine.
struct World {
    definition: Definition<Step>,
    desks: HashMap<Step, Desk>,
    air: Air,
    now: u64,
    /// The longest path that the traveller was told: it implies all the others.
    told: Path,
    end: Option<End>,
}

/// So many starts are enough, by a wide margin, for every schedule and every silence in this example.
const MAX_STARTS: u32 = 1_000;
/// From this start on the traveller is tired of waiting.
const PATIENCE_STARTS: u32 = 100;

impl World {
    fn new(seed: u64, manners: [Manner; 4]) -> World {
        let steps = [Step::Flight, Step::Hotel, Step::Card, Step::Mail];
        World {
            definition: trip(),
            desks: steps.into_iter().zip(manners.map(Desk::new)).collect(),
            air: Air { messages: Vec::new(), random: Random(seed) },
            now: 0,
            told: Path::new(),
            end: None,
        }
    }

    /// Starts a trip, and starts it again when all of its messages are gone, until it has ended. That is all there is to
    /// recovery: each desk answers what it has answered, so a new start comes to where the old one was, and on.
    ///
    /// A trip that takes too long is cancelled. The card's desk decides whether that still can be.
    fn travel(&mut self, saga: u64) -> Result<End, Illegal> {
        for starts in 1..=MAX_STARTS {
            let mode = if starts < PATIENCE_STARTS { Mode::Execute } else { Mode::Decide };
            self.air.send(Message::Start { saga, mode });
            while let Some(message) = self.air.deliver() {
                self.now += 1;
                self.handle(message)?;
            }
            // Not a moment before the air is empty: what still comes after the end must not change it.
            if let Some(end) = self.end {
                return Ok(end);
            }
        }
        panic!("a trip did not end after {MAX_STARTS} starts");
    }

    fn handle(&mut self, message: Message) -> Result<(), Illegal> {
        match message {
            Message::Start { saga, mode } => self.carry_out(start(&self.definition, saga, mode)),
            Message::Reply { token, reply } => self.carry_out(advance(&self.definition, token, reply)?),
            Message::Command { token, ask } => {
                let desk = self.desks.get_mut(&ask.step).expect("each step has a desk");
                if let Some((outcome, at)) = desk.ask(token.saga, ask.phase, self.now) {
                    let reply = Reply { step: ask.index, phase: ask.phase, outcome, at };
                    self.air.send(Message::Reply { token, reply });
                }
            }
            Message::Progress { path } => self.hear(path)?,
        }
        Ok(())
    }

    /// The engine says what is to be done; this does it.
    fn carry_out(&mut self, effects: Effects<Step>) {
        let Effects { token, ask, tell } = effects;
        if tell.is_some() {
            self.air.send(Message::Progress { path: token.path.clone() });
        }
        if let Some(ask) = ask {
            self.air.send(Message::Command { token, ask });
        }
    }

    /// News may come late, twice and in any order, but never contradict each other: of two paths, one begins with the
    /// other.
    fn hear(&mut self, path: Path) -> Result<(), Illegal> {
        let common = path.len().min(self.told.len());
        assert_eq!(path.entries()[..common], self.told.entries()[..common], "a trip has two histories");
        if path.len() > self.told.len() {
            if let Position::Ended(end) = path.position(&self.definition)? {
                self.end = Some(end);
            }
            self.told = path;
        }
        Ok(())
    }

    /// The traveller's history: a pure function of the path.
    fn history(&self) -> Result<Vec<String>, Illegal> {
        let line = |event: &saga::Event<'_, Step>| {
            let why = event.reason.map(|reason| format!(" ({reason})")).unwrap_or_default();
            format!("{:<6} {:?}{why}", format!("{:?}", event.step), event.status)
        };
        Ok(events(&self.definition, 0, &self.told)?.iter().map(line).collect())
    }

    /// Where there is a booking now.
    fn booked(&self, saga: u64) -> Vec<Step> {
        let has = |(_, step, _): &(_, Step, _)| self.desks[step].booked.contains(&saga);
        self.definition.steps().filter(has).map(|(_, step, _)| step).collect()
    }
}

/// The trips to show: what they are called, and how the four desks take them.
const TRIPS: [(&str, [Manner; 4]); 4] = {
    use Manner::{Agrees, Refuses, Silent};
    [
        ("All goes well; the mail takes a few tries", [Agrees, Agrees, Agrees, Silent { times: 3 }]),
        ("The hotel is full", [Agrees, Refuses("no room left"), Agrees, Agrees]),
        ("The card is declined", [Agrees, Agrees, Refuses("above the limit"), Agrees]),
        (
            "The hotel never answers; the trip is cancelled",
            [Agrees, Silent { times: u32::MAX }, Agrees, Agrees],
        ),
    ]
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let seed = std::env::args().nth(1).map(|text| text.parse()).transpose()?.unwrap_or(1);
    for (saga, (title, manners)) in (1..).zip(TRIPS) {
        let mut world = World::new(seed, manners);
        let end = world.travel(saga)?;
        println!("{title}");
        for (number, line) in (1..).zip(world.history()?) {
            println!("  {number}. {line}");
        }
        println!("  {end:?} after {} messages; booked: {:?}\n", world.now, world.booked(saga));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trip_has_one_history_whatever_the_air_does() {
        let expected: [(End, &[Step], &[&str]); 4] = [
            (
                End::Committed,
                &[Step::Flight, Step::Hotel, Step::Card, Step::Mail],
                &[
                    "Flight Execute",
                    "Flight Success",
                    "Hotel  Execute",
                    "Hotel  Success",
                    "Card   Execute",
                    "Card   Success",
                    "Mail   Execute",
                    "Mail   Success",
                ],
            ),
            (
                End::Aborted,
                &[],
                &[
                    "Flight Execute",
                    "Flight Success",
                    "Hotel  Execute",
                    "Hotel  Failed (no room left)",
                    "Flight RolledBack",
                ],
            ),
            (
                End::Aborted,
                &[],
                &[
                    "Flight Execute",
                    "Flight Success",
                    "Hotel  Execute",
                    "Hotel  Success",
                    "Card   Execute",
                    "Card   Failed (above the limit)",
                    "Hotel  RolledBack",
                    "Flight RolledBack",
                ],
            ),
            (
                End::Aborted,
                &[],
                &[
                    "Flight Execute",
                    "Flight Success",
                    "Hotel  Execute",
                    "Hotel  Failed (cancelled)",
                    "Flight RolledBack",
                ],
            ),
        ];
        for seed in 0..500 {
            for ((title, manners), (end, booked, history)) in TRIPS.iter().zip(&expected) {
                let mut world = World::new(seed, *manners);
                assert_eq!(world.travel(9).unwrap(), *end, "{title}, seed {seed}");
                assert_eq!(world.booked(9), *booked, "{title}, seed {seed}");
                assert_eq!(world.history().unwrap(), *history, "{title}, seed {seed}");
            }
        }
    }
}
