//! Heads as a block places them: normed, rotated, stored.

use std::sync::Arc;

use gptq_kernels::cuda::{
    Buffer, DeviceKeyValues, DeviceMatrix, DeviceNorm, Gpu, HeadNorms, RotaryTable, RowOrder,
    TextRows,
};
use gptq_kernels::{AttentionShape, Pairing, Rotation};
use gptq_types::Dtype;

use super::attention::Sequence;
use super::blocks::rotated;
use super::common::{Random, gpu};
use super::{BOTH, matrix, near, poisoned, rms, rounded, upload, values, weights};

const CAPACITY: usize = 360;
const EPS: f32 = 1e-5;

/// What a block does to its heads.
#[derive(Clone, Copy, Debug)]
struct Case {
    /// Of queries, of keys; width.
    heads: [usize; 3],
    /// Elements that are rotated, and how.
    rotary: Option<(usize, Pairing)>,
    /// Of queries, keys and values.
    norms: [bool; 3],
    norm_last: bool,
    /// Whether queries have a table of their own.
    scaled: bool,
    /// Whether values are read where keys are.
    keys_are_values: bool,
    /// Elements between rows beyond those of heads, of queries, keys and values.
    gaps: [usize; 3],
}

const LLAMA: Case = Case {
    heads: [4, 2, 128],
    rotary: Some((128, Pairing::Halves)),
    norms: [false; 3],
    norm_last: false,
    scaled: false,
    keys_are_values: false,
    gaps: [0; 3],
};

const CASES: [Case; 24] = [
    LLAMA,
    Case {
        heads: [9, 3, 64],
        rotary: Some((64, Pairing::Halves)),
        ..LLAMA
    },
    Case {
        norms: [true, true, false],
        ..LLAMA
    },
    Case {
        heads: [2, 1, 80],
        rotary: Some((80, Pairing::Halves)),
        norms: [true, true, false],
        ..LLAMA
    },
    Case {
        heads: [4, 2, 8],
        rotary: Some((8, Pairing::Halves)),
        norms: [false, true, false],
        ..LLAMA
    },
    Case {
        heads: [2, 1, 512],
        rotary: Some((512, Pairing::Halves)),
        norms: [true, true, false],
        ..LLAMA
    },
    // Gemma 4.
    Case {
        heads: [2, 1, 512],
        rotary: Some((512, Pairing::Halves)),
        norms: [true; 3],
        keys_are_values: true,
        ..LLAMA
    },
    Case {
        heads: [4, 2, 256],
        rotary: Some((256, Pairing::Halves)),
        norms: [true; 3],
        ..LLAMA
    },
    // GLM-4.
    Case {
        rotary: Some((64, Pairing::Interleaved)),
        gaps: [8, 16, 0],
        ..LLAMA
    },
    Case {
        heads: [4, 1, 64],
        rotary: Some((32, Pairing::Interleaved)),
        ..LLAMA
    },
    // Cohere 2.
    Case {
        rotary: Some((128, Pairing::Interleaved)),
        ..LLAMA
    },
    Case {
        rotary: Some((128, Pairing::Interleaved)),
        norms: [true, true, false],
        ..LLAMA
    },
    // Phi 3 and 4.
    Case {
        rotary: Some((96, Pairing::Halves)),
        ..LLAMA
    },
    Case {
        heads: [3, 3, 96],
        rotary: Some((72, Pairing::Halves)),
        ..LLAMA
    },
    // Hunyuan.
    Case {
        norms: [true, true, false],
        norm_last: true,
        ..LLAMA
    },
    Case {
        heads: [4, 2, 64],
        rotary: Some((32, Pairing::Interleaved)),
        norms: [true; 3],
        norm_last: true,
        ..LLAMA
    },
    // Ministral 3.
    Case {
        scaled: true,
        ..LLAMA
    },
    // SmolLM 3.
    Case {
        heads: [3, 1, 64],
        rotary: None,
        ..LLAMA
    },
    Case {
        rotary: None,
        norms: [true; 3],
        ..LLAMA
    },
    Case {
        rotary: None,
        norms: [true, false, false],
        gaps: [8, 0, 8],
        ..LLAMA
    },
    // By ones.
    Case {
        heads: [2, 1, 12],
        rotary: Some((4, Pairing::Interleaved)),
        norms: [true; 3],
        ..LLAMA
    },
    Case {
        heads: [2, 2, 16],
        rotary: Some((4, Pairing::Halves)),
        norms: [false, true, false],
        gaps: [3, 0, 1],
        ..LLAMA
    },
    Case {
        heads: [5, 1, 40],
        rotary: Some((20, Pairing::Interleaved)),
        norms: [true, false, true],
        scaled: true,
        ..LLAMA
    },
    Case {
        gaps: [1, 1, 1],
        norms: [true, true, false],
        norm_last: true,
        ..LLAMA
    },
];

