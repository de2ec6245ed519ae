//! Places for matrices that wait, on the GPU or in pinned host memory beside it.
//!
//! What waits in host memory crosses the bus beside the work of the GPU. A matrix on its way there
//! is first copied to a slot on the GPU, which takes a fiftieth of the time on the bus: its own
//! memory may then be written again at once. On the way back the place that comes next is fetched
//! to a slot while the GPU works on the one before it.
//!
//! The order is kept by events alone. Whoever writes a slot waits until it was read, whoever reads a
//! slot or a host place until it was written; the host itself waits for nothing before the drop.

use std::cell::Cell;
use std::sync::Arc;

use cudarc::driver::{CudaStream, sys};

use super::error::{CudaError, Named};
use super::memory::{Buffer, Pinned};
use super::view::DeviceMatrix;
use super::{Gpu, Mark};

/// Equal places for matrices that wait, as many on the GPU as fit and the rest in pinned memory.
///
/// Places may be put and asked for in any order; from the lowest on, one after the other, is the
/// order in which copies from host memory are fetched ahead.
pub struct ActivationStore {
    gpu: Arc<Gpu>,
    places: usize,
    /// Of the largest matrix.
    largest_bytes: usize,
    /// Of a place in host memory and of a slot.
    host_bytes: usize,
    /// Of a place now.
    place_bytes: Cell<usize>,
    device: Option<Buffer>,
    /// Places beyond those that are on the GPU at any size of a place.
    host: Vec<HostPlace>,
    /// The first is filled by what leaves, the last by what is fetched ahead; they may be the same.
    slots: Vec<Slot>,
}

/// A place in host memory.
struct HostPlace {
    pinned: Pinned,
    /// How much was put there; nothing is fetched beyond it.
    bytes: Cell<usize>,
    /// The copy to it is over.
    written: Mark,
    /// The copy from it to a slot is over.
    fetched: Mark,
}

/// Memory on the GPU for what crosses the bus.
struct Slot {
    memory: Buffer,
    /// The last copy to it is over.
    filled: Mark,
    /// The last copy from it is over.
    emptied: Mark,
    /// The place that was fetched to it, and how many bytes of it.
    holds: Cell<Option<(usize, usize)>>,
}

impl HostPlace {
    fn new(gpu: &Gpu, bytes: usize) -> Result<HostPlace, CudaError> {
        Ok(HostPlace {
            pinned: Pinned::new(bytes)?,
            bytes: Cell::new(0),
            written: gpu.new_mark()?,
            fetched: gpu.new_mark()?,
        })
    }
}

impl Slot {
    fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Slot, CudaError> {
        Ok(Slot {
            memory: Buffer::new(gpu, bytes)?,
            filled: gpu.new_mark()?,
            // Behind the allocation, which other streams would not wait for.
            emptied: gpu.mark()?,
            holds: Cell::new(None),
        })
    }

    /// Lets `stream` write to it.
    fn clear_for(&self, stream: &CudaStream) -> Result<(), CudaError> {
        self.holds.set(None);
        wait(stream, &self.filled)?;
        wait(stream, &self.emptied)
    }
}

