// What is between the packed products of a pass (rows.cuh) in blocks beside Llama's: layer norms, norms of whole
// outputs, norms before a sum, other activations, feed-forwards without a gate, rows that no norm comes before,
// heads of any rotation. Compiled when a model needs it.
#include "rows.cuh"

// `runs` runs of `width` that stand side by side in each row normed in place; rows lie `pitch` apart. Grid:
// rows * runs; shared: width half16.
template <int VALUES, bool LAYER>
__device__ __forceinline__ void norm_outputs(half16* x, const float* weight, const float* bias, int pitch,
                                             int runs, int width, float eps) {
    extern __shared__ __align__(16) half16 normed[];
    int first = threadIdx.x * VALUES;
    Factors<VALUES, LAYER> at;
    if (first < width) at = factors<VALUES, LAYER>(weight, bias, first);
    wait_for_it();
    let_next_start();
    x += (long long)(blockIdx.x / runs) * pitch + (long long)(blockIdx.x % runs) * width;
    auto put = [&](int i, Several<half16, VALUES> v) { put_several(x + i, v); };
    norm_row<VALUES, LAYER>(normed, x, at, weight, bias, width, eps, put);
}

// hidden += factor * norm(y), rows of `width`: the norm, the product and the sum are rounded. Grid: rows;
// shared: width half16.
template <int VALUES, bool LAYER>
__device__ __forceinline__ void add_normed(half16* hidden, const half16* y, const float* weight,
                                           const float* bias, int width, float eps, float factor) {
    extern __shared__ __align__(16) half16 normed[];
    int first = threadIdx.x * VALUES;
    Factors<VALUES, LAYER> at;
    if (first < width) at = factors<VALUES, LAYER>(weight, bias, first);
    wait_for_it();
    let_next_start();
    half16* to = hidden + (long long)blockIdx.x * width;
    auto put = [&](int i, Several<half16, VALUES> v) {
        auto sum = several<VALUES>((const half16*)to + i);
#pragma unroll
        for (int j = 0; j < VALUES; j++)
            sum.at[j] = narrow(widen(sum.at[j]) + widen(narrow(widen(v.at[j]) * factor)));
        put_several(to + i, sum);
    };
    norm_row<VALUES, LAYER>(normed, y + (long long)blockIdx.x * width, at, weight, bias, width, eps, put);
}

// 0.5 x (1 + tanh u) with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x / (1 + e^-2u).
struct GeluTanh {
    static __device__ __forceinline__ float of(float x) {
        return x / (1.0f + __expf(-1.59576912f * (x + 0.044715f * x * x * x)));
    }
};

// The activation of x; x itself.
template <class F>
struct Activation {
    static constexpr bool TWO = false;
    static __device__ __forceinline__ half16 of(half16 x, half16) { return narrow(F::of(widen(x))); }
};
struct Same {
    static constexpr bool TWO = false;
    static __device__ __forceinline__ half16 of(half16 x, half16) { return x; }
};

// Pairs from i on of a head of d elements, the first 2 `half` of which turn: PAIRED, elements 2i and 2i + 1
// turn together, else i and half + i. Of those that pass, i from `half` on, any two make a pair.
template <int VALUES, bool PAIRED, class T>
__device__ __forceinline__ void take_pairs(const T* head, int i, int half, int d, Several<T, VALUES>& low,
                                           Several<T, VALUES>& high) {
    if (PAIRED && i < half) {
        if constexpr (VALUES == 1) {
            low.at[0] = head[2 * i], high.at[0] = head[2 * i + 1];
        } else {
            auto both = several<2 * VALUES>(head + 2 * i);
#pragma unroll
            for (int j = 0; j < VALUES; j++) low.at[j] = both.at[2 * j], high.at[j] = both.at[2 * j + 1];
        }
    } else {
        const T* at = head + (i < half ? i : half + i);
        low = several<VALUES>(at), high = several<VALUES>(at + (i < half ? half : d / 2 - half));
    }
}
template <int VALUES, bool PAIRED>
__device__ __forceinline__ void put_pairs(half16* head, int i, int half, int d, Several<half16, VALUES> low,
                                          Several<half16, VALUES> high) {
    if (PAIRED && i < half) {
        if constexpr (VALUES == 1) {
            head[2 * i] = low.at[0], head[2 * i + 1] = high.at[0];
        } else {
            Several<half16, 2 * VALUES> both;
#pragma unroll
            for (int j = 0; j < VALUES; j++) both.at[2 * j] = low.at[j], both.at[2 * j + 1] = high.at[j];
            put_several(head + 2 * i, both);
        }
    } else {
        half16* at = head + (i < half ? i : half + i);
        put_several(at, low);
        put_several(at + (i < half ? half : d / 2 - half), high);
    }
}

