//! One GPU: its stream, libraries, kernels and memory.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use cudarc::cublas::sys as blas;
use cudarc::cusolver::sys as solver;
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, sys};

use super::download::PinnedPool;
use super::error::{CudaError, Named};
use super::graph::alone;
use super::memory::{Buffer, Recordings, Staging};
use super::program::Program;

/// A GPU with everything that is queued on it. All work goes to one stream, in the order of the
/// calls; nothing waits but [`Gpu::synchronize`] and copies to the host. Only codes and activations
/// that wait in host memory cross the bus on two others.
///
/// Belongs to the thread that opened it.
pub struct Gpu {
    pub(super) context: Arc<CudaContext>,
    pub(super) stream: Arc<CudaStream>,
    pub(super) blas: blas::cublasHandle_t,
    pub(super) solver: solver::cusolverDnHandle_t,
    pub(super) solver_params: solver::cusolverDnParams_t,
    pub(super) functions: RefCell<HashMap<(Program, &'static str), sys::CUfunction>>,
    /// Dynamic shared memory that a kernel may have.
    pub(super) allowed: RefCell<HashMap<(Program, &'static str), usize>>,
    pub(super) modules: RefCell<HashMap<Program, sys::CUmodule>>,
    scratch: RefCell<HashMap<&'static str, Arc<Buffer>>>,
    pub(super) staging: RefCell<Staging>,
    pub(super) recordings: RefCell<Recordings>,
    /// Results and activations go to the host beside the work of `stream`.
    pub(super) home: Arc<CudaStream>,
    /// Activations come back beside it.
    pub(super) back: Arc<CudaStream>,
    pub(super) pinned_pool: Arc<Mutex<PinnedPool>>,
    ordinal: usize,
    name: String,
    pub(super) capability: (i32, i32),
    multiprocessors: usize,
    pub(super) shared_memory: usize,
    pub(super) portable: bool,
}

/// What cuBLAS is advised to have on Hopper.
const LIBRARY_SPACE: usize = 32 << 20;

/// What [`Gpu::memory`] says, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryUse {
    /// Allocated now.
    pub used: usize,
    /// Most that was ever allocated at a time.
    pub peak: usize,
    /// Free on the device, whoever uses the rest.
    pub free: usize,
    /// Of the device.
    pub total: usize,
}

/// A moment in a stream, for the time that queued work takes.
pub struct Mark(pub(super) CudaEvent);

impl Mark {
    /// Waits until the stream has passed it.
    pub(super) fn wait(&self) -> Result<(), CudaError> {
        self.0.synchronize().named("waiting for a copy")
    }

