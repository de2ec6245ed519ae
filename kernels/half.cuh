// The base of all kernels: 16-bit floats, vectorized loads and stores, block reductions, programmatic
// dependent launch (PDL), tensor-core mma, ldmatrix, cp.async. No header of CUDA is included, so NVRTC needs
// no path to them.
//
// BF16 = 1 compiles a file for bfloat16, BF16 = 0 for IEEE half; `half16` holds the bits of either.

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

// Rounds to nearest, ties to even; overflows to infinity.
__device__ __forceinline__ half16 narrow(float x) {
    half16 y;
#if BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
#endif
    return y;
}

// N adjacent values that one instruction loads or stores. Aligned to their size, to 16 bytes at most.
template <class T, int N>
struct __align__(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
    T at[N];
};
template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_vector(const T* from) {
    return *(const Vector<T, N>*)from;
}
template <class T, int N>
__device__ __forceinline__ void store_vector(T* to, Vector<T, N> values) {
    *(Vector<T, N>*)to = values;
}

// Sum over a thread block of 32 * n threads, returned to every thread. `scratch` holds 32 floats.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(~0u, x, offset);
    int warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    __syncthreads();
    if ((threadIdx.x & 31) == 0) scratch[warp] = x;
    __syncthreads();
    float sum = 0;
    for (int w = 0; w < warps; w++) sum += scratch[w];
    return sum;
}

__device__ __forceinline__ float block_max(float x, float* scratch) {
    for (int offset = 16; offset; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
    int warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    __syncthreads();
    if ((threadIdx.x & 31) == 0) scratch[warp] = x;
    __syncthreads();
    float max = scratch[0];
    for (int w = 1; w < warps; w++) max = fmaxf(max, scratch[w]);
    return max;
}

// Programmatic dependent launch, from sm_90 on. A kernel may start while the one before it in the stream
// drains. `pdl_wait` (griddepcontrol.wait) returns when that kernel has finished and its writes are visible.
// Loads that do not depend on it, such as weights, are issued before. `pdl_trigger`
// (griddepcontrol.launch_dependents) lets the next kernel start. Every kernel waits before it triggers, so
// the writes of all earlier kernels are visible too.
__device__ __forceinline__ void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void pdl_trigger() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Prefetches a cache line into L2.
__device__ __forceinline__ void prefetch_l2(const void* from) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

#if BF16
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#define CVT_PAIR "cvt.rn.bf16x2.f32"
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#define CVT_PAIR "cvt.rn.f16x2.f32"
#endif

__device__ __forceinline__ unsigned pack_pair(float low, float high) {
    unsigned y;
    asm(CVT_PAIR " %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

// C [16, 8] += A [16, 16] B [16, 8] by a warp, with the fragments of mma.m16n8k16.
__device__ __forceinline__ void mma(float* c, const unsigned* a, unsigned b0, unsigned b1) {
    asm volatile(MMA " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// C = A B: the accumulator starts at zero.
__device__ __forceinline__ void mma_from_zero(float* c, const unsigned* a, unsigned b0, unsigned b1) {
    asm volatile(MMA " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
                 : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

// Loads four 8 x 8 matrices from shared memory as mma fragments. Lane 8m + r gives the address of row r of
// matrix m.
__device__ __forceinline__ void ldmatrix_x4(unsigned* y, unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(y[0]), "=r"(y[1]), "=r"(y[2]), "=r"(y[3])
                 : "r"(address)
                 : "memory");
}

// Copies 16 bytes to shared memory asynchronously, or writes zeros where `valid` is false.
__device__ __forceinline__ void cp_async_or_zero(void* to, const void* from, bool valid) {
    unsigned address = (unsigned)__cvta_generic_to_shared(to);
    int bytes = valid ? 16 : 0; // the rest is filled with zeros
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes));
}

// Copies 16 bytes to an address of shared memory, always.
__device__ __forceinline__ void cp_async(unsigned address, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from));
}

// `cp_async` for data that is read once: it is evicted from L2 before data that is read again.
__device__ __forceinline__ void cp_async_evict_first(unsigned address, const void* from) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    // The value that createpolicy below returns, without a register.
    const unsigned long long policy = 0x12f0000000000000;
#else
    unsigned long long policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
                 "l"(policy));
}
