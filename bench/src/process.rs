//! What a process has used, as /proc tells it.

use std::fs;
use std::io;
use std::time::Duration;

use crate::machine::{field, kib_to_bytes};

/// Clock ticks a second in /proc/PID/stat: fixed in Linux's interface to programs (USER_HZ).
const TICKS_PER_SECOND: u64 = 100;

/// Processor time that a process has used, of all its threads, in it and in the kernel.
///
/// # Errors
/// When there is no such process.
pub(crate) fn cpu_time(pid: u32) -> io::Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let ticks = ticks(&stat).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, stat))?;
    Ok(Duration::from_millis(ticks * (1_000 / TICKS_PER_SECOND)))
}

/// `utime` and `stime`, the fields 14 and 15. The name in field 2 may hold anything, parentheses too.
fn ticks(stat: &str) -> Option<u64> {
    let (_, behind_name) = stat.rsplit_once(')')?;
    let mut fields = behind_name.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(next()? + next()?)
}

/// Memory of a process, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Memory {
    /// Resident now.
    pub(crate) resident: u64,
    /// The most that was ever resident.
    pub(crate) peak: u64,
}

/// Memory that a process uses.
///
/// # Errors
/// When there is no such process.
pub(crate) fn memory(pid: u32) -> io::Result<Memory> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let bytes = |name| field(&status, name).map_or(0, kib_to_bytes);
    Ok(Memory { resident: bytes("VmRSS"), peak: bytes("VmHWM") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_found_behind_any_name() {
        let stat = "7 (a) (b 1 2) S 1 7 7 0 -1 4194304 1 2 3 4 250 50 8 9 20 0 1 0 5 6 7";
        assert_eq!(ticks(stat), Some(300));
        assert_eq!(ticks("7 (a) S 1"), None);
    }

    #[test]
    fn this_process_uses_something() {
        let memory = memory(std::process::id()).expect("this process is there");
        assert!(memory.resident > 0 && memory.peak >= memory.resident);
        cpu_time(std::process::id()).expect("this process is there");
    }
}