// As `place_heads` for models beside Llama: values may be normed, queries and keys have tables of their own
// and are turned in their first 2 `half` elements (none where that is 0), before they are normed where
// `norm_last` says so. With 0 kv_heads only queries are placed. Rows of k and v lie pitch_k and pitch_v apart.
// Grid: ((heads + 2 kv_heads) lanes / threads, rows).
template <int VALUES, bool PAIRED>
__device__ __forceinline__ void place_any_heads(
    half16* to_q, half16* keys, half16* values, const half16* q, const half16* k, const half16* v,
    const float* q_norm, const float* k_norm, const float* v_norm, const float* q_cosine, const float* q_sine,
    const float* k_cosine, const float* k_sine, Rows rows, int heads, int kv_heads, int d, int half, int lanes,
    int pitch_q, int pitch_k, int pitch_v, int capacity, int norm_last, float eps) {
    using Run = Several<half16, VALUES>;
    int row = blockIdx.y, lane = threadIdx.x & (lanes - 1), first = lane * VALUES, on = lanes * VALUES;
    int head = (blockIdx.x * blockDim.x + threadIdx.x) / lanes;
    if (head >= heads + 2 * kv_heads) return;
    int position = rows.held ? rows.held[row] - 1 : rows.first + row;
    long long stored = ((long long)(rows.held ? row : rows.sequence) * capacity + position) * kv_heads * d;
    int kind = head < heads ? 0 : head < heads + kv_heads ? 1 : 2;
    if (kind) head = (head - heads) % kv_heads;
    const half16* from = kind == 0   ? q + (long long)row * pitch_q
                         : kind == 1 ? k + (long long)row * pitch_k
                                     : v + (long long)row * pitch_v;
    from += head * d;
    half16* to = kind == 0   ? to_q + ((long long)row * heads + head) * d
                 : kind == 1 ? keys + stored + head * d
                             : values + stored + head * d;
    const float* norm = kind == 0 ? q_norm : kind == 1 ? k_norm : v_norm;
    const float* cosine = (kind == 0 ? q_cosine : k_cosine) + (long long)position * half;
    const float* sine = (kind == 0 ? q_sine : k_sine) + (long long)position * half;
    if (kind == 2) half = 0; // values pass
    if (first < half) ask_for(cosine + first), ask_for(sine + first);
    wait_for_it();
    let_next_start();
    auto turn = [&](int i, Run& low, Run& high) {
        if (i >= half) return;
        auto c = several<VALUES>(cosine + i), s = several<VALUES>(sine + i);
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
        for (int i = first; i < d / 2; i += on) {
            Run low, high;
            take_pairs<VALUES, PAIRED>(from, i, half, d, low, high);
            if (norm_last) turn(i, low, high);
#pragma unroll
            for (int j = 0; j < VALUES; j++)
                squares += widen(low.at[j]) * widen(low.at[j]) + widen(high.at[j]) * widen(high.at[j]);
        }
        unsigned mates = (~0u >> (32 - lanes)) << (threadIdx.x & 31 & ~(lanes - 1));
        for (int step = lanes / 2; step; step >>= 1) squares += __shfl_xor_sync(mates, squares, step);
        scale = rsqrtf(squares / d + eps);
    }
    for (int i = first; i < d / 2; i += on) {
        Run low, high;
        take_pairs<VALUES, PAIRED>(from, i, half, d, low, high);
        if (norm_last) turn(i, low, high);
        if (norm) {
            Several<float, VALUES> of_low, of_high;
            take_pairs<VALUES, PAIRED>(norm, i, half, d, of_low, of_high);
#pragma unroll
            for (int j = 0; j < VALUES; j++) {
                low.at[j] = narrow(widen(narrow(widen(low.at[j]) * scale)) * of_low.at[j]);
                high.at[j] = narrow(widen(narrow(widen(high.at[j]) * scale)) * of_high.at[j]);
            }
        }
        if (!norm_last) turn(i, low, high);
        put_pairs<VALUES, PAIRED>(to, i, half, d, low, high);
    }
}

