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

__device__ __forceinline__ unsigned minus(unsigned a, unsigned b);
__device__ __forceinline__ unsigned masked(unsigned word, unsigned mask);

// Two whole numbers 0..15 from the fields at bits 4p and 16 + 4p, exactly, plus an offset that the
// mantissa carries: 1024 in f16, 128 in bf16.
#if BF16
#define OFFSET 128.0f
#define MAGIC 0x43004300u
// Of an odd field p the offset is the same here; f16 has a smaller one.
#define ODD_OFFSET 128.0f
__device__ __forceinline__ unsigned code_less_zero(unsigned word, int p, unsigned zero) {
    return minus(masked(word >> (4 * p), 0x000f000fu), zero);
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
#else
#define OFFSET 1024.0f
#define MAGIC 0x64006400u
// Fields at bits 4 and 12 stay where they are: 1024 + 16 code, divided by 16.
#define ODD_OFFSET 64.0f
__device__ __forceinline__ unsigned code_less_zero(unsigned word, int p, unsigned zero) {
    unsigned moved = p < 2 ? word : word >> 8;
    if (!(p & 1)) return minus(masked(moved, 0x000f000fu), zero);
    unsigned y, sixteen_fold = masked(moved, 0x00f000f0u);
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(sixteen_fold), "r"(0x2c002c00u), "r"(zero ^ 0x80008000u));
    return y;
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
#endif

// (word & mask) | MAGIC as one instruction: the compiler makes two of it.
__device__ __forceinline__ unsigned masked(unsigned word, unsigned mask) {
    unsigned y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(word), "r"(mask), "n"(MAGIC));
    return y;
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
        a[p] = BITS == 4 ? code_less_zero(words[0], p, zero[p & 1])
                         : minus(two_bytes(words[p / 2], p & 1), zero[p & 1]);
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

// Zeros of outputs g and g + 8, as they stand in the codes: with the offset.
template <int BITS>
__device__ __forceinline__ void zeros_of(unsigned* zero, const unsigned* pairs, float common) {
    float even = BITS == 4 ? OFFSET : BYTE_OFFSET, odd = BITS == 4 ? ODD_OFFSET : BYTE_OFFSET;
    unsigned of_g = pairs ? both(*pairs, 0) : pair_of(common, common);
    unsigned of_g8 = pairs ? both(*pairs, 1) : of_g;
    zero[0] = minus(of_g, pair_of(-even, -even));
    zero[1] = minus(of_g8, pair_of(-odd, -odd));
}

// What a lane reads of a step: codes and scales of 128 positions.
template <int BITS, int TILES, int GRANULES>
struct Step {
    static constexpr int WORDS = BITS == 4 ? 2 : 4; // times 16 bytes
    uint4 codes[TILES][WORDS];
    unsigned scale[TILES][GRANULES], zero[TILES][GRANULES];

    __device__ __forceinline__ void read(const Packed& w, const long long* at, int step, int lane) {
        int a_step = GRANULES == 1 ? 1 : 4 >> w.shift;
#pragma unroll
        for (int j = 0; j < TILES; j++) {
            const uint4* from = w.codes + (at[j] + step) * WORDS * 32 + lane;
#pragma unroll
            for (int i = 0; i < WORDS; i++) codes[j][i] = stream(from + i * 32);
            long long place = (at[j] + step) * a_step * 8 + (lane >> 2);
#pragma unroll
            for (int i = 0; i < GRANULES; i++)
                if (i < a_step) {
                    scale[j][i] = w.scales[place + i * 8];
                    if (w.zeros) zero[j][i] = w.zeros[place + i * 8];
                }
        }
    }
};

// Few rows: a block takes TILES times 16 outputs and EIGHTS times eight rows; its warps take `share`
// steps each and add up at the end, in their order. What comes from memory is read two steps ahead.
// Sums of a granule are of whole numbers times x; its scale comes last. With GRANULES 1 a granule is a
// step. Grid: (n / (16 TILES), rows / (8 EIGHTS)); threads: 32 times the warps.
template <int BITS, int EIGHTS, int TILES, int GRANULES>
__device__ __forceinline__ void few_rows(half16* out, const half16* x, const float* bias, Packed w,
                                         int rows, int stride, int add, int share) {
    constexpr int CHAINS = EIGHTS * TILES > 2 ? 1 : 2, WORDS = BITS == 4 ? 1 : 2;
    extern __shared__ float partial[]; // [warps][SUMS]
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    int g = lane >> 2, t = lane & 3, row0 = blockIdx.y * 8 * EIGHTS, tile0 = blockIdx.x * TILES;
    int first = min(warp * share, w.steps), steps = min(share, w.steps - first);
    int mask = GRANULES == 1 ? 3 : (1 << w.shift) - 1;
    long long at[TILES];
#pragma unroll
    for (int j = 0; j < TILES; j++) at[j] = (long long)min(tile0 + j, (w.n + 15) / 16 - 1) * w.steps + first;
    Step<BITS, TILES, GRANULES> ahead[2];
    if (steps > 0) ahead[0].read(w, at, 0, lane);
    if (steps > 1) ahead[1].read(w, at, 1, lane);
    wait_for_it();
    let_next_start();

    const uint4* own[EIGHTS]; // rows beyond the last one repeat it
    uint4 b[EIGHTS][2];
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
        own[e] = (const uint4*)(x + (long long)min(row0 + 8 * e + g, rows - 1) * stride + first * STEP) + t;
        if (steps > 0) b[e][0] = own[e][0], b[e][1] = own[e][4];
    }
    float sum[TILES][EIGHTS][4], part_sum[TILES][EIGHTS][CHAINS][4];
#pragma unroll
    for (int i = 0; i < TILES * EIGHTS * 4; i++) sum[0][0][i] = 0;
#pragma unroll
    for (int i = 0; i < TILES * EIGHTS * CHAINS * 4; i++) part_sum[0][0][0][i] = 0;
    unsigned zero[TILES][2];
#pragma unroll
    for (int j = 0; j < TILES; j++) zeros_of<BITS>(zero[j], 0, w.zero);

    for (int step0 = 0; step0 < steps; step0 += 2)
#pragma unroll
        for (int u = 0; u < 2; u++) {
            int step = step0 + u;
            if (step >= steps) break;
            Step<BITS, TILES, GRANULES> now = ahead[u];
            if (step + 2 < steps) ahead[u].read(w, at, step + 2, lane);
#pragma unroll
            for (int part = 0; part < 4; part++) {
                uint4 v[EIGHTS];
#pragma unroll
                for (int e = 0; e < EIGHTS; e++) {
                    v[e] = b[e][part & 1];
                    int next = part < 2 || step + 1 < steps ? RUN / 8 : 0; // 16 bytes to the next run
                    if (part & 1) own[e] += next;
                    b[e][part & 1] = own[e][part & 1 ? 4 : next];
                }
                int granule = GRANULES == 1 ? 0 : part >> w.shift;
                if (w.zeros && (part & mask) == 0)
#pragma unroll
                    for (int j = 0; j < TILES; j++) {
                        unsigned pair = now.zero[j][0];
#pragma unroll
                        for (int i = 1; i < GRANULES; i++) pair = granule == i ? now.zero[j][i] : pair;
                        zeros_of<BITS>(zero[j], &pair, 0);
                    }
#pragma unroll
                for (int j = 0; j < TILES; j++)
#pragma unroll
                    for (int upper = 0; upper < 2; upper++) {
                        unsigned a[4];
                        codes_of<BITS>(a, now.codes[j] + (part >> 1) * WORDS, 2 * (part & 1) + upper, zero[j]);
#pragma unroll
                        for (int e = 0; e < EIGHTS; e++)
                            multiply(part_sum[j][e][upper % CHAINS], a, upper ? v[e].z : v[e].x,
                                     upper ? v[e].w : v[e].y);
                    }
                if (((part + 1) & mask) == 0)
#pragma unroll
                    for (int j = 0; j < TILES; j++) {
                        unsigned scale = now.scale[j][0];
#pragma unroll
                        for (int i = 1; i < GRANULES; i++) scale = granule == i ? now.scale[j][i] : scale;
                        float of_g = widen((half16)(scale & 0xffff)), of_g8 = widen((half16)(scale >> 16));
#pragma unroll
                        for (int e = 0; e < EIGHTS; e++)
#pragma unroll
                            for (int c = 0; c < CHAINS; c++)
#pragma unroll
                                for (int i = 0; i < 4; i++) {
                                    sum[j][e][i] += (i < 2 ? of_g : of_g8) * part_sum[j][e][c][i];
                                    part_sum[j][e][c][i] = 0;
                                }
                    }
            }
        }
    constexpr int SUMS = TILES * EIGHTS * 128; // of a warp
#pragma unroll
    for (int i = 0; i < SUMS / 32; i++)
        partial[warp * SUMS + i * 32 + lane] = sum[i / (4 * EIGHTS)][i / 4 % EIGHTS][i % 4];
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < SUMS; i += blockDim.x) {
        float total = 0;
        for (int other = 0; other < warps; other++) total += partial[other * SUMS + i];
        int from = i & 31, at = i >> 5 & 3, e = i / 128 % EIGHTS, j = i / (128 * EIGHTS);
        int output = (tile0 + j) * 16 + (from >> 2) + (at >> 1) * 8;
        int row = row0 + 8 * e + 2 * (from & 3) + (at & 1);
        if (output < w.n && row < rows) put(out, total, bias, w.n, output, row, add);
    }
}

