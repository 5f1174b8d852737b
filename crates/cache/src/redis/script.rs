//! Lua scripts: sent by their hash, and in full where a server does not know them (yet, or any more).

use redis::Cmd;

use super::key::Key;

/// A script and its hash.
pub(crate) struct Script {
    code: &'static str,
    sha: String,
}

impl Script {
    pub(crate) fn new(code: &'static str) -> Script {
        Script { code, sha: redis::Script::new(code).get_hash().to_owned() }
    }

    /// Runs it on keys of one bucket. In full, if the server may not know it.
    pub(crate) fn call(&self, full: bool, keys: &[&Key], arguments: &[Argument<'_>]) -> Cmd {
        let mut command = if full { redis::cmd("EVAL") } else { redis::cmd("EVALSHA") };
        command.arg(if full { self.code } else { &self.sha }).arg(keys.len());
        for key in keys {
            command.arg(&key.text);
        }
        for argument in arguments {
            match argument {
                Argument::Int(int) => command.arg(int),
                Argument::Bytes(bytes) => command.arg(bytes),
            };
        }
        command
    }
}

/// An argument of a script.
#[derive(Clone, Copy)]
pub(crate) enum Argument<'a> {
    Int(u64),
    Bytes(&'a [u8]),
}

impl<'a> Argument<'a> {
    pub(crate) fn text(text: &'a str) -> Argument<'a> {
        Argument::Bytes(text.as_bytes())
    }
}
