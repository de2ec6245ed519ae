//! Results on their way to host memory, beside the work that follows.
//!
//! Copying a linear's codes takes half as long as sweeping it: the bus, and above all fresh host
//! memory. So codes cross on a stream of their own into pinned memory, and whoever wants them waits
//! and copies them from there, on a thread of its choice.

use std::sync::{Arc, Mutex};

use bytemuck::Pod;
use cudarc::driver::result;

use super::error::{CudaError, Named};
use super::memory::{Buffer, Pinned, copy_side_by_side};
use super::{Gpu, Mark};

/// Results that may be under way at a time; what comes beyond them is copied at once.
const UNDER_WAY: usize = 4;
/// Where a part begins: a multiple of it.
const ALIGNMENT: usize = 64;

/// Pinned memory that waits for its next use; pinning a page costs more than copying it.
#[derive(Default)]
pub(super) struct Pool {
    free: Vec<Pinned>,
    lent: usize,
}

/// Parts of device memory that are being copied.
pub struct Arrival {
    over: Mark,
    parts: Vec<(usize, usize)>, // offset and length in bytes
    pinned: Option<Pinned>,     // there until it is dropped
    pool: Arc<Mutex<Pool>>,
}

impl Gpu {
    /// Starts to copy the first bytes of each buffer once the work queued so far is done; `None`
    /// where enough is under way already. The buffers must stay until [`Arrival::hold`].
    pub(super) fn send_home(
        &self,
        parts: &[(&Buffer, usize)],
    ) -> Result<Option<Arrival>, CudaError> {
        let mut end = 0;
        let places: Vec<(usize, usize)> = (parts.iter())
            .map(|&(_, bytes)| {
                let offset = end;
                end = (offset + bytes).next_multiple_of(ALIGNMENT);
                (offset, bytes)
            })
            .collect();
        let Some(mut pinned) = self.lend(end)? else {
            return Ok(None);
        };
        self.home.wait(&self.mark()?.0).named("ordering a copy")?;
        for (&(buffer, bytes), &(offset, _)) in parts.iter().zip(&places) {
            let to = &mut pinned.as_mut_slice()[offset..offset + bytes];
            // SAFETY: the buffer has so many bytes; the pinned memory is lent out until the copy
            // is over.
            unsafe { result::memcpy_dtoh_async(to, buffer.address(), self.home.cu_stream()) }
                .named("copying from the GPU")?;
        }
        let over = self.new_mark()?;
        over.0.record(&self.home).named("recording an event")?;
        Ok(Some(Arrival {
            over,
            parts: places,
            pinned: Some(pinned),
            pool: self.pool_of_pinned.clone(),
        }))
    }

    /// The free piece that fits best, or a new one in the place of one that is too small.
    fn lend(&self, bytes: usize) -> Result<Option<Pinned>, CudaError> {
        let mut pool = self.pool_of_pinned.lock().expect("nobody panics with it");
        if pool.lent == UNDER_WAY {
            return Ok(None);
        }
        pool.free.sort_by_key(|pinned| pinned.as_slice().len());
        let fits = |pinned: &Pinned| pinned.as_slice().len() >= bytes;
        let pinned = match pool.free.iter().position(fits) {
            Some(index) => pool.free.remove(index),
            None => {
                if pool.free.len() + pool.lent == UNDER_WAY {
                    pool.free.remove(0);
                }
                Pinned::new(bytes)?
            }
        };
        pool.lent += 1;
        Ok(Some(pinned))
    }
}

impl Arrival {
    /// Work queued from now on, the freeing of the buffers included, waits for the copies.
    pub(super) fn hold(&self, gpu: &Gpu) -> Result<(), CudaError> {
        gpu.stream.wait(&self.over.0).named("ordering a copy")
    }

    /// Waits for the copies; the values of part `index`.
    pub(super) fn values<T: Pod>(&self, index: usize) -> Result<Vec<T>, CudaError> {
        self.over.wait()?;
        let (offset, bytes) = self.parts[index];
        let pinned = self.pinned.as_ref().expect("it is there until the drop");
        let mut values = vec![T::zeroed(); bytes / size_of::<T>()];
        let from = &pinned.as_slice()[offset..offset + bytes];
        copy_side_by_side(bytemuck::cast_slice_mut(&mut values), from);
        Ok(values)
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        // A copy that nobody waited for still writes.
        let over = self.over.wait().is_ok();
        if let (Ok(mut pool), Some(pinned)) = (self.pool.lock(), self.pinned.take()) {
            pool.lent -= 1;
            match over {
                true => pool.free.push(pinned),
                false => std::mem::forget(pinned),
            }
        }
    }
}
