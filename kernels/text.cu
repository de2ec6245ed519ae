// What is between the packed products of a pass that reads or writes text, rows are tokens. A linear
// with sorted channels reads its rows in the order of its positions: `channels` names the channel at
// each of `stride` places, negative where there is none; null where the order is natural. What makes
// such rows writes them in that order at once.
//
// Each value is rounded to sixteen bits where Hugging Face rounds it.

// The sequence that a row belongs to, and its position there. `held` counts the tokens of each
// sequence, the newest one included; null where all rows belong to `sequence`, from `first` on.
struct Rows {
    const int* held;
    int sequence, first;
};

extern "C" {

// Root-mean-square norm of rows of `width`. Grid: rows; shared: width half16.
__global__ void norm_rows(half16* out, const half16* x, const float* weight, const int* channels,
                          int width, int stride, float eps) {
    extern __shared__ half16 normed[];
    __shared__ float scratch[32];
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
    wait_for_it();
    let_next_start();
    int row = blockIdx.y, head = blockIdx.x, i = threadIdx.x;
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
