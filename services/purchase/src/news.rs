//! News between replicas: what one tells the others of its purchases, as bytes.
//!
//! A message is [`FORMAT`], the number of the replica that sent it, and sections to its end. A section is its kind, how many
//! it tells of, and those, one after the other; numbers are variable-length integers as in Protocol Buffers:
//!
//! | kind | in front | each |
//! |---|---|---|
//! | 1 opened | the finish number behind which all of them will end | customer, id, time of acceptance |
//! | 2 progressed | | id, number of replies, length and bytes of the path |
//! | 3 ended | | customer, finish number, id, time of acceptance, length and bytes of the path |
//! | 4 given up | | id |
//!
//! A section does not depend on what is in front of it, so one message carries whatever waited. A path stays encoded until
//! somebody listens.
//!
//! Whatever is not understood may be dropped: news may be lost. So a message of another format is skipped, and two
//! versions of this software run side by side.

use bytes::{Buf, Bytes};
use prost::encoding::{decode_varint, encode_varint};
use saga::Path;
use wire::messages::{DecodeError, decode_path, encode_path};

use crate::store::OpenPurchase;

/// The format of the messages in this file.
const FORMAT: u8 = 1;

/// The kinds of sections.
mod kind {
    pub(super) const OPENED: u8 = 1;
    pub(super) const PROGRESSED: u8 = 2;
    pub(super) const ENDED: u8 = 3;
    pub(super) const GIVEN_UP: u8 = 4;
}

/// Tells replicas apart: what one has sent itself it need not hear. Drawn at its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReplicaId(pub(crate) u64);

/// A path, understood or as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    /// Understood.
    Path(Path),
    /// As [`encode_path`] wrote it.
    Encoded(Bytes),
}

impl Told {
    /// The path.
    ///
    /// # Errors
    /// When the bytes are none.
    pub(crate) fn into_path(self) -> Result<Path, DecodeError> {
        match self {
            Told::Path(path) => Ok(path),
            Told::Encoded(bytes) => decode_path(&bytes),
        }
    }

    fn encoded(&self) -> Bytes {
        match self {
            Told::Path(path) => encode_path(path).into(),
            Told::Encoded(bytes) => bytes.clone(),
        }
    }
}

/// An open purchase's path has grown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Grown {
    pub(crate) id: u64,
    /// The replies in the path.
    pub(crate) replies: usize,
    pub(crate) path: Told,
}

impl Grown {
    /// It is this one by now.
    pub(crate) fn to(id: u64, path: Path) -> Grown {
        Grown { id, replies: path.len(), path: Told::Path(path) }
    }
}

/// A purchase that has ended, and the database knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) customer_id: u64,
    pub(crate) finished_no: u64,
    pub(crate) id: u64,
    pub(crate) started_at: u64,
    pub(crate) path: Told,
}

/// What a section tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Section {
    /// These are open, and end with finish numbers above `after`.
    Opened { after: u64, purchases: Vec<OpenPurchase> },
    /// These have grown.
    Progressed(Vec<Grown>),
    /// These have ended.
    Ended(Vec<Ended>),
    /// These are left to an operator.
    GivenUp(Vec<u64>),
}

/// A message that cannot be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoNews {
    /// It was written by another generation of this software, or by something else.
    #[error("news of format {0}; this version reads format {FORMAT}")]
    Format(u8),
    /// A section of another kind.
    #[error("a section of kind {0}")]
    Kind(u8),
    /// It ends within a section.
    #[error("it ends too soon")]
    Short,
}

/// A section for purchases that were opened.
pub(crate) fn opened(after: u64, purchases: &[OpenPurchase]) -> Bytes {
    /// What one takes at most, nearly always: two ids and a time.
    const EACH_BYTES: usize = 24;
    let mut out = Vec::with_capacity(EACH_BYTES * (1 + purchases.len()));
    out.push(kind::OPENED);
    encode_varint(after, &mut out);
    encode_varint(purchases.len() as u64, &mut out);
    for OpenPurchase { id, customer_id, created_at } in purchases {
        [*customer_id, *id, *created_at].into_iter().for_each(|number| encode_varint(number, &mut out));
    }
    out.into()
}

/// A section for purchases whose paths have grown.
pub(crate) fn progressed(grown: &[Grown]) -> Bytes {
    let mut out = vec![kind::PROGRESSED];
    encode_varint(grown.len() as u64, &mut out);
    for Grown { id, replies, path } in grown {
        encode_varint(*id, &mut out);
        encode_varint(*replies as u64, &mut out);
        put_path(path, &mut out);
    }
    out.into()
}

