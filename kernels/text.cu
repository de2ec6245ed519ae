// What is between the packed products of a pass that reads or writes text, rows are tokens. A linear
// with sorted channels reads its rows in the order of its positions: `channels` names the channel at
// each of `stride` places, negative where there is none; null where the order is natural. What makes
// such rows writes them in that order at once.
//
// For one token a kernel is a chain of things to wait for. So what no kernel ahead of this one writes
// is read before `wait_for_it`, and a thread takes VALUES elements at a time: 8, or 1 where rows are no
// multiple of 8.
//
// Norms, turned heads and gates are rounded to sixteen bits where Hugging Face rounds them; weights of
// attention are rounded once where the tensor cores multiply them, their sum is not.
#include "attend_group.cuh"
#include "attend_heads.cuh"
#include "attend_newest.cuh"
#include "attend_prompt.cuh"

// The sequence that a row belongs to, and its position there. `held` counts the tokens of each
// sequence, the newest one included; null where all rows belong to `sequence`, from `first` on.
struct Rows {
    const int* held;
    int sequence, first;
};

// A row goes from shared memory to the places of its channels; the first of them are known already.
template <int VALUES>
__device__ __forceinline__ void put_in_order(half16* to, const half16* row, const int* channels,
                                             Several<int, VALUES> from, int stride) {
    int first = threadIdx.x * VALUES;
    __syncthreads();
    for (int i = first; i < stride; i += blockDim.x * VALUES) {
        if (i > first) from = several<VALUES>(channels + i);
        Several<half16, VALUES> v;
#pragma unroll
        for (int j = 0; j < VALUES; j++) v.at[j] = from.at[j] < 0 ? (half16)0 : row[from.at[j]];
        put_several(to + i, v);
    }
}

// Root-mean-square norm of rows of `width`. Grid: rows; shared: width half16.
template <int VALUES>
__device__ __forceinline__ void norm_rows(half16* out, const half16* x, const float* weight,
                                          const int* channels, int width, int stride, float eps) {
    extern __shared__ __align__(16) half16 normed[];
    __shared__ float scratch[32];
    int first = threadIdx.x * VALUES, on = blockDim.x * VALUES;
    Several<float, VALUES> weights;
    Several<int, VALUES> from;
    if (first < width) weights = several<VALUES>(weight + first);
    if (channels && first < stride) from = several<VALUES>(channels + first);
    wait_for_it();
    let_next_start();
    const half16* row = x + (long long)blockIdx.x * width;
    half16* to = out + (long long)blockIdx.x * stride;
    float squares = 0;
    for (int i = first; i < width; i += on) {
        auto v = several<VALUES>(row + i);
        put_several(normed + i, v);
#pragma unroll
        for (int j = 0; j < VALUES; j++) squares += widen(v.at[j]) * widen(v.at[j]);
    }
    float scale = rsqrtf(block_sum(squares, scratch) / width + eps);
    for (int i = first; i < width; i += on) {
        auto v = several<VALUES>((const half16*)normed + i);
        if (i > first) weights = several<VALUES>(weight + i);
#pragma unroll
        for (int j = 0; j < VALUES; j++)
            v.at[j] = narrow(widen(narrow(widen(v.at[j]) * scale)) * weights.at[j]);
        if (channels) put_several(normed + i, v);
        else put_several(to + i, v);
    }
    if (channels) put_in_order<VALUES>(to, normed, channels, from, stride);
}

// silu(gate), rounded, times up.
template <int VALUES>
__device__ __forceinline__ Several<half16, VALUES> gated(Several<half16, VALUES> gate,
                                                         Several<half16, VALUES> up) {
#pragma unroll
    for (int j = 0; j < VALUES; j++) {
        float g = widen(gate.at[j]);
        up.at[j] = narrow(widen(narrow(g / (1.0f + __expf(-g)))) * widen(up.at[j]));
    }
    return up;
}

// Rows of both lie `pitch` apart. Grid: (stride / (VALUES threads), rows).
template <int VALUES>
__device__ __forceinline__ void gate_rows(half16* out, const half16* gate, const half16* up,
                                          const int* channels, int pitch, int stride) {
    int place = (blockIdx.x * blockDim.x + threadIdx.x) * VALUES;
    if (place >= stride) return;
    Several<int, VALUES> from;
    if (channels) from = several<VALUES>(channels + place);
    wait_for_it();
    let_next_start();
    gate += (long long)blockIdx.y * pitch, up += (long long)blockIdx.y * pitch;
    Several<half16, VALUES> of_gate, of_up;
    if (channels) {
#pragma unroll
        for (int j = 0; j < VALUES; j++) {
            bool there = from.at[j] >= 0;
            of_gate.at[j] = there ? gate[from.at[j]] : (half16)0;
            of_up.at[j] = there ? up[from.at[j]] : (half16)0;
        }
    } else {
        of_gate = several<VALUES>(gate + place);
        of_up = several<VALUES>(up + place);
    }
    put_several(out + (long long)blockIdx.y * stride + place, gated(of_gate, of_up));
}

