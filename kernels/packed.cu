// Products with packed weights: out [rows, n] = x [rows, k] W^T, W [n, k] = scale * (code - zero).
//
// Codes lie so that a lane of a warp loads with one instruction what it feeds to the tensor cores:
// W is the 16 x 16 factor of mma.m16n8k16, eight rows of x are the other one. Sums run over all
// positions of k in any order, so positions inside a run of 32 are dealt to lanes such that a lane's
// share of x is 16 consecutive bytes. Layout, written by the host at load time:
//
//   codes  [n / 16][k / 64][words of a lane / 4][32 lanes][4]  4 bits: 4 words a lane, 8 bits: 8
//   scales [n / 16][granules][8]     two f16 or bf16: of output g and of output g + 8
//   zeros  likewise, whole numbers; absent where all are alike
//
// A granule is 32, 64 or 128 positions of one group. The k positions of x are padded to 128.

#define WARPS 8
#define STEP 128 // the positions are a multiple of it
#define RUN 64   // positions that a lane loads at once: 16 bytes of 4-bit codes
#define PART 32  // positions of which a lane has 16 bytes of x

// Two whole numbers 0..15 from the fields at bits 4p and 16 + 4p, exactly, plus an offset that the
// mantissa carries: 1024 in f16, 128 in bf16.
#if BF16
#define OFFSET 128.0f
__device__ __forceinline__ unsigned pair_of(float low, float high) {
    unsigned y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
__device__ __forceinline__ unsigned four_bits(unsigned word, int p) {
    return ((word >> (4 * p)) & 0x000f000fu) | 0x43004300u;
}
__device__ __forceinline__ unsigned times(unsigned a, unsigned b) {
    unsigned y;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(0x80008000u));
    return y;
}
__device__ __forceinline__ unsigned minus(unsigned a, unsigned b) {
    unsigned y;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(b), "r"(0xbf80bf80u), "r"(a));
    return y;
}
// bf16 holds whole numbers to 256 only: an offset does not fit beside a byte.
__device__ __forceinline__ unsigned two_bytes(unsigned word, int p) {
    return pair_of((float)((word >> (16 * p)) & 255), (float)((word >> (16 * p + 8)) & 255));
}
#define BYTE_OFFSET 0.0f
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#else
#define OFFSET 1024.0f
__device__ __forceinline__ unsigned pair_of(float low, float high) {
    unsigned y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
__device__ __forceinline__ unsigned four_bits(unsigned word, int p) {
    return ((word >> (4 * p)) & 0x000f000fu) | 0x64006400u;
}
__device__ __forceinline__ unsigned times(unsigned a, unsigned b) {
    unsigned y;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}
__device__ __forceinline__ unsigned minus(unsigned a, unsigned b) {
    unsigned y;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}
__device__ __forceinline__ unsigned two_bytes(unsigned word, int p) {
    return __byte_perm(word, 0x64646464u, p ? 0x4342 : 0x4140);
}
#define BYTE_OFFSET 1024.0f
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#endif

__device__ __forceinline__ void multiply(float* c, const unsigned* a, unsigned b0, unsigned b1) {
    asm volatile(MMA " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Read once: past the first-level cache, which x needs.
__device__ __forceinline__ uint4 stream(const uint4* from) {
    uint4 y;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(y.x), "=r"(y.y), "=r"(y.z), "=r"(y.w)
                 : "l"(from));
    return y;
}

__device__ __forceinline__ unsigned both(unsigned pair, int high) {
    return __byte_perm(pair, 0, high ? 0x3232 : 0x1010);
}

// The factor W of one tile of 16 positions: outputs g and g + 8 by turns, as mma wants them.
template <int BITS>
__device__ __forceinline__ void weights(unsigned* a, const unsigned* words, const unsigned* scale,
                                        const unsigned* zero) {
    for (int p = 0; p < 4; p++) {
        unsigned code = BITS == 4 ? four_bits(words[0], p) : two_bytes(words[p / 2], p & 1);
        a[p] = times(minus(code, zero[p & 1]), scale[p & 1]);
    }
}

struct Packed {
    const uint4* codes;
    const unsigned* scales;
    const unsigned* zeros; // 0: `zero` for all
    float zero;
    int n, steps; // outputs; positions / 128
    int granule;  // positions / 32 that share a scale: 1, 2 or 4
};

// COLUMNS tiles of 16 outputs and EIGHTS times eight rows a block; its warps share the positions and
// add up at the end, always in the same order. A warp loads RUNS runs of codes ahead of those at
// work. Grid: (n / (16 COLUMNS), rows / (8 EIGHTS)).
template <int BITS, int COLUMNS, int EIGHTS, int RUNS>
__device__ __forceinline__ void product(half16* out, const half16* x, const float* bias, Packed w,
                                        int rows, int stride, int add) {
    constexpr int WORDS = BITS == 4 ? 1 : 2; // times 16 bytes of a lane and a run
    constexpr int LOADS = RUNS * WORDS;
    extern __shared__ float partial[]; // [WARPS / 2][COLUMNS * EIGHTS * 4][32]
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    int row0 = blockIdx.y * 8 * EIGHTS;
    int first = w.steps * warp / WARPS * 2, last = w.steps * (warp + 1) / WARPS * 2; // runs
    float sum[COLUMNS][EIGHTS][4];
    const uint4* codes[COLUMNS];
    const unsigned *scales[COLUMNS], *zeros[COLUMNS];
    uint4 next[COLUMNS][LOADS];
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        long long tile = min(blockIdx.x * COLUMNS + c, (w.n + 15) / 16 - 1);
        codes[c] = w.codes + (tile * 2 * w.steps + first) * WORDS * 32 + lane;
        scales[c] = w.scales + tile * (4 * w.steps / w.granule) * 8 + g;
        zeros[c] = w.zeros + tile * (4 * w.steps / w.granule) * 8 + g;
#pragma unroll
        for (int i = 0; i < LOADS; i++)
            if (first < last) next[c][i] = stream(codes[c] + i * 32);
#pragma unroll
        for (int e = 0; e < EIGHTS; e++)
            sum[c][e][0] = sum[c][e][1] = sum[c][e][2] = sum[c][e][3] = 0;
    }
    float offset = BITS == 4 ? OFFSET : BYTE_OFFSET;
    unsigned common = pair_of(offset + w.zero, offset + w.zero), shift = pair_of(-offset, -offset);
    const half16* own = x + (long long)(row0 + g) * stride + 8 * t;
    unsigned scale[COLUMNS][2], zero[COLUMNS][2];

    for (int run0 = first; run0 < last; run0 += RUNS) {
        uint4 now[COLUMNS][LOADS];
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            codes[c] += LOADS * 32;
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                now[c][i] = next[c][i];
                if (run0 + RUNS < last) next[c][i] = stream(codes[c] + i * 32);
            }
        }
#pragma unroll
        for (int part = 0; part < 2 * RUNS; part++) {
            int place = run0 * 2 + part;
            if (place % w.granule == 0)
#pragma unroll
                for (int c = 0; c < COLUMNS; c++) {
                    int at = place / w.granule * 8;
                    unsigned pair = scales[c][at];
                    scale[c][0] = both(pair, 0);
                    scale[c][1] = both(pair, 1);
                    zero[c][0] = zero[c][1] = common;
                    if (w.zeros) {
                        pair = minus(zeros[c][at], shift);
                        zero[c][0] = both(pair, 0);
                        zero[c][1] = both(pair, 1);
                    }
                }
            uint4 b[EIGHTS];
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) {
                b[e] = make_uint4(0, 0, 0, 0);
                if (row0 + 8 * e + g < rows)
                    b[e] = *(const uint4*)(own + (long long)8 * e * stride + place * PART);
            }
#pragma unroll
            for (int c = 0; c < COLUMNS; c++)
#pragma unroll
                for (int upper = 0; upper < 2; upper++) { // tiles of 16 positions of the part
                    unsigned a[4], words[2];
                    int tile = 2 * (part & 1) + upper; // of the run
                    const uint4* run = now[c] + (part >> 1) * WORDS;
                    if (BITS == 4) {
                        words[0] = tile == 0 ? run->x : tile == 1 ? run->y : tile == 2 ? run->z : run->w;
                    } else {
                        words[0] = tile & 1 ? run[tile >> 1].z : run[tile >> 1].x;
                        words[1] = tile & 1 ? run[tile >> 1].w : run[tile >> 1].y;
                    }
                    weights<BITS>(a, words, scale[c], zero[c]);
#pragma unroll
                    for (int e = 0; e < EIGHTS; e++)
                        multiply(sum[c][e], a, upper ? b[e].z : b[e].x, upper ? b[e].w : b[e].y);
                }
        }
    }
    // Half the warps hand over to the other half until one is left.
