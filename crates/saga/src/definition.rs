//! What a saga is: its steps in order, and which of them can be undone.
//!
//! The terms are Chris Richardson's (*Microservices Patterns*, chapter 4): compensatable steps come first, then at
//! most one pivot, whose success decides that the saga commits, then retriable steps, which cannot say no.
//! Without a pivot the last compensatable step decides. The order is in the builder's types: what
//! would be out of order has no method to call.

use std::marker::PhantomData;

/// More steps than this in one definition are refused by the builder (a panic: definitions are written, not
/// received).
pub const MAX_STEPS: usize = 64;

/// What can become of a step once it has been asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It may be rejected, and once done it can be undone.
    Compensatable,
    /// It may be rejected; once done the saga commits, and nothing is undone any more.
    Pivot,
    /// It is tried until it is done. It is never rejected and never undone.
    Retriable,
}

/// The place of a step in its definition, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StepIndex(pub u8);

impl StepIndex {
    pub(crate) fn at(self) -> usize {
        usize::from(self.0)
    }
}

impl std::fmt::Display for StepIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// A saga's steps, under a name and a version.
///
/// `S` is the caller's own type for a step, usually an enum: it comes back in [`Ask`](crate::Ask), so that routing a
/// command is a `match` that the compiler checks.
///
/// A definition never changes once sagas run by it: a new version is a new definition beside the old one.
///
/// ```
/// use saga::Definition;
///
/// #[derive(Clone, Copy, Debug, PartialEq)]
/// enum Step { Flight, Hotel, Card, Mail }
///
/// let trip = Definition::new("trip", 1)
///     .compensatable(Step::Flight)
///     .compensatable(Step::Hotel)
///     .pivot(Step::Card)
///     .retriable(Step::Mail)
///     .build();
/// assert_eq!(trip.len(), 4);
/// ```
///
/// A compensatable step after the pivot could never be compensated, so it does not compile:
///
/// ```compile_fail,E0599
/// # use saga::Definition;
/// let _ = Definition::new("trip", 1).compensatable("flight").pivot("card").compensatable("hotel").build();
/// ```
///
/// Nor do a second pivot, a pivot behind a retriable step, and a saga without steps:
///
/// ```compile_fail,E0599
/// # use saga::Definition;
/// let _ = Definition::new("trip", 1).pivot("card").pivot("bank").build();
/// ```
/// ```compile_fail,E0599
/// # use saga::Definition;
/// let _ = Definition::new("trip", 1).retriable("mail").pivot("card").build();
/// ```
/// ```compile_fail,E0599
/// # use saga::Definition;
/// let _: Definition<&str> = Definition::new("trip", 1).build();
/// ```
#[derive(Clone, Debug)]
pub struct Definition<S> {
    name: &'static str,
    version: u32,
    steps: Vec<(S, Kind)>,
}

impl<S: Copy> Definition<S> {
    /// Begins a definition. Messages carry the name and the version, so both stay what they are for as long as a
    /// saga of theirs runs.
    #[allow(clippy::new_ret_no_self, reason = "a definition is begun here and ended by build()")]
    pub fn new(name: &'static str, version: u32) -> Builder<S, Empty> {
        Builder { definition: Definition { name, version, steps: Vec::new() }, stage: PhantomData }
    }

    /// The name that messages carry.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The version that messages carry.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The number of steps, at least 1.
    #[allow(clippy::len_without_is_empty, reason = "a definition is never empty: the builder sees to it")]
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    /// The caller's own name for a step, if there is one at this place.
    pub fn step(&self, index: StepIndex) -> Option<S> {
        self.steps.get(index.at()).map(|(step, _)| *step)
    }

    /// What can become of the step at this place, if there is one.
    pub fn kind(&self, index: StepIndex) -> Option<Kind> {
        self.steps.get(index.at()).map(|(_, kind)| *kind)
    }

    /// All steps in order.
    pub fn steps(&self) -> impl Iterator<Item = (StepIndex, S, Kind)> + '_ {
        (0u8..).zip(&self.steps).map(|(index, (step, kind))| (StepIndex(index), *step, *kind))
    }

    /// The step whose answer decides between commit and rollback: the pivot or, without one, the last compensatable
    /// step. None when every step is retriable: such a saga cannot be cancelled.
    pub fn decider(&self) -> Option<StepIndex> {
        self.steps().filter(|(_, _, kind)| *kind != Kind::Retriable).last().map(|(index, _, _)| index)
    }
}

/// Builder stage: no step yet.
#[derive(Debug)]
pub enum Empty {}
/// Builder stage: compensatable steps only, so all is still open.
#[derive(Debug)]
pub enum Undecided {}
/// Builder stage: the deciding step is behind; only retriable steps may follow.
#[derive(Debug)]
pub enum Decided {}

/// Takes the steps of a [`Definition`] in order. `Stage` says what may come next.
#[derive(Debug)]
pub struct Builder<S, Stage> {
    definition: Definition<S>,
    stage: PhantomData<Stage>,
}

impl<S: Copy, Stage> Builder<S, Stage> {
    fn then<Next>(mut self, step: S, kind: Kind) -> Builder<S, Next> {
        let name = self.definition.name;
        assert!(self.definition.len() < MAX_STEPS, "saga {name:?} has more than {MAX_STEPS} steps");
        self.definition.steps.push((step, kind));
        Builder { definition: self.definition, stage: PhantomData }
    }
}

macro_rules! may_add_any_step {
    ($($stage:ty),*) => {$(
        impl<S: Copy> Builder<S, $stage> {
            /// Adds a step that can be undone.
            pub fn compensatable(self, step: S) -> Builder<S, Undecided> {
                self.then(step, Kind::Compensatable)
            }

            /// Adds the step whose success decides that the saga commits.
            pub fn pivot(self, step: S) -> Builder<S, Decided> {
                self.then(step, Kind::Pivot)
            }

            /// Adds a step that cannot say no; the step before it decides.
            pub fn retriable(self, step: S) -> Builder<S, Decided> {
                self.then(step, Kind::Retriable)
            }
        }
    )*};
}
may_add_any_step!(Empty, Undecided);

impl<S: Copy> Builder<S, Undecided> {
    /// Ends the definition; its last step decides.
    pub fn build(self) -> Definition<S> {
        self.definition
    }
}

impl<S: Copy> Builder<S, Decided> {
    /// Adds a step that cannot say no.
    pub fn retriable(self, step: S) -> Builder<S, Decided> {
        self.then(step, Kind::Retriable)
    }

    /// Ends the definition.
    pub fn build(self) -> Definition<S> {
        self.definition
    }
}
