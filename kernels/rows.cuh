// Row kernels between the packed matrix products in prefill and decode: norms and elementwise operations,
// fused with the act-order gather of the linear that reads their output.
//
// `channels` [stride] is the permutation of that linear: out[row][i] = y[row][channels[i]], 0 where the
// channel is negative (padding of K). Null: natural order.
//
// In decode these kernels are bound by latency. So loads that do not depend on earlier kernels are issued
// before `pdl_wait`, and a thread handles VALUES elements at a time: 8, or 1 where rows are not a multiple of
// 8.
#pragma once
#include "half.cuh"

// Which sequence and position a row belongs to. `lengths` [sequences] counts the tokens of each sequence
// including the newest, and row r is the newest token of sequence r (decode). Null: all rows belong to
// `sequence`, from position `first` on (prefill).
struct Rows {
    const int* lengths;
    int sequence, first;
};

// Act-order gather of a row from shared memory. `from`: the first indices of the thread, already loaded.
template <int VALUES>
__device__ __forceinline__ void gather_row(half16* to, const half16* row, const int* channels,
                                           Vector<int, VALUES> from, int stride) {
    int first = threadIdx.x * VALUES;
    __syncthreads();
    for (int i = first; i < stride; i += blockDim.x * VALUES) {
        if (i > first) from = load_vector<VALUES>(channels + i);
        Vector<half16, VALUES> v;
#pragma unroll
        for (int j = 0; j < VALUES; j++) v.at[j] = from.at[j] < 0 ? (half16)0 : row[from.at[j]];
        store_vector(to + i, v);
    }
}

// Weights of a norm and, for a layer norm, its bias.
template <int VALUES, bool LAYER>
struct NormWeights {
    Vector<float, VALUES> weight, bias;
};
template <int VALUES, bool LAYER>
__device__ __forceinline__ NormWeights<VALUES, LAYER> load_norm_weights(const float* weight,
                                                                        const float* bias, int i) {
    NormWeights<VALUES, LAYER> at;
    at.weight = load_vector<VALUES>(weight + i);
    if (LAYER) at.bias = bias ? load_vector<VALUES>(bias + i) : Vector<float, VALUES>{};
    return at;
}

// RMSNorm of a row of `width` elements or, where LAYER, layer norm. `store(i, v)` receives VALUES elements
// from i on. The row is staged in shared memory. `at`: the first weights of the thread, already loaded.
template <int VALUES, bool LAYER, class Put>
__device__ __forceinline__ void norm_row(half16* staged, const half16* row, NormWeights<VALUES, LAYER> at,
                                         const float* weight, const float* bias, int width, float eps,
                                         Put store) {
    __shared__ float scratch[32];
    int first = threadIdx.x * VALUES, block_stride = blockDim.x * VALUES;
    float squares = 0, mean = 0;
    for (int i = first; i < width; i += block_stride) {
        auto v = load_vector<VALUES>(row + i);
        store_vector(staged + i, v);
#pragma unroll
        for (int j = 0; j < VALUES; j++)
            if (LAYER) mean += widen(v.at[j]);
            else squares += widen(v.at[j]) * widen(v.at[j]);
    }
    if (LAYER) {
        mean = block_sum(mean, scratch) / width;
        for (int i = first; i < width; i += block_stride) {
            auto v = load_vector<VALUES>((const half16*)staged + i);
#pragma unroll
            for (int j = 0; j < VALUES; j++) squares += (widen(v.at[j]) - mean) * (widen(v.at[j]) - mean);
        }
    }
    float scale = rsqrtf(block_sum(squares, scratch) / width + eps);
    for (int i = first; i < width; i += block_stride) {
        auto v = load_vector<VALUES>((const half16*)staged + i);
        if (i > first) at = load_norm_weights<VALUES, LAYER>(weight, bias, i);
#pragma unroll
        for (int j = 0; j < VALUES; j++)
            if (LAYER) v.at[j] = narrow((widen(v.at[j]) - mean) * scale * at.weight.at[j] + at.bias.at[j]);
            else v.at[j] = narrow(widen(narrow(widen(v.at[j]) * scale)) * at.weight.at[j]);
        store(i, v);
    }
}

// Norm of rows of `width`, gathered to act-order. Launch grid: rows; shared memory: width half16.
template <int VALUES, bool LAYER>
__device__ __forceinline__ void norm_rows(half16* out, const half16* x, const float* weight,
                                          const float* bias, const int* channels, int width, int stride,
                                          float eps) {
    extern __shared__ __align__(16) half16 normalized[];
    int first = threadIdx.x * VALUES;
    NormWeights<VALUES, LAYER> at;
    Vector<int, VALUES> from;
    if (first < width) at = load_norm_weights<VALUES, LAYER>(weight, bias, first);
    if (channels && first < stride) from = load_vector<VALUES>(channels + first);
    pdl_wait();
    pdl_trigger();
    half16* to = out + (long long)blockIdx.x * stride;
    auto store = [&](int i, Vector<half16, VALUES> v) {
        if (channels) store_vector(normalized + i, v);
        else store_vector(to + i, v);
    };
    norm_row<VALUES, LAYER>(normalized, x + (long long)blockIdx.x * width, at, weight, bias, width, eps,
                            store);
    if (channels) gather_row<VALUES>(to, normalized, channels, from, stride);
}

