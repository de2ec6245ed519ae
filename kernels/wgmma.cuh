// Products of a warpgroup on Hopper: the first factor from registers, the second from shared memory, not
// waited for.
#pragma once
#include "half.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define WGMMA 1
#else
#define WGMMA 0
#endif

// Rows of 64 sixteen-bit numbers in runs of [rows][128 bytes], sixteen bytes c of row r at c ^ (r & 7): a
// swizzle of 128 bytes. Times 16 bytes.
__device__ __forceinline__ int swizzled(int rows, int row, int sixteen) {
    return (sixteen >> 3) * rows * 8 + row * 8 + ((sixteen & 7) ^ (row & 7));
}

// What this thread has copied to shared memory may be read by wgmma once others have passed a barrier.
__device__ __forceinline__ void show_copies() {
#if WGMMA
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ __forceinline__ void products_are_done_but(int latest) {
#if WGMMA
    if (latest) asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    else asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
}

#if WGMMA

#if BF16
#define TYPES ".f32.bf16.bf16"
#else
#define TYPES ".f32.f16.f16"
#endif

// Swizzled rows in shared memory: eight of them are 1024 bytes, runs lie `apart` bytes from each other
// (that counts only where rows are the inner dimension of the product).
__device__ __forceinline__ unsigned long long described(unsigned place, unsigned apart = 16) {
    return (unsigned long long)((place & 0x3ffff) >> 4 | apart >> 4 << 16) | (1024ull >> 4) << 32 | 1ull << 62;
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// The compiler keeps what touches these numbers on its side of this place: it does not know that a
// product goes on behind the instruction that asks for it.
template <int N>
__device__ __forceinline__ void stay(float* c) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(c[i])::"memory");
}
template <int N>
__device__ __forceinline__ void stay(unsigned* a) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(a[i])::"memory");
}

#define C4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define C16(i) C4(i), C4(i + 4), C4(i + 8), C4(i + 12)
#define A4 "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
#define R32 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"   \
            "%24,%25,%26,%27,%28,%29,%30,%31"
#define R64 R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,"  \
                "%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

#define GROUP_64(ADDS, TURNED)                                                                       \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16" TYPES " " R32                                \
                 "}, {%32,%33,%34,%35}, %36, " ADDS ", 1, 1, " TURNED ";"                             \
                 : C16(0), C16(16) : A4, "l"(b))
#define GROUP_128(ADDS, TURNED)                                                                      \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16" TYPES " " R64                               \
                 "}, {%64,%65,%66,%67}, %68, " ADDS ", 1, 1, " TURNED ";"                             \
                 : C16(0), C16(16), C16(32), C16(48) : A4, "l"(b))

// c [64, 64] += a [64, 16] b [16, 64], where b has its columns as rows.
__device__ __forceinline__ void multiply_group(float* c, const unsigned* a, unsigned long long b) {
    GROUP_64("1", "0");
}

// The same from nothing: c = a b.
__device__ __forceinline__ void multiply_group_anew(float* c, const unsigned* a, unsigned long long b) {
    GROUP_64("0", "0");
}

// c [64, N] += a [64, 16] b [16, N], where b has its rows as rows.
template <int N>
__device__ __forceinline__ void multiply_group_turned(float* c, const unsigned* a, unsigned long long b) {
    static_assert(N == 64 || N == 128, "columns of a product");
    if constexpr (N == 64) GROUP_64("1", "1");
    else GROUP_128("1", "1");
}
#undef GROUP_128
#undef GROUP_64
#undef R64
#undef R32
#undef A4
#undef C16
#undef C4

#endif
