//! The known bugs: each is a change to one file that some test must notice.
//!
//! They are the proof that the tests can fail. A mutant names the one test command that is expected to kill
//! it, so that a run takes minutes; that command has to pass on the tree as it is.

/// One bug.
pub(crate) struct Mutant {
    /// What it is called on the command line.
    pub(crate) name: &'static str,
    /// The file that it changes, relative to the workspace.
    pub(crate) file: &'static str,
    /// What it replaces. It stands in the file exactly once.
    pub(crate) find: &'static str,
    /// What it puts there.
    pub(crate) replace: &'static str,
    /// The arguments of the `cargo` that must fail. The first is `test`.
    pub(crate) test: &'static [&'static str],
    /// What would go wrong for a customer or an operator.
    pub(crate) why: &'static str,
}

/// All of them.
pub(crate) const MUTANTS: &[Mutant] = &[
    Mutant {
        name: "bus-forgets-what-a-dead-handler-held",
        file: "crates/bus/src/embedded.rs",
        find: "        if !self.deliveries.is_empty() {\n            self.queue.give_back(",
        replace: "        if self.deliveries.len() > 1_000_000 {\n            self.queue.give_back(",
        test: &["test", "--package", "bus"],
        why: "a handler that panics takes its batch with it: those sagas stand still until they are driven again",
    },
    Mutant {
        name: "bus-bound-ignores-what-is-in-hand",
        file: "crates/bus/src/embedded.rs",
        find: "self.depth().held() + envelopes > capacity_envelopes",
        replace: "self.ready.len() + envelopes > capacity_envelopes",
        test: &["test", "--package", "bus"],
        why: "memory grows with everything that waits for its retry",
    },
];