struct Silu {
    static __device__ __forceinline__ float of(float x) { return x / (1.0f + __expf(-x)); }
};

// An elementwise operation of one input x or, where BINARY, of x and y. Gate: F(x), rounded, times y; SwiGLU
// for Silu.
template <class F>
struct Gate {
    static constexpr bool BINARY = true;
    static __device__ __forceinline__ half16 of(half16 x, half16 y) {
        return narrow(widen(narrow(F::of(widen(x)))) * widen(y));
    }
};

template <class Op, int VALUES>
__device__ __forceinline__ Vector<half16, VALUES> apply(Vector<half16, VALUES> x, Vector<half16, VALUES> y) {
#pragma unroll
    for (int j = 0; j < VALUES; j++) y.at[j] = Op::of(x.at[j], y.at[j]);
    return y;
}

// out = Op(x, y), gathered to act-order as x and y are read. For few rows. Rows of x and y are pitch_x and
// pitch_y elements apart. Launch grid: (stride / (VALUES threads), rows).
template <int VALUES, class Op>
__device__ __forceinline__ void map_rows(half16* out, const half16* x, const half16* y, const int* channels,
                                         int pitch_x, int pitch_y, int stride) {
    int column = (blockIdx.x * blockDim.x + threadIdx.x) * VALUES;
    if (column >= stride) return;
    Vector<int, VALUES> from;
    if (channels) from = load_vector<VALUES>(channels + column);
    pdl_wait();
    pdl_trigger();
    x += (long long)blockIdx.y * pitch_x, y += (long long)blockIdx.y * pitch_y;
    Vector<half16, VALUES> x_values, y_values;
    if (channels) {
#pragma unroll
        for (int j = 0; j < VALUES; j++) {
            bool valid = from.at[j] >= 0;
            x_values.at[j] = valid ? x[from.at[j]] : (half16)0;
            if (Op::BINARY) y_values.at[j] = valid ? y[from.at[j]] : (half16)0;
        }
    } else {
        x_values = load_vector<VALUES>(x + column);
        if (Op::BINARY) y_values = load_vector<VALUES>(y + column);
    }
    store_vector(out + (long long)blockIdx.y * stride + column, apply<Op>(x_values, y_values));
}

// `map_rows` for many rows: a block handles a whole row of `width` and gathers it in shared memory, since
// 2-byte gathers from global memory are slow. Launch grid: rows; shared memory: width half16.
template <int VALUES, class Op>
__device__ __forceinline__ void map_rows_gathered(half16* out, const half16* x, const half16* y,
                                                  const int* channels, int pitch_x, int pitch_y, int width,
                                                  int stride) {
    extern __shared__ __align__(16) half16 row[];
    int first = threadIdx.x * VALUES, block_stride = blockDim.x * VALUES;
    Vector<int, VALUES> from;
    if (first < stride) from = load_vector<VALUES>(channels + first);
    pdl_wait();
    pdl_trigger();
    x += (long long)blockIdx.x * pitch_x, y += (long long)blockIdx.x * pitch_y;
    for (int i = first; i < width; i += block_stride) {
        Vector<half16, VALUES> x_values = load_vector<VALUES>(x + i), y_values;
        if (Op::BINARY) y_values = load_vector<VALUES>(y + i);
        store_vector(row + i, apply<Op>(x_values, y_values));
    }
    gather_row<VALUES>(out + (long long)blockIdx.x * stride, row, channels, from, stride);
}

#define MAP_ROWS(NAME, VALUES, ...)                                                                      \
    __global__ void __launch_bounds__(128, 16)                                                           \
        NAME##_##VALUES(half16* out, const half16* x, const half16* y, const int* channels, int pitch_x, \
                        int pitch_y, int stride) {                                                       \
        map_rows<VALUES, __VA_ARGS__>(out, x, y, channels, pitch_x, pitch_y, stride);                    \
    }                                                                                                    \
    __global__ void NAME##_gathered_##VALUES(half16* out, const half16* x, const half16* y,              \
                                             const int* channels, int pitch_x, int pitch_y, int width,   \
                                             int stride) {                                               \
        map_rows_gathered<VALUES, __VA_ARGS__>(out, x, y, channels, pitch_x, pitch_y, width, stride);    \
    }
