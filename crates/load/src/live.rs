//! How it goes: a line on standard error, a line in a file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::Path;

use serde::Serialize;

use crate::record::{Failure, Measured};
use crate::report::Percentiles;

/// Seconds between two lines where there is no terminal whose line could be written over.
const PLAIN_EVERY_SECONDS: u64 = 10;
/// Seconds of which not all threads have told yet, at most.
const MOST_BEHIND: usize = 60;

/// One second of the whole load, as a line of the series.
#[derive(Debug, Serialize)]
struct Second<'a> {
    /// Seconds since the load began, at the end of this one.
    t: u64,
    offered: u64,
    accepted: u64,
    completed: u64,
    in_flight: usize,
    errors: &'a BTreeMap<Failure, u64>,
    acceptance_us: Percentiles,
    completion_us: Percentiles,
}

/// Puts the threads' seconds together and tells of them.
pub(crate) struct Live {
    threads: usize,
    series: Option<BufWriter<File>>,
    to: To,
    /// By number: how many threads have told, what they told, purchases under way.
    seconds: BTreeMap<u64, (usize, Measured, usize)>,
}

enum To {
    Nobody,
    Terminal,
    Plain,
}

impl Live {
    /// Tells standard error unless `quiet`, and a file if there is one.
    ///
    /// # Errors
    /// When the file cannot be created.
    pub(crate) fn new(threads: u32, quiet: bool, series: Option<&Path>) -> io::Result<Live> {
        let to = match (quiet, io::stderr().is_terminal()) {
            (true, _) => To::Nobody,
            (false, true) => To::Terminal,
            (false, false) => To::Plain,
        };
        let series = series.map(File::create).transpose()?.map(BufWriter::new);
        Ok(Live { threads: threads as usize, series, to, seconds: BTreeMap::new() })
    }

    /// A thread has told of a second.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn take(&mut self, number: u64, measured: &Measured, open: usize) -> io::Result<()> {
        let (told, sum, open_sum) = self.seconds.entry(number).or_default();
        *told += 1;
        *open_sum += open;
        sum.add(measured);
        if *told == self.threads || self.seconds.len() > MOST_BEHIND {
            if let Some((number, (_, sum, open))) = self.seconds.pop_first() {
                self.tell(number, &sum, open)?;
            }
        }
        Ok(())
    }

    /// There is nothing more to come.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        while let Some((number, (_, sum, open))) = self.seconds.pop_first() {
            self.tell(number, &sum, open)?;
        }
        if matches!(self.to, To::Terminal) {
            // Nobody is left to be told.
            let _ = writeln!(io::stderr());
        }
        self.series.as_mut().map_or(Ok(()), Write::flush)
    }

    fn tell(&mut self, number: u64, sum: &Measured, in_flight: usize) -> io::Result<()> {
        let second = Second {
            t: number + 1,
            offered: sum.counts.offered,
            accepted: sum.counts.accepted,
            completed: sum.counts.completed(),
            in_flight,
            errors: &sum.counts.failures,
            acceptance_us: Percentiles::of(&sum.acceptance),
            completion_us: Percentiles::of(&sum.completion),
        };
        // A progress line that cannot be written is no reason to end.
        let _ = match self.to {
            To::Nobody => Ok(()),
            To::Terminal => write!(io::stderr(), "\r\x1b[2K{}", second.line()),
            To::Plain if second.t % PLAIN_EVERY_SECONDS == 0 => writeln!(io::stderr(), "{}", second.line()),
            To::Plain => Ok(()),
        };
        let Some(series) = &mut self.series else { return Ok(()) };
        serde_json::to_writer(&mut *series, &second)?;
        series.write_all(b"\n")?;
        series.flush()
    }
}

impl Second<'_> {
    fn line(&self) -> String {
        let Second { t, offered, accepted, completed, in_flight, errors, acceptance_us, completion_us } =
            self;
        let errors: u64 = errors.values().sum();
        format!(
            "{t:>4} s  {offered}/s sent  {accepted}/s accepted ({})  {completed}/s completed ({})  \
             {in_flight} under way  {errors} errors",
            acceptance_us.short(),
            completion_us.short(),
        )
    }
}