#define PITCH 160   // elements between rows of x in shared memory: eight lanes meet no bank twice
#define GROUPS 2    // of warps, that share the positions of a step
#define OUTPUTS 256 // of a block, 32 a warp

// More rows: a block takes 256 outputs and EIGHTS times eight rows. Steps of x, codes and scales come
// through shared memory STAGES ahead; the second half of the warps takes the second half of each step.
// Blocks along z share the positions; the last one of them adds up what all have left in `parts`, in
// their order. Grid: (n / 256, rows / (8 EIGHTS), shares); 512 threads.
template <int BITS, int EIGHTS>
__device__ __forceinline__ void more_rows(half16* out, const half16* x, const float* bias, Packed w,
                                          int rows, int stride, int add, float* parts,
                                          unsigned* arrived) {
    constexpr int WORDS = BITS == 4 ? 1 : 2, STAGES = BITS == 4 ? 4 : 3, ROWS = 8 * EIGHTS;
    constexpr int X = ROWS * PITCH / 8, CODES = 16 * 2 * WORDS * 32, SCALES = 16 * 2 * 8; // times 16 bytes
    constexpr int STAGE = X + CODES + 2 * SCALES, X_PIECES = ROWS / 32;
    extern __shared__ uint4 shared[]; // [STAGES]: x, codes [warp][tile][WORDS][32], scales [warp][tile][8], zeros
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    int group = warp >> 3, row0 = blockIdx.y * ROWS, shares = gridDim.z;
    int first = w.steps * blockIdx.z / shares, steps = w.steps * (blockIdx.z + 1) / shares - first;
    int tile0 = blockIdx.x * 16 + (warp & 7) * 2, a_step = 8 >> w.shift;

    // What a thread copies of every step: codes of two tiles, a piece of their scales (eight lanes a
    // tile), pieces of x. The pointers move on with each step that is loaded.
    const uint4 *codes_from[2], *x_from[X_PIECES];
    long long begin[2]; // of the tile, in steps
#pragma unroll
    for (int j = 0; j < 2; j++) {
        begin[j] = (long long)min(tile0 + j, (w.n + 15) / 16 - 1) * w.steps + first;
        codes_from[j] = w.codes + (begin[j] * 2 + group) * WORDS * 32 + lane;
    }
    int piece = lane & 7;
    bool has_scales = lane < 16 && piece < a_step;
    long long scales_from = (lane < 8 ? begin[0] : begin[1]) * a_step + piece;
#pragma unroll
    for (int i = 0; i < X_PIECES; i++) {
        int row = min(row0 + ((int)threadIdx.x >> 4) + 32 * i, rows - 1);
        x_from[i] = (const uint4*)(x + (long long)row * stride + first * STEP) + (threadIdx.x & 15);
    }
    int x_place = (threadIdx.x >> 4) * (PITCH / 8) + (threadIdx.x & 15);
    int code_place = X + warp * 2 * WORDS * 32 + lane, scale_place = X + CODES + warp * 16;
    auto load_weight = [&](uint4* stage) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
#pragma unroll
            for (int i = 0; i < WORDS; i++)
                copy_ahead(stage + code_place + (j * WORDS + i) * 32, codes_from[j] + i * 32, true);
            codes_from[j] += 2 * WORDS * 32;
        }
        if (has_scales) {
            uint4* to = stage + scale_place + (lane >> 3) * 8 + piece;
            copy_ahead(to, (const uint4*)w.scales + scales_from, true);
            if (w.zeros) copy_ahead(to + SCALES, (const uint4*)w.zeros + scales_from, true);
            scales_from += a_step;
        }
    };
    auto load_x = [&](uint4* stage) {
#pragma unroll
        for (int i = 0; i < X_PIECES; i++) {
            copy_ahead(stage + x_place + i * 32 * (PITCH / 8), x_from[i], true);
            x_from[i] += STEP / 8;
        }
    };
    // Weights first: they may come before the kernel ahead of this one is done.
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++)
        if (s < steps) load_weight(shared + s * STAGE);
    wait_for_it();
    let_next_start();
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) load_x(shared + s * STAGE);
        asm volatile("cp.async.commit_group;");
    }
    float sum[2][EIGHTS][4];