#pragma unroll
    for (int half_warps = WARPS / 2; half_warps; half_warps >>= 1) {
        __syncthreads();
        float* mine = partial + (warp % half_warps) * COLUMNS * EIGHTS * 4 * 32 + lane;
        if (warp >= half_warps && warp < 2 * half_warps)
#pragma unroll
            for (int c = 0; c < COLUMNS; c++)
#pragma unroll
                for (int e = 0; e < EIGHTS; e++)
#pragma unroll
                    for (int i = 0; i < 4; i++) mine[((c * EIGHTS + e) * 4 + i) * 32] = sum[c][e][i];
        __syncthreads();
        if (warp < half_warps)
#pragma unroll
            for (int c = 0; c < COLUMNS; c++)
#pragma unroll
                for (int e = 0; e < EIGHTS; e++)
#pragma unroll
                    for (int i = 0; i < 4; i++) sum[c][e][i] += mine[((c * EIGHTS + e) * 4 + i) * 32];
    }
    if (warp) return;
#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
#pragma unroll
        for (int e = 0; e < EIGHTS; e++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int output = (blockIdx.x * COLUMNS + c) * 16 + g + (i >> 1) * 8, row = row0 + 8 * e + 2 * t + (i & 1);
                if (output >= w.n || row >= rows) continue;
                half16* to = out + (long long)row * w.n + output;
                float value = sum[c][e][i];
                if (bias) value += bias[output];
                *to = narrow(add ? value + widen(*to) : value);
            }
}

