//! Checks the declared sizes of the pages of a Parquet file before anything is unpacked.
//!
//! A page header declares the size of its page; the library allocates and fills that many bytes, up to
//! 2 GB, whatever the page holds. So the headers of the columns that are read are walked first.
//! They are Thrift structs in the compact protocol; fields 2 and 3 are the two sizes.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};

use parquet::file::metadata::ParquetMetaData;

/// Writers end a page at about a megabyte; a page of one long document may be larger.
const MAX_PAGE_BYTES: i64 = 1 << 28;

/// Structs inside a page header, such as its statistics, nest two deep.
const MAX_DEPTH: usize = 8;

/// Bytes of the largest page. Refuses a column chunk that reaches beyond the file and a page that
/// unpacks to too much; the error is a reason. `is_read` tells the columns that matter.
pub(crate) fn check(
    file: &File,
    metadata: &ParquetMetaData,
    is_read: impl Fn(usize) -> bool,
) -> Result<u64, String> {
    let mut largest = 0;
    let length = file.metadata().map_err(|error| error.to_string())?.len();
    for (group, row_group) in metadata.row_groups().iter().enumerate() {
        for (column, chunk) in row_group.columns().iter().enumerate() {
            let (start, bytes) = chunk.byte_range();
            let place = format!("row group {}, column {}", group + 1, column + 1);
            let end = start.checked_add(bytes).filter(|end| *end <= length);
            let end = end.ok_or_else(|| format!("{place} reaches beyond the end of the file"))?;
            let root = row_group.schema_descr().get_column_root_idx(column);
            if is_read(root) {
                let found = check_chunk(file, start, end);
                largest = largest.max(found.map_err(|reason| format!("{place}: {reason}"))?);
            }
        }
    }
    Ok(largest)
}

fn check_chunk(file: &File, start: u64, end: u64) -> Result<u64, String> {
    let mut largest = 0;
    let in_words = |error: io::Error| format!("a page header cannot be read: {error}");
    let mut reader = BufReader::new(file);
    reader.seek(SeekFrom::Start(start)).map_err(in_words)?;
    let mut at = start;
    while at < end {
        let mut header = Counted {
            inner: (&mut reader).take(end - at),
            read: 0,
        };
        let sizes = sizes(&mut header).map_err(in_words)?;
        let after = at + header.read;
        let (Some(unpacked @ 0..=MAX_PAGE_BYTES), Some(packed @ 0..)) = (sizes[0], sizes[1]) else {
            return Err(format!(
                "a page of {} bytes, the limit is {MAX_PAGE_BYTES}",
                sizes[0].unwrap_or_default()
            ));
        };
        if unpacked > 0 && packed as u64 > end - after {
            return Err("a page reaches beyond its column".to_string());
        }
        reader.seek_relative(packed).map_err(in_words)?;
        at = after + packed as u64;
        largest = largest.max(unpacked as u64);
    }
    Ok(largest)
}

/// Counts what was read.
struct Counted<R> {
    inner: R,
    read: u64,
}

impl<R: Read> Counted<R> {
    fn byte(&mut self) -> io::Result<u8> {
        let mut byte = [0];
        self.inner.read_exact(&mut byte)?;
        self.read += 1;
        Ok(byte[0])
    }

    fn varint(&mut self) -> io::Result<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(malformed("a number of more than 64 bits"))
    }

    fn zigzag(&mut self) -> io::Result<i64> {
        let value = self.varint()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    fn pass(&mut self, bytes: u64) -> io::Result<()> {
        let passed = io::copy(&mut (&mut self.inner).take(bytes), &mut io::sink())?;
        self.read += passed;
        match passed == bytes {
            true => Ok(()),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Passes over a value of a type of the compact protocol.
    fn pass_value(&mut self, kind: u8, depth: usize) -> io::Result<()> {
        if depth > MAX_DEPTH {
            return Err(malformed("structs in structs without end"));
        }
        match kind {
            1 | 2 => Ok(()), // the type of the field says which
            3 => self.pass(1),
            4..=6 => self.varint().map(drop),
            7 => self.pass(8),
            8 => {
                let bytes = self.varint()?;
                self.pass(bytes)
            }
            9 | 10 => {
                let head = self.byte()?;
                let count = match head >> 4 {
                    15 => self.varint()?,
                    few => u64::from(few),
                };
                self.pass_elements(head & 0x0f, count, depth)
            }
            12 => {
                let mut last = 0;
                while let Some((field, kind)) = self.field(last)? {
                    last = field;
                    self.pass_value(kind, depth + 1)?;
                }
                Ok(())
            }
            _ => Err(malformed("an unknown type")),
        }
    }

    fn pass_elements(&mut self, kind: u8, count: u64, depth: usize) -> io::Result<()> {
        for _ in 0..count {
            match kind {
                1 | 2 => self.pass(1)?, // here a byte each
                kind => self.pass_value(kind, depth + 1)?,
            }
        }
        Ok(())
    }

    /// Number and type of the next field of a struct; nothing at its end.
    fn field(&mut self, last: i64) -> io::Result<Option<(i64, u8)>> {
        let head = self.byte()?;
        let kind = head & 0x0f;
        Ok(match (head, head >> 4) {
            (0, _) => None,
            (_, 0) => Some((self.zigzag()?, kind)),
            (_, delta) => Some((last + i64::from(delta), kind)),
        })
    }
}

/// Unpacked and packed bytes of the page that follows.
fn sizes<R: Read>(header: &mut Counted<R>) -> io::Result<[Option<i64>; 2]> {
    let (mut sizes, mut last) = ([None; 2], 0i64);
    while let Some((field, kind)) = header.field(last)? {
        last = field;
        match (field, kind) {
            (2 | 3, 5) => sizes[field as usize - 2] = Some(header.zigzag()?),
            (_, kind) => header.pass_value(kind, 0)?,
        }
    }
    Ok(sizes)
}

fn malformed(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes_of(bytes: &[u8]) -> io::Result<([Option<i64>; 2], u64)> {
        let mut header = Counted {
            inner: bytes,
            read: 0,
        };
        Ok((sizes(&mut header)?, header.read))
    }

    /// Type 0, 10 bytes, 7 of them stored, a checksum, a data page header with statistics.
    #[test]
    fn sizes_are_found_among_other_fields() {
        let header = [
            0x15, 0x00, 0x15, 0x14, 0x15, 0x0e, 0x15, 0x05, // fields 1 to 4
            0x1c, 0x15, 0x06, 0x15, 0x00, 0x5c, 0x18, 0x02, b'a', b'b', 0x00, 0x00, // struct
            0x00, 0xff,
        ];
        let (sizes, read) = sizes_of(&header).unwrap();
        assert_eq!(sizes, [Some(10), Some(7)]);
        assert_eq!(read, header.len() as u64 - 1);
    }

    #[test]
    fn headers_without_end_are_refused() {
        assert!(sizes_of(&[0x1c; 64]).is_err());
        assert!(
            sizes_of(&[
                0x15, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff
            ])
            .is_err()
        );
        assert!(sizes_of(&[0x18, 0xff, 0xff, 0xff, 0x7f, b'a']).is_err());
        assert!(sizes_of(&[0x1d]).is_err());
        assert!(sizes_of(&[]).is_err());
    }
}
