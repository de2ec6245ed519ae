// Products of up to 32 rows, by the tensor cores of every GPU from Ampere on. A block reads all
// positions of its outputs, so that sums need not leave it, and takes most of a multiprocessor: what
// counts is how much of the weight is on its way at any time, and next to that the instructions that
// turn codes into numbers.
#pragma once
#include "packed.cuh"

#define TILES 2 // sixteens of outputs of a warp: they share what is read of x

// A block is TEAMS of WARPS warps. Warps of a team stand side by side in outputs and share x; teams
// share the positions. SLOTS steps of a team are in shared memory, or on their way there, each part of
// them from a multiple of 128 bytes on: with copies to places that are not, products took up to a fourth
// longer. Hopper has room for more than the smallest; `Few` in cuda/multiply.rs computes the same.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ROOM (216 << 10)
#else
#define ROOM (96 << 10)
#endif
template <int BITS, int EIGHTS, int WARPS>
struct Few {
    static constexpr int X = EIGHTS * 8 * STEP * 2, OF_TILE = BITS * 256 + 256; // bytes of a step
    static constexpr int SLOT = X + WARPS * TILES * OF_TILE;
    __device__ static constexpr int teams() {
        int most = WARPS == 1 ? 8 : WARPS == 6 ? 2 : 4;
        while (most > 1 && ROOM / (most * SLOT) < 2) most /= 2;
        return most;
    }
    static constexpr int TEAMS = teams(), MOST = EIGHTS == 1 || WARPS == 1 ? 4 : 3;
    static constexpr int SLOTS = ROOM / (TEAMS * SLOT) < MOST ? ROOM / (TEAMS * SLOT) : MOST;
    static constexpr int THREADS = 32 * WARPS; // of a team
};

// As it is, in a register: the compiler would rather compute it anew, or carry pointers along.
__device__ __forceinline__ unsigned kept(unsigned x) {
    asm volatile("" : "+r"(x));
    return x;
}
__device__ __forceinline__ const char* kept(const char* x) {
    asm volatile("" : "+l"(x));
    return x;
}

template <int WARPS>
__device__ __forceinline__ void wait_for_team(int team) {
    if (WARPS == 1) __syncwarp();
    else asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(32 * WARPS) : "memory");
}

