// Products of more rows, to 256 on Hopper and 64 elsewhere, by blocks of 64 (of 32 where there is less
// shared memory): a warpgroup takes 64 outputs, its weights go from registers to the tensor cores, x
// through shared memory. On Hopper by wgmma, which reads x for four warps at once and does not wait;
// elsewhere by mma.
#pragma once
#include "packed.cuh"
#include "wgmma.cuh"

// c += the products of a run of 64 positions; `a` holds its four tiles and stays as it is until the
// next but one `products_are_done_but(1)`.
template <int EIGHTS>
__device__ __forceinline__ void multiply_run(float* c, const unsigned (*a)[4], unsigned x) {
#if WGMMA
    static_assert(EIGHTS == 8, "wgmma of 64 rows");
    begin_products();
    unsigned long long b = described(x);
#pragma unroll
    for (int tile = 0; tile < 4; tile++) multiply_group(c, a[tile], b + 2 * tile);
    end_products();
#else
    int lane = threadIdx.x & 31, row = (lane >> 4) * 8 + (lane & 7), high = lane >> 3 & 1;
#pragma unroll
    for (int e = 0; e < EIGHTS; e += 2)
#pragma unroll
        for (int tile = 0; tile < 4; tile++) {
            unsigned b[4];
            load_four(b, x + 16 * swizzled(0, 8 * e + row, 2 * tile + high));
            multiply(c + 4 * e, a[tile], b[0], b[1]);
            multiply(c + 4 * e + 4, a[tile], b[2], b[3]);
        }
#endif
}

// A block takes 64 WIDE outputs and EIGHTS times eight rows; the blocks along z share the positions.
// Steps of x, codes and scales come through shared memory PREFETCH ahead. At the end the last of the
// blocks along z adds up what all have left in `parts`, in their order.
// Grid: (n / (64 WIDE), rows / (8 EIGHTS), shares); 128 WIDE threads.
template <int BITS, int EIGHTS, int WIDE, Kind KIND>
__device__ __forceinline__ void more_rows(half16* out, const half16* x, const float* bias, Packed w,
                                          int rows, int stride, int add, float* parts,
                                          unsigned* arrived) {
    constexpr int WORDS = BITS == 4 ? 1 : 2, ROWS = 8 * EIGHTS, THREADS = 128 * WIDE, SUMS = 4 * EIGHTS;
    // Steps of x, codes and scales in shared memory: two blocks fit into a multiprocessor of Hopper.
    constexpr int STAGES = BITS == 4 ? 4 : 3, PREFETCH = STAGES - 1;
    constexpr int X = ROWS * STEP / 8, CODES = 2 * WORDS * 32, SCALES = 8; // times 16 bytes; two of a warp
    constexpr int OWN = CODES + 2 * SCALES, PIECES = X / THREADS;          // of a warp; of a thread
    extern __shared__ __align__(1024) uint4 shared[]; // [STAGES][X], then [warp][STAGES][OWN]
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    int row0 = blockIdx.y * ROWS, shares = gridDim.z, place = threadIdx.x;
    int first = w.steps * blockIdx.z / shares, steps = w.steps * (blockIdx.z + 1) / shares - first;
    int tile = blockIdx.x * 4 * WIDE + warp, granules = KIND == PLAIN ? 1 : 4 >> w.shift;
    uint4* own = shared + STAGES * X + warp * STAGES * OWN;
    unsigned of_x = (unsigned)__cvta_generic_to_shared(shared);

    long long begin = (long long)min(tile, (w.n + 15) / 16 - 1) * w.steps + first; // in steps
    const uint4* codes_from = w.codes + begin * CODES + lane;
    bool has_scales = lane < 2 * granules;
    const uint4* scales_from = (const uint4*)w.scales + begin * 2 * granules + lane;
    long long to_zeros = (const uint4*)w.zeros - (const uint4*)w.scales;
    unsigned weight_to = (unsigned)__cvta_generic_to_shared(own + lane), x_to[PIECES];
    const uint4* x_from[PIECES];
    // Rows beyond the last are whatever is there; nobody reads their products.
    int left = rows - row0 - (place >> 4);
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int row = (place + i * THREADS) >> 4, sixteen = place & 15;
        x_from[i] = (const uint4*)(x + (long long)(row0 + row) * stride + first * STEP) + sixteen;
        x_to[i] = of_x + 16 * swizzled(ROWS, row, sixteen);
    }
    auto load_weight = [&](int slot) {
        unsigned to = weight_to + slot * OWN * 16;
#pragma unroll
        for (int i = 0; i < 2 * WORDS; i++) copy_to(to + i * 512, codes_from + i * 32);
        codes_from += CODES;
        if (has_scales) copy_to(to + CODES * 16, scales_from);
        if (KIND == ANY && w.zeros && has_scales) copy_to(to + (CODES + SCALES) * 16, scales_from + to_zeros);
        scales_from += 2 * granules;
    };
    auto load_x = [&](int slot) {
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            if (i * (THREADS / 16) < left) copy_to(x_to[i] + slot * X * 16, x_from[i]);
            x_from[i] += STEP / 8;
        }
    };
    // Weights first: they may come before the kernel ahead of this one is done.