#pragma unroll
    for (int i = 0; i < 2 * EIGHTS * 4; i++) sum[0][0][i] = 0;
    unsigned zero[2][2];
    zeros_of<BITS>(zero[0], 0, w.zero);
    zeros_of<BITS>(zero[1], 0, w.zero);

    uint4 *stage = shared, *free_stage = shared + (STAGES - 1) * STAGE, *end = shared + STAGES * STAGE;
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        __syncthreads(); // all copies of this step are there, and all have left the step before
        if (step + STAGES - 1 < steps) {
            load_weight(free_stage);
            load_x(free_stage);
        }
        asm volatile("cp.async.commit_group;");
        const uint4* here = stage + g * (PITCH / 8) + group * 8 + t;
        const unsigned* scales = (const unsigned*)(stage + scale_place) + g;
        uint4 now[2][WORDS];
#pragma unroll
        for (int i = 0; i < 2 * WORDS; i++) now[i / WORDS][i % WORDS] = stage[code_place + i * 32];
#pragma unroll
        for (int part = 0; part < 2; part++) {
            int granule = (2 * group + part) >> w.shift;
            unsigned a[2][2][4];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                unsigned pair = scales[j * 32 + granule * 8];
                if (w.zeros) zeros_of<BITS>(zero[j], scales + SCALES * 4 + j * 32 + granule * 8, 0);
#pragma unroll
                for (int upper = 0; upper < 2; upper++) {
                    codes_of<BITS>(a[j][upper], now[j], 2 * part + upper, zero[j]);
#pragma unroll
                    for (int p = 0; p < 4; p++) a[j][upper][p] = times(a[j][upper][p], both(pair, p & 1));
                }
            }
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) {
                uint4 b = here[e * PITCH + part * 4];
                multiply(sum[0][e], a[0][0], b.x, b.y);
                multiply(sum[1][e], a[1][0], b.x, b.y);
                multiply(sum[0][e], a[0][1], b.z, b.w);
                multiply(sum[1][e], a[1][1], b.z, b.w);
            }
        }
        free_stage = stage;
        stage = stage + STAGE == end ? shared : stage + STAGE;
    }
    // The second group hands half of its sums over and takes the other half of the first one's.
    constexpr int HALF = EIGHTS * 4;
    float* handed = (float*)shared; // [group][HALF][256]
    int place = threadIdx.x & 255;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < HALF; i++)
        handed[(group * HALF + i) * 256 + place] = group ? sum[0][i / 4][i % 4] : sum[1][i / 4][i % 4];
    __syncthreads();
    float total[HALF]; // of tile `group`
