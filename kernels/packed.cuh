// Packed weights as the kernels read them. Products are out [rows, n] = x [rows, k] W^T with
// W [n, k] = scale * (code - zero).
//
// Codes lie so that a lane of a warp loads with one instruction what it feeds to the tensor cores:
// W is the 16 x 16 factor of mma.m16n8k16 (and a warp's share of wgmma.m64), rows of x the other one.
// Lane (g, t) = (lane / 4, lane % 4) holds of 16 outputs by 16 positions: outputs g and g + 8, positions
// 2t, 2t + 1, 2t + 8 and 2t + 9. Layout, written by the host at load time:
//
//   codes  [n / 16][k / 64][words of a lane / 4][32 lanes][4]  4 bits: word j is tile j of the four
//          tiles of 64 positions; 8 bits: words 2j (positions 2t, 2t + 1) and 2j + 1 (2t + 8, 2t + 9)
//   scales [n / 16][granules][8]     two f16 or bf16: of output g and of output g + 8
//   zeros  likewise, whole numbers; absent where all are alike
//
// A granule is 32, 64 or 128 positions of one group. The k positions of x are padded to 128.
#pragma once
#include "half.cuh"

#define STEP 128 // the positions are a multiple of it
#define RUN 64   // positions that a lane loads at once: 16 bytes of 4-bit codes

// Two whole numbers 0..15 from the fields at bits 4p and 16 + 4p, exactly: the mantissa carries them
// above an offset, 1024 in f16 and 128 in bf16, which goes with the zero.
#if BF16
#define OFFSET 128.0f
#define MAGIC 0x43004300u
// Of an odd field p the offset is the same here; f16 has a smaller one.
#define ODD_OFFSET 128.0f
#define ARITHMETIC "bf16x2"
#define ONES 0x3f803f80u
#else
#define OFFSET 1024.0f
#define MAGIC 0x64006400u
// Fields at bits 4 and 12 stay where they are: 1024 + 16 code, divided by 16.
#define ODD_OFFSET 64.0f
#define ARITHMETIC "f16x2"
#define ONES 0x3c003c00u
#define SIXTEENTHS 0x2c002c00u
#endif

__device__ __forceinline__ unsigned fused(unsigned a, unsigned b, unsigned c) { // a b + c of pairs
    unsigned y;
    asm("fma.rn." ARITHMETIC " %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
}

__device__ __forceinline__ unsigned plus(unsigned a, unsigned b) {
#if BF16
    return fused(a, ONES, b);
#else
    unsigned y;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
#endif
}

__device__ __forceinline__ unsigned times(unsigned a, unsigned b) {
#if BF16
    return fused(a, b, 0x80008000u);
#else
    unsigned y;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
#endif
}

// (word & mask) | MAGIC as one instruction: the compiler makes two of it.
__device__ __forceinline__ unsigned masked(unsigned word, unsigned mask) {
    unsigned y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(word), "r"(mask), "n"(MAGIC));
    return y;
}

// `less` is the negative zero of the field's output, offset included.
__device__ __forceinline__ unsigned code_less_zero(unsigned word, int p, unsigned less) {
#if BF16
    return plus(masked(word >> (4 * p), 0x000f000fu), less);
#else
    unsigned moved = p < 2 ? word : word >> 8;
    if (p & 1) return fused(masked(moved, 0x00f000f0u), SIXTEENTHS, less);
    return plus(masked(moved, 0x000f000fu), less);
#endif
}

// Two bytes as numbers. bf16 holds whole numbers to 256 only: an offset does not fit beside a byte.
__device__ __forceinline__ unsigned two_bytes(unsigned word, int p) {
#if BF16
    return pair_of((float)((word >> (16 * p)) & 255), (float)((word >> (16 * p + 8)) & 255));
#else
    return __byte_perm(word, 0x64646464u, p ? 0x4342 : 0x4140);
#endif
}
#define BYTE_OFFSET (BF16 ? 0.0f : 1024.0f)

__device__ __forceinline__ unsigned both(unsigned pair, int high) {
    return __byte_perm(pair, 0, high ? 0x3232 : 0x1010);
}

// The factor W of tile `tile` of a run of 64 positions, as mma wants it: outputs g and g + 8 by turns.
template <int BITS>
__device__ __forceinline__ void codes_of(unsigned* a, const uint4* run, int tile, const unsigned* less) {
    unsigned words[2];
    if (BITS == 4) {
        words[0] = tile == 0 ? run->x : tile == 1 ? run->y : tile == 2 ? run->z : run->w;
    } else {
        words[0] = tile & 1 ? run[tile >> 1].z : run[tile >> 1].x;
        words[1] = tile & 1 ? run[tile >> 1].w : run[tile >> 1].y;
    }
#pragma unroll
    for (int p = 0; p < 4; p++)
        a[p] = BITS == 4 ? code_less_zero(words[0], p, less[p & 1])
                         : plus(two_bytes(words[p / 2], p & 1), less[p & 1]);
}

struct Packed {
    const uint4* codes;
    const unsigned* scales;
    const unsigned* zeros; // 0: `zero` for all
    float zero;
    int n, steps; // outputs; positions / 128
    int shift;    // 2^shift times 32 positions share a scale
};

__device__ __forceinline__ void put(half16* out, float value, const float* bias, int n, int output,
                                    int row, int add) {
    half16* to = out + (long long)row * n + output;
    if (bias) value += bias[output];
    *to = narrow(add ? value + widen(*to) : value);
}

// The negative zeros of outputs g and g + 8, with the offset of their fields.
template <int BITS>
__device__ __forceinline__ void zeros_of(unsigned* less, const unsigned* pairs, float common) {
    float even = BITS == 4 ? OFFSET : BYTE_OFFSET, odd = BITS == 4 ? ODD_OFFSET : BYTE_OFFSET;
    const unsigned signs = 0x80008000u;
    unsigned of_g = (pairs ? both(*pairs, 0) : pair_of(common, common)) ^ signs;
    unsigned of_g8 = pairs ? both(*pairs, 1) ^ signs : of_g;
    less[0] = plus(of_g, pair_of(-even, -even));
    less[1] = plus(of_g8, pair_of(-odd, -odd));
}

// What differs between groups beside the scale of a step, if anything: PLAIN weights have one zero and
// groups of whole steps.
enum Kind { PLAIN, ANY };

// Whether this block is the last of `blocks` that leave their sums for the same outputs; then all of
// them may be read. `said`: a word of shared memory.
__device__ __forceinline__ bool is_last(unsigned* arrived, unsigned blocks, unsigned* said) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *said = atomicAdd(arrived, 1);
    __syncthreads();
    if (*said != blocks - 1) return false;
    __threadfence();
    if (threadIdx.x == 0) *arrived = 0; // for the next launch
    return true;
}