// Grid: n / (32 WARPS); threads: TEAMS THREADS; shared: TEAMS SLOTS SLOT.
template <int BITS, int EIGHTS, int WARPS, Kind KIND>
__device__ __forceinline__ void few_rows(half16* out, const half16* x, const float* bias, Packed w,
                                         int rows, int stride, int add) {
    using Shape = Few<BITS, EIGHTS, WARPS>;
    constexpr int TEAMS = Shape::TEAMS, SLOTS = Shape::SLOTS, THREADS = Shape::THREADS, X = Shape::X;
    constexpr int OF_TILE = Shape::OF_TILE, OF_WARP = TILES * OF_TILE, OF_TEAM = SLOTS * Shape::SLOT;
    constexpr int CODES = BITS * 16, SCALES_AT = BITS * 256, ZEROS_AT = SCALES_AT + 128;
    constexpr int PIECES = (8 * EIGHTS + 2 * WARPS - 1) / (2 * WARPS), OF_SUMS = 4 * EIGHTS;
    constexpr int SUMS = TILES * OF_SUMS, WORDS = BITS / 4; // of a run
    extern __shared__ __align__(1024) char memory[]; // of a team: [SLOTS][X], [WARPS][SLOTS][OF_WARP]
    unsigned team = threadIdx.x / THREADS, member = threadIdx.x % THREADS;
    unsigned lane = member & 31, warp = member >> 5;
    unsigned first = w.steps * team / TEAMS;
    int steps = w.steps * (team + 1) / TEAMS - first;
    int tile0 = (blockIdx.x * WARPS + warp) * TILES, granules = KIND == PLAIN ? 1 : 4 >> w.shift;
    char* of_team = memory + team * OF_TEAM;
    char* own = of_team + SLOTS * X + warp * SLOTS * OF_WARP;
    unsigned x_place = (unsigned)__cvta_generic_to_shared(of_team);
    unsigned own_place = (unsigned)__cvta_generic_to_shared(own);

    const char *codes_from[TILES], *scales_from[TILES];
    long long to_zeros = (const char*)w.zeros - (const char*)w.scales;
    bool has_scales = (int)lane < 2 * granules;
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        unsigned begin = min(tile0 + j, (w.n - 1) / 16) * w.steps + first; // in steps
        codes_from[j] = kept((const char*)(w.codes + lane) + (long long)begin * (CODES * 16));
        scales_from[j] = kept((const char*)w.scales + lane * 16 + (long long)begin * (granules * 32));
    }
    auto load_weight = [&](int slot, int step) {
        unsigned to = own_place + slot * OF_WARP + lane * 16;
        unsigned codes_on = kept(step * CODES * 16), scales_on = kept(step * granules * 32);
#pragma unroll
        for (int j = 0; j < TILES; j++) {
            const char *codes = codes_from[j] + codes_on, *scales = scales_from[j] + scales_on;
#pragma unroll
            for (int i = 0; i < CODES / 32; i++) copy_once(to + j * OF_TILE + i * 512, codes + i * 512);
            if (has_scales) copy_once(to + j * OF_TILE + SCALES_AT, scales);
            if (KIND == ANY && w.zeros && has_scales)
                copy_once(to + j * OF_TILE + ZEROS_AT, scales + to_zeros);
        }
    };
    // The first weights may come before the kernel ahead of this one is done; more of them would come
    // before x and keep everybody waiting.
    if (steps) load_weight(0, 0);

    // x of a step: [rows][256 bytes], sixteen bytes c of row r at c ^ (r & 7), so that eight rows meet
    // no bank twice. Rows beyond the last are whatever is there; nobody reads their products.
    const char* x_from[PIECES];
    unsigned x_to[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int row = (member >> 4) + i * 2 * WARPS, sixteen = member & 15;
        x_from[i] = kept((const char*)(x + (long long)row * stride + first * STEP) + sixteen * 16);
        x_to[i] = kept(x_place + row * 256 + (sixteen ^ (row & 7)) * 16);
    }
    auto load_x = [&](int slot, int step) {
        unsigned on = kept(step * STEP * 2);
#pragma unroll
        for (int i = 0; i < PIECES; i++)
            if ((member >> 4) + i * 2 * WARPS < rows) copy_to(x_to[i] + slot * X, x_from[i] + on);
    };
    wait_for_it();
    let_next_start();
#pragma unroll
    for (int s = 0; s < SLOTS - 1; s++) {
        if (s < steps) {
            load_x(s, s);
            if (s) load_weight(s, s);
        }
        asm volatile("cp.async.commit_group;");
    }
    // Two eights: rows 0 to 7 of positions 0 to 7, of 8 to 15, then rows 8 to 15. One: positions 0 to 31.
    int own_row = EIGHTS == 1 ? lane & 7 : (lane >> 4) * 8 + (lane & 7), within = EIGHTS == 1 ? 4 : 6;
    int sixteen = EIGHTS == 1 ? lane >> 3 : lane >> 3 & 1;
    unsigned turned[4];
#pragma unroll
    for (int q = 0; q < 4; q++)
        turned[q] = kept(x_place + own_row * 256 + ((2 * q & within) ^ sixteen ^ (own_row & 7)) * 16);

    float sum[SUMS], part_sum[SUMS];
    unsigned less[TILES][2];
#pragma unroll
    for (int i = 0; i < SUMS; i++) sum[i] = 0;
#pragma unroll
    for (int j = 0; j < TILES; j++) zeros_of<BITS>(less[j], 0, w.zero);
    int slot = 0, free = SLOTS - 1;
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(SLOTS - 2) : "memory");
        wait_for_team<WARPS>(team); // copies of this step are there, and the slot before is free
        if (step + SLOTS - 1 < steps) {
            load_weight(free, step + SLOTS - 1);
            load_x(free, step + SLOTS - 1);
        }
        asm volatile("cp.async.commit_group;");
        const char* now = own + slot * OF_WARP;
        uint4 codes[TILES][2 * WORDS];
