//! Mutations of files whose parts hold the lengths of other parts: a field is changed, and about half
//! the time the enclosing lengths are corrected, so that readers get past their first check.

use crate::bytes::{self, EDGES};
use crate::random::Random;
use crate::text;

/// Safetensors: eight bytes of length, a JSON header, data.
pub fn safetensors(file: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let Some(header) = header_of(file).map(<[u8]>::to_vec) else {
        return bytes::mutate(file, other, random);
    };
    match random.below(8) {
        0..=4 => {
            let mut new = header.clone();
            let theirs = header_of(other).unwrap_or(b"{}");
            text::mutate(&mut new, theirs, random);
            let end = 8 + header.len();
            file.splice(8..end, new.iter().copied());
            if !random.once_in(8) {
                file[..8].copy_from_slice(&(new.len() as u64).to_le_bytes());
            }
        }
        5 => file[..8].copy_from_slice(&random.pick(&EDGES).to_le_bytes()),
        6 => poison(file, 8 + header.len(), random),
        _ => bytes::mutate(file, other, random),
    }
}

fn header_of(file: &[u8]) -> Option<&[u8]> {
    let length = u64::from_le_bytes(file.get(..8)?.try_into().ok()?);
    file.get(8..8usize.checked_add(usize::try_from(length).ok()?)?)
}

/// Numbers that are none, or none that fit, in the data.
fn poison(file: &mut [u8], data: usize, random: &mut Random) {
    let value: [u8; 4] = *random.pick(&[
        [0, 0x7c, 0, 0x7c],
        [0, 0xfc, 0, 0xfc],
        [0xff; 4],
        [0, 0, 0x80, 0x7f],
        [0xff, 0x7b, 0xff, 0x7b],
        [0; 4],
        [0xff, 0xff, 0xff, 0x7f],
    ]);
    let start = data + random.below(file.len().saturating_sub(data)) / 4 * 4;
    let words = 1 + random.below(64);
    let start = start.min(file.len());
    for word in file[start..].chunks_exact_mut(4).take(words) {
        word.copy_from_slice(&value);
    }
}

/// A field of a GGUF file or of a protobuf message.
#[derive(Clone, Copy, Debug)]
enum Field {
    /// A number of `width` bytes.
    Number { at: usize, width: usize },
    /// Text behind its length of eight bytes.
    Text { at: usize, length: usize },
}

/// GGUF: counts, lengths, types, shapes, offsets, keys and values.
pub fn gguf(file: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let fields = Gguf::fields(file);
    if fields.is_empty() || random.once_in(4) {
        return bytes::mutate(file, other, random);
    }
    // Fields of the header are few compared with the entries of a vocabulary.
    let few = fields.len().min(60);
    let at = match random.below(3) {
        0 => random.below(few),
        1 => fields.len() - 1 - random.below(few),
        _ => random.below(fields.len()),
    };
    match fields[at] {
        Field::Number { at, width } => {
            let value = match random.below(3) {
                0 => u64::from(file[at])
                    .wrapping_add(random.below(3) as u64)
                    .wrapping_sub(1),
                _ => *random.pick(&EDGES),
            };
            file[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
        }
        Field::Text { at, length } => {
            let mut new = file[at + 8..at + 8 + length].to_vec();
            match random.below(6) {
                0 => new = vec![*random.pick(b"a \xff"); *random.pick(&[0, 100, 5_000, 100_000])],
                1 => new.extend(b"\0\x1b[31m\nerror: forged"),
                2 => new = b"../escaped".to_vec(),
                3 if random.once_in(2) => new = "\u{2581}".repeat(200).into_bytes(),
                3 => {
                    let from = fields.iter().filter_map(|field| match field {
                        Field::Text { at, length } => Some((at + 8, *length)),
                        Field::Number { .. } => None,
                    });
                    let texts: Vec<(usize, usize)> = from.collect();
                    let (start, length) = *random.pick(&texts);
                    new = file[start..start + length].to_vec();
                }
                _ => bytes::mutate(&mut new, b"<s>", random),
            }
            let fill = random.once_in(2);
            Gguf::replace(file, at, length, &new, fill);
        }
    }
}

/// A walk through a GGUF file, as far as it makes sense.
struct Gguf<'a> {
    file: &'a [u8],
    at: usize,
    fields: Vec<Field>,
}

impl<'a> Gguf<'a> {
    fn fields(file: &'a [u8]) -> Vec<Field> {
        let mut walk = Gguf {
            file,
            at: 4,
            fields: Vec::new(),
        };
        walk.all();
        walk.fields
    }

    /// Replaces a text. The data begin at a multiple of 32 behind the header, so one that is filled
    /// up to such a distance leaves them where they were.
    fn replace(file: &mut Vec<u8>, at: usize, length: usize, new: &[u8], fill: bool) {
        let mut text = new.to_vec();
        if fill {
            let longer = new.len().saturating_sub(length).next_multiple_of(32);
            text.resize(length + longer, b'x');
        }
        let whole = [&(text.len() as u64).to_le_bytes()[..], &text].concat();
        file.splice(at..at + 8 + length, whole);
    }

    fn all(&mut self) -> Option<()> {
        self.number(4)?;
        let tensors = self.number(8)?;
        let keys = self.number(8)?;
        for _ in 0..keys {
            self.text()?;
            let kind = self.number(4)?;
            self.value(kind)?;
        }
        for _ in 0..tensors {
            self.text()?;
            for _ in 0..self.number(4)? {
                self.number(8)?;
            }
            self.number(4)?;
            self.number(8)?;
        }
        Some(())
    }

