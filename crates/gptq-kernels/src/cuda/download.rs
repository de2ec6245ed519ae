//! Asynchronous downloads: results are copied to host memory while the GPU goes on.
//!
//! Downloading a linear's codes takes half as long as its sweep, because of the bus and above all because of
//! page faults in fresh host memory. So codes are copied to pinned memory on a stream of their own. The reader
//! waits for that copy and copies from there, on any thread.

use std::sync::{Arc, Mutex};

use bytemuck::Pod;
use cudarc::driver::result;

use super::error::{CudaError, Named};
use super::memory::{Buffer, Pinned, copy_side_by_side};
use super::{Gpu, Mark};

/// Downloads that may be pending at a time; further ones are synchronous.
const MAX_PENDING: usize = 4;
/// Alignment of a part in the pinned buffer.
const ALIGNMENT: usize = 64;

/// Pinned buffers for reuse: pinning a page costs more than copying it.
#[derive(Default)]
pub(super) struct PinnedPool {
    free: Vec<Pinned>,
    in_use: usize,
}

/// A pending download of several parts.
pub struct Download {
    done: Mark,
    parts: Vec<(usize, usize)>, // offset and length in bytes
    pinned: Option<Pinned>,     // present until drop
    pool: Arc<Mutex<PinnedPool>>,
}

impl Gpu {
    /// Starts to copy the first bytes of each buffer once the work queued so far is done; `None` if too many
    /// downloads are pending. The buffers must live until [`Download::order_after`].
    pub(super) fn start_download(
        &self,
        parts: &[(&Buffer, usize)],
    ) -> Result<Option<Download>, CudaError> {
        let mut end = 0;
        let places: Vec<(usize, usize)> = (parts.iter())
            .map(|&(_, bytes)| {
                let offset = end;
                end = (offset + bytes).next_multiple_of(ALIGNMENT);
                (offset, bytes)
            })
            .collect();
        let Some(mut pinned) = self.take_pinned(end)? else {
            return Ok(None);
        };
        self.home.wait(&self.mark()?.0).named("ordering a copy")?;
        for (&(buffer, bytes), &(offset, _)) in parts.iter().zip(&places) {
            let to = &mut pinned.as_mut_slice()[offset..offset + bytes];
            // SAFETY: the buffer has so many bytes; the pinned memory is in use until the copy
            // is over.
            unsafe { result::memcpy_dtoh_async(to, buffer.address(), self.home.cu_stream()) }
                .named("copying from the GPU")?;
        }
        let done = self.new_mark()?;
        done.0.record(&self.home).named("recording an event")?;
        Ok(Some(Download {
            done,
            parts: places,
            pinned: Some(pinned),
            pool: self.pinned_pool.clone(),
        }))
    }

    /// The smallest free buffer that is large enough, or a new one that replaces one that is too small.
    fn take_pinned(&self, bytes: usize) -> Result<Option<Pinned>, CudaError> {
        let mut pool = self.pinned_pool.lock().expect("nobody panics with it");
        if pool.in_use == MAX_PENDING {
            return Ok(None);
        }
        pool.free.sort_by_key(|pinned| pinned.as_slice().len());
        let fits = |pinned: &Pinned| pinned.as_slice().len() >= bytes;
        let pinned = match pool.free.iter().position(fits) {
            Some(index) => pool.free.remove(index),
            None => {
                if pool.free.len() + pool.in_use == MAX_PENDING {
                    pool.free.remove(0);
                }
                Pinned::new(bytes)?
            }
        };
        pool.in_use += 1;
        Ok(Some(pinned))
    }
}

impl Download {
    /// Orders all work queued from now on after the copies, the freeing of the buffers included.
    pub(super) fn order_after(&self, gpu: &Gpu) -> Result<(), CudaError> {
        gpu.stream.wait(&self.done.0).named("ordering a copy")
    }

    /// Waits for the copies and returns the values of part `index`.
    pub(super) fn values<T: Pod>(&self, index: usize) -> Result<Vec<T>, CudaError> {
        self.done.wait()?;
        let (offset, bytes) = self.parts[index];
        let pinned = self.pinned.as_ref().expect("it is there until the drop");
        let mut values = vec![T::zeroed(); bytes / size_of::<T>()];
        let from = &pinned.as_slice()[offset..offset + bytes];
        copy_side_by_side(bytemuck::cast_slice_mut(&mut values), from);
        Ok(values)
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        // A copy that nobody waited for may still write.
        let done = self.done.wait().is_ok();
        if let (Ok(mut pool), Some(pinned)) = (self.pool.lock(), self.pinned.take()) {
            pool.in_use -= 1;
            match done {
                true => pool.free.push(pinned),
                false => std::mem::forget(pinned),
            }
        }
    }
}