/// A section for purchases that have ended.
pub(crate) fn ended(ended: &[Ended]) -> Bytes {
    let mut out = vec![kind::ENDED];
    encode_varint(ended.len() as u64, &mut out);
    for Ended { customer_id, finished_no, id, started_at, path } in ended {
        let numbers = [*customer_id, *finished_no, *id, *started_at];
        numbers.into_iter().for_each(|number| encode_varint(number, &mut out));
        put_path(path, &mut out);
    }
    out.into()
}

/// A section for purchases that were left to an operator.
pub(crate) fn given_up(ids: &[u64]) -> Bytes {
    let mut out = vec![kind::GIVEN_UP];
    encode_varint(ids.len() as u64, &mut out);
    ids.iter().for_each(|id| encode_varint(*id, &mut out));
    out.into()
}

fn put_path(path: &Told, out: &mut Vec<u8>) {
    let path = path.encoded();
    encode_varint(path.len() as u64, out);
    out.extend_from_slice(&path);
}

/// One message of these sections.
pub(crate) fn message(sender: ReplicaId, sections: &[Bytes]) -> Bytes {
    let mut out = Vec::with_capacity(1 + 8 + sections.iter().map(Bytes::len).sum::<usize>());
    out.push(FORMAT);
    out.extend(sender.0.to_be_bytes());
    sections.iter().for_each(|section| out.extend_from_slice(section));
    out.into()
}

/// Reads a message; none if it is one's own. Paths stay slices of it.
///
/// # Errors
/// [`NoNews`] when it cannot be understood as a whole.
pub(crate) fn read(mut bytes: Bytes, own: ReplicaId) -> Result<Option<Vec<Section>>, NoNews> {
    let format = bytes.try_get_u8().map_err(|_| NoNews::Short)?;
    if format != FORMAT {
        return Err(NoNews::Format(format));
    }
    if bytes.try_get_u64().map_err(|_| NoNews::Short)? == own.0 {
        return Ok(None);
    }
    let mut sections = Vec::new();
    while bytes.has_remaining() {
        sections.push(section(&mut bytes)?);
    }
    Ok(Some(sections))
}

fn section(bytes: &mut Bytes) -> Result<Section, NoNews> {
    match bytes.get_u8() {
        kind::OPENED => {
            let after = number(bytes)?;
            let one = |bytes: &mut Bytes| {
                let (customer_id, id, created_at) = (number(bytes)?, number(bytes)?, number(bytes)?);
                Ok(OpenPurchase { id, customer_id, created_at })
            };
            Ok(Section::Opened { after, purchases: many(bytes, one)? })
        }
        kind::PROGRESSED => {
            let one = |bytes: &mut Bytes| {
                let (id, replies) = (number(bytes)?, length(bytes)?);
                Ok(Grown { id, replies, path: path(bytes)? })
            };
            many(bytes, one).map(Section::Progressed)
        }
        kind::ENDED => {
            let one = |bytes: &mut Bytes| {
                let (customer_id, finished_no) = (number(bytes)?, number(bytes)?);
                let (id, started_at) = (number(bytes)?, number(bytes)?);
                Ok(Ended { customer_id, finished_no, id, started_at, path: path(bytes)? })
            };
            many(bytes, one).map(Section::Ended)
        }
        kind::GIVEN_UP => many(bytes, number).map(Section::GivenUp),
        other => Err(NoNews::Kind(other)),
    }
}

/// As many as the section says. What is reserved for them is bounded by the bytes that are there.
fn many<T>(bytes: &mut Bytes, one: impl Fn(&mut Bytes) -> Result<T, NoNews>) -> Result<Vec<T>, NoNews> {
    let count = length(bytes)?;
    let mut all = Vec::with_capacity(count.min(bytes.remaining()));
    for _ in 0..count {
        all.push(one(bytes)?);
    }
    Ok(all)
}

fn number(bytes: &mut Bytes) -> Result<u64, NoNews> {
    decode_varint(bytes).map_err(|_| NoNews::Short)
}

fn length(bytes: &mut Bytes) -> Result<usize, NoNews> {
    usize::try_from(number(bytes)?).map_err(|_| NoNews::Short)
}

