// Attention of a prompt, or of windows, by warpgroups of Hopper.
#pragma once
#include "attend_prompt.cuh"
#include "wgmma.cuh"

#if WGMMA

__device__ __forceinline__ float two_to(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// As `attend_prompt`, by warpgroups (Shah et al. 2024): a block takes 128 queries of a head, a warpgroup
// 64 of them, and goes through the keys 64 at a time, three tiles of them on their way. While the
// weights of one tile are computed, the values of the tile before are multiplied. The first tile is the one
// with the first key that the block's first query sees.
// Grid: (count / 128, heads); block 256; shared: 4 * 2 * 64 * D half16.
template <int D>
__device__ __forceinline__ void attend_group(half16* out, const half16* q, const half16* keys,
                                             const half16* values, int count, int first, int kv_heads,
                                             float scale, float cap, int window) {
    constexpr int SLOTS = 4, TILE = 64 * D * 2, RUN = 64 * 128, PIECES = 64 * D / 8 / 256; // bytes; of a thread
    extern __shared__ __align__(1024) char tiles_of[]; // [SLOTS][keys, values][D / 64][64][128 bytes]
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    int block = gridDim.x - 1 - blockIdx.x; // the longest first
    int q0 = block * 128 + warp * 16;
    int head = blockIdx.y, heads = gridDim.y, pitch = kv_heads * D, total = first + count;
    const half16* own_keys = keys + head / (heads / kv_heads) * D;
    const half16* own_values = values + head / (heads / kv_heads) * D;
    unsigned place = (unsigned)__cvta_generic_to_shared(tiles_of);
    int begin = first_seen(first + block * 128, window) / 64;
    int tiles = (first + min(block * 128 + 127, count - 1)) / 64 + 1;
    auto load = [&](int tile) {
        if (tile < tiles) {
            char* to = tiles_of + tile % SLOTS * 2 * TILE;
#pragma unroll
            for (int i = 0; i < PIECES; i++) {
                int piece = threadIdx.x + i * 256, row = piece / (D / 8), sixteen = piece % (D / 8);
                int key = tile * 64 + row, at = 16 * swizzled(64, row, sixteen);
                long long from = (long long)min(key, total - 1) * pitch + sixteen * 8;
                copy_ahead(to + at, own_keys + from, key < total);
                copy_ahead(to + TILE + at, own_values + from, key < total);
            }
        }
        asm volatile("cp.async.commit_group;");
    };
    wait_for_it();
    let_next_start();
#pragma unroll
    for (int tile = 0; tile < SLOTS - 1; tile++) load(begin + tile);
    unsigned of_q[D / 16][4], of_p[4][4];
    load_queries<D>(of_q, q + head * D, q0, count, heads);
    float score[32], sum[D / 2], top[2] = {-INFINITY, -INFINITY}, weights[2] = {0, 0}, shrink[2];
#pragma unroll
    for (int i = 0; i < D / 2; i++) sum[i] = 0;
    float by_two = (CAP ? 1 : scale) * 1.44269504f;

    auto multiply_keys = [&](int tile) {
        unsigned from = place + tile % SLOTS * 2 * TILE;
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            unsigned long long b = described(from + k / 4 * RUN) + 2 * (k % 4);
            if (k == 0) multiply_group_anew(score, of_q[k], b);
            else multiply_group(score, of_q[k], b);
        }
        end_products();
    };
    auto multiply_values = [&](int tile) {
        unsigned from = place + tile % SLOTS * 2 * TILE + TILE;
#pragma unroll
        for (int k = 0; k < 4; k++) multiply_group_turned<D>(sum, of_p[k], described(from + k * 2048, RUN));
        end_products();
    };
    // Scores become weights; what was summed before shrinks where a larger score comes.
    auto weigh = [&](int tile) {
        if (CAP)
#pragma unroll
            for (int i = 0; i < 32; i++) score[i] = capped(score[i] * scale, cap);
        if (tile * 64 + 63 > first + q0)
#pragma unroll
            for (int i = 0; i < 32; i++)
                if (tile * 64 + i / 4 * 8 + 2 * t + (i & 1) > first + q0 + g + (i >> 1 & 1) * 8) score[i] = -INFINITY;
        if (WINDOW && tile * 64 < first_seen(first + q0 + 15, window))
#pragma unroll
            for (int i = 0; i < 32; i++)
                if (tile * 64 + i / 4 * 8 + 2 * t + (i & 1) <
                    first_seen(first + q0 + g + (i >> 1 & 1) * 8, window))
                    score[i] = -INFINITY;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float now = top[h], more = 0;
#pragma unroll
            for (int i = 2 * h; i < 32; i += 4) now = fmaxf(now, fmaxf(score[i], score[i + 1]));
            now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
            now = fmaxf(now, __shfl_xor_sync(~0u, now, 2));
            if (WINDOW) now = fmaxf(now, -1e30f); // a row that sees nothing of its first tiles
            float less = now * by_two;
            // Where a row has seen nothing yet both are -1e30, whose product rounds to something far from `less`.
            shrink[h] = WINDOW && top[h] == now ? 1 : two_to(top[h] * by_two - less);
            top[h] = now;
#pragma unroll
            for (int i = 2 * h; i < 32; i += 4)
#pragma unroll
                for (int j = i; j < i + 2; j++) {
                    score[j] = two_to(score[j] * by_two - less);
                    more += score[j];
                }
            weights[h] = weights[h] * shrink[h] + more;
        }
    };
    auto round_weights = [&] {
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) of_p[k][i] = pair_of(score[k * 8 + i * 2], score[k * 8 + i * 2 + 1]);
        stay<16>(of_p[0]);
    };

    asm volatile("cp.async.wait_group %0;" ::"n"(SLOTS - 2) : "memory");
    show_copies();
    __syncthreads();
    begin_products();
    multiply_keys(begin);
    products_are_done_but(0);
    stay<32>(score);
    weigh(begin);
    round_weights();
    // Of the last tile the first warpgroup sees nothing.
#pragma unroll 1
    for (int tile = begin; tile + 1 < tiles; tile++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(SLOTS - 3) : "memory");
        show_copies();
        __syncthreads(); // the next tile is there, and nobody reads the one before
        load(tile + SLOTS - 1);
        begin_products();
        multiply_keys(tile + 1);
        multiply_values(tile);
        products_are_done_but(1);
        stay<32>(score);
        weigh(tile + 1);
        products_are_done_but(0);
        stay<D / 2>(sum);
#pragma unroll
        for (int i = 0; i < D / 2; i++) sum[i] *= shrink[i >> 1 & 1];
        round_weights();
    }
    begin_products();
    multiply_values(tiles - 1);
    products_are_done_but(0);
    stay<D / 2>(sum);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float all = weights[h] + __shfl_xor_sync(~0u, weights[h], 1);
        all += __shfl_xor_sync(~0u, all, 2);
        int row = q0 + g + h * 8;
        if (row >= count) continue;
        half16* to = out + ((long long)row * heads + head) * D + 2 * t;
        float share = 1 / all;
#pragma unroll
        for (int j = 0; j < D / 8; j++)
            *(unsigned*)(to + j * 8) = pair_of(sum[4 * j + 2 * h] * share, sum[4 * j + 2 * h + 1] * share);
    }
}

#endif