/// The case, and what it needs on the GPU and in f64.
struct Block {
    case: Case,
    dtype: Dtype,
    shape: AttentionShape,
    weights: [Option<Vec<f32>>; 3],
    norms: [Option<DeviceNorm>; 3],
    rotations: Option<[Rotation; 2]>,
    rotary_tables: Option<[RotaryTable; 2]>,
}

impl Block {
    fn new(gpu: &Arc<Gpu>, case: Case, dtype: Dtype, random: &mut Random) -> Self {
        let [heads, kv_heads, d] = case.heads;
        let weights = case.norms.map(|normed| normed.then(|| weights(random, d)));
        let norms = weights
            .clone()
            .map(|weights| weights.map(|weights| DeviceNorm::rms(gpu, &weights, EPS).unwrap()));
        let rotations = case.rotary.map(|(rotary, pairing)| {
            let frequencies: Vec<f32> = (0..rotary / 2)
                .map(|i| 1.0 / (1.0 + i as f32 * 0.7))
                .collect();
            let of_keys = Rotation::new(&frequencies, 0..CAPACITY, 1.0, d, pairing);
            let factors: Vec<f32> = (0..CAPACITY)
                .map(|position| match case.scaled {
                    true => 1.0 + position as f32 / 256.0,
                    false => 1.0,
                })
                .collect();
            [of_keys.clone().scaled(&factors), of_keys]
        });
        let rotary_tables = (rotations.as_ref())
            .map(|both| both.each_ref().map(|of| RotaryTable::new(gpu, of).unwrap()));
        Block {
            case,
            dtype,
            shape: AttentionShape::new(heads, kv_heads, d),
            weights,
            norms,
            rotations,
            rotary_tables,
        }
    }

    fn norms(&self) -> HeadNorms<'_> {
        let [query, key, value] = self.norms.each_ref().map(|norm| norm.as_ref());
        HeadNorms {
            query,
            key,
            value,
            after_rotation: self.case.norm_last,
        }
    }

    /// One table for both where they are the same.
    fn rotary_tables(&self) -> Option<[&RotaryTable; 2]> {
        self.rotary_tables
            .as_ref()
            .map(|[of_q, of_k]| match self.case.scaled {
                true => [of_q, of_k],
                false => [of_k, of_k],
            })
    }

    /// A head of queries (0), keys (1) or values (2) as it is placed.
    fn placed(&self, head: &[f64], kind: usize, position: usize) -> Vec<f64> {
        let normed = |head: Vec<f64>| match &self.weights[kind] {
            Some(weight) => rms(self.dtype, &head, weight, f64::from(EPS)),
            None => head,
        };
        let rotated = |head: Vec<f64>| match &self.rotations {
            Some(rotations) if kind < 2 => (rotated(&head, position, &rotations[kind]).iter())
                .map(|x| rounded(self.dtype, *x))
                .collect(),
            _ => head,
        };
        match self.case.norm_last {
            true => normed(rotated(head.to_vec())),
            false => rotated(normed(head.to_vec())),
        }
    }

    /// Rows of kind 0, 1 or 2 from position `first` on, `pitch` apart, as they are placed.
    fn all_placed(&self, rows: &[f64], kind: usize, first: usize) -> Vec<f64> {
        let (width, pitch) = (self.width(kind), self.pitch(kind));
        (rows.chunks(pitch).enumerate())
            .flat_map(|(row, x)| {
                x[..width]
                    .chunks(self.shape.head_dim)
                    .flat_map(move |head| self.placed(head, kind, first + row))
            })
            .collect()
    }

    fn width(&self, kind: usize) -> usize {
        let heads = if kind == 0 {
            self.shape.heads
        } else {
            self.shape.kv_heads
        };
        heads * self.shape.head_dim
    }

    fn pitch(&self, kind: usize) -> usize {
        self.width(kind) + self.case.gaps[kind]
    }

    /// Heads of `count` rows that lie a pitch apart.
    fn heads<'a>(&self, buffer: &'a Buffer, kind: usize, count: usize) -> DeviceMatrix<'a> {
        let rows = matrix(buffer, self.dtype, count, self.pitch(kind));
        rows.column_range(0..self.width(kind))
    }
}

