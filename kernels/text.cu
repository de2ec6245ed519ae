// What is between the packed products of a pass that reads or writes text, rows are tokens. A linear
// with sorted channels reads its rows in the order of its positions: `channels` names the channel at
// each of `stride` places, negative where there is none; null where the order is natural. What makes
// such rows writes them in that order at once.
//
// Norms, turned heads and gates are rounded to sixteen bits where Hugging Face rounds them; weights of
// attention stay in f32 for new tokens and are rounded once for prompts.
#include "half.cuh"

// The sequence that a row belongs to, and its position there. `held` counts the tokens of each
// sequence, the newest one included; null where all rows belong to `sequence`, from `first` on.
struct Rows {
    const int* held;
    int sequence, first;
};

// Asks for what no kernel writes before the kernel ahead of this one is done: other weights have
// driven it out of the cache since the last token. Eight four-byte elements a thread.
__device__ __forceinline__ void ask_for(const void* from, int place, int count) {
    if (from && place < count) asm volatile("prefetch.global.L2 [%0];" ::"l"((const char*)from + 4ll * place));
}

extern "C" {

// Root-mean-square norm of rows of `width`. Grid: rows; shared: width half16.
__global__ void norm_rows(half16* out, const half16* x, const float* weight, const int* channels,
                          int width, int stride, float eps) {
    extern __shared__ half16 normed[];
    __shared__ float scratch[32];
    for (int i = threadIdx.x * 8; i < max(width, stride); i += blockDim.x * 8) {
        ask_for(weight, i, width);
        ask_for(channels, i, stride);
    }
    wait_for_it();
    let_next_start();
    const half16* row = x + (long long)blockIdx.x * width;
    half16* to = out + (long long)blockIdx.x * stride;
    float squares = 0;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float v = widen(row[i]);
        normed[i] = row[i];
        squares += v * v;
    }
    float scale = rsqrtf(block_sum(squares, scratch) / width + eps);
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        half16 v = narrow(widen(narrow(widen(normed[i]) * scale)) * weight[i]);
        if (channels) normed[i] = v;
        else to[i] = v;
    }
    if (!channels) return;
    __syncthreads();
    for (int i = threadIdx.x; i < stride; i += blockDim.x) to[i] = channels[i] < 0 ? 0 : normed[channels[i]];
}

// silu(gate) * up, the gate rounded first; rows of both lie `pitch` apart. Grid: (stride / 1024, rows),
// block 128.
__global__ void gate_rows(half16* out, const half16* gate, const half16* up, const int* channels,
                          int pitch, int stride) {
    ask_for(channels, blockIdx.x * 1024 + threadIdx.x * 8, stride);
    wait_for_it();
    let_next_start();
    long long row = (long long)blockIdx.y * pitch;
    for (int j = 0; j < 8; j++) {
        int place = blockIdx.x * 1024 + j * 128 + threadIdx.x;
        if (place >= stride) return;
        int channel = channels ? channels[place] : place;
        half16 value = 0;
        if (channel >= 0) {
            float g = widen(gate[row + channel]);
            value = narrow(widen(narrow(g / (1.0f + __expf(-g)))) * widen(up[row + channel]));
        }
        out[(long long)blockIdx.y * stride + place] = value;
    }
}

