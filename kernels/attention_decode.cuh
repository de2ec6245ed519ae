// Decode attention: the newest token of each sequence attends to the KV cache,
//   out [rows, heads, d] = softmax(scale * q K^T) V,  K and V [capacity, kv_heads, d] for each sequence.
//
// Split-KV (Flash-Decoding): blocks work on splits of `split_keys` keys in parallel, and `merge_splits`
// combines their partial results by log-sum-exp. Bound by the bandwidth of reading the KV cache.
#pragma once
#include "attention_scores.cuh"

// One split: keys from blockIdx.x * split_keys on. A group of eight lanes handles one key. Each lane loads
// LOADS vectors of VALUES elements of it, with KEYS keys in flight. The softmax is online: sums are rescaled
// when a larger score arrives. With a sliding window, splits before the window write nothing, and the first
// one inside it reads only visible keys.
//
// partials f32 [rows, heads, splits, d + 2]: maximum score, sum of the softmax weights, weighted sum of the
// values.
// Launch grid: (splits, heads, rows); block: 128; shared memory: 16 (d + 2) floats.
template <int VALUES, int LOADS, int KEYS>
__device__ __forceinline__ void attention_decode(float* partials, const half16* q, const half16* keys,
                                                 const half16* values, const int* lengths, int capacity,
                                                 int kv_heads, int d, int split_keys, float scale, float cap,
                                                 int window) {
    using Load = Vector<half16, VALUES>;
    extern __shared__ float shared_partials[];
    int row = blockIdx.z, head = blockIdx.y, heads = gridDim.y, length = lengths[row];
    int begin = blockIdx.x * split_keys, end = min(begin + split_keys, length);
    if (WINDOW) begin = max(begin, first_visible_key(length - 1, window));
    int lane = threadIdx.x & 7, key_group = threadIdx.x >> 3;
    int pitch = kv_heads * d, kv_head = head / (heads / kv_heads);
    long long base = (long long)row * capacity * pitch + kv_head * d;
    pdl_wait();
    pdl_trigger();
    if (begin >= end) return;
    auto read = [&](Load* to, const half16* from) {
#pragma unroll
        for (int p = 0; p < LOADS; p++) {
            int at = (p * 8 + lane) * VALUES;
            to[p] = VALUES == 8 && LOADS < 8 || at < d ? load_vector<VALUES>(from + at) : Load{};
        }
    };
    Load query_loads[LOADS];
    read(query_loads, q + ((long long)row * heads + head) * d);
    float query[LOADS * VALUES], sum[LOADS * VALUES], running_max = -INFINITY, weight_sum = 0;
#pragma unroll
    for (int i = 0; i < LOADS * VALUES; i++) {
        query[i] = widen(query_loads[i / VALUES].at[i % VALUES]) * scale;
        sum[i] = 0;
    }
    for (int first = begin + key_group; first < end; first += 16 * KEYS) {
        Load key[KEYS][LOADS], value[KEYS][LOADS];
        float score[KEYS];
#pragma unroll
        for (int k = 0; k < KEYS; k++) {
            long long from = base + (long long)min(first + 16 * k, end - 1) * pitch;
            read(key[k], keys + from);
            read(value[k], values + from);
        }
        asm volatile("" ::: "memory"); // issue all loads before the first use
#pragma unroll
        for (int k = 0; k < KEYS; k++) {
            score[k] = 0;
#pragma unroll
            for (int i = 0; i < LOADS * VALUES; i++)
                score[k] += query[i] * widen(key[k][i / VALUES].at[i % VALUES]);
        }
        unsigned group_mask = 0xffu << (threadIdx.x & 24);
        float new_max = running_max;
#pragma unroll
        for (int k = 0; k < KEYS; k++) {
#pragma unroll
            for (int step = 4; step; step >>= 1) score[k] += __shfl_xor_sync(group_mask, score[k], step);
            if (SOFT_CAP) score[k] = soft_capped(score[k], cap);
            if (first + 16 * k >= end) score[k] = -INFINITY;
            new_max = fmaxf(new_max, score[k]);
        }
        float rescale = __expf(running_max - new_max);
        running_max = new_max;
        weight_sum *= rescale;
#pragma unroll
        for (int i = 0; i < LOADS * VALUES; i++) sum[i] *= rescale;
#pragma unroll
        for (int k = 0; k < KEYS; k++) {
            float weight = __expf(score[k] - new_max);
            weight_sum += weight;
#pragma unroll
            for (int i = 0; i < LOADS * VALUES; i++)
                sum[i] += weight * widen(value[k][i / VALUES].at[i % VALUES]);
        }
    }
    float* own = shared_partials + key_group * (d + 2);
    if (lane == 0) own[0] = running_max, own[1] = weight_sum;
#pragma unroll
    for (int i = 0; i < LOADS * VALUES; i++) {
        int at = (i / VALUES * 8 + lane) * VALUES + i % VALUES;
        if (at < d) own[2 + at] = sum[i];
    }
    __syncthreads();
    float largest = -INFINITY;
    for (int m = 0; m < 16; m++) largest = fmaxf(largest, shared_partials[m * (d + 2)]);
    float* to = partials + (((long long)row * heads + head) * gridDim.x + blockIdx.x) * (d + 2);
    for (int i = threadIdx.x; i < d + 1; i += 128) {
        float total = 0;
        for (int m = 0; m < 16; m++)
            total += shared_partials[m * (d + 2) + 1 + i] * __expf(shared_partials[m * (d + 2)] - largest);
        to[1 + i] = total;
    }
    if (threadIdx.x == 0) to[0] = largest;
}

// Merges the splits of a row and head. `out_columns` maps each channel to its position in the act-order of
// the next linear; null: natural order. Loads sixteen splits at a time, from the first visible one on.
//
// Launch grid: (heads, rows); block: d threads, rounded up to a multiple of 32.
extern "C" __global__ void merge_splits(half16* out, const float* partials, const int* lengths,
                                        const int* out_columns, int splits, int split_keys, int d, int stride,
                                        int window) {
    constexpr int UNROLL = 16;
    int row = blockIdx.y, head = blockIdx.x, i = min((int)threadIdx.x, d - 1);
    int out_column = out_columns ? out_columns[head * d + i] : head * d + i;
    int length = lengths[row], count = (length + split_keys - 1) / split_keys;
    pdl_wait();
    pdl_trigger();
    const float* part = partials + ((long long)row * gridDim.x + head) * splits * (d + 2);
    float largest = -INFINITY, weight_sum = 0, sum = 0;
    for (int first = first_visible_key(length - 1, window) / split_keys; first < count; first += UNROLL) {
        float running_max[UNROLL], weight[UNROLL], value[UNROLL], new_max = largest;
#pragma unroll
        for (int s = 0; s < UNROLL; s++) {
            const float* from = part + min(first + s, count - 1) * (d + 2);
            running_max[s] = from[0], weight[s] = from[1], value[s] = from[2 + i];
        }
#pragma unroll
        for (int s = 0; s < UNROLL; s++) {
            if (first + s >= count) running_max[s] = -INFINITY;
            new_max = fmaxf(new_max, running_max[s]);
        }
        float rescale = __expf(largest - new_max);
        weight_sum *= rescale, sum *= rescale, largest = new_max;
#pragma unroll
        for (int s = 0; s < UNROLL; s++) {
            rescale = __expf(running_max[s] - new_max);
            weight_sum += weight[s] * rescale, sum += value[s] * rescale;
        }
    }
    if (threadIdx.x < d) out[(long long)row * stride + out_column] = narrow(sum / weight_sum);
}
