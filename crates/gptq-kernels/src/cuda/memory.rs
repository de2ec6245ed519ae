//! Memory on the GPU, pinned memory beside it, and copies between them.

use std::ffi::c_void;
use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::result;
use rayon::prelude::*;

use super::error::{CudaError, Named};
use super::view::{DeviceMatrix, DeviceSlice};
use super::{Gpu, Mark};

/// Bytes on the GPU. Freed in the order of the stream: work queued before may still use them.
pub struct Buffer {
    gpu: Arc<Gpu>,
    address: u64,
    bytes: usize,
    serial: u64,
}

/// Which buffers a recorded graph may know the addresses of: those that are older. They are freed when it
/// is gone, whoever drops them before.
#[derive(Default)]
pub(super) struct Recordings {
    next: u64,
    /// Serials of the recordings that exist.
    alive: Vec<u64>,
    /// Buffers that were dropped meanwhile.
    dropped: Vec<u64>,
}

impl Recordings {
    fn serial(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

impl Gpu {
    /// The serial of a recording made now.
    pub(super) fn record_serial(&self) -> u64 {
        let mut recordings = self.recordings.borrow_mut();
        let serial = recordings.serial();
        recordings.alive.push(serial);
        serial
    }

    /// Frees what waited for the end of a recording, unless others are left.
    pub(super) fn forget_recording(&self, serial: u64) {
        let mut recordings = self.recordings.borrow_mut();
        recordings.alive.retain(|&other| other != serial);
        if recordings.alive.is_empty() {
            for address in recordings.dropped.drain(..) {
                // SAFETY: allocated on this stream, and freed here alone.
                let _ = unsafe { result::free_async(address, self.raw_stream()) };
            }
        }
    }
}

impl Buffer {
    /// `bytes` of undefined content.
    pub fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Buffer, CudaError> {
        // SAFETY: the stream is this GPU's.
        let address =
            unsafe { result::malloc_async(gpu.raw_stream(), bytes.max(1)) }.map_err(|_| {
                CudaError::Memory {
                    bytes,
                    free: gpu.memory().map_or(0, |memory| memory.free),
                }
            })?;
        Ok(Buffer {
            gpu: gpu.clone(),
            address,
            bytes,
            serial: gpu.recordings.borrow_mut().serial(),
        })
    }

    /// `bytes` of zero.
    pub fn zeros(gpu: &Arc<Gpu>, bytes: usize) -> Result<Buffer, CudaError> {
        let buffer = Buffer::new(gpu, bytes)?;
        buffer.clear()?;
        Ok(buffer)
    }

    /// Sets all of it to zero.
    pub fn clear(&self) -> Result<(), CudaError> {
        // SAFETY: the buffer has so many bytes.
        unsafe { result::memset_d8_async(self.address, 0, self.bytes, self.gpu.raw_stream()) }
            .named("clearing memory")
    }

    /// A copy of host values.
    pub fn from_host<T: Pod>(gpu: &Arc<Gpu>, values: &[T]) -> Result<Buffer, CudaError> {
        let buffer = Buffer::new(gpu, size_of_val(values))?;
        gpu.to_device(buffer.address, values)?;
        Ok(buffer)
    }

    pub(super) fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Of the first byte.
    pub(super) fn address(&self) -> u64 {
        self.address
    }

    /// Length.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The first `count` values; waits for all work queued so far.
    pub fn to_host<T: Pod>(&self, count: usize) -> Result<Vec<T>, CudaError> {
        assert!(count * size_of::<T>() <= self.bytes, "values in the buffer");
        self.gpu.to_host(self.address, count)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut recordings = self.gpu.recordings.borrow_mut();
        if recordings
            .alive
            .iter()
            .any(|&recording| recording > self.serial)
        {
            recordings.dropped.push(self.address);
            return;
        }
        // SAFETY: allocated on this stream and freed once.
        let _ = unsafe { result::free_async(self.address, self.gpu.raw_stream()) };
    }
}

/// Host memory that the GPU copies from and to at full speed.
pub struct Pinned {
    pointer: *mut c_void,
    bytes: usize,
}

// SAFETY: plain memory; the pointer is the only one to it.
unsafe impl Send for Pinned {}
// SAFETY: shared access only reads.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// `bytes` of undefined content.
    pub fn new(bytes: usize) -> Result<Pinned, CudaError> {
        // SAFETY: plain allocation.
        let pointer =
            unsafe { result::malloc_host(bytes.max(1), 0) }.named("pinning host memory")?;
        Ok(Pinned { pointer, bytes })
    }

    /// Of the first byte, for copies that the borrow checker cannot see the end of.
    pub(super) fn pointer(&self) -> *mut c_void {
        self.pointer
    }

    /// The content; undefined until something was written.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: allocated with this length; any byte is a valid u8.
        unsafe { std::slice::from_raw_parts(self.pointer.cast(), self.bytes) }
    }

