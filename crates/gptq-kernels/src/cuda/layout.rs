//! Codes, scales and zeros as the kernels for packed weights read them; the layout is described in
//! `kernels/packed.cuh`.

use gptq_types::{Bits, Dtype, SolvedLayer};
use half::{bf16, f16};
use rayon::prelude::*;

/// Outputs of a tile, and positions of a run, as in the kernels.
pub(super) const TILE: usize = 16;
pub(super) const RUN: usize = 64;
/// What the positions are padded to.
pub(super) const K_STEP: usize = 128;
/// Positions that share a scale are a multiple of it.
pub(super) const GRANULE: usize = 32;
pub(super) const LANES: usize = 32;

/// Where channels stand: sorted by group, each group filled up to whole granules.
pub(super) struct Positions {
    pub channels: Vec<i32>,
    /// Group of each granule of [`GRANULE`] positions.
    pub groups: Vec<usize>,
    /// [`GRANULE`]s that always share a group.
    pub granule: usize,
}

impl Positions {
    pub fn new(g_idx: &[u32], groups: usize) -> Self {
        let mut members: Vec<Vec<i32>> = vec![Vec::new(); groups];
        for (channel, &group) in g_idx.iter().enumerate() {
            members[group as usize].push(channel as i32);
        }
        let (mut channels, mut of_granule) = (Vec::new(), Vec::new());
        for (group, own) in members.iter().enumerate() {
            channels.extend(own);
            channels.resize(channels.len().next_multiple_of(GRANULE), -1);
            of_granule.resize(channels.len() / GRANULE, group);
        }
        let padded = channels.len().next_multiple_of(K_STEP);
        channels.resize(padded, -1);
        of_granule.resize(padded / GRANULE, *of_granule.last().unwrap_or(&0));
        let alike = |size: usize| {
            (of_granule.chunks(size)).all(|run| run.iter().all(|group| *group == run[0]))
        };
        Positions {
            granule: [4, 2].into_iter().find(|&size| alike(size)).unwrap_or(1),
            channels,
            groups: of_granule,
        }
    }

    pub fn places(&self, features: usize) -> Vec<i32> {
        let mut places = vec![0; features];
        for (place, &channel) in self.channels.iter().enumerate() {
            if channel >= 0 {
                places[channel as usize] = place as i32;
            }
        }
        places
    }

    pub fn are_channels(&self, features: usize) -> bool {
        let in_place = |(at, &channel): (usize, &i32)| channel == at as i32;
        self.channels.len() == features && self.channels.iter().enumerate().all(in_place)
    }
}

/// Words of all tiles. `code(position, output)` may be asked for any position and output.
fn lay_out(
    wide: bool,
    tiles: usize,
    runs: usize,
    code: impl Fn(usize, usize) -> u32 + Sync,
) -> Vec<u32> {
    let words = if wide { 8 } else { 4 }; // of a lane and a run
    let mut out = vec![0u32; tiles * runs * words * LANES];
    (out.par_chunks_mut(runs * words * LANES).enumerate()).for_each(|(tile, out)| {
        for (run, out) in out.chunks_mut(words * LANES).enumerate() {
            for (lane, word) in (0..LANES).flat_map(|lane| (0..words).map(move |word| (lane, word)))
            {
                let (g, t) = (lane / 4, lane % 4);
                let tile_of_run = if wide { word / 2 } else { word };
                let first = run * RUN + tile_of_run * TILE + 2 * t;
                let mut packed = 0;
                let registers = match (wide, word % 2) {
                    (false, _) => 0..4,
                    (true, 0) => 0..2,
                    (true, _) => 2..4,
                };
                for p in registers {
                    let output = tile * TILE + g + 8 * (p % 2);
                    let position = first + p / 2 * 8;
                    let (low, high) = (code(position, output), code(position + 1, output));
                    packed |= match wide {
                        false => low << (4 * p) | high << (16 + 4 * p),
                        true => (low | high << 8) << (16 * (p % 2)),
                    };
                }
                // Sixteen bytes of each lane stand together.
                out[word / 4 * 4 * LANES + lane * 4 + word % 4] = packed;
            }
        }
    });
    out
}

/// Pairs of outputs `g`, `g + 8` for each granule of each tile.
fn pairs(tiles: usize, granules: usize, value: impl Fn(usize, usize) -> u16 + Sync) -> Vec<u32> {
    (0..tiles * granules * 8)
        .into_par_iter()
        .map(|at| {
            let (tile, granule, g) = (at / 8 / granules, at / 8 % granules, at % 8);
            let output = tile * TILE + g;
            u32::from(value(granule, output)) | u32::from(value(granule, output + 8)) << 16
        })
        .collect()
}

