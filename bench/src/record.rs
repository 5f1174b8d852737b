//! What a measurement leaves: its figures, how they came about, and what the tools said, in one JSON file each.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::machine::Machine;

/// What a figure counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Unit {
    /// Things a second.
    PerSecond,
    /// Milliseconds.
    Millis,
    /// Microseconds.
    Micros,
    /// Nanoseconds.
    Nanos,
    /// Bytes.
    Bytes,
    /// Things.
    Count,
}

/// What is asked of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Asked {
    /// At least this part of what it is compared with.
    RatioAtLeast(f64),
    /// At most this, in the figure's unit.
    AtMost(f64),
}

/// One figure. It is the median of its runs; what it is compared with was measured between them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Figure {
    /// What was measured.
    pub(crate) what: String,
    /// What the numbers are.
    pub(crate) unit: Unit,
    /// One number a run.
    pub(crate) runs: Vec<f64>,
    /// The same of what it is compared with; empty where there is nothing.
    pub(crate) beside: Vec<f64>,
    /// What is asked of it, if anything.
    pub(crate) asked: Option<Asked>,
}

impl Figure {
    pub(crate) fn new(what: impl Into<String>, unit: Unit, runs: impl Into<Vec<f64>>) -> Figure {
        Figure { what: what.into(), unit, runs: runs.into(), beside: Vec::new(), asked: None }
    }

    pub(crate) fn beside(mut self, runs: impl Into<Vec<f64>>) -> Figure {
        self.beside = runs.into();
        self
    }

    pub(crate) fn asked(mut self, asked: Asked) -> Figure {
        self.asked = Some(asked);
        self
    }

    /// The figure itself; none without a run.
    pub(crate) fn value(&self) -> Option<f64> {
        median(&self.runs)
    }

    /// The figure as a part of what it is compared with.
    pub(crate) fn ratio(&self) -> Option<f64> {
        let beside = median(&self.beside).filter(|beside| *beside != 0.0)?;
        Some(self.value()? / beside)
    }

    /// Whether it is what was asked; none where nothing was asked or measured.
    pub(crate) fn met(&self) -> Option<bool> {
        match self.asked? {
            Asked::RatioAtLeast(ratio) => self.ratio().map(|it| it >= ratio),
            Asked::AtMost(most) => self.value().map(|it| it <= most),
        }
    }
}

/// The middle one, or the mean of the two in the middle.
pub(crate) fn median(runs: &[f64]) -> Option<f64> {
    let mut sorted = runs.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match (sorted.len(), sorted.len() % 2) {
        (0, _) => None,
        (_, 1) => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

/// How something went over time: one row a look, the first column is seconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Series {
    pub(crate) columns: Vec<String>,
    pub(crate) rows: Vec<Vec<f64>>,
}

/// When, of what and where a measurement was taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Taken {
    /// The day, as 2026-01-31, UTC.
    pub(crate) date: String,
    /// The commit; `+changes` if the tree was another one.
    pub(crate) commit: String,
    pub(crate) machine: Machine,
}

/// All that one measurement leaves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) taken: Taken,
    pub(crate) figures: Vec<Figure>,
    /// What a reader has to know to believe the figures.
    pub(crate) notes: Vec<String>,
    pub(crate) series: Option<Series>,
    /// What the tools said, word for word.
    pub(crate) raw: Vec<serde_json::Value>,
}

/// What a measurement found out, before it is said when.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    pub(crate) figures: Vec<Figure>,
    pub(crate) notes: Vec<String>,
    pub(crate) series: Option<Series>,
    pub(crate) raw: Vec<serde_json::Value>,
}

impl Record {
    pub(crate) fn new(taken: Taken, findings: Findings) -> Record {
        let Findings { figures, notes, series, raw } = findings;
        Record { taken, figures, notes, series, raw }
    }

    /// The figure of this name.
    pub(crate) fn figure(&self, what: &str) -> Option<&Figure> {
        self.figures.iter().find(|figure| figure.what == what)
    }

    /// Reads the record of this name, if there is one.
    ///
    /// # Errors
    /// When there is one and it cannot be read.
    pub(crate) fn load(dir: &Path, name: &str) -> io::Result<Option<Record>> {
        match fs::read(file(dir, name)) {
            Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes the record of this name.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn save(&self, dir: &Path, name: &str) -> io::Result<()> {
        fs::create_dir_all(dir)?;
        fs::write(file(dir, name), serde_json::to_string_pretty(self)? + "\n")
    }
}

fn file(dir: &Path, name: &str) -> PathBuf {
    dir.join(name).with_extension("json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_nothing_is_nothing() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0]), Some(2.5));
    }

    #[test]
    fn a_figure_is_judged_by_what_is_asked_of_it() {
        let rate = Figure::new("rate", Unit::PerSecond, [10.0, 30.0, 20.0]).beside([40.0]);
        assert_eq!((rate.ratio(), rate.met()), (Some(0.5), None));
        assert_eq!(rate.clone().asked(Asked::RatioAtLeast(0.5)).met(), Some(true));
        assert_eq!(rate.asked(Asked::RatioAtLeast(0.51)).met(), Some(false));
        let time = Figure::new("time", Unit::Millis, [3.0]).asked(Asked::AtMost(3.0));
        assert_eq!((time.ratio(), time.met()), (None, Some(true)));
        assert_eq!(Figure { runs: vec![3.1], ..time.clone() }.met(), Some(false));
        assert_eq!(Figure { runs: Vec::new(), ..time }.met(), None, "nothing measured is not met");
    }

    #[test]
    fn a_ratio_to_nothing_is_none() {
        assert_eq!(Figure::new("rate", Unit::Count, [1.0]).beside([0.0]).ratio(), None);
    }
}
