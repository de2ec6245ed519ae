//! Codes of few bits, laid out so that a product with one row streams them once.
//!
//! ```text
//! tile of 32 outputs ─┬─ group 0 ─┬─ word 0: 32 lanes of u32, lane = output,
//!                     │           │          field j of a lane = channel j of the word
//!                     │           ├─ word 1 …
//!                     │           └─ grid: 32 lanes of u32, f16 scale below, zero above
//!                     └─ group 1 …
//! ```
//!
//! Channels are sorted by group when the layout is made, and each group is filled up to whole
//! words; a product permutes its rows once, and the inner loop never gathers. With `s`, `z` of a
//! group, `sum_k x_k s (c_k - z) = s (sum_k x_k c_k - z sum_k x_k)`: the inner sum is over bare
//! codes. A field is masked where it stands and not shifted down; the power of two that is left is
//! taken out of `x` beforehand, which is exact.

use std::borrow::Cow;

use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul};
use gptq_types::{Bits, SolvedLayer};
use pulp::Simd;
use rayon::prelude::*;

use super::float::f16_bits_to_f32;
use super::{Input, by_rows};
use crate::vector::{Kernel, multiply_sum, run_widest};

/// Outputs side by side: four vectors of AVX2, two of AVX-512.
pub(super) const TILE: usize = 32;

/// Position of a word that no channel fills.
const PADDING: u32 = u32::MAX;

/// See the module.
#[derive(Clone, Debug)]
pub struct PackedMatrix {
    bits: Bits,
    in_features: usize,
    out_features: usize,
    words: Vec<usize>,  // [groups]: words of each
    channels: Vec<u32>, // [positions]: the channel at each, or PADDING
    in_order: bool,     // positions are channels
    tiles: Vec<u32>,
}

/// Fields of a word.
const fn fields(bits: usize) -> usize {
    32 / bits
}

/// A field in its place in the word, as a float; see [`place_value`].
#[inline(always)]
fn field<const B: usize>(word: u32, at: usize) -> f32 {
    let mask = (1u32 << B) - 1;
    if B * (at + 1) == 32 {
        // In its place it would be a sign.
        (word >> (B * at)) as i32 as f32
    } else {
        (word & (mask << (B * at))) as i32 as f32
    }
}

/// The value of [`field`] for a code of one.
fn place_value(bits: usize, at: usize) -> f32 {
    match bits * (at + 1) == 32 {
        true => 1.0,
        false => (1u32 << (bits * at)) as f32,
    }
}

/// Adds the products of one word's channels to the sums of each row.
#[inline(always)]
fn add_word<S: Simd, const B: usize, const R: usize>(
    sums: &mut [[f32; TILE]; R],
    word: &[u32; TILE],
    x: [&[f32]; R],
) {
    for lane in 0..TILE {
        let word = word[lane];
        for row in 0..R {
            let x = x[row];
            // Four sums that do not wait for each other.
            let mut part = [0.0f32; 4];
            for at in 0..4 {
                part[at] = x[at] * field::<B>(word, at);
            }
            for at in 4..fields(B) {
                let part = &mut part[at % 4];
                *part = multiply_sum::<S>(x[at], field::<B>(word, at), *part);
            }
            sums[row][lane] += (part[0] + part[1]) + (part[2] + part[3]);
        }
    }
}

/// `s (sum - z total)` of one group, added to the outputs.
#[inline(always)]
fn close_group<const R: usize>(
    out: &mut [[f32; TILE]; R],
    sums: &[[f32; TILE]; R],
    grid: &[u32; TILE],
    totals: [f32; R],
) {
    for lane in 0..TILE {
        let scale = f16_bits_to_f32(grid[lane] as u16);
        let zero = (grid[lane] >> 16) as i32 as f32;
        for row in 0..R {
            out[row][lane] += scale * (sums[row][lane] - zero * totals[row]);
        }
    }
}

/// `R` rows times one tile.
struct TileRows<'a, const B: usize, const R: usize> {
    tile: &'a [u32],
    words: &'a [usize],
    x: [&'a [f32]; R],
    totals: [&'a [f32]; R],
}

impl<const B: usize, const R: usize> Kernel for TileRows<'_, B, R> {
    type Output = [[f32; TILE]; R];

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> [[f32; TILE]; R] {
        let mut out = [[0.0f32; TILE]; R];
        let (mut lanes, _) = self.tile.as_chunks::<TILE>();
        let mut x = self.x;
        for (group, &count) in self.words.iter().enumerate() {
            let mut sums = [[0.0f32; TILE]; R];
            let (own, after) = lanes.split_at(count);
            for word in own {
                let mut here = x;
                for row in 0..R {
                    (here[row], x[row]) = x[row].split_at(fields(B));
                }
                add_word::<S, B, R>(&mut sums, word, here);
            }
            let (grid, after) = after.split_first().expect("a grid ends each group");
            let total = self.totals.map(|totals| totals[group]);
            close_group(&mut out, &sums, grid, total);
            lanes = after;
        }
        out
    }
}