#pragma unroll
    for (int i = 0; i < HALF; i++) {
        float own = group ? sum[1][i / 4][i % 4] : sum[0][i / 4][i % 4];
        float other = handed[((1 - group) * HALF + i) * 256 + place];
        total[i] = group ? other + own : own + other;
    }
    if (shares > 1) {
        __shared__ unsigned before;
        long long block = (long long)blockIdx.y * gridDim.x + blockIdx.x, blocks = (long long)gridDim.x * gridDim.y;
        float* all = parts + block * HALF * 512 + threadIdx.x;
        long long apart = blocks * HALF * 512;
#pragma unroll
        for (int i = 0; i < HALF; i++) all[blockIdx.z * apart + i * 512] = total[i];
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) before = atomicAdd(arrived + block, 1);
        __syncthreads();
        if (before != shares - 1) return;
        __threadfence();
        if (threadIdx.x == 0) arrived[block] = 0; // for the next launch
#pragma unroll
        for (int i = 0; i < HALF; i++) total[i] = 0;
        for (int s = 0; s < shares; s++)
#pragma unroll
            for (int i = 0; i < HALF; i++) total[i] += __ldcg(all + s * apart + i * 512);
    }
#pragma unroll
    for (int i = 0; i < HALF; i++) {
        int output = (tile0 + group) * 16 + g + (i >> 1 & 1) * 8, row = row0 + 8 * (i >> 2) + 2 * t + (i & 1);
        if (output < w.n && row < rows) put(out, total[i], bias, w.n, output, row, add);
    }
}

