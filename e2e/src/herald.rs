//! A herald between the replicas of the purchase service: it carries their news, and does to them what a network, a stream that is
//! trimmed and a Redis that fails over do.
//!
//! What never happens: it invents a message, or holds more than [`LOAD_MESSAGES`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use purchase::Feed;
use testkit::Dice;
use tokio::sync::mpsc;

/// Messages that wait at each end at most.
const QUEUE_MESSAGES: usize = 4_096;
/// Copies that are under way at most. What goes beyond is lost.
const LOAD_MESSAGES: usize = 4_096;
/// Messages by which a copy is put off at most.
const PUT_OFF_MESSAGES: u64 = 12;
/// With nothing coming in for so long, what was put off is delivered all the same.
const SILENCE: Duration = Duration::from_millis(2);

/// What becomes of the news.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weather {
    /// All of them arrive, once and in order.
    Fair,
    /// Some are lost, some come twice, many are put off.
    Rough,
    /// None arrives.
    Storm,
}

/// A handle to the herald. Clones share it. Must be made on a tokio runtime.
#[derive(Clone)]
pub struct Herald(Arc<Mutex<State>>);

struct State {
    weather: Weather,
    dice: Dice,
    taken: u64,
    load: Vec<Copied>,
    ears: Vec<mpsc::Sender<Bytes>>,
    mouth: mpsc::Sender<Bytes>,
}

/// One copy of a message, for one replica, to be delivered once so many messages have been taken.
struct Copied {
    due: u64,
    ear: usize,
    message: Bytes,
}

impl std::fmt::Debug for Herald {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let State { weather, taken, load, ears, .. } = &*self.state();
        write!(f, "Herald({weather:?}, taken {taken}, load {}, ears {})", load.len(), ears.len())
    }
}

impl Herald {
    /// A herald in this weather.
    pub fn new(weather: Weather, seed: u64) -> Herald {
        let (mouth, mut told) = mpsc::channel(QUEUE_MESSAGES);
        let (load, ears, dice) = (Vec::new(), Vec::new(), Dice::new(seed));
        let herald = Herald(Arc::new(Mutex::new(State { weather, dice, taken: 0, load, ears, mouth })));
        let state = Arc::downgrade(&herald.0);
        tokio::spawn(async move {
            loop {
                let message = tokio::time::timeout(SILENCE, told.recv()).await;
                let Some(herald) = state.upgrade().map(Herald) else { return };
                match message {
                    Ok(Some(message)) => herald.state().take(message),
                    Ok(None) => return,
                    Err(_) => herald.state().hurry(),
                }
            }
        });
        herald
    }

    /// The weather from now on. What is under way in a storm is lost.
    pub fn weather(&self, weather: Weather) {
        let mut state = self.state();
        state.weather = weather;
        if weather == Weather::Storm {
            state.load.clear();
        }
    }

    /// How many messages it has taken.
    pub fn taken(&self) -> u64 {
        self.state().taken
    }

    /// A replica's end.
    pub(crate) fn feed(&self) -> Feed {
        let (ear, heard) = mpsc::channel(QUEUE_MESSAGES);
        let mut state = self.state();
        state.ears.push(ear);
        Feed::Channel { told: state.mouth.clone(), heard }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn take(&mut self, message: Bytes) {
        self.taken += 1;
        for ear in 0..self.ears.len() {
            let (copies, put_off) = match self.weather {
                Weather::Fair => (1, 1),
                Weather::Rough => (self.dice.below(3), PUT_OFF_MESSAGES),
                Weather::Storm => (0, 1),
            };
            for _ in 0..copies {
                let due = self.taken + self.dice.below(put_off);
                if self.load.len() < LOAD_MESSAGES {
                    self.load.push(Copied { due, ear, message: message.clone() });
                }
            }
        }
        self.deliver(self.taken);
    }

    /// Delivers one that is put off.
    fn hurry(&mut self) {
        let first = self.load.iter().map(|copied| copied.due).min();
        first.into_iter().for_each(|due| self.deliver(due));
    }

    fn deliver(&mut self, due: u64) {
        let ears = &self.ears;
        self.load.retain(|copied| {
            if copied.due <= due {
                // A replica that is gone, or that is behind, has missed it.
                let _ = ears[copied.ear].try_send(copied.message.clone());
            }
            copied.due > due
        });
    }
}