#[test]
fn heads_are_normed_turned_and_stored() {
    let Some(gpu) = gpu() else { return };
    for dtype in BOTH {
        for case in CASES {
            let mut random = Random(case.heads[2] as u64);
            check(
                &Block::new(&gpu, case, dtype, &mut random),
                &gpu,
                &mut random,
            );
        }
    }
}

/// Two prompts, then the newest token of each of two sequences; values are what a window of one token shows,
/// keys are felt in the weights.
fn check(block: &Block, gpu: &Arc<Gpu>, random: &mut Random) {
    let (shape, dtype) = (block.shape, block.dtype);
    let cache = DeviceKeyValues::new(gpu, 2, CAPACITY, shape, dtype).unwrap();
    let lengths = [[40, 300], [1, 3]];
    let mut own = [(); 2].map(|()| Sequence {
        q: Vec::new(),
        k: Vec::new(),
        v: Vec::new(),
    });
    for (sequence, own) in own.iter_mut().enumerate() {
        let mut first = 0;
        for count in lengths[sequence] {
            let rows = TextRows::Prompt { sequence, first };
            let placed = place(block, gpu, &cache, random, &[first], count, rows);
            extend(own, placed);
            let what = format!("{:?}, {count} rows after {first}", block.case);
            check_prompt(block, gpu, &cache, own, sequence, first, &what);
            first += count;
        }
    }
    let held = lengths.map(|[first, second]| first + second + 1);
    let held_there = Buffer::from_host(gpu, &held.map(|held| held as i32)).unwrap();
    let held_there = held_there.slice(2);
    let rows = TextRows::Newest(held_there);
    let positions = held.map(|held| held - 1);
    let placed = place(block, gpu, &cache, random, &positions, 2, rows);
    let queries = block.width(0);
    let q = upload(gpu, dtype, &placed.q);
    for (at, own) in own.iter_mut().enumerate() {
        let part = |x: &[f64], kind: usize| {
            let width = block.width(kind);
            x[at * width..][..width].to_vec()
        };
        let row = Sequence {
            q: part(&placed.q, 0),
            k: part(&placed.k, 1),
            v: part(&placed.v, 2),
        };
        extend(own, row);
    }
    let out = poisoned(gpu, 2 * queries);
    let order = RowOrder::natural(queries);
    let [out, q] = [&out, &q].map(|rows| matrix(rows, dtype, 2, queries));
    cache
        .attend_newest(out, order, q, held_there, shape)
        .unwrap();
    let got = gpu.download(out).unwrap();
    let want: Vec<f64> = (own.iter().zip(positions))
        .flat_map(|(own, position)| own.attended(shape, position))
        .collect();
    near(
        &got,
        &want,
        dtype,
        1.0,
        &format!("{:?}, newest", block.case),
    );
}

