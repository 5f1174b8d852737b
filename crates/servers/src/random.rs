//! Names and passwords that nobody else has.

use std::fs::File;
use std::io::Read;

use crate::Error;

/// A name such as `t_5f0c9a3be1d2` that no other test has, of any process at any time: for a database, or as a prefix of subjects
/// and keys. It consists of lower-case letters, digits and underscores.
///
/// # Panics
/// When the system has no random numbers.
pub fn unique_name() -> String {
    match hex(6) {
        Ok(hex) => format!("t_{hex}"),
        Err(error) => panic!("{error}"),
    }
}

/// Random bytes in hexadecimal digits.
pub(crate) fn hex(bytes: usize) -> Result<String, Error> {
    let mut random = vec![0; bytes];
    let source = "/dev/urandom";
    File::open(source)
        .and_then(|mut file| file.read_exact(&mut random))
        .map_err(Error::io(format!("read {source}")))?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}