// A head of q, k or v: norms it where there are weights, turns it, and puts it where it is read: q
// [rows, heads * d], keys and values [sequences, capacity, kv_heads * d]. Rows of the inputs lie
// pitch_q and pitch_kv apart. Grid: (heads + 2 kv_heads, rows); threads: d / 2, up to a multiple of 32.
__global__ void place_heads(half16* to_q, half16* keys, half16* values, const half16* q, const half16* k,
                            const half16* v, const float* q_norm, const float* k_norm,
                            const float* cosine, const float* sine, Rows rows, int heads, int kv_heads,
                            int d, int pitch_q, int pitch_kv, int capacity, float eps) {
    __shared__ float scratch[32];
    wait_for_it();
    let_next_start();
    int row = blockIdx.y, half_d = d / 2, i = threadIdx.x;
    int position = rows.held ? rows.held[row] - 1 : rows.first + row;
    long long stored = ((long long)(rows.held ? row : rows.sequence) * capacity + position) * kv_heads * d;
    int head = blockIdx.x, kind = head < heads ? 0 : head < heads + kv_heads ? 1 : 2;
    if (kind) head = (head - heads) % kv_heads;
    const half16* from = kind == 0 ? q + (long long)row * pitch_q : (kind == 1 ? k : v) + (long long)row * pitch_kv;
    from += head * d;
    half16* to = kind == 0   ? to_q + ((long long)row * heads + head) * d
                 : kind == 1 ? keys + stored + head * d
                             : values + stored + head * d;
    half16 low = i < half_d ? from[i] : (half16)0, high = i < half_d ? from[i + half_d] : (half16)0;
    const float* norm = kind == 0 ? q_norm : kind == 1 ? k_norm : 0;
    if (norm) {
        float a = widen(low), b = widen(high);
        float scale = rsqrtf(block_sum(a * a + b * b, scratch) / d + eps);
        if (i < half_d) {
            low = narrow(widen(narrow(a * scale)) * norm[i]);
            high = narrow(widen(narrow(b * scale)) * norm[i + half_d]);
        }
    }
    if (i >= half_d) return;
    if (kind < 2) {
        float c = cosine[(long long)position * half_d + i], s = sine[(long long)position * half_d + i];
        float a = widen(low), b = widen(high);
        low = narrow(a * c - b * s);
        high = narrow(b * c + a * s);
    }
    to[i] = low;
    to[i + half_d] = high;
}

}

// The newest token of each sequence against a share of its cache: `share` keys from blockIdx.x * share
// on. Eight lanes take a key, each VALUES times PIECES elements of it; sums that run on rescale where
// a larger score comes. parts f32 [rows, heads, shares, d + 2]: the largest score, the sum of weights,
// the weighted values. Grid: (shares, heads, rows); block 128; shared: 16 (d + 2) floats.
template <int VALUES, int PIECES>
__device__ __forceinline__ void attend_share(float* parts, const half16* q, const half16* keys,
                                             const half16* values, const int* held, int capacity,
                                             int kv_heads, int d, int share, float scale) {
    extern __shared__ float merged[];
    wait_for_it();
    let_next_start();
    int row = blockIdx.z, head = blockIdx.y, heads = gridDim.y, seen = held[row];
    int begin = blockIdx.x * share, end = min(begin + share, seen);
    if (begin >= end) return;
    int lane = threadIdx.x & 7, team = threadIdx.x >> 3;
    int pitch = kv_heads * d, kv = head / (heads / kv_heads);
    long long base = (long long)row * capacity * pitch + kv * d;
    float query[PIECES * VALUES], sum[PIECES * VALUES], top = -INFINITY, weights = 0;
#pragma unroll
    for (int p = 0; p < PIECES; p++)
#pragma unroll
        for (int i = 0; i < VALUES; i++) {
            int at = (p * 8 + lane) * VALUES + i;
            query[p * VALUES + i] = at < d ? widen(q[((long long)row * heads + head) * d + at]) * scale : 0;
            sum[p * VALUES + i] = 0;
        }
    auto read = [&](float* x, const half16* from) {
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
            int at = (p * 8 + lane) * VALUES;
            half16 own[VALUES];
            if (VALUES == 8) *(uint4*)own = *(const uint4*)(from + at);
            else *(unsigned*)own = at < d ? *(const unsigned*)(from + at) : 0;
#pragma unroll
            for (int i = 0; i < VALUES; i++) x[p * VALUES + i] = widen(own[i]);
        }
    };
    for (int t = begin + team; t < end; t += 16) {
        float x[PIECES * VALUES], value[PIECES * VALUES], score = 0;
        read(x, keys + base + (long long)t * pitch);
        read(value, values + base + (long long)t * pitch);
#pragma unroll
        for (int i = 0; i < PIECES * VALUES; i++) score += query[i] * x[i];
        unsigned mates = 0xffu << (threadIdx.x & 24);
#pragma unroll
        for (int step = 4; step; step >>= 1) score += __shfl_xor_sync(mates, score, step);
        float now = fmaxf(top, score), shrink = __expf(top - now), weight = __expf(score - now);
        weights = weights * shrink + weight;
#pragma unroll
        for (int i = 0; i < PIECES * VALUES; i++) sum[i] = sum[i] * shrink + weight * value[i];
        top = now;
    }
    float* own = merged + team * (d + 2);
    if (lane == 0) own[0] = top, own[1] = weights;
