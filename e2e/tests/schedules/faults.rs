//! What a schedule does to which message.

use std::collections::VecDeque;

use saga::Mode;

/// What happens at one delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing unusual.
    None,
    /// The message is delivered, and comes again at once.
    Twice,
    /// It is delivered, and comes again behind the delivery of this number.
    Again { behind: u32 },
    /// It is held back until the delivery of this number is over.
    Late { until: u32 },
    /// It never arrives.
    Lost,
    /// Its handler dies when so many of the messages that it calls for are published, so it comes again. A participant's
    /// handler has committed by then.
    Killed { published: usize },
    /// Its participant's database fails: the transaction is rolled back, and it comes again.
    Fails,
    /// It is delivered, and one more driver starts the saga, in this mode.
    Start(Mode),
    /// All that is under way is lost: the bus has died.
    Forgotten,
}

/// What is to happen to a saga. When a schedule is over, everything goes well and in order.
#[derive(Clone, Debug)]
pub enum Schedule {
    /// Oldest message first, with these faults at the deliveries of these numbers, from 0.
    Script(Vec<(u32, Fault)>),
    /// Any message, any fault: two numbers each.
    Random(VecDeque<(u8, u8)>),
}

impl Schedule {
    /// Everything goes well.
    pub fn calm() -> Schedule {
        Schedule::Script(Vec::new())
    }

    /// One fault.
    pub fn one(number: u32, fault: Fault) -> Schedule {
        Schedule::Script(vec![(number, fault)])
    }

    /// What happens at the delivery of this number, and to which of the messages that are there, oldest first.
    pub fn next(&mut self, number: u32, messages: usize) -> (usize, Fault) {
        match self {
            Schedule::Script(faults) => {
                let fault = faults.iter().find(|(at, _)| *at == number);
                (0, fault.map_or(Fault::None, |(_, fault)| *fault))
            }
            Schedule::Random(choices) => match choices.pop_front() {
                Some((which, what)) => (usize::from(which) % messages, random_fault(what, number)),
                None => (0, Fault::None),
            },
        }
    }

    /// How many messages may be taken before any is handled, so that a batch has several of one saga.
    pub fn at_once(&self) -> usize {
        match self {
            Schedule::Script(_) => 1,
            Schedule::Random(choices) => choices.front().map_or(1, |(which, _)| usize::from(which % 3) + 1),
        }
    }
}

fn random_fault(what: u8, number: u32) -> Fault {
    match what % 24 {
        0..=9 => Fault::None,
        10 | 11 => Fault::Twice,
        12 => Fault::Again { behind: number + u32::from(what / 24) },
        13 => Fault::Late { until: number + u32::from(what / 24) },
        14 | 15 => Fault::Lost,
        16 => Fault::Killed { published: 0 },
        17 => Fault::Killed { published: 1 },
        18 => Fault::Fails,
        19 | 20 => Fault::Start(Mode::Execute),
        21 => Fault::Start(Mode::Decide),
        22 => Fault::Start(Mode::Cancel),
        _ => Fault::Forgotten,
    }
}

/// Every single fault at every delivery of a saga that has so many when all goes well, every pair of deliveries in the other
/// order, and a repetition behind every later one; then a second driver from every delivery on, in every mode, alone
/// and with a third one that decides.
pub fn ordeals(deliveries: u32) -> Vec<Schedule> {
    let mut all = vec![Schedule::calm()];
    let each_twice = (0..4 * deliveries).map(|number| (number, Fault::Twice)).collect();
    all.push(Schedule::Script(each_twice));
    for number in 0..deliveries {
        let killed = |published| Fault::Killed { published };
        let one_fault =
            [Fault::Twice, Fault::Lost, Fault::Forgotten, Fault::Fails, killed(0), killed(1), killed(2)];
        all.extend(one_fault.map(|fault| Schedule::one(number, fault)));
        for other in number + 1..deliveries {
            all.push(Schedule::one(number, Fault::Again { behind: other }));
            all.push(Schedule::one(number, Fault::Late { until: other }));
        }
        for mode in [Mode::Execute, Mode::Decide, Mode::Cancel] {
            all.push(Schedule::one(number, Fault::Start(mode)));
            for other in (number + 1..deliveries).step_by(3) {
                let faults = vec![(number, Fault::Start(mode)), (other, Fault::Start(Mode::Decide))];
                all.push(Schedule::Script(faults));
            }
        }
    }
    all
}