impl PackedMatrix {
    /// Lays the codes of `layer` out anew.
    pub fn new(layer: &SolvedLayer) -> Self {
        let per_word = fields(layer.bits.width() as usize);
        let mut of_group: Vec<Vec<u32>> = vec![Vec::new(); layer.groups()];
        for (channel, &group) in layer.g_idx.iter().enumerate() {
            of_group[group as usize].push(channel as u32);
        }
        for channels in &mut of_group {
            channels.resize(channels.len().next_multiple_of(per_word), PADDING);
        }
        let words: Vec<usize> = (of_group.iter())
            .map(|channels| channels.len() / per_word)
            .collect();
        let channels = of_group.concat();
        let in_order = channels.len() == layer.in_features
            && channels.iter().enumerate().all(|(at, &c)| c as usize == at);
        let mut matrix = PackedMatrix {
            bits: layer.bits,
            in_features: layer.in_features,
            out_features: layer.out_features,
            words,
            channels,
            in_order,
            tiles: Vec::new(),
        };
        matrix.tiles = matrix.lay_out(layer);
        matrix
    }

    fn lay_out(&self, layer: &SolvedLayer) -> Vec<u32> {
        let stride = self.stride();
        let mut tiles = vec![0u32; self.out_features.div_ceil(TILE) * stride];
        (tiles.par_chunks_exact_mut(stride.max(1)).enumerate())
            .for_each(|(tile, out)| self.lay_out_tile(layer, tile * TILE, out));
        tiles
    }

    /// Outputs beyond the last one keep a scale of zero.
    fn lay_out_tile(&self, layer: &SolvedLayer, first: usize, out: &mut [u32]) {
        let n = self.out_features;
        let outputs = TILE.min(n - first);
        let bits = self.bits.width();
        let (mut lanes, _) = out.as_chunks_mut::<TILE>();
        let mut channels = self.channels.chunks_exact(fields(bits as usize));
        for (group, &count) in self.words.iter().enumerate() {
            let (words, after) = lanes.split_at_mut(count);
            for (word, channels) in words.iter_mut().zip(&mut channels) {
                for (at, &channel) in channels.iter().enumerate() {
                    if channel == PADDING {
                        continue;
                    }
                    let codes = &layer.codes[channel as usize * n + first..][..outputs];
                    for (word, &code) in word.iter_mut().zip(codes) {
                        *word |= u32::from(code) << (bits * at as u32);
                    }
                }
            }
            let (grid, after) = after.split_first_mut().expect("a grid ends each group");
            let scales = &layer.scales[group * n + first..][..outputs];
            let zeros = &layer.zeros[group * n + first..][..outputs];
            for ((grid, scale), &zero) in grid.iter_mut().zip(scales).zip(zeros) {
                *grid = u32::from(scale.to_bits()) | u32::from(zero) << 16;
            }
            lanes = after;
        }
    }

    /// Words of a tile.
    fn stride(&self) -> usize {
        (self.words.iter().sum::<usize>() + self.words.len()) * TILE
    }

    /// `K`.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// `N`.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Bytes of codes and grids, padding counted.
    pub fn bytes(&self) -> usize {
        self.tiles.len() * 4
    }