    /// Seconds to a later mark; waits for it.
    pub fn seconds_to(&self, later: &Mark) -> Result<f64, CudaError> {
        Ok(f64::from(self.0.elapsed_ms(&later.0).named("reading the time")?) / 1e3)
    }
}

/// A device that is kept open, so that opening a [`Gpu`] on it takes no second more.
pub struct KeptOpen(#[allow(dead_code)] Arc<CudaContext>);

impl KeptOpen {
    /// Opens the device and lets cuBLAS load what it needs there; on any thread.
    pub fn new(ordinal: usize) -> Result<Self, CudaError> {
        super::probe::check(ordinal)?;
        let context = CudaContext::new(ordinal).named("opening the device")?;
        let handle = cudarc::cublas::result::create_handle().named("creating a handle")?;
        let _alone = alone();
        // SAFETY: created just now, used nowhere else.
        unsafe { cudarc::cublas::result::destroy_handle(handle) }.named("closing a handle")?;
        Ok(KeptOpen(context))
    }
}

impl Gpu {
    /// Opens device `ordinal` with cuBLAS, cuSOLVER and NVRTC. Fails with the name of what is not
    /// there.
    pub fn open(ordinal: usize) -> Result<Arc<Gpu>, CudaError> {
        Self::open_with(ordinal, None)
    }

    /// The same with kernels as GPUs other than Hopper have them, without what Hopper alone can do,
    /// and no more shared memory of a block than `shared_memory` bytes; for their tests.
    pub fn open_portable(ordinal: usize, shared_memory: usize) -> Result<Arc<Gpu>, CudaError> {
        Self::open_with(ordinal, Some(shared_memory))
    }

    fn open_with(ordinal: usize, portable: Option<usize>) -> Result<Arc<Gpu>, CudaError> {
        super::probe::check(ordinal)?;
        let context = CudaContext::new(ordinal).named("opening the device")?;
        let stream = context.new_stream().named("creating a stream")?;
        let home = context.new_stream().named("creating a stream")?;
        let back = context.new_stream().named("creating a stream")?;
        let capability = context
            .compute_capability()
            .named("reading the compute capability")?;
        let blas = cudarc::cublas::result::create_handle().named("creating a handle")?;
        let solver = cudarc::cusolver::result::dn_create().named("creating a handle")?;
        let solver_params =
            cudarc::cusolver::result::dn_create_params().named("creating params")?;
        // SAFETY: handles and stream were created just now, for this context.
        unsafe {
            cudarc::cublas::result::set_stream(blas, stream.cu_stream().cast())
                .named("setting the stream")?;
            cudarc::cusolver::result::dn_set_stream(solver, stream.cu_stream().cast())
                .named("setting the stream")?;
            // Sums of half products stay in f32 also where cuBLAS splits a product.
            blas::cublasSetMathMode(
                blas,
                blas::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION,
            )
            .result()
            .named("setting the math mode")?;
        }
        let multiprocessors = context
            .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .named("counting multiprocessors")?;
        let shared_memory = context
            .attribute(
                sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            )
            .named("asking for shared memory")?;
        let gpu = Gpu {
            multiprocessors: multiprocessors as usize,
            shared_memory: (shared_memory as usize).min(portable.unwrap_or(usize::MAX)),
            portable: portable.is_some(),
            name: context.name().named("reading the name")?,
            context,
            stream,
            blas,
            solver,
            solver_params,
            functions: RefCell::default(),
            allowed: RefCell::default(),
            modules: RefCell::default(),
            scratch: RefCell::default(),
            staging: RefCell::default(),
            recordings: RefCell::default(),
            home,
            back,
            pinned_pool: Arc::default(),
            ordinal,
            capability,
        };
        gpu.keep_freed_memory()?;
        #[allow(clippy::arc_with_non_send_sync)]
        Ok(Arc::new(gpu))
    }

    /// `cuda:N`'s N.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// As the driver names it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits for everything queued so far. A kernel that failed shows here.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.stream.synchronize().named("waiting for the GPU")
    }

    /// Compiles and loads every kernel; returns the seconds it took.
    pub fn compile_all(&self) -> Result<f64, CudaError> {
        let start = std::time::Instant::now();
        for program in Program::all() {
            self.module(program)?;
        }
        Ok(start.elapsed().as_secs_f64())
    }

    /// A moment in the stream.
    pub fn mark(&self) -> Result<Mark, CudaError> {
        let mark = self.new_mark()?;
        mark.0.record(&self.stream).named("recording an event")?;
        Ok(mark)
    }

    /// In no stream yet.
    pub(super) fn new_mark(&self) -> Result<Mark, CudaError> {
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
        let event = self.context.new_event(Some(flags));
        Ok(Mark(event.named("creating an event")?))
    }

    /// What NVRTC compiles for: the features of Hopper need the `a`.
    pub(super) fn architecture(&self) -> String {
        let (major, minor) = self.capability;
        let own = if self.is_hopper() { "a" } else { "" };
        format!("sm_{major}{minor}{own}")
    }

    /// Whether kernels use what only Hopper has.
    pub(super) fn is_hopper(&self) -> bool {
        self.capability.0 == 9 && !self.portable
    }

    pub(super) fn raw_stream(&self) -> sys::CUstream {
        self.stream.cu_stream()
    }

    fn pool(&self) -> Result<sys::CUmemoryPool, CudaError> {
        let mut pool = std::ptr::null_mut();
        // SAFETY: an out parameter of the right type.
        unsafe { sys::cuDeviceGetDefaultMemPool(&mut pool, self.context.cu_device()) }
            .result()
            .named("finding the memory pool")?;
        Ok(pool)
    }

    /// Freed memory stays mapped for the next allocation: mapping it anew costs milliseconds a
    /// gigabyte, at every stage of every block.
    fn keep_freed_memory(&self) -> Result<(), CudaError> {
        let mut threshold = u64::MAX;
        // SAFETY: the attribute is a u64.
        unsafe {
            sys::cuMemPoolSetAttribute(
                self.pool()?,
                sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
                (&raw mut threshold).cast(),
            )
        }
        .result()
        .named("setting the memory pool")
    }

    /// Bytes allocated through the driver's pool, by this crate and by Burn alike.
    pub fn memory(&self) -> Result<MemoryUse, CudaError> {
        let pool = self.pool()?;
        let read = |attribute| {
            let mut value = 0u64;
            // SAFETY: both attributes read are u64.
            unsafe { sys::cuMemPoolGetAttribute(pool, attribute, (&raw mut value).cast()) }
                .result()
                .named("reading the memory pool")?;
            Ok::<_, CudaError>(value as usize)
        };
        let (free, total) = self.context.mem_get_info().named("reading free memory")?;
        Ok(MemoryUse {
            used: read(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?,
            peak: read(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?,
            free,
            total,
        })
    }

    /// Most bytes allocated at a time are counted from here on.
    pub fn forget_peak(&self) -> Result<(), CudaError> {
        let mut zero = 0u64;
        // SAFETY: the attribute is a u64, and zero is what it may be set to.
        unsafe {
            sys::cuMemPoolSetAttribute(
                self.pool()?,
                sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH,
                (&raw mut zero).cast(),
            )
        }
        .result()
        .named("setting the memory pool")
    }

    /// Gives cuBLAS working space of its own, so that recorded products need not allocate any.
    pub fn keep_library_space(self: &Arc<Self>) -> Result<(), CudaError> {
        let space = self.scratch("cublas", LIBRARY_SPACE)?;
        // SAFETY: the handle uses the space until `drop_scratch` takes it away from it.
        unsafe { blas::cublasSetWorkspace_v2(self.blas, space.address() as *mut _, space.bytes()) }
            .result()
            .named("giving cuBLAS working space")
    }

    /// Working space that lives on under a name, grown where it is too small.
    pub(super) fn scratch(
        self: &Arc<Self>,
        name: &'static str,
        bytes: usize,
    ) -> Result<Arc<Buffer>, CudaError> {
        let mut all = self.scratch.borrow_mut();
        if let Some(found) = all.get(name).filter(|buffer| buffer.bytes() >= bytes) {
            return Ok(found.clone());
        }
        all.remove(name);
        #[allow(clippy::arc_with_non_send_sync)]
        let buffer = Arc::new(Buffer::new(self, bytes)?);
        all.insert(name, buffer.clone());
        Ok(buffer)
    }

    /// All of it, so that it outlives being replaced by more.
    pub(super) fn working_space(&self) -> Vec<Arc<Buffer>> {
        self.scratch.borrow().values().cloned().collect()
    }

    /// Gives the named working space back.
    pub fn drop_scratch(&self) {
        if self.scratch.borrow().contains_key("cublas") {
            let stream = self.raw_stream().cast();
            // SAFETY: the handle's own stream; to set it takes cuBLAS back to a space of its own.
            let reset = unsafe { cudarc::cublas::result::set_stream(self.blas, stream) };
            if reset.is_err() {
                return;
            }
        }
        self.scratch.borrow_mut().clear();
    }

    /// Zeros that kernels count in and leave as zeros.
    pub(super) fn counters(self: &Arc<Self>, count: usize) -> Result<Arc<Buffer>, CudaError> {
        let before = self.scratch.borrow().get("counters").map(|all| all.bytes());
        let counters = self.scratch("counters", count * 4)?;
        if before != Some(counters.bytes()) {
            counters.clear()?;
        }
        Ok(counters)
    }

    /// Multiprocessors of the device.
    pub(super) fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }
}

/// Gives working space back when it is dropped: a GPU and its working space hold each other.
pub struct WorkingSpace(Arc<Gpu>);

impl WorkingSpace {
    /// What `gpu` has, and what it will have.
    pub fn of(gpu: &Arc<Gpu>) -> Self {
        WorkingSpace(gpu.clone())
    }
}

impl Drop for WorkingSpace {
    fn drop(&mut self) {
        self.0.drop_scratch();
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        let _alone = alone();
        // SAFETY: created in `open`, used nowhere else; errors at the end of a process are moot.
        unsafe {
            let _ = self.home.synchronize();
            let _ = self.back.synchronize();
            let _ = self.stream.synchronize();
            let _ = cudarc::cublas::result::destroy_handle(self.blas);
            let _ = cudarc::cusolver::result::dn_destroy_params(self.solver_params);
            let _ = cudarc::cusolver::result::dn_destroy(self.solver);
        }
    }
}
