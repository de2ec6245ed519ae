// out [rows, n] = x [rows, k] W^T with packed W, for up to 32 rows (decode), by mma.m16n8k16 on every GPU
// from Ampere on.
//
// A block computes 32 WARPS outputs over all of K, so no sums leave it. It is split along K inside the block
// (sliced-K): K_SLICES groups of warps each walk over their own part of K, with a cp.async pipeline of their
// own, and their sums are added in shared memory at the end. Bound by memory bandwidth: what counts are the
// bytes in flight, then the instructions that dequantize.
#pragma once
#include "packed.cuh"

#define OUTPUT_TILES 2 // tiles of 16 outputs of a warp; they share the fragments of x

// Shape of a block: K_SLICES groups of WARPS warps. Warps of a slice take neighbouring outputs and share x. A
// slice has STAGES pipeline stages of K_STEP positions in shared memory. Each part of a stage starts at a
// multiple of 128 bytes; with unaligned copies products took up to a fourth longer. `Few` in cuda/multiply.rs
// computes the same.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SHARED_BYTES (216 << 10)
#else
#define SHARED_BYTES (96 << 10)
#endif
template <int BITS, int ROW_TILES, int WARPS>
struct FewRowsShape {
    static constexpr int X_BYTES = ROW_TILES * 8 * K_STEP * 2,
                         TILE_BYTES = BITS * 256 + 256; // bytes of a K step
    static constexpr int STAGE_BYTES = X_BYTES + WARPS * OUTPUT_TILES * TILE_BYTES;
    __device__ static constexpr int k_slices() {
        int count = WARPS == 1 ? 8 : WARPS == 6 ? 2 : 4;
        while (count > 1 && SHARED_BYTES / (count * STAGE_BYTES) < 2) count /= 2;
        return count;
    }
    static constexpr int K_SLICES = k_slices(), MAX_STAGES = ROW_TILES == 1 || WARPS == 1 ? 4 : 3;
    static constexpr int STAGES = SHARED_BYTES / (K_SLICES * STAGE_BYTES) < MAX_STAGES
                                      ? SHARED_BYTES / (K_SLICES * STAGE_BYTES)
                                      : MAX_STAGES;
    static constexpr int THREADS = 32 * WARPS; // of a slice
};

// Keeps a value in its register: the compiler would rather recompute it, or keep more pointers.
__device__ __forceinline__ unsigned pin_register(unsigned x) {
    asm volatile("" : "+r"(x));
    return x;
}
__device__ __forceinline__ const char* pin_register(const char* x) {
    asm volatile("" : "+l"(x));
    return x;
}

template <int WARPS>
__device__ __forceinline__ void sync_slice(int slice) {
    if (WARPS == 1) __syncwarp();
    else asm volatile("bar.sync %0, %1;" ::"r"(slice + 1), "n"(32 * WARPS) : "memory");
}

