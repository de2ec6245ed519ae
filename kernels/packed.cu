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

// The factor W of tile `tile` of a run of 64 positions, as mma wants it: outputs g and g + 8 by turns.
template <int BITS>
__device__ __forceinline__ void codes_of(unsigned* a, const uint4* run, int tile, const unsigned* zero) {
    unsigned words[2];
    if (BITS == 4) {
        words[0] = tile == 0 ? run->x : tile == 1 ? run->y : tile == 2 ? run->z : run->w;
    } else {
        words[0] = tile & 1 ? run[tile >> 1].z : run[tile >> 1].x;
        words[1] = tile & 1 ? run[tile >> 1].w : run[tile >> 1].y;
    }
#pragma unroll
    for (int p = 0; p < 4; p++)
        a[p] = minus(BITS == 4 ? four_bits(words[0], p) : two_bytes(words[p / 2], p & 1), zero[p & 1]);
}

struct Packed {
    const uint4* codes;
    const unsigned* scales;
    const unsigned* zeros; // 0: `zero` for all
    float zero;
    int n, steps; // outputs; positions / 128
    int shift;    // 2^shift times 32 positions share a scale
};

// Four sums of an mma tile: outputs `output` and `output` + 8 of rows `row` and `row` + 1.
__device__ __forceinline__ void put(half16* out, const float* sum, const float* bias, int n, int output,
                                    int row, int rows, int add) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int o = output + (i >> 1) * 8, r = row + (i & 1);
        if (o >= n || r >= rows) continue;
        half16* to = out + (long long)r * n + o;
        float value = bias ? sum[i] + bias[o] : sum[i];
        *to = narrow(add ? value + widen(*to) : value);
    }
}

// Zeros of outputs g and g + 8, as they stand in the codes: with the offset.
template <int BITS>
__device__ __forceinline__ void zeros_of(unsigned* zero, const unsigned* pairs, float common) {
    float offset = BITS == 4 ? OFFSET : BYTE_OFFSET;
    unsigned pair = pairs ? minus(*pairs, pair_of(-offset, -offset)) : pair_of(offset + common, offset + common);
    zero[0] = both(pair, 0);
    zero[1] = both(pair, 1);
}

// Few rows: a block takes 16 outputs and EIGHTS times eight rows; its warps share the positions and
// add up at the end, always in the same order. A warp loads RUNS runs of codes ahead of those at
// work. Sums of a granule are of whole numbers times x; its scale comes last. Grid: (n / 16,
// rows / (8 EIGHTS)); threads: 32 times a power of two.
template <int BITS, int EIGHTS, int RUNS>
__device__ __forceinline__ void few_rows(half16* out, const half16* x, const float* bias, Packed w,
                                         int rows, int stride, int add) {
    constexpr int WORDS = BITS == 4 ? 1 : 2; // times 16 bytes of a lane and a run
    constexpr int LOADS = RUNS * WORDS;
    extern __shared__ float partial[]; // [warps / 2][EIGHTS * 4][32]
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    int g = lane >> 2, t = lane & 3, row0 = blockIdx.y * 8 * EIGHTS;
    int first = w.steps * warp / warps * 2, last = w.steps * (warp + 1) / warps * 2; // runs
    long long tile = blockIdx.x;
    const uint4* codes = w.codes + (tile * 2 * w.steps + first) * WORDS * 32 + lane;
    long long granules = (4 * w.steps) >> w.shift;
    const unsigned* scales = w.scales + tile * granules * 8 + g;
    const unsigned* zeros = w.zeros ? w.zeros + tile * granules * 8 + g : 0;
    const half16* own = x + (long long)(row0 + g) * stride + 8 * t;
    int mask = (1 << w.shift) - 1;

    float sum[EIGHTS][4], part_sum[EIGHTS][4];
#pragma unroll
    for (int e = 0; e < EIGHTS; e++)
#pragma unroll
        for (int i = 0; i < 4; i++) sum[e][i] = part_sum[e][i] = 0;
    uint4 next[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        next[i] = make_uint4(0, 0, 0, 0);
        if (first + i / WORDS < last) next[i] = stream(codes + i * 32);
    }
    unsigned zero[2], scale = 0;
    zeros_of<BITS>(zero, 0, w.zero);

    for (int run0 = first; run0 < last; run0 += RUNS) {
        uint4 now[LOADS];
        codes += LOADS * 32;
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            now[i] = next[i];
            if (run0 + RUNS + i / WORDS < last) next[i] = stream(codes + i * 32);
        }
#pragma unroll
        for (int part = 0; part < 2 * RUNS; part++) {
            int place = run0 * 2 + part;
            if (place >= 2 * last) break;
            if ((place & mask) == 0) {
                int at = (place >> w.shift) * 8;
                scale = scales[at];
                if (zeros) zeros_of<BITS>(zero, zeros + at, 0);
            }
            uint4 b[EIGHTS];
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) {
                b[e] = make_uint4(0, 0, 0, 0);
                if (row0 + 8 * e + g < rows)
                    b[e] = *(const uint4*)(own + (long long)8 * e * stride + place * PART);
            }
#pragma unroll
            for (int upper = 0; upper < 2; upper++) {
                unsigned a[4];
                codes_of<BITS>(a, now + (part >> 1) * WORDS, 2 * (part & 1) + upper, zero);
#pragma unroll
                for (int e = 0; e < EIGHTS; e++)
                    multiply(part_sum[e], a, upper ? b[e].z : b[e].x, upper ? b[e].w : b[e].y);
            }
            if (((place + 1) & mask) == 0) {
                float of_g = widen((half16)(scale & 0xffff)), of_g8 = widen((half16)(scale >> 16));
#pragma unroll
                for (int e = 0; e < EIGHTS; e++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        sum[e][i] += (i < 2 ? of_g : of_g8) * part_sum[e][i];
                        part_sum[e][i] = 0;
                    }
            }
        }
    }
    // Half the warps hand over to the other half until one is left.
    for (int half_warps = warps / 2; half_warps; half_warps >>= 1) {
        __syncthreads();
        float* mine = partial + (warp % half_warps) * EIGHTS * 4 * 32 + lane;
        if (warp >= half_warps && warp < 2 * half_warps)
#pragma unroll
            for (int i = 0; i < 4 * EIGHTS; i++) mine[i * 32] = sum[i / 4][i % 4];
        __syncthreads();
        if (warp < half_warps)
#pragma unroll
            for (int i = 0; i < 4 * EIGHTS; i++) sum[i / 4][i % 4] += mine[i * 32];
    }
    if (warp) return;
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) put(out, sum[e], bias, w.n, tile * 16 + g, row0 + 8 * e + 2 * t, rows, add);
}