    fn value(&mut self, kind: u64) -> Option<()> {
        match kind {
            0 | 1 | 7 => self.number(1).map(|_| ()),
            2 | 3 => self.number(2).map(|_| ()),
            4..=6 => self.number(4).map(|_| ()),
            8 => self.text(),
            9 => {
                let kind = self.number(4)?;
                for _ in 0..self.number(8)? {
                    self.value(kind)?;
                }
                Some(())
            }
            10..=12 => self.number(8).map(|_| ()),
            _ => None,
        }
    }

    fn number(&mut self, width: usize) -> Option<u64> {
        let bytes = self.file.get(self.at..self.at + width)?;
        let value = bytes
            .iter()
            .rev()
            .fold(0, |value, &byte| value << 8 | u64::from(byte));
        self.fields.push(Field::Number { at: self.at, width });
        self.at += width;
        Some(value)
    }

    fn text(&mut self) -> Option<()> {
        let at = self.at;
        let length = usize::try_from(self.number(8)?).ok()?;
        self.file.get(self.at..self.at.checked_add(length)?)?;
        self.fields.push(Field::Text { at, length });
        self.at += length;
        Some(())
    }
}

/// A protobuf message of pieces, as SentencePiece writes it: lengths stay right around what changes.
pub fn protobuf(file: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let parts = parts(file);
    if parts.is_empty() || random.once_in(4) {
        return bytes::mutate(file, other, random);
    }
    let (start, body, end) = match random.below(3) {
        // The parts after the pieces determine how they are used.
        0 => parts[parts.len() - 1 - random.below(parts.len().min(4))],
        _ => *random.pick(&parts),
    };
    let tag = file[start];
    let mut new = file[body..end].to_vec();
    match random.below(6) {
        0 => new.clear(),
        1 => new = vec![*random.pick(b"a\xff\x0a"); *random.pick(&[10, 1_000, 100_000])],
        2 => {
            let (_, body, end) = *random.pick(&parts);
            new = file[body..end].to_vec();
        }
        3 if new.len() >= 4 => {
            let at = new.len() - 4;
            let score: f32 = *random.pick(&[f32::NAN, f32::INFINITY, -f32::INFINITY, 1e38, -0.0]);
            new[at..].copy_from_slice(&score.to_le_bytes());
        }
        _ => bytes::mutate(&mut new, b"\x0a\x00\x15\x00\x00\x80\x7f\x18\x63", random),
    }
    let mut part = vec![tag];
    varint(&mut part, new.len());
    part.extend(new);
    let times = *random.pick(&[1, 1, 1, 1, 2, 5_000]);
    let times = if part.len() > 1_000 { 1 } else { times };
    file.splice(start..end, part.repeat(times));
}

/// Parts of a message that have a length: start, start of the body, end.
fn parts(file: &[u8]) -> Vec<(usize, usize, usize)> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < file.len() && file[at] & 7 == 2 {
        let (mut length, mut shift, mut body) = (0usize, 0, at + 1);
        while let Some(&byte) = file.get(body) {
            body += 1;
            length |= usize::from(byte & 0x7f) << shift;
            shift += 7;
            if byte < 0x80 || shift > 28 {
                break;
            }
        }
        let end = body + length;
        if end > file.len() {
            break;
        }
        found.push((at, body, end));
        at = end;
    }
    found
}

/// Seven bits a byte, lowest first.
pub fn varint(out: &mut Vec<u8>, mut value: usize) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A git tree: entries of mode, name, NUL and twenty bytes of the object's name.
pub fn tree(file: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    const NAMES: [&[u8]; 20] = [
        b"../escaped",
        b"../../escaped",
        b"..",
        b".",
        b"",
        b"a/b",
        b"/tmp/gptq-fuzz-outside/escaped",
        b".git",
        b".GIT",
        b".gitmodules",
        b"\xff\xfe",
        b"a\nb",
        b"\x1b[31m",
        b"con",
        b"a\\..\\b",
        b"model.safetensors",
        b"config.json",
        b"CONFIG.JSON",
        b".gitattributes",
        b"journal.jsonl",
    ];
    const MODES: [&[u8]; 8] = [
        b"100644",
        b"100755",
        b"120000",
        b"40000",
        b"160000",
        b"0",
        b"777777777777",
        b"100664",
    ];
    let mut entries = entries(file);
    if entries.is_empty() || random.once_in(8) {
        return bytes::mutate(file, other, random);
    }
    let at = random.below(entries.len());
    match random.below(7) {
        0..=2 => entries[at].1 = random.pick(&NAMES).to_vec(),
        3 => entries[at].0 = random.pick(&MODES).to_vec(),
        4 => {
            let mut copy = entries[at].clone();
            copy.1 = random.pick(&NAMES).to_vec();
            entries.push(copy);
        }
        5 => entries[at].1 = vec![b'a'; *random.pick(&[200, 300, 5_000])],
        _ => {
            let with = random.below(entries.len());
            let object = entries[with].2.clone();
            entries[at].2 = object;
        }
    }
    file.clear();
    for (mode, name, object) in entries {
        file.extend([&mode[..], b" ", &name, b"\0", &object].concat());
    }
}

type Entry = (Vec<u8>, Vec<u8>, Vec<u8>);

fn entries(mut file: &[u8]) -> Vec<Entry> {
    let mut found = Vec::new();
    let cut = |file: &[u8], by: u8| file.iter().position(|&byte| byte == by);
    while let Some(space) = cut(file, b' ') {
        let (mode, rest) = (&file[..space], &file[space + 1..]);
        let Some(nul) = cut(rest, 0).filter(|nul| rest.len() >= nul + 21) else {
            break;
        };
        let (name, object) = (&rest[..nul], &rest[nul + 1..nul + 21]);
        found.push((mode.to_vec(), name.to_vec(), object.to_vec()));
        file = &rest[nul + 21..];
    }
    found
}
