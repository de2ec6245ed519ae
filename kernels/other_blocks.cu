// Prefill and decode of blocks that differ from Llama's, between the packed matrix products (rows.cuh): layer
// norm, norms of q and k over all heads, norms after a branch (post-norm), GeGLU and ungated activations,
// gathers without a norm, partial and interleaved RoPE. Compiled only for models that need it.
#include "rows.cuh"

// Norm in place of `runs` adjacent runs of `width` elements in each row; rows are `pitch` elements apart.
// Launch grid: rows * runs; shared memory: width half16.
template <int VALUES, bool LAYER>
__device__ __forceinline__ void norm_outputs(half16* x, const float* weight, const float* bias, int pitch,
                                             int runs, int width, float eps) {
    extern __shared__ __align__(16) half16 normalized[];
    int first = threadIdx.x * VALUES;
    NormWeights<VALUES, LAYER> at;
    if (first < width) at = load_norm_weights<VALUES, LAYER>(weight, bias, first);
    pdl_wait();
    pdl_trigger();
    x += (long long)(blockIdx.x / runs) * pitch + (long long)(blockIdx.x % runs) * width;
    auto store = [&](int i, Vector<half16, VALUES> v) { store_vector(x + i, v); };
    norm_row<VALUES, LAYER>(normalized, x, at, weight, bias, width, eps, store);
}

// Post-norm residual: hidden += factor * norm(y), rows of `width`. The norm, the product and the sum are each
// rounded. Launch grid: rows; shared memory: width half16.
template <int VALUES, bool LAYER>
__device__ __forceinline__ void add_normed(half16* hidden, const half16* y, const float* weight,
                                           const float* bias, int width, float eps, float factor) {
    extern __shared__ __align__(16) half16 normalized[];
    int first = threadIdx.x * VALUES;
    NormWeights<VALUES, LAYER> at;
    if (first < width) at = load_norm_weights<VALUES, LAYER>(weight, bias, first);
    pdl_wait();
    pdl_trigger();
    half16* to = hidden + (long long)blockIdx.x * width;
    auto store = [&](int i, Vector<half16, VALUES> v) {
        auto sum = load_vector<VALUES>((const half16*)to + i);
#pragma unroll
        for (int j = 0; j < VALUES; j++)
            sum.at[j] = narrow(widen(sum.at[j]) + widen(narrow(widen(v.at[j]) * factor)));
        store_vector(to + i, sum);
    };
    norm_row<VALUES, LAYER>(normalized, y + (long long)blockIdx.x * width, at, weight, bias, width, eps,
                            store);
}

// GELU, tanh approximation: 0.5 x (1 + tanh u), u = sqrt(2 / pi) (x + 0.044715 x^3), equal to x / (1 +
// e^-2u).
struct GeluTanh {
    static __device__ __forceinline__ float of(float x) {
        return x / (1.0f + __expf(-1.59576912f * (x + 0.044715f * x * x * x)));
    }
};

// Operations on one input: an activation, the identity.
template <class F>
struct Activation {
    static constexpr bool BINARY = false;
    static __device__ __forceinline__ half16 of(half16 x, half16) { return narrow(F::of(widen(x))); }
};
struct Identity {
    static constexpr bool BINARY = false;
    static __device__ __forceinline__ half16 of(half16 x, half16) { return x; }
};

// Loads VALUES pairs from pair i on of a head of d elements whose first 2 `half` elements are rotated.
// Rotated pairs are (2i, 2i + 1) where INTERLEAVED, else (i, half + i). The elements that are not rotated are
// paired in any way.
template <int VALUES, bool INTERLEAVED, class T>
__device__ __forceinline__ void load_rope_pairs(const T* head, int i, int half, int d, Vector<T, VALUES>& low,
                                                Vector<T, VALUES>& high) {
    if (INTERLEAVED && i < half) {
        if constexpr (VALUES == 1) {
            low.at[0] = head[2 * i], high.at[0] = head[2 * i + 1];
        } else {
            auto both = load_vector<2 * VALUES>(head + 2 * i);
#pragma unroll
            for (int j = 0; j < VALUES; j++) low.at[j] = both.at[2 * j], high.at[j] = both.at[2 * j + 1];
        }
    } else {
        const T* at = head + (i < half ? i : half + i);
        low = load_vector<VALUES>(at), high = load_vector<VALUES>(at + (i < half ? half : d / 2 - half));
    }
}
template <int VALUES, bool INTERLEAVED>
__device__ __forceinline__ void store_rope_pairs(half16* head, int i, int half, int d,
                                                 Vector<half16, VALUES> low, Vector<half16, VALUES> high) {
    if (INTERLEAVED && i < half) {
        if constexpr (VALUES == 1) {
            head[2 * i] = low.at[0], head[2 * i + 1] = high.at[0];
        } else {
            Vector<half16, 2 * VALUES> both;
#pragma unroll
            for (int j = 0; j < VALUES; j++) both.at[2 * j] = low.at[j], both.at[2 * j + 1] = high.at[j];
            store_vector(head + 2 * i, both);
        }
    } else {
        half16* at = head + (i < half ? i : half + i);
        store_vector(at, low);
        store_vector(at + (i < half ? half : d / 2 - half), high);
    }
}

