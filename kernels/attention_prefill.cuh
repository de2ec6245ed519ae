// Prefill attention on the tensor cores (mma.m16n8k16), for every GPU from Ampere on:
//   out [count, heads * D] = softmax(scale * q K^T + causal mask) V.
//
// FlashAttention (Dao et al. 2022): tiles of keys and values pass through shared memory, the softmax is
// online, and scores are never written. Bound by the tensor cores for long prompts.
#pragma once
#include "attention_scores.cuh"

// Loads 16 rows of `query [count, heads * D]` from q0 on as A fragments of mma or wgmma; rows beyond the last
// repeat the last.
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

// `ldmatrix_x4` with each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned* y, const half16* from) {
    unsigned address = (unsigned)__cvta_generic_to_shared(from);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(y[0]), "=r"(y[1]), "=r"(y[2]), "=r"(y[3])
                 : "r"(address));
}

// The queries of a prompt against the KV cache of its sequence, or of a window against itself. q [count,
// heads * D] are at positions from `first` on. A block takes 64 queries of one head, 16 per warp. It walks
// over the keys in tiles of 64, double-buffered by cp.async, from the first tile with a visible key on.
//
// Launch grid: (ceil(count / 64), heads); block: 128; shared memory: 4 * 64 * (D + 8) half16.
template <int D>
__device__ __forceinline__ void attention_prefill(half16* out, const half16* q, const half16* keys,
                                                  const half16* values, int count, int first, int kv_heads,
                                                  float scale, float cap, int window) {
    constexpr int ROW_PITCH = D + 8;   // padded: eight rows hit different banks
    extern __shared__ half16 staged[]; // [2 stages][keys, values][64][ROW_PITCH]
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    // Blocks with the most keys start first.
    int block = gridDim.x - 1 - blockIdx.x, q0 = block * 64 + warp * 16;
    int head = blockIdx.y, heads = gridDim.y, pitch = kv_heads * D, total = first + count;
    const half16* head_keys = keys + head / (heads / kv_heads) * D;
    const half16* head_values = values + head / (heads / kv_heads) * D;
    auto load = [&](int tile) {
        half16* to = staged + (tile & 1) * 2 * 64 * ROW_PITCH;
#pragma unroll
        for (int i = threadIdx.x; i < 64 * D / 8; i += 128) {
            int row = i / (D / 8), column = i % (D / 8) * 8, key = tile * 64 + row;
            long long from = (long long)min(key, total - 1) * pitch + column;
            cp_async_or_zero(to + row * ROW_PITCH + column, head_keys + from, key < total);
            cp_async_or_zero(to + (64 + row) * ROW_PITCH + column, head_values + from, key < total);
        }
        asm volatile("cp.async.commit_group;");
    };
    pdl_wait();
    pdl_trigger();
    int begin = first_visible_key(first + block * 64, window) / 64;
    int tiles = (first + min(block * 64 + 63, count - 1)) / 64 + 1;
    load(begin);
    unsigned a[D / 16][4];
    load_queries<D>(a, q + head * D, q0, count, heads);
    float sum[D / 8][4], running_max[2] = {-INFINITY, -INFINITY}, weight_sum[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < D / 8; j++) sum[j][0] = sum[j][1] = sum[j][2] = sum[j][3] = 0;
    float scale_log2 = (SOFT_CAP ? 1 : scale) * 1.44269504f;

    for (int tile = begin; tile < tiles; tile++) {
        if (tile + 1 < tiles) {
            load(tile + 1);
            asm volatile("cp.async.wait_group 1;" ::: "memory");
        } else {
            asm volatile("cp.async.wait_group 0;" ::: "memory");
        }
        __syncthreads();
        const half16* k_tile = staged + (tile & 1) * 2 * 64 * ROW_PITCH;
        const half16* v_tile = k_tile + 64 * ROW_PITCH;
        float score[8][4];
#pragma unroll
        for (int j = 0; j < 8; j++) score[j][0] = score[j][1] = score[j][2] = score[j][3] = 0;
#pragma unroll
        for (int k = 0; k < D / 16; k++)
#pragma unroll
            for (int p = 0; p < 4; p++) {
                unsigned b[4];
                int row = (2 * p + (lane >> 4)) * 8 + (lane & 7);
                ldmatrix_x4(b, (unsigned)__cvta_generic_to_shared(k_tile + row * ROW_PITCH + k * 16 +
                                                                  (lane >> 3 & 1) * 8));
                mma(score[2 * p], a[k], b[0], b[1]);
                mma(score[2 * p + 1], a[k], b[2], b[3]);
            }
        if (SOFT_CAP)
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) score[j][i] = soft_capped(score[j][i] * scale, cap);
        if (tile * 64 + 63 > first + q0)
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (tile * 64 + j * 8 + 2 * t + (i & 1) > first + q0 + g + (i >> 1) * 8)
                        score[j][i] = -INFINITY;
        if (WINDOW && tile * 64 < first_visible_key(first + q0 + 15, window))
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (tile * 64 + j * 8 + 2 * t + (i & 1) <
                        first_visible_key(first + q0 + g + (i >> 1) * 8, window))
                        score[j][i] = -INFINITY;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float new_max = running_max[h];
#pragma unroll
            for (int j = 0; j < 8; j++) new_max = fmaxf(new_max, fmaxf(score[j][2 * h], score[j][2 * h + 1]));
            new_max = fmaxf(new_max, __shfl_xor_sync(~0u, new_max, 1));
            new_max = fmaxf(new_max, __shfl_xor_sync(~0u, new_max, 2));
            if (WINDOW) new_max = fmaxf(new_max, -1e30f); // a row without a visible key so far
            float rescale = exp2f((running_max[h] - new_max) * scale_log2), added = 0;
            running_max[h] = new_max;
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int i = 2 * h; i < 2 * h + 2; i++) {
                    score[j][i] = exp2f((score[j][i] - new_max) * scale_log2);
                    added += score[j][i];
                }
            weight_sum[h] = weight_sum[h] * rescale + added;
#pragma unroll
            for (int j = 0; j < D / 8; j++) sum[j][2 * h] *= rescale, sum[j][2 * h + 1] *= rescale;
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            unsigned p[4] = {pack_pair(score[2 * k][0], score[2 * k][1]),
                             pack_pair(score[2 * k][2], score[2 * k][3]),
                             pack_pair(score[2 * k + 1][0], score[2 * k + 1][1]),
                             pack_pair(score[2 * k + 1][2], score[2 * k + 1][3])};
#pragma unroll
            for (int j = 0; j < D / 16; j++) {
                unsigned b[4];
                int row = k * 16 + (lane >> 3 & 1) * 8 + (lane & 7);
                ldmatrix_x4_trans(b, v_tile + row * ROW_PITCH + (2 * j + (lane >> 4)) * 8);
                mma(sum[2 * j], p, b[0], b[1]);
                mma(sum[2 * j + 1], p, b[2], b[3]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float total = weight_sum[h] + __shfl_xor_sync(~0u, weight_sum[h], 1);
        total += __shfl_xor_sync(~0u, total, 2);
        int row = q0 + g + h * 8;
        if (row >= count) continue;
        half16* to = out + ((long long)row * heads + head) * D + 2 * t;
#pragma unroll
        for (int j = 0; j < D / 8; j++)
            *(unsigned*)(to + j * 8) = pack_pair(sum[j][2 * h] / total, sum[j][2 * h + 1] / total);
    }
}
