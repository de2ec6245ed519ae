// Rows between the packed products of a pass, normed or computed element by element, in the order of the
// linear that reads them. That linear reads rows in the order of its positions where its channels are sorted:
// `channels` names the channel at each of `stride` places, negative where there is none; null where the
// order is natural. What makes such rows writes them in that order at once.
//
// For one token a kernel is a chain of things to wait for. So what no kernel ahead of this one writes
// is read before `wait_for_it`, and a thread takes VALUES elements at a time: 8, or 1 where rows are no
// multiple of 8.
#pragma once
#include "half.cuh"

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

// What a norm multiplies elements by and, where it is a layer norm with a bias, adds to them.
template <int VALUES, bool LAYER>
struct Factors {
    Several<float, VALUES> weight, bias;
};
template <int VALUES, bool LAYER>
__device__ __forceinline__ Factors<VALUES, LAYER> factors(const float* weight, const float* bias, int i) {
    Factors<VALUES, LAYER> at;
    at.weight = several<VALUES>(weight + i);
    if (LAYER) at.bias = bias ? several<VALUES>(bias + i) : Several<float, VALUES>{};
    return at;
}

// A row of `width` normed, root-mean-square or, where LAYER, by mean and variance; `put` gets VALUES elements
// from i on. The row is kept in shared memory meanwhile. The first factors of a thread are known already.
template <int VALUES, bool LAYER, class Put>
__device__ __forceinline__ void norm_row(half16* kept, const half16* row, Factors<VALUES, LAYER> at,
                                         const float* weight, const float* bias, int width, float eps,
                                         Put put) {
    __shared__ float scratch[32];
    int first = threadIdx.x * VALUES, on = blockDim.x * VALUES;
    float squares = 0, mean = 0;
    for (int i = first; i < width; i += on) {
        auto v = several<VALUES>(row + i);
        put_several(kept + i, v);
#pragma unroll
        for (int j = 0; j < VALUES; j++)
            if (LAYER) mean += widen(v.at[j]);
            else squares += widen(v.at[j]) * widen(v.at[j]);
    }
    if (LAYER) {
        mean = block_sum(mean, scratch) / width;
        for (int i = first; i < width; i += on) {
            auto v = several<VALUES>((const half16*)kept + i);
#pragma unroll
            for (int j = 0; j < VALUES; j++) squares += (widen(v.at[j]) - mean) * (widen(v.at[j]) - mean);
        }
    }
    float scale = rsqrtf(block_sum(squares, scratch) / width + eps);
    for (int i = first; i < width; i += on) {
        auto v = several<VALUES>((const half16*)kept + i);
        if (i > first) at = factors<VALUES, LAYER>(weight, bias, i);
#pragma unroll
        for (int j = 0; j < VALUES; j++)
            if (LAYER) v.at[j] = narrow((widen(v.at[j]) - mean) * scale * at.weight.at[j] + at.bias.at[j]);
            else v.at[j] = narrow(widen(narrow(widen(v.at[j]) * scale)) * at.weight.at[j]);
        put(i, v);
    }
}

// Rows of `width` normed. Grid: rows; shared: width half16.
template <int VALUES, bool LAYER>
__device__ __forceinline__ void norm_rows(half16* out, const half16* x, const float* weight,
                                          const float* bias, const int* channels, int width, int stride,
                                          float eps) {
    extern __shared__ __align__(16) half16 normed[];
    int first = threadIdx.x * VALUES;
    Factors<VALUES, LAYER> at;
    Several<int, VALUES> from;
    if (first < width) at = factors<VALUES, LAYER>(weight, bias, first);
    if (channels && first < stride) from = several<VALUES>(channels + first);
    wait_for_it();
    let_next_start();
    half16* to = out + (long long)blockIdx.x * stride;
    auto put = [&](int i, Several<half16, VALUES> v) {
        if (channels) put_several(normed + i, v);
        else put_several(to + i, v);
    };
    norm_row<VALUES, LAYER>(normed, x + (long long)blockIdx.x * width, at, weight, bias, width, eps, put);
    if (channels) put_in_order<VALUES>(to, normed, channels, from, stride);
}