// `qk_norm_rope_cache` for blocks that differ from Llama's: values may be normalized too, q and k have RoPE
// tables of their own, RoPE is partial (the first 2 `half` elements; none where half is 0) and precedes the
// norm where `norm_after_rope` is set. With kv_heads = 0 only queries are written: the keys and values are
// another block's. Rows of q, k and v are pitch_q, pitch_k and pitch_v elements apart.
//
// Launch grid: ((heads + 2 kv_heads) lanes / threads, rows).
template <int VALUES, bool INTERLEAVED>
__device__ __forceinline__ void qk_norm_rope_cache_any(
    half16* out_q, half16* keys, half16* values, const half16* q, const half16* k, const half16* v,
    const float* q_norm, const float* k_norm, const float* v_norm, const float* q_cosine, const float* q_sine,
    const float* k_cosine, const float* k_sine, Rows rows, int heads, int kv_heads, int d, int half,
    int lanes, int pitch_q, int pitch_k, int pitch_v, int capacity, int norm_after_rope, float eps) {
    using Values = Vector<half16, VALUES>;
    int row = blockIdx.y, lane = threadIdx.x & (lanes - 1), first = lane * VALUES,
        group_stride = lanes * VALUES;
    int head = (blockIdx.x * blockDim.x + threadIdx.x) / lanes;
    if (head >= heads + 2 * kv_heads) return;
    int position = rows.lengths ? rows.lengths[row] - 1 : rows.first + row;
    long long cache_row =
        ((long long)(rows.lengths ? row : rows.sequence) * capacity + position) * kv_heads * d;
    int role = head < heads ? 0 : head < heads + kv_heads ? 1 : 2;
    if (role) head = (head - heads) % kv_heads;
    const half16* from = role == 0   ? q + (long long)row * pitch_q
                         : role == 1 ? k + (long long)row * pitch_k
                                     : v + (long long)row * pitch_v;
    from += head * d;
    half16* to = role == 0   ? out_q + ((long long)row * heads + head) * d
                 : role == 1 ? keys + cache_row + head * d
                             : values + cache_row + head * d;
    const float* norm = role == 0 ? q_norm : role == 1 ? k_norm : v_norm;
    const float* cosine = (role == 0 ? q_cosine : k_cosine) + (long long)position * half;
    const float* sine = (role == 0 ? q_sine : k_sine) + (long long)position * half;
    if (role == 2) half = 0; // values are not rotated
    if (first < half) prefetch_l2(cosine + first), prefetch_l2(sine + first);
    pdl_wait();
    pdl_trigger();
    auto rope = [&](int i, Values& low, Values& high) {
        if (i >= half) return;
        auto c = load_vector<VALUES>(cosine + i), s = load_vector<VALUES>(sine + i);
#pragma unroll
        for (int j = 0; j < VALUES; j++) {
            float a = widen(low.at[j]), b = widen(high.at[j]);
            low.at[j] = narrow(a * c.at[j] - b * s.at[j]);
            high.at[j] = narrow(b * c.at[j] + a * s.at[j]);
        }
    };
    float scale = 1;
    if (norm) {
        float squares = 0;
        for (int i = first; i < d / 2; i += group_stride) {
            Values low, high;
            load_rope_pairs<VALUES, INTERLEAVED>(from, i, half, d, low, high);
            if (norm_after_rope) rope(i, low, high);
#pragma unroll
            for (int j = 0; j < VALUES; j++)
                squares += widen(low.at[j]) * widen(low.at[j]) + widen(high.at[j]) * widen(high.at[j]);
        }
        unsigned group_mask = (~0u >> (32 - lanes)) << (threadIdx.x & 31 & ~(lanes - 1));
        for (int step = lanes / 2; step; step >>= 1) squares += __shfl_xor_sync(group_mask, squares, step);
        scale = rsqrtf(squares / d + eps);
    }
    for (int i = first; i < d / 2; i += group_stride) {
        Values low, high;
        load_rope_pairs<VALUES, INTERLEAVED>(from, i, half, d, low, high);
        if (norm_after_rope) rope(i, low, high);
        if (norm) {
            Vector<float, VALUES> weight_low, weight_high;
            load_rope_pairs<VALUES, INTERLEAVED>(norm, i, half, d, weight_low, weight_high);
#pragma unroll
            for (int j = 0; j < VALUES; j++) {
                low.at[j] = narrow(widen(narrow(widen(low.at[j]) * scale)) * weight_low.at[j]);
                high.at[j] = narrow(widen(narrow(widen(high.at[j]) * scale)) * weight_high.at[j]);
            }
        }
        if (!norm_after_rope) rope(i, low, high);
        store_rope_pairs<VALUES, INTERLEAVED>(to, i, half, d, low, high);
    }
}