// The same of many rows of `width` that are put in order: a block takes a whole one, so that the order
// costs no reads of two bytes from far. Grid: rows; shared: width half16.
template <int VALUES>
__device__ __forceinline__ void gate_rows_in_order(half16* out, const half16* gate, const half16* up,
                                                   const int* channels, int pitch, int width, int stride) {
    extern __shared__ __align__(16) half16 row[];
    int first = threadIdx.x * VALUES, on = blockDim.x * VALUES;
    Several<int, VALUES> from;
    if (first < stride) from = several<VALUES>(channels + first);
    wait_for_it();
    let_next_start();
    gate += (long long)blockIdx.x * pitch, up += (long long)blockIdx.x * pitch;
    for (int i = first; i < width; i += on)
        put_several(row + i, gated(several<VALUES>(gate + i), several<VALUES>(up + i)));
    put_in_order<VALUES>(out + (long long)blockIdx.x * stride, row, channels, from, stride);
}

// A head of q, k or v: norms it where there are weights, turns it, and puts it where it is read: q
// [rows, heads * d], keys and values [sequences, capacity, kv_heads * d]. Rows of the inputs lie
// pitch_q and pitch_kv apart. A team of `lanes` (a power of two) takes a head.
// Grid: ((heads + 2 kv_heads) lanes / threads, rows).
template <int VALUES>
__device__ __forceinline__ void place_heads(half16* to_q, half16* keys, half16* values, const half16* q,
                                            const half16* k, const half16* v, const float* q_norm,
                                            const float* k_norm, const float* cosine, const float* sine,
                                            Rows rows, int heads, int kv_heads, int d, int lanes,
                                            int pitch_q, int pitch_kv, int capacity, float eps) {
    int row = blockIdx.y, half_d = d / 2, lane = threadIdx.x & (lanes - 1);
    int head = (blockIdx.x * blockDim.x + threadIdx.x) / lanes, first = lane * VALUES, on = lanes * VALUES;
    if (head >= heads + 2 * kv_heads) return;
    int position = rows.held ? rows.held[row] - 1 : rows.first + row;
    long long stored = ((long long)(rows.held ? row : rows.sequence) * capacity + position) * kv_heads * d;
    int kind = head < heads ? 0 : head < heads + kv_heads ? 1 : 2;
    if (kind) head = (head - heads) % kv_heads;
    const half16* from = kind == 0 ? q + (long long)row * pitch_q : (kind == 1 ? k : v) + (long long)row * pitch_kv;
    from += head * d;
    half16* to = kind == 0   ? to_q + ((long long)row * heads + head) * d
                 : kind == 1 ? keys + stored + head * d
                             : values + stored + head * d;
    const float* norm = kind == 0 ? q_norm : kind == 1 ? k_norm : 0;
    cosine += (long long)position * half_d, sine += (long long)position * half_d;
    if (kind < 2 && first < half_d) ask_for(cosine + first), ask_for(sine + first);
    wait_for_it();
    let_next_start();
    float scale = 1;
    if (norm) {
        float squares = 0;
        for (int i = first; i < half_d; i += on) {
            auto low = several<VALUES>(from + i), high = several<VALUES>(from + half_d + i);
#pragma unroll
            for (int j = 0; j < VALUES; j++)
                squares += widen(low.at[j]) * widen(low.at[j]) + widen(high.at[j]) * widen(high.at[j]);
        }
        unsigned mates = (~0u >> (32 - lanes)) << (threadIdx.x & 31 & ~(lanes - 1));
        for (int step = lanes / 2; step; step >>= 1) squares += __shfl_xor_sync(mates, squares, step);
        scale = rsqrtf(squares / d + eps);
    }
    for (int i = first; i < half_d; i += on) {
        auto low = several<VALUES>(from + i), high = several<VALUES>(from + half_d + i);
        if (norm) {
            auto of_low = several<VALUES>(norm + i), of_high = several<VALUES>(norm + half_d + i);
#pragma unroll
            for (int j = 0; j < VALUES; j++) {
                low.at[j] = narrow(widen(narrow(widen(low.at[j]) * scale)) * of_low.at[j]);
                high.at[j] = narrow(widen(narrow(widen(high.at[j]) * scale)) * of_high.at[j]);
            }
        }
        if (kind < 2) {
            auto c = several<VALUES>(cosine + i), s = several<VALUES>(sine + i);
#pragma unroll
            for (int j = 0; j < VALUES; j++) {
                float a = widen(low.at[j]), b = widen(high.at[j]);
                low.at[j] = narrow(a * c.at[j] - b * s.at[j]);
                high.at[j] = narrow(b * c.at[j] + a * s.at[j]);
            }
        }
        put_several(to + i, low);
        put_several(to + half_d + i, high);
    }
}