struct Silu {
    static __device__ __forceinline__ float of(float x) { return x / (1.0f + __expf(-x)); }
};

// What becomes of an element of x, and of one of y where there are TWO inputs: the activation of x, rounded,
// times y.
template <class F>
struct Gate {
    static constexpr bool TWO = true;
    static __device__ __forceinline__ half16 of(half16 x, half16 y) {
        return narrow(widen(narrow(F::of(widen(x)))) * widen(y));
    }
};

template <class Op, int VALUES>
__device__ __forceinline__ Several<half16, VALUES> each(Several<half16, VALUES> x, Several<half16, VALUES> y) {
#pragma unroll
    for (int j = 0; j < VALUES; j++) y.at[j] = Op::of(x.at[j], y.at[j]);
    return y;
}

// Rows of x and y lie pitch_x and pitch_y apart. Grid: (stride / (VALUES threads), rows).
template <int VALUES, class Op>
__device__ __forceinline__ void write_rows(half16* out, const half16* x, const half16* y,
                                           const int* channels, int pitch_x, int pitch_y, int stride) {
    int place = (blockIdx.x * blockDim.x + threadIdx.x) * VALUES;
    if (place >= stride) return;
    Several<int, VALUES> from;
    if (channels) from = several<VALUES>(channels + place);
    wait_for_it();
    let_next_start();
    x += (long long)blockIdx.y * pitch_x, y += (long long)blockIdx.y * pitch_y;
    Several<half16, VALUES> of_x, of_y;
    if (channels) {
#pragma unroll
        for (int j = 0; j < VALUES; j++) {
            bool there = from.at[j] >= 0;
            of_x.at[j] = there ? x[from.at[j]] : (half16)0;
            if (Op::TWO) of_y.at[j] = there ? y[from.at[j]] : (half16)0;
        }
    } else {
        of_x = several<VALUES>(x + place);
        if (Op::TWO) of_y = several<VALUES>(y + place);
    }
    put_several(out + (long long)blockIdx.y * stride + place, each<Op>(of_x, of_y));
}

// The same of many rows of `width` that are put in order: a block takes a whole one, so that the order
// costs no reads of two bytes from far. Grid: rows; shared: width half16.
template <int VALUES, class Op>
__device__ __forceinline__ void write_rows_in_order(half16* out, const half16* x, const half16* y,
                                                    const int* channels, int pitch_x, int pitch_y, int width,
                                                    int stride) {
    extern __shared__ __align__(16) half16 row[];
    int first = threadIdx.x * VALUES, on = blockDim.x * VALUES;
    Several<int, VALUES> from;
    if (first < stride) from = several<VALUES>(channels + first);
    wait_for_it();
    let_next_start();
    x += (long long)blockIdx.x * pitch_x, y += (long long)blockIdx.x * pitch_y;
    for (int i = first; i < width; i += on) {
        Several<half16, VALUES> of_x = several<VALUES>(x + i), of_y;
        if (Op::TWO) of_y = several<VALUES>(y + i);
        put_several(row + i, each<Op>(of_x, of_y));
    }
    put_in_order<VALUES>(out + (long long)blockIdx.x * stride, row, channels, from, stride);
}

#define WRITE_ROWS(NAME, VALUES, ...)                                                                  \
    __global__ void __launch_bounds__(128, 16) NAME##_##VALUES(                                        \
        half16* out, const half16* x, const half16* y, const int* channels, int pitch_x, int pitch_y,  \
        int stride) {                                                                                  \
        write_rows<VALUES, __VA_ARGS__>(out, x, y, channels, pitch_x, pitch_y, stride);                \
    }                                                                                                  \
    __global__ void NAME##_in_order_##VALUES(half16* out, const half16* x, const half16* y,            \
                                             const int* channels, int pitch_x, int pitch_y, int width, \
                                             int stride) {                                             \
        write_rows_in_order<VALUES, __VA_ARGS__>(out, x, y, channels, pitch_x, pitch_y, width, stride); \
    }