#define PRODUCT(BITS, COLUMNS, EIGHTS, RUNS)                                                           \
    __global__ void __launch_bounds__(32 * WARPS) packed_##BITS##_##EIGHTS(                            \
        half16* out, const half16* x, const float* bias, Packed w, int rows, int stride, int add) {    \
        product<BITS, COLUMNS, EIGHTS, RUNS>(out, x, bias, w, rows, stride, add);                      \
    }

extern "C" {

// Wider blocks where there are more rows: x is read again for every 16 COLUMNS outputs.
PRODUCT(4, 1, 1, 2)
PRODUCT(4, 1, 2, 2)
PRODUCT(4, 2, 4, 1)
PRODUCT(4, 4, 8, 1)
PRODUCT(8, 1, 1, 2)
PRODUCT(8, 1, 2, 2)
PRODUCT(8, 2, 4, 1)
PRODUCT(8, 2, 8, 1)

// The weight in sixteen bits, [n, 128 steps] row-major, positions as in the layout: for products of
// many rows. A warp takes a run of 64 positions of 16 outputs. Grid: (2 steps / 8, n / 16).
__global__ void widen_packed(half16* out, Packed w, int bits) {
    int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    int run = blockIdx.x * 8 + (threadIdx.x >> 5), tile = blockIdx.y;
    if (run >= 2 * w.steps) return;
    int words = bits == 4 ? 1 : 2; // of 16 bytes
    const uint4* from = w.codes + ((long long)tile * 2 * w.steps + run) * words * 32 + lane;
    uint4 loaded[2];
    for (int i = 0; i < words; i++) loaded[i] = stream(from + i * 32);
    const unsigned* code = (const unsigned*)loaded;
    int stride = w.steps * STEP;
    for (int part = 0; part < 2; part++) { // 32 positions: 16 consecutive bytes of a lane
        int granule = (run * 2 + part) / w.granule;
        long long at = ((long long)tile * (4 * w.steps / w.granule) + granule) * 8 + g;
        unsigned pair = w.scales[at], zeros = w.zeros ? w.zeros[at] : pair_of(w.zero, w.zero);
        for (int high = 0; high < 2; high++) {
            int output = tile * 16 + g + 8 * high;
            float scale = widen((half16)(high ? pair >> 16 : pair & 0xffff));
            float zero = widen((half16)(high ? zeros >> 16 : zeros & 0xffff));
            unsigned packed[4];
            for (int j = 0; j < 2; j++)         // tiles of the part
                for (int p = 0; p < 2; p++) {   // pairs of the tile for this output
                    int which = 2 * p + high, tile_of_run = 2 * part + j;
                    float low, up;
                    if (bits == 4) {
                        unsigned word = code[tile_of_run];
                        low = (word >> (4 * which)) & 15;
                        up = (word >> (16 + 4 * which)) & 15;
                    } else {
                        unsigned word = code[2 * tile_of_run + p];
                        low = (word >> (16 * high)) & 255;
                        up = (word >> (16 * high + 8)) & 255;
                    }
                    packed[2 * j + p] = pair_of((low - zero) * scale, (up - zero) * scale);
                }
            if (output < w.n)
                *(uint4*)(out + (long long)output * stride + run * RUN + part * PART + 8 * t) =
                    make_uint4(packed[0], packed[1], packed[2], packed[3]);
        }
    }
}

// out [rows, stride]: column i of x at the places of `channels`, zero where that is negative.
// Grid: (stride / 256, rows).
__global__ void arrange(half16* out, const half16* x, const int* channels, int k, int stride) {
    int i = blockIdx.x * 256 + threadIdx.x;
    if (i >= stride) return;
    int channel = channels[i];
    long long row = blockIdx.y;
    out[row * stride + i] = channel < 0 ? (half16)0 : x[row * k + channel];
}

}