#define TEXT(VALUES)                                                                                   \
    __global__ void __launch_bounds__(1024) norm_rows_##VALUES(                                        \
        half16* out, const half16* x, const float* weight, const int* channels, int width, int stride, \
        float eps) {                                                                                   \
        norm_rows<VALUES>(out, x, weight, channels, width, stride, eps);                               \
    }                                                                                                  \
    __global__ void gate_rows_##VALUES(half16* out, const half16* gate, const half16* up,              \
                                       const int* channels, int pitch, int stride) {                   \
        gate_rows<VALUES>(out, gate, up, channels, pitch, stride);                                     \
    }                                                                                                  \
    __global__ void gate_rows_in_order_##VALUES(half16* out, const half16* gate, const half16* up,     \
                                                const int* channels, int pitch, int width, int stride) { \
        gate_rows_in_order<VALUES>(out, gate, up, channels, pitch, width, stride);                     \
    }                                                                                                  \
    __global__ void place_heads_##VALUES(                                                              \
        half16* to_q, half16* keys, half16* values, const half16* q, const half16* k, const half16* v, \
        const float* q_norm, const float* k_norm, const float* cosine, const float* sine, Rows rows,   \
        int heads, int kv_heads, int d, int lanes, int pitch_q, int pitch_kv, int capacity, float eps) { \
        place_heads<VALUES>(to_q, keys, values, q, k, v, q_norm, k_norm, cosine, sine, rows, heads,    \
                            kv_heads, d, lanes, pitch_q, pitch_kv, capacity, eps);                     \
    }

#define ATTEND_SHARE(VALUES, PIECES, KEYS)                                                             \
    __global__ void __launch_bounds__(128, 4) attend_share_##VALUES##_##PIECES(                        \
        float* parts, const half16* q, const half16* keys, const half16* values, const int* held,      \
        int capacity, int kv_heads, int d, int share, float scale) {                                   \
        attend_share<VALUES, PIECES, KEYS>(parts, q, keys, values, held, capacity, kv_heads, d, share, \
                                           scale);                                                     \
    }

#define ATTEND_HEADS(D)                                                                                \
    __global__ void __launch_bounds__(128, 4) attend_heads_##D(                                        \
        float* parts, const half16* q, const half16* keys, const half16* values, const int* held,      \
        int capacity, int kv_heads, int of, int share, float scale) {                                  \
        attend_heads<D>(parts, q, keys, values, held, capacity, kv_heads, of, share, scale);           \
    }

#define ATTEND_PROMPT(D)                                                                               \
    __global__ void __launch_bounds__(128) attend_prompt_##D(                                          \
        half16* out, const half16* q, const half16* keys, const half16* values, int count, int first,  \
        int kv_heads, float scale) {                                                                   \
        attend_prompt<D>(out, q, keys, values, count, first, kv_heads, scale);                         \
    }

#define ATTEND_GROUP(D)                                                                                \
    __global__ void __launch_bounds__(256) attend_group_##D(                                           \
        half16* out, const half16* q, const half16* keys, const half16* values, int count, int first,  \
        int kv_heads, float scale) {                                                                   \
        attend_group<D>(out, q, keys, values, count, first, kv_heads, scale);                          \
    }

extern "C" {

TEXT(8)
TEXT(1)

ATTEND_SHARE(8, 1, 4) // heads of 64
ATTEND_SHARE(8, 2, 4) // of 128
ATTEND_SHARE(8, 4, 2) // of 256
ATTEND_SHARE(2, 8, 2) // any even width up to 128
ATTEND_SHARE(2, 16, 1)

ATTEND_HEADS(64)
ATTEND_HEADS(128)

ATTEND_PROMPT(64)
ATTEND_PROMPT(128)
#if WGMMA
ATTEND_GROUP(64)
ATTEND_GROUP(128)
#endif

}
