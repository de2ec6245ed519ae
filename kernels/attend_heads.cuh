// Attention of new tokens where heads share keys: up to eight heads are the columns of products on the
// tensor cores, so that keys and values are read once for all of them.
#pragma once
#include "attend_newest.cuh"

// A transposed 8 x 8 matrix of a warp: lane (g, t) has pair t of row g, and gets pair t of column g.
__device__ __forceinline__ unsigned turned(unsigned pair) {
    unsigned y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(pair));
    return y;
}

// As `attend_share`; a warp takes sixteen keys at a time. Scores are keys x heads and sums are dimensions
// x heads, in the layout of mma.m16n8k16. A dot product may take dimensions in any order, so lane (g, t)
// reads sixteen bytes of keys g and g + 8 at a time, and of the heads likewise; of values it reads
// dimensions 8g to 8g + 7 and pairs those of neighbouring keys. Head dimensions D = 64 or 128.
// Grid: (shares, kv_heads * (of / 8 rounded up), rows), `of` heads to a head of keys; block 128; shared:
// 32 (D + 2) floats.
template <int D>
__device__ __forceinline__ void attend_heads(float* parts, const half16* q, const half16* keys,
                                             const half16* values, const int* held, int capacity,
                                             int kv_heads, int of, int share, float scale, float cap,
                                             int window) {
    constexpr int CHUNKS = D / 32, HALVES = D / 64, PART = D + 2; // a lane's of a key, of a value, in 16 bytes
    extern __shared__ float merged[];                             // [warp][8 heads][PART]
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    int row = blockIdx.z, eights = (of + 7) / 8, kv = blockIdx.y / eights, first = blockIdx.y % eights * 8;
    int count = min(8, of - first), seen = held[row], pitch = kv_heads * D;
    int begin = blockIdx.x * share, end = min(begin + share, seen);
    if (WINDOW) begin = max(begin, first_seen(seen - 1, window));
    long long base = (long long)row * capacity * pitch + kv * D;
    long long head0 = (long long)(row * kv_heads + kv) * of + first;
    wait_for_it();
    let_next_start();
    if (begin >= end) return;
    uint4 query[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
        query[c] = g < count ? ((const uint4*)(q + (head0 + g) * D))[4 * c + t] : make_uint4(0, 0, 0, 0);
    float sum[4 * HALVES][4] = {}, top[2] = {-INFINITY, -INFINITY}, weights[2] = {0, 0};
    float by_two = (CAP ? 1 : scale) * 1.44269504f;
    auto of_key = [&](const half16* from, int key) {
        return (const uint4*)(from + base + (long long)min(key, end - 1) * pitch);
    };
#pragma unroll 1
    for (int key = begin + 16 * warp; key < end; key += 64) {
        uint4 k[2][CHUNKS], v[4][HALVES];
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) k[i][c] = of_key(keys, key + g + 8 * i)[4 * c + t];
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int h = 0; h < HALVES; h++)
                v[i][h] = of_key(values, key + 2 * t + (i & 1) + 4 * (i & 2))[8 * h + g];
        asm volatile("" ::: "memory"); // all are asked for before any is waited for
        float score[4] = {}; // keys g and g + 8 of heads 2t and 2t + 1
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            unsigned low[4] = {k[0][c].x, k[1][c].x, k[0][c].y, k[1][c].y};
            unsigned high[4] = {k[0][c].z, k[1][c].z, k[0][c].w, k[1][c].w};
            multiply(score, low, query[c].x, query[c].y);
            multiply(score, high, query[c].z, query[c].w);
        }
        if (CAP)
#pragma unroll
            for (int i = 0; i < 4; i++) score[i] = capped(score[i] * scale, cap);
        float shrink[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if (key + g >= end) score[h] = -INFINITY;
            if (key + g + 8 >= end) score[h + 2] = -INFINITY;
            float now = fmaxf(score[h], score[h + 2]);
#pragma unroll
            for (int step = 4; step < 32; step *= 2) now = fmaxf(now, __shfl_xor_sync(~0u, now, step));
            now = fmaxf(now * by_two, top[h]);
            shrink[h] = exp2f(top[h] - now);
            top[h] = now;
            score[h] = exp2f(score[h] * by_two - now);
            score[h + 2] = exp2f(score[h + 2] * by_two - now);
            weights[h] = weights[h] * shrink[h] + score[h] + score[h + 2];
        }
        unsigned near = turned(pair_of(score[0], score[1])), far = turned(pair_of(score[2], score[3]));
#pragma unroll
        for (int h = 0; h < HALVES; h++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                auto word = [&](uint4 eight) {
                    return i == 0 ? eight.x : i == 1 ? eight.y : i == 2 ? eight.z : eight.w;
                };
                unsigned a[4]; // dimensions 2i and 2i + 1 of the eight, of two keys each
#pragma unroll
                for (int pair = 0; pair < 2; pair++) {
                    unsigned one = word(v[2 * pair][h]), other = word(v[2 * pair + 1][h]);
                    a[2 * pair] = __byte_perm(one, other, 0x5410);
                    a[2 * pair + 1] = __byte_perm(one, other, 0x7632);
                }
                float* c = sum[4 * h + i];
                c[0] *= shrink[0], c[1] *= shrink[1], c[2] *= shrink[0], c[3] *= shrink[1];
                multiply(c, a, near, far);
            }
    }
    float* own = merged + warp * 8 * PART;
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) weights[h] += __shfl_xor_sync(~0u, weights[h], step);
        float* of_head = own + (2 * t + h) * PART;
        if (g == 0) of_head[0] = top[h], of_head[1] = weights[h];
#pragma unroll
        for (int i = 0; i < 4 * HALVES; i++) {
            int dimension = i / 4 * 64 + 8 * g + 2 * (i & 3);
            of_head[2 + dimension] = sum[i][h];
            of_head[3 + dimension] = sum[i][h + 2];
        }
    }
    __syncthreads();
    for (int at = threadIdx.x; at < count * (D + 1); at += 128) {
        int head = at / (D + 1), i = at % (D + 1);
        const float* from = merged + head * PART;
        float largest = -INFINITY, total = 0;
        for (int m = 0; m < 4; m++) largest = fmaxf(largest, from[m * 8 * PART]);
        for (int m = 0; m < 4; m++) total += from[m * 8 * PART + 1 + i] * exp2f(from[m * 8 * PART] - largest);
        float* to = parts + ((head0 + head) * gridDim.x + blockIdx.x) * PART;
        to[1 + i] = total;
        if (i == 0) to[0] = largest * 0.69314718f; // as `merge_shares` has it
    }
}