// Launch grid: n / (32 WARPS); block: K_SLICES * THREADS; shared memory: K_SLICES * STAGES * STAGE_BYTES.
template <int BITS, int ROW_TILES, int WARPS, Kind KIND>
__device__ __forceinline__ void few_rows(half16* out, const half16* x, const float* bias, Packed w, int rows,
                                         int stride, int add) {
    using Shape = FewRowsShape<BITS, ROW_TILES, WARPS>;
    constexpr int K_SLICES = Shape::K_SLICES, STAGES = Shape::STAGES, THREADS = Shape::THREADS,
                  X_BYTES = Shape::X_BYTES;
    constexpr int TILE_BYTES = Shape::TILE_BYTES, WARP_BYTES = OUTPUT_TILES * TILE_BYTES,
                  SLICE_BYTES = STAGES * Shape::STAGE_BYTES;
    constexpr int CODES = BITS * 16, SCALES_AT = BITS * 256, ZEROS_AT = SCALES_AT + 128;
    constexpr int X_COPIES = (8 * ROW_TILES + 2 * WARPS - 1) / (2 * WARPS), TILE_SUMS = 4 * ROW_TILES;
    // 16-byte words of a lane in K_RUN positions.
    constexpr int SUMS = OUTPUT_TILES * TILE_SUMS, WORDS = BITS / 4;
    // Of a slice: [STAGES][X_BYTES], [WARPS][STAGES][WARP_BYTES].
    extern __shared__ __align__(1024) char stage_memory[];
    unsigned slice = threadIdx.x / THREADS, slice_thread = threadIdx.x % THREADS;
    unsigned lane = slice_thread & 31, warp = slice_thread >> 5;
    unsigned first = w.steps * slice / K_SLICES;
    int steps = w.steps * (slice + 1) / K_SLICES - first;
    int tile0 = (blockIdx.x * WARPS + warp) * OUTPUT_TILES, granules = KIND == PLAIN ? 1 : 4 >> w.shift;
    char* slice_memory = stage_memory + slice * SLICE_BYTES;
    char* own = slice_memory + STAGES * X_BYTES + warp * STAGES * WARP_BYTES;
    unsigned x_address = (unsigned)__cvta_generic_to_shared(slice_memory);
    unsigned own_address = (unsigned)__cvta_generic_to_shared(own);

    const char *codes_from[OUTPUT_TILES], *scales_from[OUTPUT_TILES];
    long long to_zeros = (const char*)w.zeros - (const char*)w.scales;
    bool has_scales = (int)lane < 2 * granules;
#pragma unroll
    for (int j = 0; j < OUTPUT_TILES; j++) {
        unsigned begin = min(tile0 + j, (w.n - 1) / 16) * w.steps + first; // in K steps
        codes_from[j] = pin_register((const char*)(w.codes + lane) + (long long)begin * (CODES * 16));
        scales_from[j] = pin_register((const char*)w.scales + lane * 16 + (long long)begin * (granules * 32));
    }
    auto load_weight = [&](int stage, int step) {
        unsigned to = own_address + stage * WARP_BYTES + lane * 16;
        unsigned codes_offset = pin_register(step * CODES * 16),
                 scales_offset = pin_register(step * granules * 32);
#pragma unroll
        for (int j = 0; j < OUTPUT_TILES; j++) {
            const char *codes = codes_from[j] + codes_offset, *scales = scales_from[j] + scales_offset;
#pragma unroll
            for (int i = 0; i < CODES / 32; i++)
                cp_async_evict_first(to + j * TILE_BYTES + i * 512, codes + i * 512);
            if (has_scales) cp_async_evict_first(to + j * TILE_BYTES + SCALES_AT, scales);
            if (KIND == ANY && w.zeros && has_scales)
                cp_async_evict_first(to + j * TILE_BYTES + ZEROS_AT, scales + to_zeros);
        }
    };
    // The first weights do not depend on the kernel before, so they are loaded ahead of `pdl_wait`. More than
    // one stage would delay x, which everything waits for.
    if (steps) load_weight(0, 0);

    // x of a K step: [rows][256 bytes], XOR-swizzled: 16-byte chunk c of row r is at c ^ (r & 7), so that
    // ldmatrix has no bank conflicts. Rows beyond the last are not loaded; their products are not stored.
    const char* x_from[X_COPIES];
    unsigned x_to[X_COPIES];
#pragma unroll
    for (int i = 0; i < X_COPIES; i++) {
        int row = (slice_thread >> 4) + i * 2 * WARPS, chunk = slice_thread & 15;
        x_from[i] = pin_register((const char*)(x + (long long)row * stride + first * K_STEP) + chunk * 16);
        x_to[i] = pin_register(x_address + row * 256 + (chunk ^ (row & 7)) * 16);
    }
    auto load_x = [&](int stage, int step) {
        unsigned offset = pin_register(step * K_STEP * 2);
#pragma unroll
        for (int i = 0; i < X_COPIES; i++)
            if ((slice_thread >> 4) + i * 2 * WARPS < rows)
                cp_async(x_to[i] + stage * X_BYTES, x_from[i] + offset);
    };
    pdl_wait();
    pdl_trigger();
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) {
            load_x(s, s);
            if (s) load_weight(s, s);
        }
        asm volatile("cp.async.commit_group;");
    }
    // ldmatrix addresses. Two row tiles: rows 0 to 7 at positions 0 to 7 and 8 to 15, then rows 8 to 15. One
    // row tile: positions 0 to 31.
    int own_row = ROW_TILES == 1 ? lane & 7 : (lane >> 4) * 8 + (lane & 7), within = ROW_TILES == 1 ? 4 : 6;
    int chunk = ROW_TILES == 1 ? lane >> 3 : lane >> 3 & 1;
    unsigned b_address[4];
#pragma unroll
    for (int q = 0; q < 4; q++)
        b_address[q] =
            pin_register(x_address + own_row * 256 + ((2 * q & within) ^ chunk ^ (own_row & 7)) * 16);

    float sum[SUMS], part_sum[SUMS];
    unsigned minus_zero[OUTPUT_TILES][2];
#pragma unroll
    for (int i = 0; i < SUMS; i++) sum[i] = 0;
