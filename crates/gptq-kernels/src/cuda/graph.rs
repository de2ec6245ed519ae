//! Work that is queued once and run many times.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex, MutexGuard};

use cudarc::driver::sys;

use super::Gpu;
use super::error::{CudaError, Named};
use super::memory::Buffer;

/// Held while work is recorded, and while libraries give back what they hold, which waits for the
/// whole device: a product recorded on another thread failed once, and this is its likely cause.
pub(super) fn alone() -> MutexGuard<'static, ()> {
    static RECORDING: Mutex<()> = Mutex::new(());
    RECORDING.lock().unwrap_or_else(|held| held.into_inner())
}

/// Kernels and products as one CUDA graph: the same addresses every time, so what they hold may
/// change and where it lies may not.
pub struct Recorded {
    gpu: Arc<Gpu>,
    graph: sys::CUgraph,
    executable: sys::CUgraphExec,
    /// Buffers allocated before the recording stay allocated as long as it exists.
    serial: u64,
    /// Working space that the graph knows the addresses of.
    _kept: Vec<Arc<Buffer>>,
}

impl Gpu {
    /// Records what `work` queues, without running it. `work` must have run before, so that
    /// kernels are loaded and working space is there: nothing may be allocated or waited for.
    pub fn record(
        self: &Arc<Self>,
        work: impl FnOnce() -> Result<(), CudaError>,
    ) -> Result<Recorded, CudaError> {
        let _alone = alone();
        let stream = self.raw_stream();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is this GPU's; what is captured is instantiated below or dropped.
        unsafe { sys::cuStreamBeginCapture_v2(stream, mode) }
            .result()
            .named("recording")?;
        // A capture that a panic left open would swallow all later work.
        let queued = catch_unwind(AssertUnwindSafe(work));
        let mut graph = std::ptr::null_mut();
        // SAFETY: an out parameter; ends the capture whatever `work` said.
        let ended = unsafe { sys::cuStreamEndCapture(stream, &mut graph) }.result();
        let queued = queued.unwrap_or_else(|panic| {
            if !graph.is_null() {
                // SAFETY: captured just now, and nothing was made of it.
                let _ = unsafe { sys::cuGraphDestroy(graph) };
            }
            resume_unwind(panic)
        });
        let mut executable = std::ptr::null_mut();
        let prepared = queued
            .and_then(|()| ended.named("recording"))
            .and_then(|()| {
                // SAFETY: the graph was captured just now.
                unsafe { sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0) }
                    .result()
                    .named("preparing recorded work")
            });
        if let Err(error) = prepared {
            if !graph.is_null() {
                // SAFETY: captured just now, and nothing was made of it.
                let _ = unsafe { sys::cuGraphDestroy(graph) };
            }
            return Err(error);
        }
        Ok(Recorded {
            gpu: self.clone(),
            graph,
            executable,
            serial: self.record_serial(),
            _kept: self.working_space(),
        })
    }
}

impl Recorded {
    /// Queues all of it.
    pub fn run(&self) -> Result<(), CudaError> {
        // SAFETY: instantiated on this device and not destroyed.
        unsafe { sys::cuGraphLaunch(self.executable, self.gpu.raw_stream()) }
            .result()
            .named("running recorded work")
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        // SAFETY: both were created in `record` and are destroyed once, after all work on them.
        unsafe {
            let _ = self.gpu.stream.synchronize();
            let _ = sys::cuGraphExecDestroy(self.executable);
            let _ = sys::cuGraphDestroy(self.graph);
        }
        self.gpu.forget_recording(self.serial);
    }
}