fn sixteen(dtype: Dtype, value: f32) -> u16 {
    match dtype {
        Dtype::BF16 => bf16::from_f32(value).to_bits(),
        _ => f16::from_f32(value).to_bits(),
    }
}

/// One layer as the kernels read it.
pub(super) struct Laid {
    pub codes: Vec<u32>,
    pub scales: Vec<u32>,
    /// Empty where all zeros are alike.
    pub zeros: Vec<u32>,
}

impl Laid {
    pub fn new(layer: &SolvedLayer, positions: &Positions, one_zero: bool, dtype: Dtype) -> Self {
        let n = layer.out_features;
        let (steps, tiles) = (positions.channels.len() / K_STEP, n.div_ceil(TILE));
        let code = |position: usize, output: usize| match positions.channels[position] {
            _ if output >= n => 0,
            channel @ 0.. => u32::from(layer.codes[channel as usize * n + output]),
            _ => 0, // x is zero there
        };
        let granules = positions.groups.len() / positions.granule;
        let each = |value: &(dyn Fn(usize) -> f32 + Sync)| {
            pairs(tiles, granules, |granule, output| match output < n {
                true => {
                    let group = positions.groups[granule * positions.granule];
                    sixteen(dtype, value(group * n + output))
                }
                false => 0,
            })
        };
        Laid {
            codes: lay_out(layer.bits == Bits::Eight, tiles, 2 * steps, code),
            scales: each(&|at| layer.scales[at].to_f32()),
            zeros: match one_zero {
                true => Vec::new(),
                false => each(&|at| f32::from(layer.zeros[at])),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Row and column of element `i` of a lane's share of the 16 x 16 factor of mma.m16n8k16 (PTX
    /// ISA, matrix fragments for m16n8k16).
    fn place(lane: usize, i: usize) -> (usize, usize) {
        let (group, thread) = (lane / 4, lane % 4);
        let row = if matches!(i, 0 | 1 | 4 | 5) {
            group
        } else {
            group + 8
        };
        let column = thread * 2 + (i & 1) + if i < 4 { 0 } else { 8 };
        (row, column)
    }

    #[test]
    fn lanes_hold_what_the_tensor_cores_multiply() {
        const TILES: usize = 3;
        const RUNS: usize = 4;
        for wide in [false, true] {
            let max = if wide { 255 } else { 15 };
            let code = |position: usize, output: usize| {
                ((position * 31 + output * 7919) as u32).wrapping_mul(2_654_435_761) >> 20 & max
            };
            let words = lay_out(wide, TILES, RUNS, code);
            let of_lane = if wide { 8 } else { 4 };
            // Word `word` of a lane, as sixteen bytes of each lane stand together.
            let word = |tile: usize, run: usize, lane: usize, word: usize| {
                let run = &words[(tile * RUNS + run) * of_lane * LANES..];
                run[word / 4 * 4 * LANES + lane * 4 + word % 4]
            };
            for (tile, run) in (0..TILES).flat_map(|tile| (0..RUNS).map(move |run| (tile, run))) {
                for (lane, part) in (0..LANES).flat_map(|lane| (0..4).map(move |part| (lane, part)))
                {
                    for i in 0..8 {
                        let (register, high) = (i / 2, i % 2);
                        let found = match wide {
                            false => word(tile, run, lane, part) >> (4 * register + 16 * high) & 15,
                            true => {
                                let two = word(tile, run, lane, 2 * part + register / 2);
                                two >> (16 * (register % 2) + 8 * high) & 255
                            }
                        };
                        let (row, column) = place(lane, i);
                        let position = run * RUN + part * TILE + column;
                        assert_eq!(
                            found,
                            code(position, tile * TILE + row),
                            "{wide} {lane} {i}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn groups_begin_at_granules_and_channels_find_their_places() {
        // Three groups of 40, 8 and 24 channels in an order of their own.
        let g_idx: Vec<u32> = (0..72)
            .map(|c| [1, 0, 0, 2, 0, 0, 2, 0, 2][c % 9])
            .collect();
        let positions = Positions::new(&g_idx, 3);
        assert_eq!(positions.channels.len(), 128);
        assert_eq!(positions.groups, [0, 0, 1, 2]);
        assert_eq!(positions.granule, 1);
        for (place, &channel) in positions.channels.iter().enumerate() {
            if channel >= 0 {
                let group = positions.groups[place / GRANULE];
                assert_eq!(g_idx[channel as usize] as usize, group);
            }
        }
        for (channel, &place) in positions.places(72).iter().enumerate() {
            assert_eq!(positions.channels[place as usize], channel as i32);
        }
        assert!(!positions.are_channels(72));
        let natural = Positions::new(&(0..256).map(|c| c / 128).collect::<Vec<u32>>(), 2);
        assert!(natural.are_channels(256) && natural.granule == 4);
    }
}