fn extend(own: &mut Sequence, more: Sequence) {
    own.q.extend(more.q);
    own.k.extend(more.k);
    own.v.extend(more.v);
}

/// Places `count` new rows, the first ones at `positions` and the others behind the last of them; returns them
/// as they are placed, having checked the queries. The same rows of queries placed alone are the same.
fn place(
    block: &Block,
    gpu: &Arc<Gpu>,
    cache: &DeviceKeyValues,
    random: &mut Random,
    positions: &[usize],
    count: usize,
    rows: TextRows,
) -> Sequence {
    let dtype = block.dtype;
    let raw = [0, 1, 2].map(|kind| values(random, dtype, count * block.pitch(kind)));
    let there = raw.each_ref().map(|rows| upload(gpu, dtype, rows));
    let [q, k, v] = [0, 1, 2].map(|kind| block.heads(&there[kind], kind, count));
    let v = if block.case.keys_are_values { k } else { v };
    let queries = block.width(0);
    let (norms, rotary_tables) = (block.norms(), block.rotary_tables());
    let [with, alone] = [Some([k, v]), None].map(|kv| {
        let out = poisoned(gpu, count * queries);
        let to = matrix(&out, dtype, count, queries);
        cache.store(to, q, kv, rows, &norms, rotary_tables).unwrap();
        out
    });
    let placed = |kind: usize, rows: &[f64]| -> Vec<f64> {
        let pitch = block.pitch(kind);
        (rows.chunks(pitch).enumerate())
            .flat_map(|(row, x)| {
                let last = positions.len() - 1;
                let position = positions[row.min(last)] + row.saturating_sub(last);
                block.all_placed(x, kind, position)
            })
            .collect()
    };
    let want = Sequence {
        q: placed(0, &raw[0]),
        k: placed(1, &raw[1]),
        v: match block.case.keys_are_values {
            true => (raw[1].chunks(block.pitch(1)))
                .flat_map(|x| block.all_placed_as_values(x))
                .collect(),
            false => placed(2, &raw[2]),
        },
    };
    for out in [&with, &alone] {
        let got = gpu.download(matrix(out, dtype, count, queries)).unwrap();
        near(
            &got,
            &want.q,
            dtype,
            1.0,
            &format!("{:?}, queries", block.case),
        );
    }
    let both = [&with, &alone].map(|out| out.to_host::<u16>(count * queries).unwrap());
    assert!(both[0] == both[1], "{:?}, queries alone", block.case);
    want
}

impl Block {
    /// A row of keys, read as values.
    fn all_placed_as_values(&self, row: &[f64]) -> Vec<f64> {
        row[..self.width(1)]
            .chunks(self.shape.head_dim)
            .flat_map(|head| self.placed(head, 2, 0))
            .collect()
    }
}

/// The rows from `first` on attend to themselves alone, then to all before them.
fn check_prompt(
    block: &Block,
    gpu: &Arc<Gpu>,
    cache: &DeviceKeyValues,
    own: &Sequence,
    sequence: usize,
    first: usize,
    what: &str,
) {
    let (dtype, queries) = (block.dtype, block.width(0));
    let q = upload(gpu, dtype, &own.q[first * queries..]);
    let count = own.q.len() / queries - first;
    let q = matrix(&q, dtype, count, queries);
    for window in [Some(1), None] {
        let shape = AttentionShape {
            window,
            ..block.shape
        };
        let out = poisoned(gpu, count * queries);
        let out = matrix(&out, dtype, count, queries);
        cache.attend_prompt(out, q, sequence, first, shape).unwrap();
        let got = gpu.download(out).unwrap();
        for row in (0..count).filter(|row| window.is_some() || row % 37 == 0 || row + 1 == count) {
            let want = own.attended(shape, first + row);
            let got = &got[row * queries..][..queries];
            near(
                got,
                &want,
                dtype,
                1.0,
                &format!("{what}, {window:?}, row {row}"),
            );
        }
    }
}