__device__ __forceinline__ void copy_ahead(void* to, const void* from, bool there) {
    unsigned place = (unsigned)__cvta_generic_to_shared(to);
    int bytes = there ? 16 : 0; // the rest becomes zero
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(bytes));
}

#define STAGES 3
#define PITCH 160 // elements between rows of x in shared memory: eight lanes meet no bank twice

// More rows: a block takes 128 outputs, 16 a warp, and EIGHTS times eight rows, whose x goes through
// shared memory STAGES steps ahead. Blocks along z share the positions; the last one of them adds up
// what all have left in `parts`, in their order. Grid: (n / 128, rows / (8 EIGHTS), shares).
template <int BITS, int EIGHTS>
__device__ __forceinline__ void more_rows(half16* out, const half16* x, const float* bias, Packed w,
                                          int rows, int stride, int add, float* parts,
                                          unsigned* arrived) {
    constexpr int WORDS = BITS == 4 ? 1 : 2;
    constexpr int LOADS = 2 * WORDS;
    constexpr int ROWS = 8 * EIGHTS;
    extern __shared__ half16 staged[]; // [STAGES][ROWS][PITCH]
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    int row0 = blockIdx.y * ROWS, share = blockIdx.z, shares = gridDim.z;
    int first = w.steps * share / shares, last = w.steps * (share + 1) / shares;
    int tile0 = blockIdx.x * 8 + warp;
    long long tile = min(tile0, (w.n + 15) / 16 - 1);
    const uint4* codes = w.codes + (tile * w.steps + first) * LOADS * 32 + lane;
    long long granules = (4 * w.steps) >> w.shift;
    const unsigned* scales = w.scales + tile * granules * 8 + g;
    const unsigned* zeros = w.zeros ? w.zeros + tile * granules * 8 + g : 0;
    int mask = (1 << w.shift) - 1;

    auto load = [&](int step) {
        if (step < last)
            for (int i = threadIdx.x; i < ROWS * 16; i += 256) {
                int row = i >> 4, column = (i & 15) * 8;
                half16* to = staged + ((step - first) % STAGES * ROWS + row) * PITCH + column;
                bool there = row0 + row < rows;
                const half16* from = x + (long long)(there ? row0 + row : 0) * stride + step * STEP + column;
                copy_ahead(to, from, there);
            }
        asm volatile("cp.async.commit_group;");
    };
    float sum[EIGHTS][4];
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) sum[e][0] = sum[e][1] = sum[e][2] = sum[e][3] = 0;
    for (int s = 0; s < STAGES - 1; s++) load(first + s);
    uint4 next[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; i++)
        if (first < last) next[i] = stream(codes + i * 32);
    unsigned zero[2], scale[2];
    zeros_of<BITS>(zero, 0, w.zero);

    for (int step = first; step < last; step++) {
        uint4 now[LOADS];
        codes += LOADS * 32;
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            now[i] = next[i];
            if (step + 1 < last) next[i] = stream(codes + i * 32);
        }
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
        __syncthreads(); // all copies of this step are there, and all have left the step before
        load(step + STAGES - 1);
        const half16* here = staged + (step - first) % STAGES * ROWS * PITCH + g * PITCH + 8 * t;