fn path(bytes: &mut Bytes) -> Result<Told, NoNews> {
    let length = length(bytes)?;
    if length > bytes.remaining() {
        return Err(NoNews::Short);
    }
    Ok(Told::Encoded(bytes.split_to(length)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use saga::{Entry, Outcome, Reason, StepIndex};

    use super::*;

    fn any_path() -> impl Strategy<Value = Path> {
        let outcome = prop_oneof![
            prop::collection::vec(any::<u8>(), 0..8).prop_map(Outcome::Done),
            Just(Outcome::Rejected(Reason::Cancelled)),
            "[a-zé ]{0,12}".prop_map(|why| Outcome::Rejected(Reason::Refused(why))),
            Just(Outcome::Compensated),
        ];
        let entry = (0..4_u8, outcome, any::<u64>());
        let entry = entry.prop_map(|(step, outcome, at)| Entry { step: StepIndex(step), outcome, at });
        prop::collection::vec(entry, 0..6).prop_map(|entries| entries.into_iter().collect())
    }

    fn any_section() -> impl Strategy<Value = Section> {
        let open = any::<(u64, u64, u64)>().prop_map(|(id, customer_id, created_at)| OpenPurchase {
            id,
            customer_id,
            created_at,
        });
        let ended = (any::<(u64, u64, u64, u64)>(), any_path());
        let ended = ended.prop_map(|((customer_id, finished_no, id, started_at), path)| Ended {
            customer_id,
            finished_no,
            id,
            started_at,
            path: Told::Path(path),
        });
        let many = 0..5_usize;
        prop_oneof![
            (any::<u64>(), prop::collection::vec(open, many.clone()))
                .prop_map(|(after, purchases)| Section::Opened { after, purchases }),
            prop::collection::vec((any::<u64>(), any_path()), many.clone()).prop_map(|grown| {
                Section::Progressed(grown.into_iter().map(|(id, path)| Grown::to(id, path)).collect())
            }),
            prop::collection::vec(ended, many.clone()).prop_map(Section::Ended),
            prop::collection::vec(any::<u64>(), many).prop_map(Section::GivenUp),
        ]
    }

    fn encode(section: &Section) -> Bytes {
        match section {
            Section::Opened { after, purchases } => opened(*after, purchases),
            Section::Progressed(all) => progressed(all),
            Section::Ended(all) => ended(all),
            Section::GivenUp(ids) => given_up(ids),
        }
    }

    fn understood(section: Section) -> Section {
        let path = |told: Told| Told::Path(told.into_path().expect("a path"));
        match section {
            Section::Progressed(all) => Section::Progressed(
                all.into_iter().map(|one| Grown { path: path(one.path), ..one }).collect(),
            ),
            Section::Ended(all) => {
                Section::Ended(all.into_iter().map(|one| Ended { path: path(one.path), ..one }).collect())
            }
            other => other,
        }
    }

    const HERE: ReplicaId = ReplicaId(1);
    const THERE: ReplicaId = ReplicaId(u64::MAX);

    proptest! {
        #[test]
        fn what_is_told_is_heard(sections in prop::collection::vec(any_section(), 0..5)) {
            let encoded: Vec<Bytes> = sections.iter().map(encode).collect();
            let bytes = message(THERE, &encoded);
            prop_assert_eq!(read(bytes.clone(), THERE), Ok(None), "one's own is not heard");
            let heard = read(bytes, HERE).expect("news").expect("another's");
            prop_assert_eq!(heard.into_iter().map(understood).collect::<Vec<_>>(), sections);
        }

        /// Cut anywhere but between two sections it is refused, never misread.
        #[test]
        fn what_is_cut_off_is_refused(
            sections in prop::collection::vec(any_section(), 1..4),
            cut in any::<prop::sample::Index>(),
        ) {
            let encoded: Vec<Bytes> = sections.iter().map(encode).collect();
            let bytes = message(THERE, &encoded);
            let cut = cut.index(bytes.len());
            let ends: Vec<usize> =
                encoded.iter().scan(9, |end, section| { *end += section.len(); Some(*end) }).collect();
            match read(bytes.slice(..cut), HERE) {
                Ok(heard) => {
                    prop_assert!(cut == 9 || ends.contains(&cut), "{heard:?} was read from {cut} bytes");
                }
                Err(refused) => prop_assert_eq!(refused, NoNews::Short),
            }
        }

        #[test]
        fn noise_is_refused_and_reserves_nothing(noise in prop::collection::vec(any::<u8>(), 0..64)) {
            // Whatever comes of it: no panic, no large allocation.
            let _ = read(noise.into(), HERE);
        }
    }

    #[test]
    fn another_generation_is_not_read() {
        let mut bytes = message(THERE, &[given_up(&[7])]).to_vec();
        bytes[0] = FORMAT + 1;
        assert_eq!(read(bytes.clone().into(), HERE), Err(NoNews::Format(FORMAT + 1)));
        bytes[0] = FORMAT;
        bytes[9] = 5;
        assert_eq!(read(bytes.into(), HERE), Err(NoNews::Kind(5)));
    }

    #[test]
    fn a_batch_is_small() {
        let id = (1 << 53) - 1;
        let open = vec![OpenPurchase { id, customer_id: id, created_at: 1_800_000_000_000 }; 100];
        assert_eq!(message(HERE, &[opened(7, &open)]).len(), 9 + 3 + 100 * (8 + 8 + 6));
    }
}
