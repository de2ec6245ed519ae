// out [rows, n] = x [rows, k] W^T with packed W, for up to 256 rows on Hopper and 64 elsewhere.
//
// A warpgroup computes 64 outputs by 64 rows (32 where shared memory is small). W is dequantized into
// registers as the A operand; x is the B operand, in shared memory with a 128-byte swizzle. On Hopper by
// asynchronous wgmma, which reads x once for four warps; elsewhere by mma. Each block of rows dequantizes W
// again, so beyond 256 rows it is cheaper to dequantize once (`dequantize_packed`) and call cuBLAS.
#pragma once
#include "packed.cuh"
#include "wgmma.cuh"

// c += the products of K_RUN = 64 positions. `a` holds their four A fragments and must stay unchanged until
// the wgmma group has completed, at the second `wgmma_wait(1)` after this call.
template <int ROW_TILES>
__device__ __forceinline__ void mma_run(float* c, const unsigned (*a)[4], unsigned x) {
#if WGMMA
    static_assert(ROW_TILES == 8, "wgmma of 64 rows");
    wgmma_fence();
    unsigned long long b = matrix_descriptor(x);
#pragma unroll
    for (int tile = 0; tile < 4; tile++) wgmma_n64(c, a[tile], b + 2 * tile);
    wgmma_commit();
#else
    int lane = threadIdx.x & 31, row = (lane >> 4) * 8 + (lane & 7), high = lane >> 3 & 1;
#pragma unroll
    for (int e = 0; e < ROW_TILES; e += 2)
#pragma unroll
        for (int tile = 0; tile < 4; tile++) {
            unsigned b[4];
            ldmatrix_x4(b, x + 16 * swizzle_128b(0, 8 * e + row, 2 * tile + high));
            mma(c + 4 * e, a[tile], b[0], b[1]);
            mma(c + 4 * e + 4, a[tile], b[2], b[3]);
        }
#endif
}