#pragma unroll
        for (int part = 0; part < 4; part++) {
            int place = step * 4 + part;
            if ((place & mask) == 0) {
                int at = (place >> w.shift) * 8;
                unsigned pair = scales[at];
                scale[0] = both(pair, 0);
                scale[1] = both(pair, 1);
                if (zeros) zeros_of<BITS>(zero, zeros + at, 0);
            }
            unsigned a[2][4];
#pragma unroll
            for (int upper = 0; upper < 2; upper++) {
                codes_of<BITS>(a[upper], now + (part >> 1) * WORDS, 2 * (part & 1) + upper, zero);
#pragma unroll
                for (int p = 0; p < 4; p++) a[upper][p] = times(a[upper][p], scale[p & 1]);
            }
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) {
                uint4 b = *(const uint4*)(here + 8 * e * PITCH + part * PART);
                multiply(sum[e], a[0], b.x, b.y);
                multiply(sum[e], a[1], b.z, b.w);
            }
        }
    }
    if (shares > 1) {
        __shared__ unsigned before;
        long long block = (long long)blockIdx.y * gridDim.x + blockIdx.x, blocks = (long long)gridDim.x * gridDim.y;
        float* mine = parts + (share * blocks + block) * EIGHTS * 4 * 256 + threadIdx.x;
#pragma unroll
        for (int i = 0; i < 4 * EIGHTS; i++) mine[i * 256] = sum[i / 4][i % 4];
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) before = atomicAdd(arrived + block, 1);
        __syncthreads();
        if (before != shares - 1) return;
        __threadfence();
        if (threadIdx.x == 0) arrived[block] = 0; // for the next launch
#pragma unroll
        for (int i = 0; i < 4 * EIGHTS; i++) {
            float total = 0;
            for (int s = 0; s < shares; s++)
                total += __ldcg(parts + (s * blocks + block) * EIGHTS * 4 * 256 + i * 256 + threadIdx.x);
            sum[i / 4][i % 4] = total;
        }
    }
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) put(out, sum[e], bias, w.n, tile0 * 16 + g, row0 + 8 * e + 2 * t, rows, add);
}

#define FEW_ROWS(BITS, EIGHTS, RUNS)                                                                  \
    __global__ void few_rows_##BITS##_##EIGHTS(half16* out, const half16* x, const float* bias,       \
                                               Packed w, int rows, int stride, int add) {             \
        few_rows<BITS, EIGHTS, RUNS>(out, x, bias, w, rows, stride, add);                             \
    }
#define MORE_ROWS(BITS, EIGHTS)                                                                       \
    __global__ void __launch_bounds__(256, 2)                                                         \
        more_rows_##BITS##_##EIGHTS(half16* out, const half16* x, const float* bias, Packed w,        \
                                    int rows, int stride, int add, float* parts, unsigned* arrived) { \
        more_rows<BITS, EIGHTS>(out, x, bias, w, rows, stride, add, parts, arrived);                  \
    }

extern "C" {

FEW_ROWS(4, 1, 4)
FEW_ROWS(4, 2, 4)
FEW_ROWS(8, 1, 2)
FEW_ROWS(8, 2, 2)
MORE_ROWS(4, 4)
MORE_ROWS(4, 8)
MORE_ROWS(8, 4)
MORE_ROWS(8, 8)

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
        int granule = (run * 2 + part) >> w.shift;
        long long at = ((long long)tile * (4 * w.steps >> w.shift) + granule) * 8 + g;
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

// out [rows, stride]: column i of x at the places of `channels`, zero where that is negative. Eight
// columns a thread. Grid: (stride / 1024, rows), block 128.
__global__ void arrange(uint4* out, const half16* x, const int4* channels, int k, int stride) {
    int i = blockIdx.x * 128 + threadIdx.x;
    if (8 * i >= stride) return;
    const half16* row = x + (long long)blockIdx.y * k;
    int4 low = channels[2 * i], high = channels[2 * i + 1];
    auto at = [&](int channel) { return channel < 0 ? 0u : (unsigned)row[channel]; };
    out[(long long)blockIdx.y * (stride / 8) + i] =
        make_uint4(at(low.x) | at(low.y) << 16, at(low.z) | at(low.w) << 16,
                   at(high.x) | at(high.y) << 16, at(high.z) | at(high.w) << 16);
}

}