#pragma unroll
    for (int s = 0; s < PREFETCH; s++)
        if (s < steps) load_weight(s);
    wait_for_it();
    let_next_start();
#pragma unroll
    for (int s = 0; s < PREFETCH; s++) {
        if (s < steps) load_x(s);
        asm volatile("cp.async.commit_group;");
    }
    float sum[SUMS];
#pragma unroll
    for (int i = 0; i < SUMS; i++) sum[i] = 0;
    unsigned less[2], a[2][4][4];
    zeros_of<BITS>(less, 0, w.zero);
    auto weights = [&](int slot, int run) { // of a run, as numbers, to a[run]
        const uint4* from = own + slot * OWN;
        const unsigned* scales = (const unsigned*)(from + CODES) + g;
        uint4 codes[WORDS];
#pragma unroll
        for (int i = 0; i < WORDS; i++) codes[i] = from[(run * WORDS + i) * 32 + lane];
#pragma unroll
        for (int part = 0; part < 2; part++) {
            int granule = KIND == PLAIN ? 0 : (2 * run + part) >> w.shift;
            unsigned pair = scales[granule * 8];
            if (KIND == ANY && w.zeros) zeros_of<BITS>(less, scales + SCALES * 4 + granule * 8, 0);
#pragma unroll
            for (int i = 2 * part; i < 2 * part + 2; i++) {
                codes_of<BITS>(a[run][i], codes, i, less);
#pragma unroll
                for (int p = 0; p < 4; p++) a[run][i][p] = times(a[run][i][p], both(pair, p & 1));
            }
        }
    };
    asm volatile("cp.async.wait_group %0;" ::"n"(PREFETCH - 1) : "memory");
    show_copies();
    __syncthreads();
    int slot = 0;
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        weights(slot, 0);
        multiply_run<EIGHTS>(sum, a[0], of_x + slot * X * 16);
        products_are_done_but(1); // the step before is done: its place is free once all are here
        asm volatile("cp.async.wait_group %0;" ::"n"(PREFETCH - 2) : "memory");
        show_copies();
        __syncthreads(); // and the copies of the next step are there
        if (step + PREFETCH < steps) {
            int free = slot ? slot - 1 : STAGES - 1;
            load_weight(free);
            load_x(free);
        }
        asm volatile("cp.async.commit_group;");
        weights(slot, 1);
        multiply_run<EIGHTS>(sum, a[1], of_x + slot * X * 16 + X * 8);
        products_are_done_but(1);
        slot = slot + 1 == STAGES ? 0 : slot + 1;
    }
    products_are_done_but(0);
#if WGMMA
    stay<SUMS>(sum);
#endif

    if (shares > 1) {
        long long block = (long long)blockIdx.y * gridDim.x + blockIdx.x;
        long long apart = (long long)gridDim.x * gridDim.y * SUMS * THREADS;
        float* all = parts + block * SUMS * THREADS + place;
#pragma unroll
        for (int i = 0; i < SUMS; i++) all[blockIdx.z * apart + i * THREADS] = sum[i];
        if (!is_last(arrived + block, shares, (unsigned*)shared)) return; // x is read no more
#pragma unroll
        for (int i = 0; i < SUMS; i++) sum[i] = 0;
        for (int s = 0; s < shares; s++)
#pragma unroll
            for (int i = 0; i < SUMS; i++) sum[i] += __ldcg(all + s * apart + i * THREADS);
    }
#pragma unroll
    for (int i = 0; i < SUMS; i++) {
        int output = tile * 16 + g + (i >> 1 & 1) * 8, row = row0 + 8 * (i >> 2) + 2 * t + (i & 1);
        if (output < w.n && row < rows) put(out, sum[i], bias, w.n, output, row, add);
    }
}
