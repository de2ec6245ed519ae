//! The bit order, in the one place that knows it.
//!
//! Fields form a little-endian bit stream: field `i` of width `b` lies in bits `b*i .. b*(i+1)`,
//! and word `w` holds bits `32*w .. 32*(w+1)`, least significant first. With 3 bits this is the
//! 96-bit pattern 10|1|10|1|10 of other tools, no special case. A last word that is not full has
//! zeros in its high bits.
//!
//! Along rows ([`pack_rows`]) each output column is a stream of its own, so 32 rows of codes become
//! `b` rows of words, and every inner loop runs over the columns, where memory is contiguous and
//! the compiler vectorizes. Reading four rows of codes at a time rather than all rows of a word
//! keeps the lines, which lie a power of two apart, from evicting each other.

use std::sync::atomic::{AtomicU8, Ordering};

use gptq_types::Bits;
use rayon::prelude::*;

const WORD_BITS: u32 = 32;
/// After this many fields a stream of any width is at a word boundary again.
const BLOCK_ROWS: usize = 32;
/// Fewer codes than this are not worth a task of their own.
const TASK_CODES: usize = 1 << 16;

/// Words for `fields` fields, the partly filled last one counted. Cannot overflow.
pub(crate) fn word_count(fields: usize, bits: Bits) -> usize {
    let width = bits.width() as usize;
    fields / BLOCK_ROWS * width + (fields % BLOCK_ROWS * width).div_ceil(WORD_BITS as usize)
}

/// `codes [K, N]` to words `[ceil(K*bits/32), N]`; or the index of the first code that is too large.
///
/// `codes.len()` is a multiple of `outputs`, and `outputs` is not 0.
pub(crate) fn pack_rows(codes: &[u8], outputs: usize, bits: Bits) -> Result<Vec<i32>, usize> {
    match bits {
        Bits::Two => pack_rows_of::<2>(codes, outputs, bits),
        Bits::Three => pack_rows_of::<3>(codes, outputs, bits),
        Bits::Four => pack_rows_of::<4>(codes, outputs, bits),
        Bits::Eight => pack_rows_of::<8>(codes, outputs, bits),
    }
}

fn pack_rows_of<const BITS: u32>(
    codes: &[u8],
    outputs: usize,
    bits: Bits,
) -> Result<Vec<i32>, usize> {
    let mut words = vec![0i32; word_count(codes.len() / outputs, bits) * outputs];
    let seen = AtomicU8::new(0);
    codes
        .par_chunks(BLOCK_ROWS * outputs)
        .zip(words.par_chunks_mut(BITS as usize * outputs))
        .with_min_len(blocks_per_task(outputs))
        .for_each(|(codes, words)| {
            // max_code is all ones, so a union above it means a code above it.
            seen.fetch_or(
                codes.iter().fold(0, |union, code| union | code),
                Ordering::Relaxed,
            );
            pack_block::<BITS>(codes, outputs, words);
        });
    let max = bits.max_code();
    if u32::from(seen.into_inner()) > max
        && let Some(index) = codes.iter().position(|&code| u32::from(code) > max)
    {
        return Err(index);
    }
    Ok(words)
}

fn blocks_per_task(outputs: usize) -> usize {
    TASK_CODES.div_ceil(BLOCK_ROWS * outputs)
}