    /// The same as f32.
    pub fn as_floats(&self) -> &[f32] {
        bytemuck::cast_slice(self.as_slice())
    }

    /// For writing.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: allocated with this length, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.cast(), self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` and freed once.
        let _ = unsafe { result::free_host(self.pointer) };
    }
}

/// Pageable memory crosses the bus at a fifth of its speed; from this size on copies go through
/// pinned memory, filled and emptied by all threads.
const STAGED_FROM: usize = 1 << 20;
/// Bytes of a slot, and slots: one is on the bus while the next is filled.
const SLOT: usize = 16 << 20;
const SLOTS: usize = 3;
/// Bytes that one thread copies.
const SHARE: usize = 1 << 20;

/// Pinned memory on the way of large copies.
#[derive(Default)]
pub(super) struct Staging(Vec<Slot>);

struct Slot {
    pinned: Pinned,
    /// When the last copy through it is over.
    over: Option<Mark>,
}

impl Slot {
    fn wait(&mut self) -> Result<(), CudaError> {
        self.over.take().map_or(Ok(()), |mark| mark.wait())
    }
}

impl Staging {
    fn slots(&mut self) -> Result<&mut [Slot], CudaError> {
        while self.0.len() < SLOTS {
            self.0.push(Slot {
                pinned: Pinned::new(SLOT)?,
                over: None,
            });
        }
        Ok(&mut self.0)
    }
}

pub(super) fn copy_side_by_side(to: &mut [u8], from: &[u8]) {
    (to.par_chunks_mut(SHARE).zip(from.par_chunks(SHARE)))
        .for_each(|(to, from)| to.copy_from_slice(from));
}

impl Gpu {
    /// Copies to the device. The host values may be changed once this returns.
    ///
    /// # Panics
    /// If there are more or fewer values than elements.
    pub fn write<T: Pod>(&self, to: DeviceSlice<'_, T>, values: &[T]) -> Result<(), CudaError> {
        assert_eq!(to.len(), values.len(), "values for the elements");
        self.to_device(to.address(), values)
    }

    /// The same for the stored bytes of a matrix.
    ///
    /// # Panics
    /// If the matrix has other bytes, or gaps.
    pub fn write_stored(&self, to: DeviceMatrix<'_>, bytes: &[u8]) -> Result<(), CudaError> {
        assert_eq!(to.contiguous().bytes(), bytes.len(), "bytes of the matrix");
        self.to_device(to.address, bytes)
    }

