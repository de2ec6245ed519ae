// Attention of a prompt, or of windows, by the tensor cores of every GPU from Ampere on.
#pragma once
#include "scores.cuh"

// A warp's sixteen rows of `query [count, heads * D]` from q0 on as mma and wgmma take a first factor; rows
// beyond the last are the last.
template <int D>
__device__ __forceinline__ void load_queries(unsigned (*a)[4], const half16* query, int q0, int count,
                                             int heads) {
    int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    query += 2 * t;
#pragma unroll
    for (int k = 0; k < D / 16; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            long long row = min(q0 + g + (i & 1) * 8, count - 1);
            a[k][i] = *(const unsigned*)(query + row * heads * D + k * 16 + (i >> 1) * 8);
        }
}

// As `load_four`, each matrix transposed.
__device__ __forceinline__ void load_turned(unsigned* y, const half16* from) {
    unsigned place = (unsigned)__cvta_generic_to_shared(from);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(y[0]), "=r"(y[1]), "=r"(y[2]), "=r"(y[3])
                 : "r"(place));
}

// A prompt against the cache of its sequence, or a window against itself, the scores never written
// (Dao et al. 2022): q [count, heads * D] at positions from `first` on. A block takes 64 queries of a
// head, 16 a warp, and goes through the keys 64 at a time, the next ones on their way, from the first one that
// its first query sees on.
// Grid: (count / 64, heads); block 128; shared: 4 * 64 * (D + 8) half16.
template <int D>
__device__ __forceinline__ void attend_prompt(half16* out, const half16* q, const half16* keys,
                                              const half16* values, int count, int first, int kv_heads,
                                              float scale, float cap, int window) {
    constexpr int LINE = D + 8; // eight rows meet no bank twice
    extern __shared__ half16 staged[]; // [2][keys, values][64][LINE]
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    int block = gridDim.x - 1 - blockIdx.x, q0 = block * 64 + warp * 16; // the longest first
    int head = blockIdx.y, heads = gridDim.y, pitch = kv_heads * D, total = first + count;
    const half16* own_keys = keys + head / (heads / kv_heads) * D;
    const half16* own_values = values + head / (heads / kv_heads) * D;
    auto load = [&](int tile) {
        half16* to = staged + (tile & 1) * 2 * 64 * LINE;
#pragma unroll
        for (int i = threadIdx.x; i < 64 * D / 8; i += 128) {
            int row = i / (D / 8), column = i % (D / 8) * 8, key = tile * 64 + row;
            long long from = (long long)min(key, total - 1) * pitch + column;
            copy_ahead(to + row * LINE + column, own_keys + from, key < total);
            copy_ahead(to + (64 + row) * LINE + column, own_values + from, key < total);
        }
        asm volatile("cp.async.commit_group;");
    };
    wait_for_it();
    let_next_start();
    int begin = first_seen(first + block * 64, window) / 64;
    int tiles = (first + min(block * 64 + 63, count - 1)) / 64 + 1;
    load(begin);
    unsigned a[D / 16][4];
    load_queries<D>(a, q + head * D, q0, count, heads);
    float sum[D / 8][4], top[2] = {-INFINITY, -INFINITY}, weights[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < D / 8; j++) sum[j][0] = sum[j][1] = sum[j][2] = sum[j][3] = 0;
    float by_two = (CAP ? 1 : scale) * 1.44269504f;

    for (int tile = begin; tile < tiles; tile++) {
        if (tile + 1 < tiles) {
            load(tile + 1);
            asm volatile("cp.async.wait_group 1;" ::: "memory");
        } else {
            asm volatile("cp.async.wait_group 0;" ::: "memory");
        }
        __syncthreads();
        const half16* k_tile = staged + (tile & 1) * 2 * 64 * LINE;
        const half16* v_tile = k_tile + 64 * LINE;
        float score[8][4];
#pragma unroll
        for (int j = 0; j < 8; j++) score[j][0] = score[j][1] = score[j][2] = score[j][3] = 0;
#pragma unroll
        for (int k = 0; k < D / 16; k++)
#pragma unroll
            for (int p = 0; p < 4; p++) {
                unsigned b[4];
                int row = (2 * p + (lane >> 4)) * 8 + (lane & 7);
                load_four(b, (unsigned)__cvta_generic_to_shared(
                                 k_tile + row * LINE + k * 16 + (lane >> 3 & 1) * 8));
                multiply(score[2 * p], a[k], b[0], b[1]);
                multiply(score[2 * p + 1], a[k], b[2], b[3]);
            }
        if (CAP)
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) score[j][i] = capped(score[j][i] * scale, cap);
        if (tile * 64 + 63 > first + q0)
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (tile * 64 + j * 8 + 2 * t + (i & 1) > first + q0 + g + (i >> 1) * 8) score[j][i] = -INFINITY;
        if (WINDOW && tile * 64 < first_seen(first + q0 + 15, window))
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (tile * 64 + j * 8 + 2 * t + (i & 1) < first_seen(first + q0 + g + (i >> 1) * 8, window))
                        score[j][i] = -INFINITY;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float now = top[h];
#pragma unroll
            for (int j = 0; j < 8; j++) now = fmaxf(now, fmaxf(score[j][2 * h], score[j][2 * h + 1]));
            now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
            now = fmaxf(now, __shfl_xor_sync(~0u, now, 2));
            if (WINDOW) now = fmaxf(now, -1e30f); // a row that sees nothing of its first tiles
            float shrink = exp2f((top[h] - now) * by_two), more = 0;
            top[h] = now;
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int i = 2 * h; i < 2 * h + 2; i++) {
                    score[j][i] = exp2f((score[j][i] - now) * by_two);
                    more += score[j][i];
                }
            weights[h] = weights[h] * shrink + more;
#pragma unroll
            for (int j = 0; j < D / 8; j++) sum[j][2 * h] *= shrink, sum[j][2 * h + 1] *= shrink;
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            unsigned p[4] = {pair_of(score[2 * k][0], score[2 * k][1]), pair_of(score[2 * k][2], score[2 * k][3]),
                             pair_of(score[2 * k + 1][0], score[2 * k + 1][1]),
                             pair_of(score[2 * k + 1][2], score[2 * k + 1][3])};
#pragma unroll
            for (int j = 0; j < D / 16; j++) {
                unsigned b[4];
                int row = k * 16 + (lane >> 3 & 1) * 8 + (lane & 7);
                load_turned(b, v_tile + row * LINE + (2 * j + (lane >> 4)) * 8);
                multiply(sum[2 * j], p, b[0], b[1]);
                multiply(sum[2 * j + 1], p, b[2], b[3]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float all = weights[h] + __shfl_xor_sync(~0u, weights[h], 1);
        all += __shfl_xor_sync(~0u, all, 2);
        int row = q0 + g + h * 8;
        if (row >= count) continue;
        half16* to = out + ((long long)row * heads + head) * D + 2 * t;
#pragma unroll
        for (int j = 0; j < D / 8; j++)
            *(unsigned*)(to + j * 8) = pair_of(sum[j][2 * h] / all, sum[j][2 * h + 1] / all);
    }
}
