//! What machine it is, without saying whose.

use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use wire::time::UnixMillis;

/// What of a machine makes figures differ.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Machine {
    /// The processor's name, as it gives it.
    pub(crate) processor: String,
    /// Logical processors that this process may use.
    pub(crate) processors: usize,
    /// Memory, in bytes.
    pub(crate) memory_bytes: u64,
    /// The kernel's version.
    pub(crate) kernel: String,
    /// The file system that the databases are on.
    pub(crate) file_system: String,
}

/// A disk is needed, and the data directory is in memory.
#[derive(Debug, thiserror::Error)]
#[error(
    "the target directory is on {0}, in memory: what is durable is measured on a disk (set CARGO_TARGET_DIR)"
)]
pub(crate) struct InMemory(String);

impl Machine {
    /// Looks at this machine; `data` is where the databases will be.
    ///
    /// # Errors
    /// When the system does not tell.
    pub(crate) fn look(data: &Path) -> io::Result<Machine> {
        Ok(Machine {
            processor: field(&fs::read_to_string("/proc/cpuinfo")?, "model name")
                .unwrap_or("unknown")
                .to_owned(),
            processors: std::thread::available_parallelism()?.get(),
            memory_bytes: field(&fs::read_to_string("/proc/meminfo")?, "MemTotal").map_or(0, kib_to_bytes),
            kernel: release(&fs::read_to_string("/proc/sys/kernel/osrelease")?).to_owned(),
            file_system: file_system(&fs::read_to_string("/proc/mounts")?, &data.canonicalize()?).to_owned(),
        })
    }

    /// Durable figures need a disk.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn check_disk(&self) -> Result<(), InMemory> {
        match self.file_system.as_str() {
            "tmpfs" | "ramfs" => Err(InMemory(self.file_system.clone())),
            _ => Ok(()),
        }
    }
}

/// A kernel's version without what whoever built it has added.
fn release(text: &str) -> &str {
    text.trim().split('-').next().unwrap_or_default()
}

/// The value of the first line `name : value`, as in /proc.
pub(crate) fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let pair = |line: &'a str| line.split_once(':').filter(|(key, _)| key.trim() == name);
    text.lines().find_map(pair).map(|(_, value)| value.trim())
}

/// `123 kB` in bytes; 0 for anything else.
pub(crate) fn kib_to_bytes(value: &str) -> u64 {
    value.split_whitespace().next().and_then(|number| number.parse::<u64>().ok()).unwrap_or_default() * 1024
}

/// The type of the file system that is mounted closest above `path`; the last of those mounted on one another.
fn file_system<'a>(mounts: &'a str, path: &Path) -> &'a str {
    let mount = |line: &'a str| {
        let mut words = line.split_whitespace().skip(1);
        Some((words.next()?, words.next()?))
    };
    let above = mounts.lines().filter_map(mount).filter(|(at, _)| path.starts_with(at));
    above.max_by_key(|(at, _)| at.len()).map_or("unknown", |(_, kind)| kind)
}

/// The day of a time, as 2026-01-31, UTC.
pub(crate) fn date(now: UnixMillis) -> String {
    // Howard Hinnant's civil_from_days, for days since 1970.
    let days = now / 86_400_000 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, next_year) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    format!("{:04}-{month:02}-{day:02}", year_of_era + era * 400 + next_year)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_have_their_dates() {
        for (days, expected) in [
            (0, "1970-01-01"),
            (59, "1970-03-01"),
            (11_016, "2000-02-29"),
            (20_453, "2025-12-31"),
            (20_454, "2026-01-01"),
        ] {
            assert_eq!(date(days * 86_400_000 + 86_399_999), expected);
        }
    }

    #[test]
    fn the_closest_mount_counts() {
        let mounts = "a / ext4 rw 0 0\nb /data tmpfs rw 0 0\nc /data/disk xfs rw 0 0\nd /dat btrfs rw 0 0\n";
        for (path, kind) in [
            ("/x", "ext4"),
            ("/data", "tmpfs"),
            ("/data/x", "tmpfs"),
            ("/data/disk/x", "xfs"),
            ("/database", "ext4"),
        ] {
            assert_eq!(file_system(mounts, Path::new(path)), kind, "{path}");
        }
    }

    #[test]
    fn fields_of_proc_are_found() {
        let text = "processor\t: 0\nmodel name\t: A: B\nMemTotal:       2048 kB\n";
        assert_eq!(field(text, "model name"), Some("A: B"));
        assert_eq!(field(text, "MemTotal").map(kib_to_bytes), Some(2 * 1024 * 1024));
        assert_eq!(field(text, "Total"), None);
    }

    #[test]
    fn a_version_is_without_its_builders_marks() {
        assert_eq!(release("6.1.0-44-amd64\n"), "6.1.0");
        assert_eq!(release("6.12.3\n"), "6.12.3");
    }

    #[test]
    fn memory_is_no_disk() {
        let machine =
            |file_system: &str| Machine { file_system: file_system.to_owned(), ..Machine::default() };
        assert!(machine("tmpfs").check_disk().is_err());
        assert!(machine("ext4").check_disk().is_ok());
    }
}
