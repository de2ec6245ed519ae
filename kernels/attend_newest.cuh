// Attention of new tokens, one a sequence, over what the cache holds.
#pragma once
#include "scores.cuh"

// The newest token of each sequence against a share of its cache: `share` keys from blockIdx.x * share
// on. Eight lanes take a key, each VALUES times PIECES elements of it, and have KEYS of them on their
// way; sums that run on rescale where a larger score comes. Of a window's first share only what is seen is
// read, of shares before it nothing is written. parts f32 [rows, heads, shares, d + 2]: the
// largest score, the sum of weights, the weighted values. Grid: (shares, heads, rows); block 128;
// shared: 16 (d + 2) floats.
template <int VALUES, int PIECES, int KEYS>
__device__ __forceinline__ void attend_share(float* parts, const half16* q, const half16* keys,
                                             const half16* values, const int* held, int capacity,
                                             int kv_heads, int d, int share, float scale, float cap,
                                             int window) {
    using Run = Several<half16, VALUES>;
    extern __shared__ float merged[];
    int row = blockIdx.z, head = blockIdx.y, heads = gridDim.y, seen = held[row];
    int begin = blockIdx.x * share, end = min(begin + share, seen);
    if (WINDOW) begin = max(begin, first_seen(seen - 1, window));
    int lane = threadIdx.x & 7, team = threadIdx.x >> 3;
    int pitch = kv_heads * d, kv = head / (heads / kv_heads);
    long long base = (long long)row * capacity * pitch + kv * d;
    wait_for_it();
    let_next_start();
    if (begin >= end) return;
    auto read = [&](Run* to, const half16* from) {
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
            int at = (p * 8 + lane) * VALUES;
            to[p] = VALUES == 8 && PIECES < 8 || at < d ? several<VALUES>(from + at) : Run{};
        }
    };
    Run of_query[PIECES];
    read(of_query, q + ((long long)row * heads + head) * d);
    float query[PIECES * VALUES], sum[PIECES * VALUES], top = -INFINITY, weights = 0;
#pragma unroll
    for (int i = 0; i < PIECES * VALUES; i++) {
        query[i] = widen(of_query[i / VALUES].at[i % VALUES]) * scale;
        sum[i] = 0;
    }
    for (int first = begin + team; first < end; first += 16 * KEYS) {
        Run key[KEYS][PIECES], value[KEYS][PIECES];
        float score[KEYS];
#pragma unroll
        for (int k = 0; k < KEYS; k++) {
            long long from = base + (long long)min(first + 16 * k, end - 1) * pitch;
            read(key[k], keys + from);
            read(value[k], values + from);
        }
        asm volatile("" ::: "memory"); // all are asked for before any is waited for
#pragma unroll
        for (int k = 0; k < KEYS; k++) {
            score[k] = 0;
#pragma unroll
            for (int i = 0; i < PIECES * VALUES; i++)
                score[k] += query[i] * widen(key[k][i / VALUES].at[i % VALUES]);
        }
        unsigned mates = 0xffu << (threadIdx.x & 24);
        float now = top;
#pragma unroll
        for (int k = 0; k < KEYS; k++) {
#pragma unroll
            for (int step = 4; step; step >>= 1) score[k] += __shfl_xor_sync(mates, score[k], step);
            if (CAP) score[k] = capped(score[k], cap);
            if (first + 16 * k >= end) score[k] = -INFINITY;
            now = fmaxf(now, score[k]);
        }
        float shrink = __expf(top - now);
        top = now;
        weights *= shrink;
#pragma unroll
        for (int i = 0; i < PIECES * VALUES; i++) sum[i] *= shrink;
#pragma unroll
        for (int k = 0; k < KEYS; k++) {
            float weight = __expf(score[k] - now);
            weights += weight;
#pragma unroll
            for (int i = 0; i < PIECES * VALUES; i++)
                sum[i] += weight * widen(value[k][i / VALUES].at[i % VALUES]);
        }
    }
    float* own = merged + team * (d + 2);
    if (lane == 0) own[0] = top, own[1] = weights;
#pragma unroll
    for (int i = 0; i < PIECES * VALUES; i++) {
        int at = (i / VALUES * 8 + lane) * VALUES + i % VALUES;
        if (at < d) own[2 + at] = sum[i];
    }
    __syncthreads();
    float largest = -INFINITY;
    for (int m = 0; m < 16; m++) largest = fmaxf(largest, merged[m * (d + 2)]);
    float* to = parts + (((long long)row * heads + head) * gridDim.x + blockIdx.x) * (d + 2);
    for (int i = threadIdx.x; i < d + 1; i += 128) {
        float total = 0;
        for (int m = 0; m < 16; m++) total += merged[m * (d + 2) + 1 + i] * __expf(merged[m * (d + 2)] - largest);
        to[1 + i] = total;
    }
    if (threadIdx.x == 0) to[0] = largest;
}

// The shares of a row and a head put together, at the places that `places` names for the channels of
// the next linear; null where they are natural. Sixteen shares are asked for at a time, from the first one
// that is seen on.
// Grid: (heads, rows); threads: d, up to a multiple of 32.
extern "C" __global__ void merge_shares(half16* out, const float* parts, const int* held,
                                        const int* places, int shares, int share, int d, int stride,
                                        int window) {
    constexpr int AT_ONCE = 16;
    int row = blockIdx.y, head = blockIdx.x, i = min((int)threadIdx.x, d - 1);
    int place = places ? places[head * d + i] : head * d + i;
    int seen = held[row], count = (seen + share - 1) / share;
    wait_for_it();
    let_next_start();
    const float* part = parts + ((long long)row * gridDim.x + head) * shares * (d + 2);
    float largest = -INFINITY, weights = 0, sum = 0;
    for (int first = first_seen(seen - 1, window) / share; first < count; first += AT_ONCE) {
        float top[AT_ONCE], weight[AT_ONCE], value[AT_ONCE], now = largest;
#pragma unroll
        for (int s = 0; s < AT_ONCE; s++) {
            const float* from = part + min(first + s, count - 1) * (d + 2);
            top[s] = from[0], weight[s] = from[1], value[s] = from[2 + i];
        }
#pragma unroll
        for (int s = 0; s < AT_ONCE; s++) {
            if (first + s >= count) top[s] = -INFINITY;
            now = fmaxf(now, top[s]);
        }
        float shrink = __expf(largest - now);
        weights *= shrink, sum *= shrink, largest = now;
#pragma unroll
        for (int s = 0; s < AT_ONCE; s++) {
            shrink = __expf(top[s] - now);
            weights += weight[s] * shrink, sum += value[s] * shrink;
        }
    }
    if (threadIdx.x < d) out[(long long)row * stride + place] = narrow(sum / weights);
}
