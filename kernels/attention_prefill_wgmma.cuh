// Prefill attention on Hopper: as attention_prefill.cuh, with wgmma (FlashAttention-3, Shah et al. 2024).
#pragma once
#include "attention_prefill.cuh"
#include "wgmma.cuh"

#if WGMMA

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// A block takes 128 queries of one head, 64 per warpgroup, and walks over the keys in tiles of 64. A cp.async
// pipeline of STAGES holds the tiles, STAGES - 1 of them ahead. The softmax of one tile overlaps with the
// product P V of the tile before. The first tile is that of the first key that is visible to the block's
// first query.
//
// Launch grid: (ceil(count / 128), heads); block: 256; shared memory: 4 * 2 * 64 * D half16.
template <int D>
__device__ __forceinline__ void attention_prefill_wgmma(half16* out, const half16* q, const half16* keys,
                                                        const half16* values, int count, int first,
                                                        int kv_heads, float scale, float cap, int window) {
    constexpr int STAGES = 4, TILE = 64 * D * 2, PANEL = 64 * 128,
                  COPIES = 64 * D / 8 / 256;                 // TILE and PANEL in bytes; COPIES of a thread
    extern __shared__ __align__(1024) char swizzled_tiles[]; // [STAGES][keys, values][D / 64][64][128 bytes]
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    int block = gridDim.x - 1 - blockIdx.x; // blocks with the most keys start first
    int q0 = block * 128 + warp * 16;
    int head = blockIdx.y, heads = gridDim.y, pitch = kv_heads * D, total = first + count;
    const half16* head_keys = keys + head / (heads / kv_heads) * D;
    const half16* head_values = values + head / (heads / kv_heads) * D;
    unsigned tiles_address = (unsigned)__cvta_generic_to_shared(swizzled_tiles);
    int begin = first_visible_key(first + block * 128, window) / 64;
    int tiles = (first + min(block * 128 + 127, count - 1)) / 64 + 1;
    auto load = [&](int tile) {
        if (tile < tiles) {
            char* to = swizzled_tiles + tile % STAGES * 2 * TILE;
#pragma unroll
            for (int i = 0; i < COPIES; i++) {
                int copy = threadIdx.x + i * 256, row = copy / (D / 8), chunk = copy % (D / 8);
                int key = tile * 64 + row, at = 16 * swizzle_128b(64, row, chunk);
                long long from = (long long)min(key, total - 1) * pitch + chunk * 8;
                cp_async_or_zero(to + at, head_keys + from, key < total);
                cp_async_or_zero(to + TILE + at, head_values + from, key < total);
            }
        }
        asm volatile("cp.async.commit_group;");
    };
    pdl_wait();
    pdl_trigger();
#pragma unroll
    for (int tile = 0; tile < STAGES - 1; tile++) load(begin + tile);
    unsigned q_fragments[D / 16][4], p_fragments[4][4];
    load_queries<D>(q_fragments, q + head * D, q0, count, heads);
    float score[32], sum[D / 2], running_max[2] = {-INFINITY, -INFINITY}, weight_sum[2] = {0, 0}, rescale[2];
#pragma unroll
    for (int i = 0; i < D / 2; i++) sum[i] = 0;
    float scale_log2 = (SOFT_CAP ? 1 : scale) * 1.44269504f;

    auto issue_qk = [&](int tile) {
        unsigned from = tiles_address + tile % STAGES * 2 * TILE;
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            unsigned long long b = matrix_descriptor(from + k / 4 * PANEL) + 2 * (k % 4);
            if (k == 0) wgmma_n64_from_zero(score, q_fragments[k], b);
            else wgmma_n64(score, q_fragments[k], b);
        }
        wgmma_commit();
    };
    auto issue_pv = [&](int tile) {
        unsigned from = tiles_address + tile % STAGES * 2 * TILE + TILE;
#pragma unroll
        for (int k = 0; k < 4; k++)
            wgmma_transposed<D>(sum, p_fragments[k], matrix_descriptor(from + k * 2048, PANEL));
        wgmma_commit();
    };
    // Online softmax of a tile: scores become weights, and `rescale` is what earlier sums are multiplied by.
    auto softmax_tile = [&](int tile) {
        if (SOFT_CAP)
#pragma unroll
            for (int i = 0; i < 32; i++) score[i] = soft_capped(score[i] * scale, cap);
        if (tile * 64 + 63 > first + q0)
#pragma unroll
            for (int i = 0; i < 32; i++)
                if (tile * 64 + i / 4 * 8 + 2 * t + (i & 1) > first + q0 + g + (i >> 1 & 1) * 8)
                    score[i] = -INFINITY;
        if (WINDOW && tile * 64 < first_visible_key(first + q0 + 15, window))
#pragma unroll
            for (int i = 0; i < 32; i++)
                if (tile * 64 + i / 4 * 8 + 2 * t + (i & 1) <
                    first_visible_key(first + q0 + g + (i >> 1 & 1) * 8, window))
                    score[i] = -INFINITY;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float new_max = running_max[h], added = 0;
#pragma unroll
            for (int i = 2 * h; i < 32; i += 4) new_max = fmaxf(new_max, fmaxf(score[i], score[i + 1]));
            new_max = fmaxf(new_max, __shfl_xor_sync(~0u, new_max, 1));
            new_max = fmaxf(new_max, __shfl_xor_sync(~0u, new_max, 2));
            if (WINDOW) new_max = fmaxf(new_max, -1e30f); // a row without a visible key so far
            float max_log2 = new_max * scale_log2;
            // Without a visible key so far both maxima are -1e30. Their scaled difference would be a rounding
            // error of that size instead of 0.
            rescale[h] =
                WINDOW && running_max[h] == new_max ? 1 : exp2_approx(running_max[h] * scale_log2 - max_log2);
            running_max[h] = new_max;
#pragma unroll
            for (int i = 2 * h; i < 32; i += 4)
#pragma unroll
                for (int j = i; j < i + 2; j++) {
                    score[j] = exp2_approx(score[j] * scale_log2 - max_log2);
                    added += score[j];
                }
            weight_sum[h] = weight_sum[h] * rescale[h] + added;
        }
    };
    auto pack_weights = [&] {
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                p_fragments[k][i] = pack_pair(score[k * 8 + i * 2], score[k * 8 + i * 2 + 1]);
        pin_registers<16>(p_fragments[0]);
    };

    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
    fence_async_proxy();
    __syncthreads();
    wgmma_fence();
    issue_qk(begin);
    wgmma_wait(0);
    pin_registers<32>(score);
    softmax_tile(begin);
    pack_weights();
    // The last tile is masked for the first warpgroup as a whole.
