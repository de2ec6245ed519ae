//! Places of a store, on the GPU and in host memory: what was put there comes back, walked and in any
//! order, though all copies are queued before any of them is over. Skipped by name where there is no GPU.
#![cfg(feature = "cuda")]
#![allow(clippy::print_stderr)]

#[allow(dead_code)]
mod common;

use std::sync::Arc;

use gptq_kernels::cuda::{ActivationStore, Buffer, DeviceMatrix, Gpu};
use gptq_types::Dtype;

use common::{Random, gpu};

/// A quarter of a millisecond on the bus: copies are under way when the next ones are queued.
const PLACE: usize = 12 << 20;
/// Of a shorter batch, or a narrower matrix.
const SHORT: usize = 5 << 20;
const PLACES: usize = 7;
/// Contents to tell apart.
const CONTENTS: usize = 5;
/// Reads that are queued before they are looked at.
const QUEUED: usize = 40;

/// The first `bytes` as a matrix of one row.
fn matrix(buffer: &Buffer, bytes: usize) -> DeviceMatrix<'_> {
    buffer.matrix([1, bytes / 2], Dtype::F16)
}

/// A store, what should be at each place, and what was read.
struct Bench {
    gpu: Arc<Gpu>,
    store: ActivationStore,
    contents: Vec<(Vec<u32>, Buffer)>,
    /// Written over as soon as a place was put from it.
    from: Buffer,
    at: [Option<(usize, usize)>; PLACES], // content and bytes
    read: Vec<(Buffer, usize, usize, usize)>, // with content, bytes, place
    random: Random,
}

impl Bench {
    fn new(gpu: &Arc<Gpu>, on_device: usize, slots: usize) -> Self {
        let mut random = Random(on_device as u64 * 7 + slots as u64);
        let contents = (0..CONTENTS)
            .map(|_| {
                let values: Vec<u32> = (0..PLACE / 4).map(|_| random.next()).collect();
                let there = Buffer::from_host(gpu, &values).unwrap();
                (values, there)
            })
            .collect();
        Bench {
            gpu: gpu.clone(),
            store: ActivationStore::new(gpu, PLACES, [PLACE, PLACE], on_device, slots).unwrap(),
            contents,
            from: Buffer::new(gpu, PLACE).unwrap(),
            at: [None; PLACES],
            read: Vec::new(),
            random,
        }
    }

    fn put(&mut self, place: usize, bytes: usize) {
        let content = self.random.next() as usize % CONTENTS;
        let from = matrix(&self.from, bytes);
        let there = matrix(&self.contents[content].1, bytes);
        self.gpu.copy(from, there).unwrap();
        self.store.put(place, from).unwrap();
        self.from.clear().unwrap();
        self.at[place] = Some((content, bytes));
    }

    fn get(&mut self, place: usize) {
        let (content, bytes) = self.at[place].expect("it was put");
        let to = Buffer::zeros(&self.gpu, bytes).unwrap();
        self.store.get(place, matrix(&to, bytes)).unwrap();
        self.read.push((to, content, bytes, place));
        if self.read.len() >= QUEUED {
            self.look();
        }
    }

    #[track_caller]
    fn look(&mut self) {
        for (index, (got, content, bytes, place)) in self.read.drain(..).enumerate() {
            let got = got.to_host::<u32>(bytes / 4).unwrap();
            let want = &self.contents[content].0[..bytes / 4];
            assert!(got == want, "read {index} of place {place}");
        }
    }

    fn any(&mut self) -> usize {
        self.random.next() as usize % PLACES
    }
}

/// ActivationStores with all, some and no places on the GPU, with and without copies beside its work.
fn benches() -> impl Iterator<Item = Bench> {
    let cases = [(7, 2), (3, 2), (3, 1), (3, 0), (6, 2), (0, 2), (0, 1)];
    gpu().into_iter().flat_map(move |gpu| {
        (cases.into_iter()).map(move |(on_device, slots)| Bench::new(&gpu, on_device, slots))
    })
}

/// As hidden states are: read, and on some walks put again at once. The last batch is shorter.
#[test]
fn places_that_are_walked_and_changed() {
    for mut bench in benches() {
        let bytes = |place: usize| if place == PLACES - 1 { SHORT } else { PLACE };
        for place in 0..PLACES {
            bench.put(place, bytes(place));
        }
        for walk in 0..9 {
            for place in 0..PLACES {
                bench.get(place);
                if walk % 3 == 2 {
                    bench.put(place, bytes(place));
                }
            }
        }
        bench.look();
    }
}

/// As inner activations are: all put, then all read, with places of two sizes in turn.
#[test]
fn places_that_are_written_before_they_are_read() {
    for mut bench in benches() {
        for walk in 0..6 {
            let bytes = if walk % 2 == 0 { SHORT } else { PLACE };
            bench.store.clear(bytes);
            for place in 0..PLACES {
                bench.put(place, bytes);
            }
            for place in 0..PLACES {
                bench.get(place);
            }
        }
        bench.look();
    }
}

/// As inner activations are that are too large for host memory: those on the GPU alone are kept, and
/// smaller ones all.
#[test]
fn large_matrices_have_room_on_the_gpu_alone() {
    let Some(gpu) = gpu() else { return };
    let store = ActivationStore::new(&gpu, PLACES, [PLACE, SHORT], 3, 1).unwrap();
    let values: Vec<u32> = (0..PLACE as u32 / 4).collect();
    let from = Buffer::from_host(&gpu, &values).unwrap();
    for bytes in [SHORT, PLACE, SHORT] {
        store.clear(bytes);
        let room: Vec<usize> = (0..PLACES).filter(|&place| store.has_room(place)).collect();
        assert_eq!(room.len(), if bytes == SHORT { PLACES } else { 3 });
        for &place in &room {
            store.put(place, matrix(&from, bytes)).unwrap();
        }
        for &place in &room {
            let to = Buffer::zeros(&gpu, bytes).unwrap();
            store.get(place, matrix(&to, bytes)).unwrap();
            assert!(to.to_host::<u32>(bytes / 4).unwrap() == values[..bytes / 4]);
        }
    }
}

#[test]
fn places_in_random_order() {
    for mut bench in benches() {
        for place in 0..PLACES {
            bench.put(place, PLACE);
        }
        for _ in 0..200 {
            let place = bench.any();
            match bench.random.next() % 3 {
                0 => {
                    let bytes = (1 + bench.random.next() as usize % (PLACE / 4)) * 4;
                    bench.put(place, bytes);
                }
                1 => bench.get(place),
                // A place that is fetched ahead: just written, or overtaken by another content.
                _ => {
                    let next = (place + 1) % PLACES;
                    if bench.random.next() % 2 == 0 {
                        bench.put(next, PLACE);
                    }
                    bench.get(place);
                    if bench.random.next() % 2 == 0 {
                        bench.put(next, PLACE);
                    }
                    bench.get(next);
                }
            }
        }
        bench.look();
    }
}

/// Nothing waits for the copies but the drop.
#[test]
fn a_store_may_go_while_copies_are_under_way() {
    for mut bench in benches() {
        for place in 0..PLACES {
            bench.put(place, PLACE);
        }
        bench.get(0);
        bench.get(1);
        let Bench {
            store,
            gpu,
            contents,
            read,
            ..
        } = bench;
        drop(store);
        for (got, content, bytes, place) in read {
            let got = got.to_host::<u32>(bytes / 4).unwrap();
            assert!(got == contents[content].0[..bytes / 4], "place {place}");
        }
        gpu.synchronize().unwrap();
    }
}