// A block takes 64 WARPGROUPS outputs and 8 ROW_TILES rows. Blocks along z split K (split-K); the last one to
// arrive sums all partial results in a fixed order, so results are reproducible. The cp.async pipeline runs
// PREFETCH stages of K_STEP positions ahead.
//
// Launch grid: (n / (64 WARPGROUPS), rows / (8 ROW_TILES), splits); block: 128 WARPGROUPS.
template <int BITS, int ROW_TILES, int WARPGROUPS, Kind KIND>
__device__ __forceinline__ void more_rows(half16* out, const half16* x, const float* bias, Packed w, int rows,
                                          int stride, int add, float* partials, unsigned* arrivals) {
    constexpr int WORDS = BITS == 4 ? 1 : 2, ROWS = 8 * ROW_TILES, THREADS = 128 * WARPGROUPS,
                  SUMS = 4 * ROW_TILES;
    // Pipeline stages: two blocks fit on a multiprocessor of Hopper.
    constexpr int STAGES = BITS == 4 ? 4 : 3, PREFETCH = STAGES - 1;
    constexpr int X_CHUNKS = ROWS * K_STEP / 8, CODE_CHUNKS = 2 * WORDS * 32,
                  SCALE_CHUNKS = 8; // in 16-byte chunks; scales of a warp: two tiles of 8 pairs
    constexpr int WARP_CHUNKS = CODE_CHUNKS + 2 * SCALE_CHUNKS,
                  X_COPIES = X_CHUNKS / THREADS;      // of a warp; of a thread
    extern __shared__ __align__(1024) uint4 shared[]; // [STAGES][X_CHUNKS], then [warp][STAGES][WARP_CHUNKS]
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    int row0 = blockIdx.y * ROWS, splits = gridDim.z, thread = threadIdx.x;
    int first = w.steps * blockIdx.z / splits, steps = w.steps * (blockIdx.z + 1) / splits - first;
    int tile = blockIdx.x * 4 * WARPGROUPS + warp, granules = KIND == PLAIN ? 1 : 4 >> w.shift;
    uint4* own = shared + STAGES * X_CHUNKS + warp * STAGES * WARP_CHUNKS;
    unsigned x_address = (unsigned)__cvta_generic_to_shared(shared);

    long long begin = (long long)min(tile, (w.n + 15) / 16 - 1) * w.steps + first; // in K steps
    const uint4* codes_from = w.codes + begin * CODE_CHUNKS + lane;
    bool has_scales = lane < 2 * granules;
    const uint4* scales_from = (const uint4*)w.scales + begin * 2 * granules + lane;
    long long to_zeros = (const uint4*)w.zeros - (const uint4*)w.scales;
    unsigned weight_to = (unsigned)__cvta_generic_to_shared(own + lane), x_to[X_COPIES];
    const uint4* x_from[X_COPIES];
    // Rows beyond the last are not loaded; their products are not stored.
    int left = rows - row0 - (thread >> 4);
#pragma unroll
    for (int i = 0; i < X_COPIES; i++) {
        int row = (thread + i * THREADS) >> 4, chunk = thread & 15;
        x_from[i] = (const uint4*)(x + (long long)(row0 + row) * stride + first * K_STEP) + chunk;
        x_to[i] = x_address + 16 * swizzle_128b(ROWS, row, chunk);
    }
    auto load_weight = [&](int stage) {
        unsigned to = weight_to + stage * WARP_CHUNKS * 16;
#pragma unroll
        for (int i = 0; i < 2 * WORDS; i++) cp_async(to + i * 512, codes_from + i * 32);
        codes_from += CODE_CHUNKS;
        if (has_scales) cp_async(to + CODE_CHUNKS * 16, scales_from);
        if (KIND == ANY && w.zeros && has_scales)
            cp_async(to + (CODE_CHUNKS + SCALE_CHUNKS) * 16, scales_from + to_zeros);
        scales_from += 2 * granules;
    };
    auto load_x = [&](int stage) {
#pragma unroll
        for (int i = 0; i < X_COPIES; i++) {
            if (i * (THREADS / 16) < left) cp_async(x_to[i] + stage * X_CHUNKS * 16, x_from[i]);
            x_from[i] += K_STEP / 8;
        }
    };
    // Weights do not depend on the kernel before, so they are loaded ahead of `pdl_wait`.
#pragma unroll
    for (int s = 0; s < PREFETCH; s++)
        if (s < steps) load_weight(s);
    pdl_wait();
    pdl_trigger();
#pragma unroll
    for (int s = 0; s < PREFETCH; s++) {
        if (s < steps) load_x(s);
        asm volatile("cp.async.commit_group;");
    }
    float sum[SUMS];
#pragma unroll
    for (int i = 0; i < SUMS; i++) sum[i] = 0;
    unsigned minus_zero[2], a[2][4][4];
    load_negative_zeros<BITS>(minus_zero, 0, w.zero);
    auto weights = [&](int stage, int run) { // dequantizes K_RUN positions to a[run]
        const uint4* from = own + stage * WARP_CHUNKS;
        const unsigned* scales = (const unsigned*)(from + CODE_CHUNKS) + g;
        uint4 codes[WORDS];
#pragma unroll
        for (int i = 0; i < WORDS; i++) codes[i] = from[(run * WORDS + i) * 32 + lane];
#pragma unroll
        for (int part = 0; part < 2; part++) {
            int granule = KIND == PLAIN ? 0 : (2 * run + part) >> w.shift;
            unsigned pair = scales[granule * 8];
            if (KIND == ANY && w.zeros)
                load_negative_zeros<BITS>(minus_zero, scales + SCALE_CHUNKS * 4 + granule * 8, 0);
#pragma unroll
            for (int i = 2 * part; i < 2 * part + 2; i++) {
                dequantize_tile<BITS>(a[run][i], codes, i, minus_zero);
#pragma unroll
                for (int p = 0; p < 4; p++) a[run][i][p] = mul_pair(a[run][i][p], broadcast(pair, p & 1));
            }
        }
    };
    asm volatile("cp.async.wait_group %0;" ::"n"(PREFETCH - 1) : "memory");
    fence_async_proxy();
    __syncthreads();
    int stage = 0;
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        weights(stage, 0);
        mma_run<ROW_TILES>(sum, a[0], x_address + stage * X_CHUNKS * 16);
        wgmma_wait(1); // the previous K step is done: its stage is free behind the barrier
        asm volatile("cp.async.wait_group %0;" ::"n"(PREFETCH - 2) : "memory");
        fence_async_proxy();
        __syncthreads(); // the copies of the next K step have arrived
        if (step + PREFETCH < steps) {
            int free_stage = stage ? stage - 1 : STAGES - 1;
            load_weight(free_stage);
            load_x(free_stage);
        }
        asm volatile("cp.async.commit_group;");
        weights(stage, 1);
        mma_run<ROW_TILES>(sum, a[1], x_address + stage * X_CHUNKS * 16 + X_CHUNKS * 8);
        wgmma_wait(1);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    wgmma_wait(0);
#if WGMMA
    pin_registers<SUMS>(sum);
#endif

    if (splits > 1) {
        long long block = (long long)blockIdx.y * gridDim.x + blockIdx.x;
        long long split_stride = (long long)gridDim.x * gridDim.y * SUMS * THREADS;
        float* own_partials = partials + block * SUMS * THREADS + thread;
#pragma unroll
        for (int i = 0; i < SUMS; i++) own_partials[blockIdx.z * split_stride + i * THREADS] = sum[i];
        // X in shared memory is no longer read.
        if (!is_last_block(arrivals + block, splits, (unsigned*)shared)) return;
#pragma unroll
        for (int i = 0; i < SUMS; i++) sum[i] = 0;
        for (int s = 0; s < splits; s++)
#pragma unroll
            for (int i = 0; i < SUMS; i++) sum[i] += __ldcg(own_partials + s * split_stride + i * THREADS);
    }
#pragma unroll
    for (int i = 0; i < SUMS; i++) {
        int output = tile * 16 + g + (i >> 1 & 1) * 8, row = row0 + 8 * (i >> 2) + 2 * t + (i & 1);
        if (output < w.n && row < rows) store_output(out, sum[i], bias, w.n, output, row, add);
    }
}
