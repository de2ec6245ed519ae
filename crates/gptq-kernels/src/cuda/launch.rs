//! Kernel launches: looks up a kernel by name in its program, passes arguments, queues it.

use std::ffi::c_void;

use cudarc::driver::{result, sys};

use super::Gpu;
use super::error::{CudaError, Named};
use super::memory::Buffer;
use super::program::{Program, compiled};

/// Dynamic shared memory that a kernel may use without an attribute: 48 KB less what it may have declared.
const DEFAULT_SHARED: usize = (48 << 10) - (1 << 10);

/// A kernel argument.
#[derive(Clone, Copy)]
pub(super) struct Arg([u64; 5]);

macro_rules! argument {
    ($($type:ty),*) => {$(
        impl From<$type> for Arg {
            fn from(value: $type) -> Arg {
                const { assert!(size_of::<$type>() <= 40 && align_of::<$type>() <= 8) };
                let mut slot = [0u64; 5];
                // SAFETY: the slot is as long and as aligned as the value, asserted above.
                unsafe { slot.as_mut_ptr().cast::<$type>().write(value) };
                Arg(slot)
            }
        }
    )*};
}
argument!(
    u64,
    i32,
    i64,
    f32,
    super::latents::RawAdamStep,
    crate::RowScale,
    super::packed::Packed,
    super::sweep::RawGridRule,
    super::key_values::RawRows
);

impl From<&Buffer> for Arg {
    fn from(buffer: &Buffer) -> Arg {
        buffer.address().into()
    }
}

impl Gpu {
    fn function(&self, program: Program, name: &'static str) -> Result<sys::CUfunction, CudaError> {
        if let Some(found) = self.functions.borrow().get(&(program, name)) {
            return Ok(*found);
        }
        let module = self.module(program)?;
        let c_name = std::ffi::CString::new(name).expect("kernel names hold no zero byte");
        // SAFETY: the module is loaded and never unloaded.
        let function =
            unsafe { result::module::get_function(module, c_name) }.named("finding a kernel")?;
        self.functions
            .borrow_mut()
            .insert((program, name), function);
        Ok(function)
    }

    /// Whether a program is loaded.
    pub(super) fn has(&self, program: Program) -> bool {
        self.modules.borrow().contains_key(&program)
    }

    pub(super) fn module(&self, program: Program) -> Result<sys::CUmodule, CudaError> {
        if let Some(found) = self.modules.borrow().get(&program) {
            return Ok(*found);
        }
        let cubin = compiled(program, &self.architecture())?;
        // SAFETY: the image was compiled by NVRTC for this device, or verified to be such.
        let module = unsafe { result::module::load_data(cubin.as_ptr().cast::<c_void>()) }
            .named("loading kernels")?;
        self.modules.borrow_mut().insert(program, module);
        Ok(module)
    }

    /// Queues a kernel with `shared` bytes of dynamic shared memory; where that is more than the default, the
    /// limit of the kernel is raised first.
    ///
    /// # Safety
    /// The arguments are those of the kernel, and every address in them is valid for it.
    pub(super) unsafe fn launch(
        &self,
        program: Program,
        name: &'static str,
        grid: [usize; 3],
        block: [usize; 3],
        shared: usize,
        args: &[Arg],
    ) -> Result<(), CudaError> {
        // SAFETY: as the caller says.
        unsafe { self.launch_with(program, name, grid, block, shared, args, &mut []) }
    }

    /// Queues a kernel with programmatic dependent launch (PDL): on Hopper and later it may start while the
    /// kernel before it drains. The kernel calls `pdl_wait` itself.
    ///
    /// # Safety
    /// As [`Gpu::launch`]. Before `pdl_wait` the kernel writes no global memory, and reads only what the kernel
    /// before it does not write; some thread of every block waits before it triggers the next kernel
    /// (`pdl_trigger`). Copies do not overlap: a kernel behind one begins after it.
    pub(super) unsafe fn launch_pdl(
        &self,
        program: Program,
        name: &'static str,
        grid: [usize; 3],
        block: [usize; 3],
        shared: usize,
        args: &[Arg],
    ) -> Result<(), CudaError> {
        let mut early = [sys::CUlaunchAttribute_st {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue_union {
                programmaticStreamSerializationAllowed: 1,
            },
        }];
        let attributes = if self.capability.0 >= 9 {
            &mut early[..]
        } else {
            &mut []
        };
        // SAFETY: as the caller says.
        unsafe { self.launch_with(program, name, grid, block, shared, args, attributes) }
    }

    #[allow(clippy::too_many_arguments)]
    unsafe fn launch_with(
        &self,
        program: Program,
        name: &'static str,
        grid: [usize; 3],
        block: [usize; 3],
        shared: usize,
        args: &[Arg],
        attributes: &mut [sys::CUlaunchAttribute_st],
    ) -> Result<(), CudaError> {
        if grid.contains(&0) {
            return Ok(());
        }
        let function = self.function(program, name)?;
        let mut allowed = self.allowed.borrow_mut();
        let allowed = allowed.entry((program, name)).or_insert(DEFAULT_SHARED);
        if shared > *allowed {
            // SAFETY: the function is loaded.
            unsafe {
                result::function::set_function_attribute(
                    function,
                    sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    shared as i32,
                )
            }
            .named("asking for shared memory")?;
            *allowed = shared; // never less again: a recorded launch may need it
        }
        let mut args = args.to_vec();
        let mut pointers: Vec<*mut c_void> = args
            .iter_mut()
            .map(|arg| arg.0.as_mut_ptr().cast())
            .collect();
        let [grid, block] = [grid, block].map(|size| size.map(|size| size as u32));
        let config = sys::CUlaunchConfig_st {
            gridDimX: grid[0],
            gridDimY: grid[1],
            gridDimZ: grid[2],
            blockDimX: block[0],
            blockDimY: block[1],
            blockDimZ: block[2],
            sharedMemBytes: shared as u32,
            hStream: self.raw_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        // SAFETY: as the caller says; the driver copies the arguments before it returns.
        unsafe {
            sys::cuLaunchKernelEx(
                &config,
                function,
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .named(name)
    }
}