#pragma unroll 1
    for (int tile = begin; tile + 1 < tiles; tile++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 3) : "memory");
        fence_async_proxy();
        __syncthreads(); // the next tile has arrived, and the previous one is free
        load(tile + STAGES - 1);
        wgmma_fence();
        issue_qk(tile + 1);
        issue_pv(tile);
        wgmma_wait(1);
        pin_registers<32>(score);
        softmax_tile(tile + 1);
        wgmma_wait(0);
        pin_registers<D / 2>(sum);
#pragma unroll
        for (int i = 0; i < D / 2; i++) sum[i] *= rescale[i >> 1 & 1];
        pack_weights();
    }
    wgmma_fence();
    issue_pv(tiles - 1);
    wgmma_wait(0);
    pin_registers<D / 2>(sum);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float total = weight_sum[h] + __shfl_xor_sync(~0u, weight_sum[h], 1);
        total += __shfl_xor_sync(~0u, total, 2);
        int row = q0 + g + h * 8;
        if (row >= count) continue;
        half16* to = out + ((long long)row * heads + head) * D + 2 * t;
        float inverse = 1 / total;
#pragma unroll
        for (int j = 0; j < D / 8; j++)
            *(unsigned*)(to + j * 8) =
                pack_pair(sum[4 * j + 2 * h] * inverse, sum[4 * j + 2 * h + 1] * inverse);
    }
}

#endif
