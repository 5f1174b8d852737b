//! The invariants of the whole shop, checked on its databases: what I1 to I6, I10 and I12 of the design mean, row by row.
//!
//! The databases, files or on a server ([`Books`]), are opened read-only, each in one snapshot, so this may look at a shop that runs, if it is quiet, as well as at
//! one that was killed. Reading ([`check`]) and judging are apart: the judgement is a pure function of the rows.
//!
//! What never happens: a violation that is not named with the ids at fault, or one that hides behind another: no check is left
//! out because an earlier one has failed.

mod judge;
mod rows;
mod source;
mod violation;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

pub use source::{Books, CheckError, ReadError};
pub use violation::{Database, Effect, Misfiling, Table, Violation};

/// What the test knows and the databases must agree with.
#[derive(Clone, Debug, Default)]
pub struct Expected {
    /// Every product with the stock that it was created with.
    pub stock: BTreeMap<u64, i64>,
    /// Every purchase that was answered 201.
    pub acknowledged: BTreeSet<u64>,
    /// For each Idempotency-Key that was answered 201, with which purchase. The keys of two customers differ, too.
    pub keys: BTreeMap<String, u64>,
    /// Purchases that the test has poisoned, so that they may need an operator.
    pub parked: BTreeSet<u64>,
    /// Purchases may still be under way.
    pub may_be_open: bool,
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Report {
    /// Purchases in the database.
    pub accepted: usize,
    /// Those that succeeded.
    pub committed: usize,
    /// Those that failed or were cancelled.
    pub aborted: usize,
    /// Those that need an operator.
    pub parked: usize,
    /// Those that are under way.
    pub open: usize,
    /// What must never be.
    pub violations: Vec<Violation>,
}

impl Report {
    /// Ends the test if anything is wrong.
    ///
    /// # Panics
    /// With every violation, if there is one.
    pub fn assert_clean(&self) {
        assert!(self.violations.is_empty(), "{self}");
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { accepted, committed, aborted, parked, open, violations } = self;
        write!(
            f,
            "{accepted} purchases: {committed} committed, {aborted} aborted, {parked} parked, {open} open; "
        )?;
        write!(f, "{} violations", violations.len())?;
        violations.iter().try_for_each(|violation| write!(f, "\n  {violation}"))
    }
}

/// Checks a shop's databases.
///
/// # Errors
/// [`CheckError`] when a database cannot be read.
pub fn check(books: impl Into<Books>, expected: &Expected) -> Result<Report, CheckError> {
    let rows = rows::read(&books.into())?;
    Ok(judge::judge(&rows, expected))
}
