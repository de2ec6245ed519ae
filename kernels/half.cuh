// Sixteen-bit floats without headers, so that NVRTC needs no include path.
// BF16 = 1 compiles a file for bfloat16, 0 for IEEE half.

#define INFINITY __int_as_float(0x7f800000)

typedef unsigned short half16;

__device__ __forceinline__ float widen(half16 x) {
#if BF16
    return __uint_as_float((unsigned)x << 16);
#else
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
#endif
}

// To the nearest, ties to even; beyond the range to infinity.
__device__ __forceinline__ half16 narrow(float x) {
    half16 y;
#if BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
#endif
    return y;
}

// Sum over a block of 32 * n threads, the same in every thread; `scratch` holds 32 floats.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(~0u, x, step);
    int warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    __syncthreads();
    if ((threadIdx.x & 31) == 0) scratch[warp] = x;
    __syncthreads();
    float sum = 0;
    for (int w = 0; w < warps; w++) sum += scratch[w];
    return sum;
}

__device__ __forceinline__ float block_max(float x, float* scratch) {
    for (int step = 16; step; step >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    int warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    __syncthreads();
    if ((threadIdx.x & 31) == 0) scratch[warp] = x;
    __syncthreads();
    float max = scratch[0];
    for (int w = 1; w < warps; w++) max = fmaxf(max, scratch[w]);
    return max;
}

// The kernel before has written what this one reads only when `wait_for_it` returns; what is asked
// for earlier (weights) comes meanwhile. `let_next_start`: the next one may be put beside this one.
__device__ __forceinline__ void wait_for_it() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
