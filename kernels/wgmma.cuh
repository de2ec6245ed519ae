// Hopper's warpgroup products (wgmma): A from registers, B from shared memory, asynchronous.
#pragma once
#include "half.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define WGMMA 1
#else
#define WGMMA 0
#endif

// Byte offset / 16 in a B tile: rows of 64 16-bit values (128 bytes) in panels of [rows][128 bytes], with the
// 128-byte swizzle: 16-byte chunk c of row r is at c ^ (r & 7).
__device__ __forceinline__ int swizzle_128b(int rows, int row, int chunk) {
    return (chunk >> 3) * rows * 8 + row * 8 + ((chunk & 7) ^ (row & 7));
}

// Makes shared memory written by this thread visible to wgmma, which reads through the async proxy; a barrier
// follows.
__device__ __forceinline__ void fence_async_proxy() {
#if WGMMA
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_wait(int pending) {
#if WGMMA
    if (pending) asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    else asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
}

#if WGMMA

#if BF16
#define WGMMA_TYPES ".f32.bf16.bf16"
#else
#define WGMMA_TYPES ".f32.f16.f16"
#endif

// Shared-memory descriptor of a tile with the 128-byte swizzle: eight rows are 1024 bytes, panels are
// `stride` bytes apart. The stride matters only where rows are the K dimension (transposed B).
__device__ __forceinline__ unsigned long long matrix_descriptor(unsigned address, unsigned stride = 16) {
    return (unsigned long long)((address & 0x3ffff) >> 4 | stride >> 4 << 16) | (1024ull >> 4) << 32 |
           1ull << 62;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Keeps the compiler from moving accesses to these registers across this point: it does not know that wgmma
// goes on using them after it was issued.
template <int N>
__device__ __forceinline__ void pin_registers(float* c) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(c[i])::"memory");
}
template <int N>
__device__ __forceinline__ void pin_registers(unsigned* a) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(a[i])::"memory");
}

#define C4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define C16(i) C4(i), C4(i + 4), C4(i + 8), C4(i + 12)
#define A4 "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
#define R32                                                                                   \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23," \
    "%24,%25,%26,%27,%28,%29,%30,%31"
#define R64                                                                                     \
    R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52," \
        "%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

#define WGMMA_N64(SCALE_D, TRANS_B)                                           \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16" WGMMA_TYPES " " R32 \
                 "}, {%32,%33,%34,%35}, %36, " SCALE_D ", 1, 1, " TRANS_B ";" \
                 : C16(0), C16(16)                                            \
                 : A4, "l"(b))
#define WGMMA_N128(SCALE_D, TRANS_B)                                           \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16" WGMMA_TYPES " " R64 \
                 "}, {%64,%65,%66,%67}, %68, " SCALE_D ", 1, 1, " TRANS_B ";"  \
                 : C16(0), C16(16), C16(32), C16(48)                           \
                 : A4, "l"(b))

// C [64, 64] += A [64, 16] B [16, 64]; B is stored by columns (K-major).
__device__ __forceinline__ void wgmma_n64(float* c, const unsigned* a, unsigned long long b) {
    WGMMA_N64("1", "0");
}

// C = A B: the accumulator starts at zero.
__device__ __forceinline__ void wgmma_n64_from_zero(float* c, const unsigned* a, unsigned long long b) {
    WGMMA_N64("0", "0");
}

// C [64, N] += A [64, 16] B [16, N]; B is stored by rows (transposed).
template <int N>
__device__ __forceinline__ void wgmma_transposed(float* c, const unsigned* a, unsigned long long b) {
    static_assert(N == 64 || N == 128, "columns of a product");
    if constexpr (N == 64) WGMMA_N64("1", "1");
    else WGMMA_N128("1", "1");
}
#undef WGMMA_N128
#undef WGMMA_N64
#undef R64
#undef R32
#undef A4
#undef C16
#undef C4

#endif
