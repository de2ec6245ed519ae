// Prefill and decode of Llama-like blocks, between the packed matrix products: RMSNorm, SwiGLU, QK-norm +
// RoPE + KV cache write, and attention. Blocks of other families take more from other_blocks.cu, compiled
// only when needed.
//
// Intermediate values are rounded to 16 bits where Hugging Face rounds them. Attention weights are rounded
// once, for the tensor cores; their sum is not.
#include "attention.cuh"
#include "rows.cuh"

// Fused QK-norm, RoPE and KV cache write. For each head of q, k and v: RMSNorm where there are weights, RoPE
// on q and k, then a store to out_q [rows, heads * d] or to the cache, keys and values [sequences, capacity,
// kv_heads * d]. Input rows are pitch_q and pitch_kv elements apart. A group of `lanes` lanes, a power of
// two, handles a head.
//
// Launch grid: ((heads + 2 kv_heads) lanes / threads, rows).
template <int VALUES>
__device__ __forceinline__ void qk_norm_rope_cache(half16* out_q, half16* keys, half16* values,
                                                   const half16* q, const half16* k, const half16* v,
                                                   const float* q_norm, const float* k_norm,
                                                   const float* cosine, const float* sine, Rows rows,
                                                   int heads, int kv_heads, int d, int lanes, int pitch_q,
                                                   int pitch_kv, int capacity, float eps) {
    int row = blockIdx.y, half_d = d / 2, lane = threadIdx.x & (lanes - 1);
    int head = (blockIdx.x * blockDim.x + threadIdx.x) / lanes, first = lane * VALUES,
        group_stride = lanes * VALUES;
    if (head >= heads + 2 * kv_heads) return;
    int position = rows.lengths ? rows.lengths[row] - 1 : rows.first + row;
    long long cache_row =
        ((long long)(rows.lengths ? row : rows.sequence) * capacity + position) * kv_heads * d;
    int role = head < heads ? 0 : head < heads + kv_heads ? 1 : 2;
    if (role) head = (head - heads) % kv_heads;
    const half16* from =
        role == 0 ? q + (long long)row * pitch_q : (role == 1 ? k : v) + (long long)row * pitch_kv;
    from += head * d;
    half16* to = role == 0   ? out_q + ((long long)row * heads + head) * d
                 : role == 1 ? keys + cache_row + head * d
                             : values + cache_row + head * d;
    const float* norm = role == 0 ? q_norm : role == 1 ? k_norm : 0;
    cosine += (long long)position * half_d, sine += (long long)position * half_d;
    if (role < 2 && first < half_d) prefetch_l2(cosine + first), prefetch_l2(sine + first);
    pdl_wait();
    pdl_trigger();
    float scale = 1;
    if (norm) {
        float squares = 0;
        for (int i = first; i < half_d; i += group_stride) {
            auto low = load_vector<VALUES>(from + i), high = load_vector<VALUES>(from + half_d + i);
#pragma unroll
            for (int j = 0; j < VALUES; j++)
                squares += widen(low.at[j]) * widen(low.at[j]) + widen(high.at[j]) * widen(high.at[j]);
        }
        unsigned group_mask = (~0u >> (32 - lanes)) << (threadIdx.x & 31 & ~(lanes - 1));
        for (int step = lanes / 2; step; step >>= 1) squares += __shfl_xor_sync(group_mask, squares, step);
        scale = rsqrtf(squares / d + eps);
    }
    for (int i = first; i < half_d; i += group_stride) {
        auto low = load_vector<VALUES>(from + i), high = load_vector<VALUES>(from + half_d + i);
        if (norm) {
            auto weight_low = load_vector<VALUES>(norm + i),
                 weight_high = load_vector<VALUES>(norm + half_d + i);
#pragma unroll
            for (int j = 0; j < VALUES; j++) {
                low.at[j] = narrow(widen(narrow(widen(low.at[j]) * scale)) * weight_low.at[j]);
                high.at[j] = narrow(widen(narrow(widen(high.at[j]) * scale)) * weight_high.at[j]);
            }
        }
        if (role < 2) {
            auto c = load_vector<VALUES>(cosine + i), s = load_vector<VALUES>(sine + i);
#pragma unroll
            for (int j = 0; j < VALUES; j++) {
                float a = widen(low.at[j]), b = widen(high.at[j]);
                low.at[j] = narrow(a * c.at[j] - b * s.at[j]);
                high.at[j] = narrow(b * c.at[j] + a * s.at[j]);
            }
        }
        store_vector(to + i, low);
        store_vector(to + half_d + i, high);
    }
}

#define LLAMA_BLOCK(VALUES)                                                                                 \
    __global__ void __launch_bounds__(1024)                                                                 \
        rms_norm_rows_##VALUES(half16* out, const half16* x, const float* weight, const int* channels,      \
                               int width, int stride, float eps) {                                          \
        norm_rows<VALUES, false>(out, x, weight, 0, channels, width, stride, eps);                          \
    }                                                                                                       \
    MAP_ROWS(swiglu_rows, VALUES, Gate<Silu>)                                                               \
    __global__ void qk_norm_rope_cache_##VALUES(                                                            \
        half16* out_q, half16* keys, half16* values, const half16* q, const half16* k, const half16* v,     \
        const float* q_norm, const float* k_norm, const float* cosine, const float* sine, Rows rows,        \
        int heads, int kv_heads, int d, int lanes, int pitch_q, int pitch_kv, int capacity, float eps) {    \
        qk_norm_rope_cache<VALUES>(out_q, keys, values, q, k, v, q_norm, k_norm, cosine, sine, rows, heads, \
                                   kv_heads, d, lanes, pitch_q, pitch_kv, capacity, eps);                   \
    }

extern "C" {

LLAMA_BLOCK(8)
LLAMA_BLOCK(1)
}
