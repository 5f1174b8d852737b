//! As much of Redis's protocol as it takes to ask a server something.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// How long one question may take.
const LIMIT: Duration = Duration::from_secs(5);
/// The longest string that is read, in bytes.
const LONGEST: usize = 64 * 1024 * 1024;

/// What a server answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Nothing: there is no such key.
    Nil,
    /// A string, or a status such as `OK`.
    Text(String),
    /// A number.
    Number(i64),
    /// Several answers.
    List(Vec<Reply>),
    /// It refused; the message begins with a word in capitals.
    Refused(String),
}

/// Asks one question on a connection of its own.
pub(crate) fn call(address: SocketAddr, words: &[&str]) -> io::Result<Reply> {
    let mut stream = TcpStream::connect_timeout(&address, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    let mut request = format!("*{}\r\n", words.len());
    for word in words {
        request.push_str(&format!("${}\r\n{word}\r\n", word.len()));
    }
    stream.write_all(request.as_bytes())?;
    reply(&mut BufReader::new(stream))
}

fn reply(from: &mut impl BufRead) -> io::Result<Reply> {
    let mut line = String::new();
    from.read_line(&mut line)?;
    let line = line.strip_suffix("\r\n").ok_or(io::ErrorKind::UnexpectedEof)?;
    let invalid = || io::Error::from(io::ErrorKind::InvalidData);
    let (kind, rest) = line.split_at_checked(1).ok_or_else(invalid)?;
    let number = || rest.parse::<i64>().map_err(|_| invalid());
    match kind {
        "+" => Ok(Reply::Text(rest.to_owned())),
        "-" => Ok(Reply::Refused(rest.to_owned())),
        ":" => Ok(Reply::Number(number()?)),
        "$" | "*" if number()? < 0 => Ok(Reply::Nil),
        "$" => {
            let length =
                usize::try_from(number()?).ok().filter(|length| *length <= LONGEST).ok_or_else(invalid)?;
            let mut bytes = vec![0; length + 2];
            from.read_exact(&mut bytes)?;
            bytes.truncate(length);
            String::from_utf8(bytes).map(Reply::Text).map_err(|_| invalid())
        }
        "*" => (0..number()?).map(|_| reply(from)).collect::<io::Result<_>>().map(Reply::List),
        _ => Err(invalid()),
    }
}

#[cfg(test)]
mod tests {
    use super::{Reply, reply};

    #[test]
    fn answers_of_all_kinds_are_read() {
        let wire = b"*6\r\n+OK\r\n-ERR no\r\n:-7\r\n$3\r\na\r\n\r\n$-1\r\n*0\r\n";
        let all = vec![
            Reply::Text("OK".into()),
            Reply::Refused("ERR no".into()),
            Reply::Number(-7),
            Reply::Text("a\r\n".into()),
            Reply::Nil,
            Reply::List(vec![]),
        ];
        assert_eq!(reply(&mut &wire[..]).unwrap(), Reply::List(all));
    }

    #[test]
    fn half_an_answer_is_none() {
        for wire in ["", "+OK", "$3\r\nab", "*2\r\n:1\r\n", "?\r\n", "\r\n", "$99999999999\r\n"] {
            assert!(reply(&mut wire.as_bytes()).is_err(), "{wire:?}");
        }
    }
}