    /// Copies to an address that the caller vouches for.
    pub(super) fn to_device<T: Pod>(&self, address: u64, values: &[T]) -> Result<(), CudaError> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        if bytes.len() < STAGED_FROM {
            // SAFETY: the caller vouches for the address; pageable memory is staged by the driver
            // before the call returns.
            return unsafe { result::memcpy_htod_async(address, bytes, self.raw_stream()) }
                .named("copying to the GPU");
        }
        let mut staging = self.staging.borrow_mut();
        let slots = staging.slots()?;
        for (index, part) in bytes.chunks(SLOT).enumerate() {
            let slot = &mut slots[index % SLOTS];
            slot.wait()?;
            let pinned = &mut slot.pinned.as_mut_slice()[..part.len()];
            copy_side_by_side(pinned, part);
            // SAFETY: as above; the slot is not written again before its mark has passed.
            unsafe {
                result::memcpy_htod_async(
                    address + (index * SLOT) as u64,
                    pinned,
                    self.raw_stream(),
                )
            }
            .named("copying to the GPU")?;
            slot.over = Some(self.mark()?);
        }
        Ok(())
    }

    /// Copies from the device; waits for all work queued so far. The caller vouches for the address.
    pub(super) fn to_host<T: Pod>(&self, address: u64, count: usize) -> Result<Vec<T>, CudaError> {
        let mut values = vec![T::zeroed(); count];
        self.fill_host(address, &mut values)?;
        Ok(values)
    }

    /// The same into `values`.
    pub(super) fn fill_host<T: Pod>(
        &self,
        address: u64,
        values: &mut [T],
    ) -> Result<(), CudaError> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(values);
        if bytes.len() < STAGED_FROM {
            // SAFETY: the caller vouches for the address; the slice outlives the copy, waited for.
            unsafe { result::memcpy_dtoh_async(bytes, address, self.raw_stream()) }
                .named("copying from the GPU")?;
            return self.synchronize();
        }
        let mut staging = self.staging.borrow_mut();
        let slots = staging.slots()?;
        let (total, parts) = (bytes.len(), bytes.len().div_ceil(SLOT));
        let mut queued = 0;
        for (index, part) in bytes.chunks_mut(SLOT).enumerate() {
            while queued < parts && queued < index + SLOTS {
                let slot = &mut slots[queued % SLOTS];
                slot.wait()?;
                let first = queued * SLOT;
                let length = SLOT.min(total - first);
                // SAFETY: the part lies inside what the caller vouches for, and inside the slot.
                unsafe {
                    result::memcpy_dtoh_async(
                        &mut slot.pinned.as_mut_slice()[..length],
                        address + first as u64,
                        self.raw_stream(),
                    )
                }
                .named("copying from the GPU")?;
                slot.over = Some(self.mark()?);
                queued += 1;
            }
            let slot = &mut slots[index % SLOTS];
            slot.wait()?;
            copy_side_by_side(part, &slot.pinned.as_slice()[..part.len()]);
        }
        Ok(())
    }

    /// Copies `from` to the start of `to`; waits for all work queued so far.
    ///
    /// # Panics
    /// If it does not fit there.
    pub fn to_pinned(&self, to: &mut Pinned, from: DeviceSlice<'_, u8>) -> Result<(), CudaError> {
        let to = &mut to.as_mut_slice()[..from.len()];
        // SAFETY: the slice lies in memory of its owner; the host's outlives the copy, waited for.
        unsafe { result::memcpy_dtoh_async(to, from.address(), self.raw_stream()) }
            .named("copying from the GPU")?;
        self.synchronize()
    }

    /// Copies a matrix inside the device.
    ///
    /// # Panics
    /// If the two have other numbers of elements, other types, or gaps.
    pub fn copy(&self, to: DeviceMatrix<'_>, from: DeviceMatrix<'_>) -> Result<(), CudaError> {
        let (to, from) = (to.contiguous(), from.contiguous());
        assert_eq!(to.dtype, from.dtype, "types of both");
        assert_eq!(to.elements(), from.elements(), "elements of both");
        self.copy_bytes(to.address, from.address, from.bytes())
    }

    /// Copies inside the device; the caller vouches for both addresses.
    pub(super) fn copy_bytes(&self, to: u64, from: u64, bytes: usize) -> Result<(), CudaError> {
        // SAFETY: the caller vouches for both addresses.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.raw_stream()) }
            .named("copying on the GPU")
    }
}