    /// Rows in the order of positions; for few of them divided by the fields' place values and
    /// summed by group.
    pub(super) fn prepare<'a>(&self, x: &'a [f32], rows: usize, many: bool) -> Input<'a> {
        if many && self.in_order {
            return Input {
                x: Cow::Borrowed(x),
                width: self.in_features,
                sums: Vec::new(),
                groups: 0,
            };
        }
        let bits = self.bits.width() as usize;
        let width = self.channels.len();
        let mut placed = Vec::with_capacity(rows * width);
        let mut sums = Vec::with_capacity(rows * self.words.len());
        for x in x.chunks_exact(self.in_features.max(1)) {
            let first = placed.len();
            let value = |&channel: &u32| match channel {
                PADDING => 0.0,
                channel => x[channel as usize],
            };
            match self.in_order {
                true => placed.extend_from_slice(x),
                false => placed.extend(self.channels.iter().map(value)),
            }
            if many {
                continue;
            }
            let mut rest = &mut placed[first..];
            for &words in &self.words {
                let (own, after) = rest.split_at_mut(words * fields(bits));
                sums.push(own.iter().sum());
                rest = after;
            }
            let mut factors = [1.0f32; 16];
            for (at, factor) in factors.iter_mut().enumerate().take(fields(bits)) {
                *factor = 1.0 / place_value(bits, at);
            }
            for word in placed[first..].chunks_exact_mut(fields(bits)) {
                word.iter_mut().zip(&factors).for_each(|(x, f)| *x *= f);
            }
        }
        Input {
            x: Cow::Owned(placed),
            width,
            sums,
            groups: self.words.len(),
        }
    }

    fn tile(&self, first: usize) -> &[u32] {
        let stride = self.stride();
        &self.tiles[first / TILE * stride..][..stride]
    }

    pub(super) fn few(&self, first: usize, out: &mut [f32], rows: usize, input: &Input<'_>) {
        match self.bits {
            Bits::Two => self.few_of::<2>(first, out, rows, input),
            Bits::Three => self.few_of::<3>(first, out, rows, input),
            Bits::Four => self.few_of::<4>(first, out, rows, input),
            Bits::Eight => self.few_of::<8>(first, out, rows, input),
        }
    }

    /// One tile.
    fn few_of<const B: usize>(
        &self,
        first: usize,
        out: &mut [f32],
        rows: usize,
        input: &Input<'_>,
    ) {
        by_rows(rows, |row, count| match count {
            2 => self.rows_of::<B, 2>(first, out, rows, row, input),
            _ => self.rows_of::<B, 1>(first, out, rows, row, input),
        });
    }

    fn rows_of<const B: usize, const R: usize>(
        &self,
        first: usize,
        out: &mut [f32],
        rows: usize,
        row: usize,
        input: &Input<'_>,
    ) {
        let found = run_widest(TileRows::<B, R> {
            tile: self.tile(first),
            words: &self.words,
            x: std::array::from_fn(|r| input.row(row + r)),
            totals: std::array::from_fn(|r| input.sums(row + r)),
        });
        for (lane, out) in out.chunks_exact_mut(rows).enumerate() {
            for (r, found) in found.iter().enumerate() {
                out[row + r] = found[lane];
            }
        }
    }

    /// A band of tiles, dequantized and multiplied.
    pub(super) fn many(&self, first: usize, out: &mut [f32], rows: usize, input: &Input<'_>) {
        let outputs = out.len() / rows;
        let columns = outputs.next_multiple_of(TILE);
        let mut weight = vec![0.0f32; self.channels.len() * columns]; // [positions, columns]
        for column in (0..columns).step_by(TILE) {
            run_widest(WidenTile {
                bits: self.bits,
                tile: self.tile(first + column),
                words: &self.words,
                weight: &mut weight,
                columns,
                column,
            });
        }
        let width = self.channels.len();
        let weight = MatRef::from_row_major_slice(&weight, width, columns).subcols(0, outputs);
        let x = MatRef::from_row_major_slice(&input.x, rows, width);
        let out = MatMut::from_row_major_slice_mut(out, outputs, rows);
        matmul(
            out,
            Accum::Replace,
            weight.transpose(),
            x.transpose(),
            1.0,
            Par::Seq,
        );
    }
}

struct WidenTile<'a> {
    bits: Bits,
    tile: &'a [u32],
    words: &'a [usize],
    weight: &'a mut [f32],
    columns: usize,
    column: usize,
}

impl Kernel for WidenTile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let (tile, words) = (self.tile, self.words);
        let (weight, columns, column) = (self.weight, self.columns, self.column);
        match self.bits {
            Bits::Two => widen_tile::<2>(tile, words, weight, columns, column),
            Bits::Three => widen_tile::<3>(tile, words, weight, columns, column),
            Bits::Four => widen_tile::<4>(tile, words, weight, columns, column),
            Bits::Eight => widen_tile::<8>(tile, words, weight, columns, column),
        }
    }
}

/// The values of a tile, as [`SolvedLayer::dequantize`] has them, into `columns` from `column` on.
#[inline(always)]
fn widen_tile<const B: usize>(
    tile: &[u32],
    words: &[usize],
    weight: &mut [f32],
    columns: usize,
    column: usize,
) {
    let (mut lanes, _) = tile.as_chunks::<TILE>();
    let mut rows = weight.chunks_exact_mut(columns);
    for &count in words {
        let (own, after) = lanes.split_at(count);
        let (grid, after) = after.split_first().expect("a grid ends each group");
        let mut scales = [0.0f32; TILE];
        let mut zeros = [0.0f32; TILE];
        for lane in 0..TILE {
            scales[lane] = f16_bits_to_f32(grid[lane] as u16);
            zeros[lane] = (grid[lane] >> 16) as i32 as f32;
        }
        for word in own {
            for at in 0..fields(B) {
                let row = rows.next().expect("a row for each position");
                let row: &mut [f32; TILE] = (&mut row[column..][..TILE])
                    .try_into()
                    .expect("a tile wide");
                for lane in 0..TILE {
                    let code = word[lane] >> (B * at) & ((1 << B) - 1);
                    row[lane] = scales[lane] * (code as i32 as f32 - zeros[lane]);
                }
            }
        }
        lanes = after;
    }
}