#define FEW_ROWS(BITS, EIGHTS, TILES, GRANULES)                                                       \
    __global__ void few_rows_##BITS##_##EIGHTS##_##TILES##_##GRANULES(                                \
        half16* out, const half16* x, const float* bias, Packed w, int rows, int stride, int add,     \
        int share) {                                                                                  \
        few_rows<BITS, EIGHTS, TILES, GRANULES>(out, x, bias, w, rows, stride, add, share);           \
    }
#define MORE_ROWS(BITS, EIGHTS)                                                                       \
    __global__ void __launch_bounds__(512, 1)                                                         \
        more_rows_##BITS##_##EIGHTS(half16* out, const half16* x, const float* bias, Packed w,        \
                                    int rows, int stride, int add, float* parts, unsigned* arrived) { \
        more_rows<BITS, EIGHTS>(out, x, bias, w, rows, stride, add, parts, arrived);                  \
    }

extern "C" {

FEW_ROWS(4, 1, 1, 1)
FEW_ROWS(4, 1, 1, 4)
FEW_ROWS(4, 2, 2, 1)
FEW_ROWS(4, 2, 2, 4)
FEW_ROWS(8, 1, 1, 1)
FEW_ROWS(8, 1, 1, 4)
FEW_ROWS(8, 2, 2, 1)
FEW_ROWS(8, 2, 2, 4)
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
    wait_for_it();
    let_next_start();
    if (8 * i >= stride) return;
    const half16* row = x + (long long)blockIdx.y * k;
    int4 low = channels[2 * i], high = channels[2 * i + 1];
    auto at = [&](int channel) { return channel < 0 ? 0u : (unsigned)row[channel]; };
    out[(long long)blockIdx.y * (stride / 8) + i] =
        make_uint4(at(low.x) | at(low.y) << 16, at(low.z) | at(low.w) << 16,
                   at(high.x) | at(high.y) << 16, at(high.z) | at(high.w) << 16);
}

}