#define NORMS(VALUES)                                                                                      \
    __global__ void __launch_bounds__(1024)                                                                \
        layer_norm_rows_##VALUES(half16* out, const half16* x, const float* weight, const float* bias,     \
                                 const int* channels, int width, int stride, float eps) {                  \
        norm_rows<VALUES, true>(out, x, weight, bias, channels, width, stride, eps);                       \
    }                                                                                                      \
    __global__ void __launch_bounds__(1024) rms_norm_outputs_##VALUES(                                     \
        half16* x, const float* weight, int pitch, int runs, int width, float eps) {                       \
        norm_outputs<VALUES, false>(x, weight, 0, pitch, runs, width, eps);                                \
    }                                                                                                      \
    __global__ void __launch_bounds__(1024) layer_norm_outputs_##VALUES(                                   \
        half16* x, const float* weight, const float* bias, int pitch, int runs, int width, float eps) {    \
        norm_outputs<VALUES, true>(x, weight, bias, pitch, runs, width, eps);                              \
    }                                                                                                      \
    __global__ void __launch_bounds__(1024) add_rms_normed_##VALUES(                                       \
        half16* hidden, const half16* y, const float* weight, int width, float eps, float factor) {        \
        add_normed<VALUES, false>(hidden, y, weight, 0, width, eps, factor);                               \
    }                                                                                                      \
    __global__ void __launch_bounds__(1024)                                                                \
        add_layer_normed_##VALUES(half16* hidden, const half16* y, const float* weight, const float* bias, \
                                  int width, float eps, float factor) {                                    \
        add_normed<VALUES, true>(hidden, y, weight, bias, width, eps, factor);                             \
    }

#define QK_NORM_ROPE_CACHE_ANY(NAME, VALUES, INTERLEAVED)                                                    \
    __global__ void NAME##_##VALUES(                                                                         \
        half16* out_q, half16* keys, half16* values, const half16* q, const half16* k, const half16* v,      \
        const float* q_norm, const float* k_norm, const float* v_norm, const float* q_cosine,                \
        const float* q_sine, const float* k_cosine, const float* k_sine, Rows rows, int heads, int kv_heads, \
        int d, int half, int lanes, int pitch_q, int pitch_k, int pitch_v, int capacity,                     \
        int norm_after_rope, float eps) {                                                                    \
        qk_norm_rope_cache_any<VALUES, INTERLEAVED>(                                                         \
            out_q, keys, values, q, k, v, q_norm, k_norm, v_norm, q_cosine, q_sine, k_cosine, k_sine, rows,  \
            heads, kv_heads, d, half, lanes, pitch_q, pitch_k, pitch_v, capacity, norm_after_rope, eps);     \
    }

#define OTHER_BLOCKS(VALUES)                                      \
    NORMS(VALUES)                                                 \
    MAP_ROWS(geglu_rows, VALUES, Gate<GeluTanh>)                  \
    MAP_ROWS(silu_rows, VALUES, Activation<Silu>)                 \
    MAP_ROWS(gelu_rows, VALUES, Activation<GeluTanh>)             \
    MAP_ROWS(gather_columns, VALUES, Identity)                    \
    QK_NORM_ROPE_CACHE_ANY(qk_norm_rope_cache_any, VALUES, false) \
    QK_NORM_ROPE_CACHE_ANY(qk_norm_rope_cache_interleaved, VALUES, true)

extern "C" {

OTHER_BLOCKS(8)
OTHER_BLOCKS(1)
}