#pragma unroll
    for (int p = 0; p < PIECES; p++)
#pragma unroll
        for (int i = 0; i < VALUES; i++) {
            int at = (p * 8 + lane) * VALUES + i;
            if (at < d) own[2 + at] = sum[p * VALUES + i];
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

#define ATTEND(VALUES, PIECES)                                                                         \
    __global__ void attend_share_##VALUES##_##PIECES(                                                  \
        float* parts, const half16* q, const half16* keys, const half16* values, const int* held,      \
        int capacity, int kv_heads, int d, int share, float scale) {                                   \
        attend_share<VALUES, PIECES>(parts, q, keys, values, held, capacity, kv_heads, d, share,       \
                                     scale);                                                           \
    }

extern "C" {

ATTEND(8, 1) // heads of 64
ATTEND(8, 2) // of 128
ATTEND(8, 4) // of 256
ATTEND(2, 8) // any even width up to 128
ATTEND(2, 16)

// The shares of a row and a head put together, at the places that `places` names for the channels of
// the next linear; null where they are natural. Grid: (heads, rows); threads: d, up to a multiple of 32.
__global__ void merge_shares(half16* out, const float* parts, const int* held, const int* places,
                             int shares, int share, int d, int stride) {
    int row = blockIdx.y, head = blockIdx.x, i = threadIdx.x;
    if (i % 8 == 0 && i < d) ask_for(places, head * d + i, gridDim.x * d);
    wait_for_it();
    let_next_start();
    int count = (held[row] + share - 1) / share;
    const float* part = parts + ((long long)row * gridDim.x + head) * shares * (d + 2);
    float largest = -INFINITY, weights = 0, sum = 0;
    for (int s = 0; s < count; s++) largest = fmaxf(largest, part[s * (d + 2)]);
    if (i >= d) return;
    for (int s = 0; s < count; s++) {
        float shrink = __expf(part[s * (d + 2)] - largest);
        weights += part[s * (d + 2) + 1] * shrink;
        sum += part[s * (d + 2) + 2 + i] * shrink;
    }
    int channel = head * d + i;
    out[(long long)row * stride + (places ? places[channel] : channel)] = narrow(sum / weights);
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
// head, 16 a warp, and goes through the keys 64 at a time, the next ones on their way.
// Grid: (count / 64, heads); block 128; shared: 4 * 64 * (D + 8) half16.
template <int D>
__device__ __forceinline__ void attend_prompt(half16* out, const half16* q, const half16* keys,
                                              const half16* values, int count, int first, int kv_heads,
                                              float scale) {
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
    int tiles = (first + min(block * 64 + 63, count - 1)) / 64 + 1;
    load(0);
    unsigned a[D / 16][4];
    const half16* query = q + head * D + 2 * t;
#pragma unroll
    for (int k = 0; k < D / 16; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            long long row = min(q0 + g + (i & 1) * 8, count - 1);
            a[k][i] = *(const unsigned*)(query + row * heads * D + k * 16 + (i >> 1) * 8);
        }
    float sum[D / 8][4], top[2] = {-INFINITY, -INFINITY}, weights[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < D / 8; j++) sum[j][0] = sum[j][1] = sum[j][2] = sum[j][3] = 0;
    float by_two = scale * 1.44269504f;

    for (int tile = 0; tile < tiles; tile++) {
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
        if (tile * 64 + 63 > first + q0)
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (tile * 64 + j * 8 + 2 * t + (i & 1) > first + q0 + g + (i >> 1) * 8) score[j][i] = -INFINITY;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float now = top[h];
#pragma unroll
            for (int j = 0; j < 8; j++) now = fmaxf(now, fmaxf(score[j][2 * h], score[j][2 * h + 1]));
            now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
            now = fmaxf(now, __shfl_xor_sync(~0u, now, 2));
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

#define ATTEND_PROMPT(D)                                                                               \
    __global__ void __launch_bounds__(128) attend_prompt_##D(                                          \
        half16* out, const half16* q, const half16* keys, const half16* values, int count, int first,  \
        int kv_heads, float scale) {                                                                   \
        attend_prompt<D>(out, q, keys, values, count, first, kv_heads, scale);                         \
    }

extern "C" {

ATTEND_PROMPT(64)
ATTEND_PROMPT(128)

}
