//! Keys, and how they are spread over the nodes of a cluster.

/// Keys live in so many hash tags. A Redis Cluster keeps one tag's keys on one node, so a batch of keys is at most so many
/// commands, and not one for each key. A cluster of more primaries than this gains nothing from them.
pub(crate) const BUCKETS: usize = 32;

/// The name of one value.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// Below [`BUCKETS`].
    pub(crate) bucket: usize,
    pub(crate) text: String,
}

impl Key {
    /// The key of what has this id.
    pub(crate) fn of_id(prefix: &str, kind: &str, id: u64) -> Key {
        let bucket = bucket_of(id);
        Key { bucket, text: format!("{prefix}:{{{bucket}}}:{kind}:{id}") }
    }

    /// The key of what has this name.
    pub(crate) fn of_name(prefix: &str, kind: &str, name: &str) -> Key {
        // FNV-1a: every process must find the same bucket, in every version.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let bucket = bucket_of(hash);
        Key { bucket, text: format!("{prefix}:{{{bucket}}}:{kind}:{name}") }
    }

    /// A key of this bucket for what every bucket has one of.
    pub(crate) fn of_bucket(prefix: &str, kind: &str, bucket: usize) -> Key {
        Key { bucket, text: format!("{prefix}:{{{bucket}}}:{kind}") }
    }
}

/// Ids of the same moment differ in their low bits only, and ids given out one by one hardly there: so the bits are mixed first.
pub(crate) fn bucket_of(id: u64) -> usize {
    let mixed = (id ^ (id >> 22)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed >> (64 - BUCKETS.ilog2())) as usize
}

/// The slot of a cluster that a bucket's keys are in.
pub(crate) fn slot_of_bucket(bucket: usize) -> u16 {
    /// Slots of a Redis Cluster.
    const SLOTS: u16 = 16_384;
    crc16(bucket.to_string().as_bytes()) % SLOTS
}

/// CRC-16/XMODEM, as the specification of Redis Cluster asks for.
fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc: u16, byte| {
        (0..8).fold(crc ^ (u16::from(*byte) << 8), |crc, _| {
            if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 }
        })
    })
}

const _: () = assert!(BUCKETS.is_power_of_two());

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    /// The first is the specification's example, the second is what a server says to `CLUSTER KEYSLOT foo`.
    #[test]
    fn slots_are_those_of_the_specification() {
        assert_eq!(crc16(b"123456789"), 0x31C3);
        assert_eq!(crc16(b"foo") % 16_384, 12_182);
    }

    #[test]
    fn ids_of_one_moment_and_first_ids_of_many_moments_are_spread() {
        let spread = |ids: &mut dyn Iterator<Item = u64>| ids.map(bucket_of).collect::<HashSet<_>>().len();
        assert_eq!(spread(&mut (0..400).map(|sequence| (7 << 22) | (3 << 15) | sequence)), BUCKETS);
        assert_eq!(spread(&mut (0..400).map(|second| (second << 22) | (3 << 15))), BUCKETS);
        assert_eq!(spread(&mut (0..120).map(|worker| (7 << 22) | (worker << 15))), BUCKETS);
    }
}