#define NORMS(VALUES)                                                                                  \
    __global__ void __launch_bounds__(1024) layer_norm_rows_##VALUES(                                  \
        half16* out, const half16* x, const float* weight, const float* bias, const int* channels,     \
        int width, int stride, float eps) {                                                            \
        norm_rows<VALUES, true>(out, x, weight, bias, channels, width, stride, eps);                   \
    }                                                                                                  \
    __global__ void __launch_bounds__(1024) norm_outputs_##VALUES(                                     \
        half16* x, const float* weight, int pitch, int runs, int width, float eps) {                   \
        norm_outputs<VALUES, false>(x, weight, 0, pitch, runs, width, eps);                            \
    }                                                                                                  \
    __global__ void __launch_bounds__(1024) layer_norm_outputs_##VALUES(                               \
        half16* x, const float* weight, const float* bias, int pitch, int runs, int width, float eps) { \
        norm_outputs<VALUES, true>(x, weight, bias, pitch, runs, width, eps);                          \
    }                                                                                                  \
    __global__ void __launch_bounds__(1024) add_normed_##VALUES(                                       \
        half16* hidden, const half16* y, const float* weight, int width, float eps, float factor) {    \
        add_normed<VALUES, false>(hidden, y, weight, 0, width, eps, factor);                           \
    }                                                                                                  \
    __global__ void __launch_bounds__(1024) add_layer_normed_##VALUES(                                 \
        half16* hidden, const half16* y, const float* weight, const float* bias, int width, float eps, \
        float factor) {                                                                                \
        add_normed<VALUES, true>(hidden, y, weight, bias, width, eps, factor);                         \
    }

#define PLACE_ANY_HEADS(NAME, VALUES, PAIRED)                                                          \
    __global__ void NAME##_##VALUES(                                                                   \
        half16* to_q, half16* keys, half16* values, const half16* q, const half16* k, const half16* v, \
        const float* q_norm, const float* k_norm, const float* v_norm, const float* q_cosine,          \
        const float* q_sine, const float* k_cosine, const float* k_sine, Rows rows, int heads,         \
        int kv_heads, int d, int half, int lanes, int pitch_q, int pitch_k, int pitch_v, int capacity, \
        int norm_last, float eps) {                                                                    \
        place_any_heads<VALUES, PAIRED>(to_q, keys, values, q, k, v, q_norm, k_norm, v_norm, q_cosine, \
                                        q_sine, k_cosine, k_sine, rows, heads, kv_heads, d, half,      \
                                        lanes, pitch_q, pitch_k, pitch_v, capacity, norm_last, eps);   \
    }

#define OTHERS(VALUES)                                                                                 \
    NORMS(VALUES)                                                                                      \
    WRITE_ROWS(gate_rows_gelu, VALUES, Gate<GeluTanh>)                                                 \
    WRITE_ROWS(silu_rows, VALUES, Activation<Silu>)                                                    \
    WRITE_ROWS(gelu_rows, VALUES, Activation<GeluTanh>)                                                \
    WRITE_ROWS(gather_rows, VALUES, Same)                                                              \
    PLACE_ANY_HEADS(place_any_heads, VALUES, false)                                                    \
    PLACE_ANY_HEADS(place_paired_heads, VALUES, true)

extern "C" {

OTHERS(8)
OTHERS(1)

}