#pragma unroll
    for (int j = 0; j < OUTPUT_TILES; j++) load_negative_zeros<BITS>(minus_zero[j], 0, w.zero);
    int stage = 0, free_stage = STAGES - 1;
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        sync_slice<WARPS>(slice); // the copies of this step have arrived, and the previous stage is free
        if (step + STAGES - 1 < steps) {
            load_weight(free_stage, step + STAGES - 1);
            load_x(free_stage, step + STAGES - 1);
        }
        asm volatile("cp.async.commit_group;");
        const char* current = own + stage * WARP_BYTES;
        uint4 codes[OUTPUT_TILES][2 * WORDS];
#pragma unroll
        for (int j = 0; j < OUTPUT_TILES; j++)
#pragma unroll
            for (int i = 0; i < 2 * WORDS; i++)
                codes[j][i] = ((const uint4*)(current + j * TILE_BYTES))[i * 32 + lane];
        static_assert(ROW_TILES == 1 || ROW_TILES % 2 == 0, "row tiles come in pairs");
        // B fragments of two row tiles, or of one row tile for two K tiles.
        unsigned b[ROW_TILES == 1 ? 1 : ROW_TILES / 2][4];
        // A granule is summed with integer weights (code - zero), exact in 16 bits; its scale is applied to
        // the sum.
#pragma unroll
        for (int tile = 0; tile < 8; tile++) {
            int granule = KIND == PLAIN ? 0 : (tile >> 1) >> w.shift;
            int granule_tiles = KIND == PLAIN ? 8 : 2 << w.shift; // K tiles of 16
            bool begins = (tile & (granule_tiles - 1)) == 0, ends = ((tile + 1) & (granule_tiles - 1)) == 0;
            auto pairs = [&](int j, int at) {
                return (const unsigned*)(current + j * TILE_BYTES + at) + granule * 8 + (lane >> 2);
            };
            if (KIND == ANY && begins) {
#pragma unroll
                for (int i = 0; i < SUMS; i++) part_sum[i] = 0;
#pragma unroll
                for (int j = 0; j < OUTPUT_TILES; j++)
                    if (w.zeros) load_negative_zeros<BITS>(minus_zero[j], pairs(j, ZEROS_AT), 0);
            }
#pragma unroll
            for (int e = 0; e < ROW_TILES; e += 2)
                if (ROW_TILES > 1 || tile % 2 == 0)
                    ldmatrix_x4(b[e / 2],
                                b_address[tile & 3] + stage * X_BYTES + e * 2048 + (tile >> 2) * 128);
#pragma unroll
            for (int j = 0; j < OUTPUT_TILES; j++) {
                unsigned a[4];
                dequantize_tile<BITS>(a, codes[j] + (tile >> 2) * WORDS, tile & 3, minus_zero[j]);
#pragma unroll
                for (int e = 0; e < ROW_TILES; e++) {
                    float* c = part_sum + j * TILE_SUMS + e * 4;
                    const unsigned* b_pair = b[e / 2] + 2 * (ROW_TILES == 1 ? tile & 1 : e & 1);
                    if (KIND == PLAIN && tile == 0) mma_from_zero(c, a, b_pair[0], b_pair[1]);
                    else mma(c, a, b_pair[0], b_pair[1]);
                }
            }
            if (ends) {
#pragma unroll
                for (int j = 0; j < OUTPUT_TILES; j++) {
                    unsigned pair = *pairs(j, SCALES_AT);
                    float scale_g = widen((half16)(pair & 0xffff)), scale_g8 = widen((half16)(pair >> 16));
#pragma unroll
                    for (int i = j * TILE_SUMS; i < (j + 1) * TILE_SUMS; i++)
                        sum[i] += ((i & 3) < 2 ? scale_g : scale_g8) * part_sum[i];
                }
            }
        }
        free_stage = stage;
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }

    // Each warp stores its sums over its own stages: [SUMS][32]. The slices are added in the order of K.
    static_assert(SUMS * 128 <= STAGES * WARP_BYTES, "room for the sums of a warp");
    __syncwarp();
#pragma unroll
    for (int i = 0; i < SUMS; i++) ((float*)own)[i * 32 + lane] = sum[i];
    __syncthreads();
    const float* first_slice = (const float*)(own - slice * SLICE_BYTES) + lane;
#pragma unroll 4
    for (int i = slice; i < SUMS; i += K_SLICES) {
        float total = 0;
#pragma unroll
        for (int other = 0; other < K_SLICES; other++)
            total += first_slice[other * (SLICE_BYTES / 4) + i * 32];
        int output = (tile0 + i / TILE_SUMS) * 16 + (lane >> 2) + (i >> 1 & 1) * 8;
        int row = 8 * (i / 4 % ROW_TILES) + 2 * (lane & 3) + (i & 1);
        if (output < w.n && row < rows) store_output(out, total, bias, w.n, output, row, add);
    }
}