/// Up to 32 rows of codes into up to `BITS` rows of zeroed words.
fn pack_block<const BITS: u32>(codes: &[u8], outputs: usize, words: &mut [i32]) {
    for (quad, rows) in codes.chunks(4 * outputs).enumerate() {
        let bit = quad as u32 * 4 * BITS;
        if rows.len() == 4 * outputs {
            let (a, rest) = rows.split_at(outputs);
            let (b, rest) = rest.split_at(outputs);
            let (c, d) = rest.split_at(outputs);
            place_rows(words, outputs, bit, 4 * BITS, |words, shifted| {
                let rows = a.iter().zip(b).zip(c).zip(d);
                for (word, (((&a, &b), &c), &d)) in words.iter_mut().zip(rows) {
                    let low = u16::from(a) | u16::from(b) << BITS;
                    let high = u16::from(c) | u16::from(d) << BITS;
                    *word |= shifted.apply(u32::from(low) | u32::from(high) << (2 * BITS));
                }
            });
        } else {
            for (row, codes) in rows.chunks(outputs).enumerate() {
                place_rows(
                    words,
                    outputs,
                    bit + row as u32 * BITS,
                    BITS,
                    |words, shifted| {
                        for (word, &code) in words.iter_mut().zip(codes) {
                            *word |= shifted.apply(u32::from(code));
                        }
                    },
                );
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Shifted {
    Up(u32),
    Down(u32),
}

impl Shifted {
    #[inline(always)]
    fn apply(self, value: u32) -> i32 {
        match self {
            Shifted::Up(by) => (value << by) as i32,
            Shifted::Down(by) => (value >> by) as i32,
        }
    }
}

/// Calls `add` for the word row in which `bit` lies, and for the next if `width` bits spill over.
#[inline(always)]
fn place_rows(
    words: &mut [i32],
    outputs: usize,
    bit: u32,
    width: u32,
    add: impl Fn(&mut [i32], Shifted),
) {
    let (row, shift) = ((bit / WORD_BITS) as usize, bit % WORD_BITS);
    let mut rows = words[row * outputs..].chunks_mut(outputs);
    if let Some(low) = rows.next() {
        add(low, Shifted::Up(shift));
    }
    if shift + width > WORD_BITS
        && let Some(high) = rows.next()
    {
        add(high, Shifted::Down(WORD_BITS - shift));
    }
}

/// Words `[ceil(K*bits/32), N]` to `codes [K, N]`; high bits of a last word that is not full are
/// not looked at.
///
/// `words.len()` is `word_count(inputs) * outputs`, and `outputs` is not 0.
pub(crate) fn unpack_rows(words: &[i32], inputs: usize, outputs: usize, bits: Bits) -> Vec<u8> {
    match bits {
        Bits::Two => unpack_rows_of::<2>(words, inputs, outputs),
        Bits::Three => unpack_rows_of::<3>(words, inputs, outputs),
        Bits::Four => unpack_rows_of::<4>(words, inputs, outputs),
        Bits::Eight => unpack_rows_of::<8>(words, inputs, outputs),
    }
}

fn unpack_rows_of<const BITS: u32>(words: &[i32], inputs: usize, outputs: usize) -> Vec<u8> {
    let mut codes = vec![0u8; inputs * outputs];
    codes
        .par_chunks_mut(BLOCK_ROWS * outputs)
        .zip(words.par_chunks(BITS as usize * outputs))
        .with_min_len(blocks_per_task(outputs))
        .for_each(|(codes, words)| unpack_block::<BITS>(words, outputs, codes));
    codes
}

fn unpack_block<const BITS: u32>(words: &[i32], outputs: usize, codes: &mut [u8]) {
    let mask = (1u32 << BITS) - 1;
    for (index, codes) in codes.chunks_mut(outputs).enumerate() {
        let bit = index as u32 * BITS;
        let (row, shift) = ((bit / WORD_BITS) as usize, bit % WORD_BITS);
        let words = &words[row * outputs..];
        if shift + BITS <= WORD_BITS {
            for (code, &word) in codes.iter_mut().zip(words) {
                *code = ((word as u32 >> shift) & mask) as u8;
            }
        } else {
            let (low, high) = words.split_at(outputs);
            for ((code, &low), &high) in codes.iter_mut().zip(low).zip(high) {
                let joined = (low as u32 >> shift) | (high as u32) << (WORD_BITS - shift);
                *code = (joined & mask) as u8;
            }
        }
    }
}

/// `fields [G, N]`, each below `2^bits`, to words `[G, ceil(N*bits/32)]`.
pub(crate) fn pack_columns(fields: &[u8], outputs: usize, bits: Bits) -> Vec<i32> {
    let width = bits.width();
    let row_words = word_count(outputs, bits);
    let mut words = vec![0i32; fields.len() / outputs * row_words];
    fields
        .par_chunks(outputs)
        .zip(words.par_chunks_mut(row_words))
        .for_each(|(fields, words)| {
            let (mut pending, mut filled, mut next) = (0u64, 0u32, 0usize);
            for &field in fields {
                pending |= u64::from(field) << filled;
                filled += width;
                if filled >= WORD_BITS {
                    words[next] = pending as u32 as i32;
                    next += 1;
                    pending >>= WORD_BITS;
                    filled -= WORD_BITS;
                }
            }
            if filled > 0 {
                words[next] = pending as u32 as i32;
            }
        });
    words
}

/// Words `[G, ceil(N*bits/32)]` to fields `[G, N]`; padding is not looked at.
pub(crate) fn unpack_columns(words: &[i32], outputs: usize, bits: Bits) -> Vec<u8> {
    let width = bits.width();
    let row_words = word_count(outputs, bits);
    let mut fields = vec![0u8; words.len() / row_words * outputs];
    fields
        .par_chunks_mut(outputs)
        .zip(words.par_chunks(row_words))
        .for_each(|(fields, words)| {
            let mut words = words.iter();
            let (mut pending, mut filled) = (0u64, 0u32);
            for field in fields {
                if filled < width {
                    let word = words.next().copied().unwrap_or(0) as u32;
                    pending |= u64::from(word) << filled;
                    filled += WORD_BITS;
                }
                *field = (pending & u64::from(bits.max_code())) as u8;
                pending >>= width;
                filled -= width;
            }
        });
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(words: &[i32]) -> Vec<u32> {
        words.iter().map(|&word| word as u32).collect()
    }

    #[test]
    fn symmetric_zero_words_are_the_published_ones() {
        let columns = |bits, field| hex(&pack_columns(&[field; 32], 32, bits));
        assert_eq!(columns(Bits::Two, 1), [0x5555_5555; 2]);
        assert_eq!(columns(Bits::Two, 2), [0xAAAA_AAAA; 2]);
        assert_eq!(columns(Bits::Four, 7), [0x7777_7777; 4]);
        assert_eq!(columns(Bits::Four, 8), [0x8888_8888; 4]);
        assert_eq!(columns(Bits::Eight, 127), [0x7F7F_7F7F; 8]);
        assert_eq!(columns(Bits::Eight, 128), [0x8080_8080; 8]);
        assert_eq!(
            columns(Bits::Three, 3),
            [0xDB6D_B6DB, 0xB6DB_6DB6, 0x6DB6_DB6D]
        );
        assert_eq!(
            columns(Bits::Three, 4),
            [0x2492_4924, 0x4924_9249, 0x9249_2492]
        );
    }

    /// AutoGPTQ writes the three words of 32 3-bit codes by these sums (10|1|10|1|10).
    #[test]
    fn three_bits_follow_the_pattern_of_autogptq() {
        let c: Vec<u32> = (0..32).map(|i| (i * 5 + 3) % 8).collect();
        let run = |from: usize, shift: usize| -> u32 {
            (0..10).map(|j| c[from + j] << (3 * j + shift)).sum()
        };
        let expected = [
            run(0, 0) | (c[10] & 3) << 30,
            ((c[10] >> 2) & 1) | run(11, 1) | (c[21] & 1) << 31,
            ((c[21] >> 1) & 3) | run(22, 2),
        ];
        let codes: Vec<u8> = c.iter().map(|&code| code as u8).collect();
        assert_eq!(hex(&pack_rows(&codes, 1, Bits::Three).unwrap()), expected);
        assert_eq!(hex(&pack_columns(&codes, 32, Bits::Three)), expected);
    }

    #[test]
    fn rows_are_packed_from_the_least_significant_field() {
        // K = 9, N = 2: column 0 holds 0..9, column 1 holds 15..7.
        let codes: Vec<u8> = (0..9u8).flat_map(|k| [k, 15 - k]).collect();
        assert_eq!(
            hex(&pack_rows(&codes, 2, Bits::Four).unwrap()),
            [0x7654_3210, 0x89AB_CDEF, 0x0000_0008, 0x0000_0007]
        );
    }

    #[test]
    fn a_large_code_is_found_where_it_is() {
        for bits in [Bits::Two, Bits::Three, Bits::Four] {
            let mut codes = vec![0u8; 70 * 3];
            codes[200] = bits.max_code() as u8 + 1;
            assert_eq!(pack_rows(&codes, 3, bits), Err(200));
        }
    }

    #[test]
    fn padding_is_not_read() {
        for bits in Bits::ALL {
            let codes: Vec<u8> = (0..33u32).map(|k| (k % 4) as u8).collect();
            let mut words = pack_rows(&codes, 1, bits).unwrap();
            let last = words.len() - 1;
            words[last] |= -1 << bits.width();
            assert_eq!(unpack_rows(&words, 33, 1, bits), codes);
            assert_eq!(unpack_columns(&words, 33, bits), codes);
        }
    }

    #[test]
    fn word_counts_round_up() {
        assert_eq!(word_count(172, Bits::Four), 22);
        assert_eq!(word_count(172, Bits::Three), 17);
        assert_eq!(word_count(172, Bits::Two), 11);
        assert_eq!(word_count(172, Bits::Eight), 43);
        assert_eq!(word_count(33, Bits::Three), 4);
        assert_eq!(word_count(usize::MAX, Bits::Eight), usize::MAX / 4 + 1);
    }
}