impl ActivationStore {
    /// `places` of at most `place_bytes`, of which `on_device` are on the GPU. The others take `host_bytes`:
    /// larger matrices have no room there. `slots` of as many bytes are on the GPU for copies beside its
    /// work, where not all places are on it: two where places are written between two reads, one where all
    /// are written before any is read. With none every copy stands in the way of other work.
    pub fn new(
        gpu: &Arc<Gpu>,
        places: usize,
        [place_bytes, host_bytes]: [usize; 2],
        on_device: usize,
        slots: usize,
    ) -> Result<ActivationStore, CudaError> {
        let host_bytes = host_bytes.min(place_bytes);
        let on_device = on_device.min(places);
        let device = match on_device {
            0 => None,
            _ => Some(Buffer::new(gpu, on_device * place_bytes)?),
        };
        // Places of this size that are on the GPU need none in host memory.
        let near = on_device * place_bytes / host_bytes.max(1);
        let host = (near.min(places)..places)
            .map(|_| HostPlace::new(gpu, host_bytes))
            .collect::<Result<Vec<_>, _>>()?;
        let slots = match host.is_empty() {
            true => 0,
            false => slots.min(2),
        };
        Ok(ActivationStore {
            gpu: gpu.clone(),
            places,
            largest_bytes: place_bytes,
            host_bytes,
            place_bytes: Cell::new(place_bytes),
            device,
            host,
            slots: (0..slots)
                .map(|_| Slot::new(gpu, host_bytes))
                .collect::<Result<_, _>>()?,
        })
    }

    /// Forgets what is there. From now on a place has `place_bytes`, at most those of
    /// [`ActivationStore::new`]: the smaller, the more of them are on the GPU.
    pub fn clear(&self, place_bytes: usize) {
        assert!(place_bytes <= self.largest_bytes, "bytes of a place");
        self.place_bytes.set(place_bytes);
        for host in &self.host {
            host.bytes.set(0);
        }
        for slot in &self.slots {
            slot.holds.set(None);
        }
    }

    /// Whether a matrix as large as a place now can be put there.
    pub fn has_room(&self, place: usize) -> bool {
        assert!(place < self.places, "place {place} of {}", self.places);
        self.device_address(place).is_some() || self.place_bytes.get() <= self.host_bytes
    }

    fn device_address(&self, place: usize) -> Option<u64> {
        let (device, bytes) = (self.device.as_ref()?, self.place_bytes.get());
        let start = place * bytes;
        let fits = place < self.places && start + bytes <= device.bytes();
        fits.then(|| device.address() + start as u64)
    }

    /// The place in host memory, where it is there.
    fn host_place(&self, place: usize) -> Option<&HostPlace> {
        if self.device_address(place).is_some() {
            return None;
        }
        self.host
            .get(place.checked_sub(self.places - self.host.len())?)
    }

    /// Copies a matrix to a place that has room.
    pub fn put(&self, place: usize, from: DeviceMatrix) -> Result<(), CudaError> {
        let (from, bytes) = (from.contiguous().address, from.bytes());
        assert!(bytes <= self.place_bytes.get(), "bytes of a place");
        assert!(self.has_room(place), "room for the matrix");
        let Some(host) = self.host_place(place) else {
            return self.gpu.copy_bytes(self.on_device(place), from, bytes);
        };
        for slot in &self.slots {
            if slot.holds.get().is_some_and(|(held, _)| held == place) {
                slot.holds.set(None);
            }
        }
        host.bytes.set(bytes);
        let Some(slot) = self.slots.first() else {
            return self.copy_to_host(host, from, bytes, &self.gpu.stream);
        };
        slot.clear_for(&self.gpu.stream)?;
        self.gpu.copy_bytes(slot.memory.address(), from, bytes)?;
        record(&slot.filled, &self.gpu.stream)?;
        wait(&self.gpu.home, &slot.filled)?;
        self.copy_to_host(host, slot.memory.address(), bytes, &self.gpu.home)?;
        record(&slot.emptied, &self.gpu.home)
    }

    /// Copies what is at a place to a matrix of as many bytes.
    pub fn get(&self, place: usize, to: DeviceMatrix) -> Result<(), CudaError> {
        let (to, bytes) = (to.contiguous().address, to.bytes());
        assert!(bytes <= self.place_bytes.get(), "bytes of a place");
        assert!(self.has_room(place), "room for the matrix");
        let stream = &self.gpu.stream;
        match (self.host_place(place), self.holder(place, bytes)) {
            (None, _) => self.gpu.copy_bytes(to, self.on_device(place), bytes)?,
            (Some(_), Some(slot)) => {
                wait(stream, &slot.filled)?;
                self.gpu.copy_bytes(to, slot.memory.address(), bytes)?;
                record(&slot.emptied, stream)?;
            }
            (Some(host), None) => self.copy_from_host(host, to, bytes, stream)?,
        }
        self.fetch((place + 1) % self.places)
    }

