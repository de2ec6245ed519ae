// Packed weights: W [n, k] = scale * (code - zero), the factor of out [rows, n] = x [rows, k] W^T.
//
// The layout matches the tensor cores: a lane loads with 16-byte loads exactly the codes that it feeds to
// mma. W is the A operand, 16 x 16, of mma.m16n8k16 (and a warp's part of wgmma.m64); rows of x are the B
// operand. Of a tile of 16 outputs by 16 positions of K, lane (g, t) = (lane / 4, lane % 4) holds outputs g
// and g + 8 at positions 2t, 2t + 1, 2t + 8 and 2t + 9. The host writes, when a model is loaded
// (cuda/layout.rs):
//
//   codes  [n / 16][k / 64][words of a lane / 4][32 lanes][4]  4 bits: word j is tile j of the four
//          tiles of 64 positions; 8 bits: words 2j (positions 2t, 2t + 1) and 2j + 1 (2t + 8, 2t + 9)
//   scales [n / 16][granules][8]     two f16 or bf16: of output g and of output g + 8
//   zeros  the same shape, integers; absent where all zero points are equal
//
// A granule is 32, 64 or 128 consecutive positions of one quantization group. K is in act-order, sorted by
// group, and padded to a multiple of 128.
#pragma once
#include "half.cuh"

#define K_STEP 128 // positions of K in a step of the pipelines; K is padded to a multiple of it
#define K_RUN 64   // positions of K of which a lane loads its 4-bit codes at once, 16 bytes

// Dequantization without conversion instructions: a code 0..15 is ORed into the mantissa of a constant, which
// gives exactly 1024 + code in f16 and 128 + code in bf16. The offset is subtracted together with the zero
// point. Two codes at a time: field p holds those at bits 4p and 16 + 4p.
#if BF16
#define OFFSET 128.0f
#define MAGIC 0x43004300u
// The offset of odd fields; f16 has a smaller one, see below.
#define ODD_OFFSET 128.0f
#define ARITHMETIC "bf16x2"
#define ONES 0x3f803f80u
#else
#define OFFSET 1024.0f
#define MAGIC 0x64006400u
// Odd fields, at bits 4 and 12, are not shifted: (1024 + 16 code) / 16 = 64 + code.
#define ODD_OFFSET 64.0f
#define ARITHMETIC "f16x2"
#define ONES 0x3c003c00u
#define SIXTEENTHS 0x2c002c00u
#endif

__device__ __forceinline__ unsigned fma_pair(unsigned a, unsigned b, unsigned c) { // a b + c, for two values
    unsigned y;
    asm("fma.rn." ARITHMETIC " %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
}

__device__ __forceinline__ unsigned add_pair(unsigned a, unsigned b) {
#if BF16
    return fma_pair(a, ONES, b);
#else
    unsigned y;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
#endif
}

__device__ __forceinline__ unsigned mul_pair(unsigned a, unsigned b) {
#if BF16
    return fma_pair(a, b, 0x80008000u);
#else
    unsigned y;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
#endif
}

// (word & mask) | MAGIC in one lop3; the compiler would emit two instructions.
__device__ __forceinline__ unsigned mask_into_magic(unsigned word, unsigned mask) {
    unsigned y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(word), "r"(mask), "n"(MAGIC));
    return y;
}

// Codes of field p minus the zero point. `minus_zero`: the negative zero point of the output, offset
// included.
__device__ __forceinline__ unsigned dequantize_nibbles(unsigned word, int p, unsigned minus_zero) {
#if BF16
    return add_pair(mask_into_magic(word >> (4 * p), 0x000f000fu), minus_zero);
#else
    unsigned shifted = p < 2 ? word : word >> 8;
    if (p & 1) return fma_pair(mask_into_magic(shifted, 0x00f000f0u), SIXTEENTHS, minus_zero);
    return add_pair(mask_into_magic(shifted, 0x000f000fu), minus_zero);
#endif
}

// Two 8-bit codes as floats, f16 with an offset of 1024. bf16 represents integers exactly only up to 256,
// which leaves no room for an offset, so they are converted.
__device__ __forceinline__ unsigned bytes_to_pair(unsigned word, int p) {
#if BF16
    return pack_pair((float)((word >> (16 * p)) & 255), (float)((word >> (16 * p + 8)) & 255));
#else
    return __byte_perm(word, 0x64646464u, p ? 0x4342 : 0x4140);
#endif
}
#define BYTE_OFFSET (BF16 ? 0.0f : 1024.0f)

__device__ __forceinline__ unsigned broadcast(unsigned pair, int high) {
    return __byte_perm(pair, 0, high ? 0x3232 : 0x1010);
}

// The A fragment of K tile `tile` of K_RUN positions, zero point subtracted, scale not yet applied.
template <int BITS>
__device__ __forceinline__ void dequantize_tile(unsigned* a, const uint4* run, int tile,
                                                const unsigned* minus_zero) {
    unsigned words[2];
    if (BITS == 4) {
        words[0] = tile == 0 ? run->x : tile == 1 ? run->y : tile == 2 ? run->z : run->w;
    } else {
        words[0] = tile & 1 ? run[tile >> 1].z : run[tile >> 1].x;
        words[1] = tile & 1 ? run[tile >> 1].w : run[tile >> 1].y;
    }
#pragma unroll
    for (int p = 0; p < 4; p++)
        a[p] = BITS == 4 ? dequantize_nibbles(words[0], p, minus_zero[p & 1])
                         : add_pair(bytes_to_pair(words[p / 2], p & 1), minus_zero[p & 1]);
}

struct Packed {
    const uint4* codes;
    const unsigned* scales;
    const unsigned* zeros; // null: `zero` is the zero point of all groups
    float zero;
    int n, steps; // outputs; K / 128
    int shift;    // a scale is shared by 32 * 2^shift positions
};

__device__ __forceinline__ void store_output(half16* out, float value, const float* bias, int n, int output,
                                             int row, int add) {
    half16* to = out + (long long)row * n + output;
    if (bias) value += bias[output];
    *to = narrow(add ? value + widen(*to) : value);
}

// Negative zero points of outputs g and g + 8, the offsets of their fields included.
template <int BITS>
__device__ __forceinline__ void load_negative_zeros(unsigned* minus_zero, const unsigned* pairs,
                                                    float common) {
    float even = BITS == 4 ? OFFSET : BYTE_OFFSET, odd = BITS == 4 ? ODD_OFFSET : BYTE_OFFSET;
    const unsigned signs = 0x80008000u;
    unsigned zero_g = (pairs ? broadcast(*pairs, 0) : pack_pair(common, common)) ^ signs;
    unsigned zero_g8 = pairs ? broadcast(*pairs, 1) ^ signs : zero_g;
    minus_zero[0] = add_pair(zero_g, pack_pair(-even, -even));
    minus_zero[1] = add_pair(zero_g8, pack_pair(-odd, -odd));
}

// PLAIN: one zero point for all groups, and one scale for each K step of 128 or more positions. ANY: the
// rest.
enum Kind { PLAIN, ANY };

// Split-K: whether this block is the last to arrive of `blocks` that wrote partial sums of the same outputs;
// then all partial sums are visible to it. `shared_count`: a word of shared memory.
__device__ __forceinline__ bool is_last_block(unsigned* arrivals, unsigned blocks, unsigned* shared_count) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *shared_count = atomicAdd(arrivals, 1);
    __syncthreads();
    if (*shared_count != blocks - 1) return false;
    __threadfence();
    if (threadIdx.x == 0) *arrivals = 0; // reset for the next launch
    return true;
}
