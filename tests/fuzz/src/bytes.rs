//! Mutations of bytes that know nothing of what the bytes mean.

use crate::random::Random;

/// Numbers at which arithmetic goes wrong.
pub const EDGES: [u64; 20] = [
    0,
    1,
    2,
    7,
    31,
    0x7f,
    0xff,
    0x7c00,
    0xffff,
    0x1_0000,
    0x7f80_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    1 << 40,
    1 << 60,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

/// Most bytes that one insertion adds.
const LONGEST: usize = 64;

/// Changes `bytes` in one place; `other` is a second seed of the same kind.
pub fn mutate(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    if bytes.is_empty() {
        bytes.extend(random.next().to_le_bytes());
        return;
    }
    let at = place(bytes.len(), random);
    match random.below(11) {
        0 | 1 => bytes[at] ^= 1 << random.below(8),
        2 => bytes[at] = random.next() as u8,
        3 | 4 => overwrite(bytes, at, random),
        5 => bytes.truncate(at),
        6 => {
            let end = (at + 1 + random.below(LONGEST)).min(bytes.len());
            bytes.drain(at..end);
        }
        7 => {
            let end = (at + 1 + random.below(LONGEST)).min(bytes.len());
            let copy = bytes[at..end].to_vec();
            insert(bytes, at, &copy.repeat(1 + random.below(4)));
        }
        8 => {
            let edge = random.pick(&EDGES).to_le_bytes();
            insert(bytes, at, &edge[..1 << random.below(4)]);
        }
        9 => {
            let with = place(bytes.len(), random);
            bytes.swap(at, with);
        }
        _ => splice(bytes, other, at, random),
    }
}

/// Headers and footers determine how the rest is read, so they are hit as often as all the rest.
fn place(len: usize, random: &mut Random) -> usize {
    let edge = len.min(512);
    match random.below(4) {
        0 => random.below(edge),
        1 => len - 1 - random.below(edge),
        _ => random.below(len),
    }
}

fn overwrite(bytes: &mut [u8], at: usize, random: &mut Random) {
    let width = 1 << random.below(4);
    let edge = random.pick(&EDGES).to_le_bytes();
    let places = bytes[at..].iter_mut().zip(&edge[..width]);
    places.for_each(|(place, &byte)| *place = byte);
}

fn insert(bytes: &mut Vec<u8>, at: usize, new: &[u8]) {
    bytes.splice(at..at, new.iter().copied());
}

/// From `at` on the other one's end.
fn splice(bytes: &mut Vec<u8>, other: &[u8], at: usize, random: &mut Random) {
    let from = random.below(other.len() + 1);
    bytes.truncate(at);
    bytes.extend(&other[from..]);
}