    fn on_device(&self, place: usize) -> u64 {
        let address = self.device_address(place);
        address.expect("a place is on the GPU or in host memory")
    }

    /// The slot that so many bytes of the place were fetched to.
    fn holder(&self, place: usize, bytes: usize) -> Option<&Slot> {
        let slot = self.slots.last()?;
        let (held, there) = slot.holds.get()?;
        (held == place && there >= bytes).then_some(slot)
    }

    /// Begins to copy what is at a place in host memory to the slot for it, beside the work of the
    /// GPU. A guess: another place may be asked for next.
    fn fetch(&self, place: usize) -> Result<(), CudaError> {
        let (Some(host), Some(slot)) = (self.host_place(place), self.slots.last()) else {
            return Ok(());
        };
        let bytes = host.bytes.get();
        if bytes == 0 || slot.holds.get() == Some((place, bytes)) {
            return Ok(());
        }
        let stream = &self.gpu.back;
        slot.clear_for(stream)?;
        self.copy_from_host(host, slot.memory.address(), bytes, stream)?;
        record(&slot.filled, stream)?;
        record(&host.fetched, stream)?;
        slot.holds.set(Some((place, bytes)));
        Ok(())
    }

    /// Copies from the GPU to a place once nobody reads it any more.
    fn copy_to_host(
        &self,
        host: &HostPlace,
        from: u64,
        bytes: usize,
        stream: &CudaStream,
    ) -> Result<(), CudaError> {
        // A copy from the place straight to a matrix stands in the GPU's own stream, ahead of what
        // is copied now.
        wait(stream, &host.fetched)?;
        let to = host.pinned.pointer();
        // SAFETY: the place has so many bytes and so has what the caller copies from; a slot is not
        // written, and the pinned memory neither read nor freed, before the copy is over.
        unsafe { sys::cuMemcpyDtoHAsync_v2(to, from, bytes, stream.cu_stream()) }
            .result()
            .named("moving activations to host memory")?;
        record(&host.written, stream)
    }

    /// Copies from a place to the GPU once the place is written.
    fn copy_from_host(
        &self,
        host: &HostPlace,
        to: u64,
        bytes: usize,
        stream: &CudaStream,
    ) -> Result<(), CudaError> {
        wait(stream, &host.written)?;
        let from = host.pinned.pointer();
        // SAFETY: as in `copy_to_host`, the other way round.
        unsafe { sys::cuMemcpyHtoDAsync_v2(to, from, bytes, stream.cu_stream()) }
            .result()
            .named("moving activations from host memory")
    }

    /// Waits for all copies from and to host memory.
    fn settle(&self) -> Result<(), CudaError> {
        for stream in [&self.gpu.stream, &self.gpu.home, &self.gpu.back] {
            stream.synchronize().named("waiting for a copy")?;
        }
        Ok(())
    }
}

impl Drop for ActivationStore {
    fn drop(&mut self) {
        // Slots are given back in the order of the GPU's own stream, pinned memory in none.
        if !self.host.is_empty() && self.settle().is_err() {
            std::mem::forget(std::mem::take(&mut self.host));
        }
    }
}

/// What is queued on `stream` from now on waits for the mark; not at all where it is in no stream
/// yet.
fn wait(stream: &CudaStream, mark: &Mark) -> Result<(), CudaError> {
    stream.wait(&mark.0).named("ordering a copy")
}

/// Sets the mark behind what is queued on `stream`.
fn record(mark: &Mark, stream: &CudaStream) -> Result<(), CudaError> {
    mark.0.record(stream).named("recording an event")
}
