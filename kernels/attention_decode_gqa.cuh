// Decode attention for grouped-query attention (GQA): up to eight query heads that share a KV head are the N
// = 8 columns of mma.m16n8k16. Each key and value is read once for all of them. Split-KV, as in
// attention_decode.cuh.
#pragma once
#include "attention_decode.cuh"

// Transposes an 8 x 8 matrix of a warp: lane (g, t) has pair t of row g and gets pair t of column g.
__device__ __forceinline__ unsigned transposed(unsigned pair) {
    unsigned y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(pair));
    return y;
}

// As `attention_decode`, with 16 keys per warp and iteration. S = K Q^T is keys x heads, O = V^T P is
// dimensions x heads, both as mma fragments. A dot product may take dimensions in any order, so lane (g, t)
// loads 16 bytes at a time of keys g and g + 8, and of the queries likewise. Of the values it loads
// dimensions 8g to 8g + 7 and pairs neighbouring keys in registers. Head dimensions: D = 64 or 128.
//
// Launch grid: (splits, kv_heads * ceil(heads_per_kv / 8), rows); block: 128; shared memory: 32 (D + 2)
// floats.
template <int D>
__device__ __forceinline__ void attention_decode_gqa(float* partials, const half16* q, const half16* keys,
                                                     const half16* values, const int* lengths, int capacity,
                                                     int kv_heads, int heads_per_kv, int split_keys,
                                                     float scale, float cap, int window) {
    // 16-byte loads of a lane for a key and for a value; floats of a partial result
    constexpr int CHUNKS = D / 32, HALVES = D / 64, PARTIAL = D + 2;
    extern __shared__ float shared_partials[]; // [warp][8 heads][PARTIAL]
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    int row = blockIdx.z, head_groups = (heads_per_kv + 7) / 8, kv_head = blockIdx.y / head_groups,
        first = blockIdx.y % head_groups * 8;
    int count = min(8, heads_per_kv - first), length = lengths[row], pitch = kv_heads * D;
    int begin = blockIdx.x * split_keys, end = min(begin + split_keys, length);
    if (WINDOW) begin = max(begin, first_visible_key(length - 1, window));
    long long base = (long long)row * capacity * pitch + kv_head * D;
    long long head0 = (long long)(row * kv_heads + kv_head) * heads_per_kv + first;
    pdl_wait();
    pdl_trigger();
    if (begin >= end) return;
    uint4 query[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
        query[c] = g < count ? ((const uint4*)(q + (head0 + g) * D))[4 * c + t] : make_uint4(0, 0, 0, 0);
    float sum[4 * HALVES][4] = {}, running_max[2] = {-INFINITY, -INFINITY}, weight_sum[2] = {0, 0};
    float scale_log2 = (SOFT_CAP ? 1 : scale) * 1.44269504f;
    auto key_chunks = [&](const half16* from, int key) {
        return (const uint4*)(from + base + (long long)min(key, end - 1) * pitch);
    };
#pragma unroll 1
    for (int key = begin + 16 * warp; key < end; key += 64) {
        uint4 k[2][CHUNKS], v[4][HALVES];
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) k[i][c] = key_chunks(keys, key + g + 8 * i)[4 * c + t];
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int h = 0; h < HALVES; h++)
                v[i][h] = key_chunks(values, key + 2 * t + (i & 1) + 4 * (i & 2))[8 * h + g];
        asm volatile("" ::: "memory"); // issue all loads before the first use
        float score[4] = {};           // keys g and g + 8 of heads 2t and 2t + 1
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            unsigned low[4] = {k[0][c].x, k[1][c].x, k[0][c].y, k[1][c].y};
            unsigned high[4] = {k[0][c].z, k[1][c].z, k[0][c].w, k[1][c].w};
            mma(score, low, query[c].x, query[c].y);
            mma(score, high, query[c].z, query[c].w);
        }
        if (SOFT_CAP)
#pragma unroll
            for (int i = 0; i < 4; i++) score[i] = soft_capped(score[i] * scale, cap);
        float rescale[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if (key + g >= end) score[h] = -INFINITY;
            if (key + g + 8 >= end) score[h + 2] = -INFINITY;
            float new_max = fmaxf(score[h], score[h + 2]);
#pragma unroll
            for (int step = 4; step < 32; step *= 2)
                new_max = fmaxf(new_max, __shfl_xor_sync(~0u, new_max, step));
            new_max = fmaxf(new_max * scale_log2, running_max[h]);
            rescale[h] = exp2f(running_max[h] - new_max);
            running_max[h] = new_max;
            score[h] = exp2f(score[h] * scale_log2 - new_max);
            score[h + 2] = exp2f(score[h + 2] * scale_log2 - new_max);
            weight_sum[h] = weight_sum[h] * rescale[h] + score[h] + score[h + 2];
        }
        unsigned probs_low = transposed(pack_pair(score[0], score[1])),
                 probs_high = transposed(pack_pair(score[2], score[3]));
#pragma unroll
        for (int h = 0; h < HALVES; h++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                auto word = [&](uint4 eight) {
                    return i == 0 ? eight.x : i == 1 ? eight.y : i == 2 ? eight.z : eight.w;
                };
                unsigned a[4]; // dimensions 2i and 2i + 1 of the lane, two keys each
#pragma unroll
                for (int pair = 0; pair < 2; pair++) {
                    unsigned one = word(v[2 * pair][h]), other = word(v[2 * pair + 1][h]);
                    a[2 * pair] = __byte_perm(one, other, 0x5410);
                    a[2 * pair + 1] = __byte_perm(one, other, 0x7632);
                }
                float* c = sum[4 * h + i];
                c[0] *= rescale[0], c[1] *= rescale[1], c[2] *= rescale[0], c[3] *= rescale[1];
                mma(c, a, probs_low, probs_high);
            }
    }
    float* own = shared_partials + warp * 8 * PARTIAL;
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) weight_sum[h] += __shfl_xor_sync(~0u, weight_sum[h], step);
        float* head_partial = own + (2 * t + h) * PARTIAL;
        if (g == 0) head_partial[0] = running_max[h], head_partial[1] = weight_sum[h];
#pragma unroll
        for (int i = 0; i < 4 * HALVES; i++) {
            int dimension = i / 4 * 64 + 8 * g + 2 * (i & 3);
            head_partial[2 + dimension] = sum[i][h];
            head_partial[3 + dimension] = sum[i][h + 2];
        }
    }
    __syncthreads();
    for (int at = threadIdx.x; at < count * (D + 1); at += 128) {
        int head = at / (D + 1), i = at % (D + 1);
        const float* from = shared_partials + head * PARTIAL;
        float largest = -INFINITY, total = 0;
        for (int m = 0; m < 4; m++) largest = fmaxf(largest, from[m * 8 * PARTIAL]);
        for (int m = 0; m < 4; m++)
            total += from[m * 8 * PARTIAL + 1 + i] * exp2f(from[m * 8 * PARTIAL] - largest);
        float* to = partials + ((head0 + head) * gridDim.x + blockIdx.x) * PARTIAL;
        to[1 + i] = total;
        if (i == 0) to[0] = largest * 0.69314718f; // from base 2 to base e, as `merge_splits` reads it
    }
}
