// What all kernels include, without headers of CUDA, so that NVRTC needs no path to them: sixteen-bit floats,
// values side by side, sums over a block, kernels that begin beside the one before, tensor cores, copies to
// shared memory.
// BF16 = 1 compiles a file for bfloat16, 0 for IEEE half.

#pragma once

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

// Values that stand side by side, read and written at once: their place is a multiple of their bytes, or
// of sixteen.
template <class T, int N>
struct __align__(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Several {
    T at[N];
};
template <int N, class T>
__device__ __forceinline__ Several<T, N> several(const T* from) {
    return *(const Several<T, N>*)from;
}
template <class T, int N>
__device__ __forceinline__ void put_several(T* to, Several<T, N> values) {
    *(Several<T, N>*)to = values;
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
// All wait before they let the next one start, so what kernels before the last one wrote is there.
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

// A line that is to be in the second-level cache soon.
__device__ __forceinline__ void ask_for(const void* from) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

#if BF16
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#define PAIR "cvt.rn.bf16x2.f32"
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#define PAIR "cvt.rn.f16x2.f32"
#endif

__device__ __forceinline__ unsigned pair_of(float low, float high) {
    unsigned y;
    asm(PAIR " %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

// c [16, 8] += a [16, 16] b [16, 8] by a warp, in the layout of mma.m16n8k16.
__device__ __forceinline__ void multiply(float* c, const unsigned* a, unsigned b0, unsigned b1) {
    asm volatile(MMA " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same from nothing: c = a b.
__device__ __forceinline__ void multiply_anew(float* c, const unsigned* a, unsigned b0, unsigned b1) {
    asm volatile(MMA " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
                 : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

// Four 8 x 8 matrices from shared memory as mma takes them: lane 8m + r says where row r of matrix m is.
__device__ __forceinline__ void load_four(unsigned* y, unsigned place) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(y[0]), "=r"(y[1]), "=r"(y[2]), "=r"(y[3])
                 : "r"(place)
                 : "memory");
}

// Sixteen bytes to shared memory, not waited for; zero where there is nothing.
__device__ __forceinline__ void copy_ahead(void* to, const void* from, bool there) {
    unsigned place = (unsigned)__cvta_generic_to_shared(to);
    int bytes = there ? 16 : 0; // the rest becomes zero
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(bytes));
}

// The same to an address of shared memory, always.
__device__ __forceinline__ void copy_to(unsigned place, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(from));
}

// The same of what is read once: it leaves the second-level cache before what others come back to.
__device__ __forceinline__ void copy_once(unsigned place, const void* from) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    const unsigned long long policy = 0x12f0000000000000; // what is created below, in no register
#else
    unsigned long long policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(place), "l"(from),
                 "l"(policy));
}