#pragma unroll
        for (int j = 0; j < TILES; j++)
#pragma unroll
            for (int i = 0; i < 2 * WORDS; i++)
                codes[j][i] = ((const uint4*)(now + j * OF_TILE))[i * 32 + lane];
        static_assert(EIGHTS == 1 || EIGHTS % 2 == 0, "eights come in pairs");
        unsigned b[EIGHTS == 1 ? 1 : EIGHTS / 2][4]; // of one eight for two tiles
        // Sums of a granule are of whole numbers times x; its scale comes last.
#pragma unroll
        for (int tile = 0; tile < 8; tile++) {
            int granule = KIND == PLAIN ? 0 : (tile >> 1) >> w.shift;
            int of_granule = KIND == PLAIN ? 8 : 2 << w.shift; // in tiles
            bool begins = (tile & (of_granule - 1)) == 0, ends = ((tile + 1) & (of_granule - 1)) == 0;
            auto pairs = [&](int j, int at) {
                return (const unsigned*)(now + j * OF_TILE + at) + granule * 8 + (lane >> 2);
            };
            if (KIND == ANY && begins) {
#pragma unroll
                for (int i = 0; i < SUMS; i++) part_sum[i] = 0;
#pragma unroll
                for (int j = 0; j < TILES; j++)
                    if (w.zeros) zeros_of<BITS>(less[j], pairs(j, ZEROS_AT), 0);
            }
#pragma unroll
            for (int e = 0; e < EIGHTS; e += 2)
                if (EIGHTS > 1 || tile % 2 == 0)
                    load_four(b[e / 2], turned[tile & 3] + slot * X + e * 2048 + (tile >> 2) * 128);
#pragma unroll
            for (int j = 0; j < TILES; j++) {
                unsigned a[4];
                codes_of<BITS>(a, codes[j] + (tile >> 2) * WORDS, tile & 3, less[j]);
#pragma unroll
                for (int e = 0; e < EIGHTS; e++) {
                    float* c = part_sum + j * OF_SUMS + e * 4;
                    const unsigned* of_b = b[e / 2] + 2 * (EIGHTS == 1 ? tile & 1 : e & 1);
                    if (KIND == PLAIN && tile == 0) multiply_anew(c, a, of_b[0], of_b[1]);
                    else multiply(c, a, of_b[0], of_b[1]);
                }
            }
            if (ends) {
#pragma unroll
                for (int j = 0; j < TILES; j++) {
                    unsigned pair = *pairs(j, SCALES_AT);
                    float of_g = widen((half16)(pair & 0xffff)), of_g8 = widen((half16)(pair >> 16));
#pragma unroll
                    for (int i = j * OF_SUMS; i < (j + 1) * OF_SUMS; i++)
                        sum[i] += ((i & 3) < 2 ? of_g : of_g8) * part_sum[i];
                }
            }
        }
        free = slot;
        slot = slot + 1 == SLOTS ? 0 : slot + 1;
    }

    // A warp leaves its sums where its weights were: [SUMS][32]. Teams are added up in the order of
    // their positions.
    static_assert(SUMS * 128 <= SLOTS * OF_WARP, "room for the sums of a warp");
    __syncwarp();
#pragma unroll
    for (int i = 0; i < SUMS; i++) ((float*)own)[i * 32 + lane] = sum[i];
    __syncthreads();
    const float* of_first = (const float*)(own - team * OF_TEAM) + lane;
#pragma unroll 4
    for (int i = team; i < SUMS; i += TEAMS) {
        float total = 0;
#pragma unroll
        for (int other = 0; other < TEAMS; other++) total += of_first[other * (OF_TEAM / 4) + i * 32];
        int output = (tile0 + i / OF_SUMS) * 16 + (lane >> 2) + (i >> 1 & 1) * 8;
        int row = 8 * (i / 4 % EIGHTS) + 2 * (lane & 3) + (i & 1);
        if (output < w.n && row < rows) put(out, total, bias, w.n, output, row, add);
    }
}
