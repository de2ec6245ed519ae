// The operations of a decoder block beside its matrix products, its norms and its gate (text.cu).
// Tensors are row-major sixteen-bit floats, rows are tokens; every value is computed in f32 and rounded
// once.
#define CAP 1
#define WINDOW 1
#include "scores.cuh"

// Rotary embedding in place of the first 2 `half` elements of each head: x [rows, heads * head_dim]; row r
// stands at position r % tokens of cos and sin [tokens, half]. Elements `step` * i and `apart` from it turn by
// angle i.
__device__ __forceinline__ void rotate_heads(half16* x, const float* cosine, const float* sine, int heads,
                                             int head_dim, int half, int tokens, int step, int apart) {
    int pairs = heads * half;
    long long table = (long long)(blockIdx.x % tokens) * half;
    half16* row = x + (long long)blockIdx.x * heads * head_dim;
    for (int p = threadIdx.x; p < pairs; p += blockDim.x) {
        int i = p % half;
        half16* at = row + (p / half) * head_dim + step * i;
        float a = widen(at[0]), b = widen(at[apart]);
        float c = cosine[table + i], s = sine[table + i];
        at[0] = narrow(a * c - b * s);
        at[apart] = narrow(b * c + a * s);
    }
}

// Softmax over the keys up to first + row of each score row that `score` makes of what stands there, from the
// first one on that is seen, zero elsewhere. A block takes a row.
template <class Score>
__device__ __forceinline__ void softmax_row(half16* p, const float* row, int keys, int begin, int seen,
                                            Score score) {
    __shared__ float scratch[32];
    float max = -INFINITY;
    for (int i = begin + threadIdx.x; i < seen; i += blockDim.x) max = fmaxf(max, row[i]);
    max = block_max(max, scratch);
    float sum = 0;
    for (int i = begin + threadIdx.x; i < seen; i += blockDim.x) sum += __expf(score(row[i], max));
    float inverse = 1.0f / block_sum(sum, scratch);
    for (int i = threadIdx.x; i < keys; i += blockDim.x)
        p[i] = i >= begin && i < seen ? narrow(__expf(score(row[i], max)) * inverse) : (half16)0;
}

// x [rows, columns] from rows that lie `pitch` apart. Grid: rows.
template <int VALUES>
__device__ __forceinline__ void copy_columns(half16* out, const half16* x, int pitch, int columns) {
    x += (long long)blockIdx.x * pitch, out += (long long)blockIdx.x * columns;
    for (int i = threadIdx.x * VALUES; i < columns; i += blockDim.x * VALUES)
        put_several(out + i, several<VALUES>(x + i));
}

// x = f(x, y), eight elements a thread; without y, f(x, x).
template <class F>
__device__ __forceinline__ void change(half16* x, const half16* y, long long count, F f) {
    long long i = 8 * ((long long)blockIdx.x * blockDim.x + threadIdx.x);
    bool aligned = (((long long)x | (long long)y) & 15) == 0;
    if (aligned && i + 8 <= count) {
        auto to = several<8>((const half16*)x + i), from = to;
        if (y) from = several<8>(y + i);
#pragma unroll
        for (int j = 0; j < 8; j++) to.at[j] = narrow(f(widen(to.at[j]), widen(from.at[j])));
        put_several(x + i, to);
        return;
    }
    for (long long end = min(i + 8, count); i < end; i++) x[i] = narrow(f(widen(x[i]), widen(y ? y[i] : x[i])));
}

extern "C" {

// out[row] = table[ids[row]], rows of `width`. Grid: rows.
__global__ void embed(half16* out, const half16* table, const unsigned* ids, int width) {
    const half16* from = table + (long long)ids[blockIdx.x] * width;
    half16* to = out + (long long)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) to[i] = from[i];
}

// The same times a factor.
__global__ void embed_scaled(half16* out, const half16* table, const unsigned* ids, int width, float factor) {
    const half16* from = table + (long long)ids[blockIdx.x] * width;
    half16* to = out + (long long)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) to[i] = narrow(widen(from[i]) * factor);
}

// Elements i and half + i turn together, or 2i and 2i + 1. Grid: rows.
__global__ void rotate(half16* x, const float* cosine, const float* sine, int heads, int head_dim, int half,
                       int tokens) {
    rotate_heads(x, cosine, sine, heads, head_dim, half, tokens, 1, half);
}
__global__ void rotate_pairs(half16* x, const float* cosine, const float* sine, int heads, int head_dim,
                             int half, int tokens) {
    rotate_heads(x, cosine, sine, heads, head_dim, half, tokens, 2, 1);
}

// Weights from scores, f32 [matrices, rows, keys] -> p [matrices, rows, keys]. Grid: (rows, matrices).
__global__ void causal_softmax(half16* p, const float* scores, int keys, int first, float scale) {
    long long at = ((long long)blockIdx.y * gridDim.x + blockIdx.x) * keys;
    int seen = min(keys, first + (int)blockIdx.x + 1);
    softmax_row(p + at, scores + at, keys, 0, seen, [&](float x, float max) { return (x - max) * scale; });
}
// The same with a cap where it is not 0, and inside a window.
__global__ void windowed_softmax(half16* p, const float* scores, int keys, int first, float scale, float cap,
                                 int window) {
    long long at = ((long long)blockIdx.y * gridDim.x + blockIdx.x) * keys;
    int position = first + (int)blockIdx.x, begin = first_seen(position, window);
    softmax_row(p + at, scores + at, keys, begin, min(keys, position + 1), [&](float x, float max) {
        return cap ? capped(x * scale, cap) - capped(max * scale, cap) : (x - max) * scale;
    });
}

// x += y, eight elements a thread.
__global__ void add(half16* x, const half16* y, long long count) {
    long long i = 8 * ((long long)blockIdx.x * blockDim.x + threadIdx.x);
    bool aligned = (((long long)x | (long long)y) & 15) == 0;
    if (aligned && i + 8 <= count) {
        auto sum = several<8>((const half16*)x + i), more = several<8>(y + i);
#pragma unroll
        for (int j = 0; j < 8; j++) sum.at[j] = narrow(widen(sum.at[j]) + widen(more.at[j]));
        put_several(x + i, sum);
        return;
    }
    for (long long end = min(i + 8, count); i < end; i++) x[i] = narrow(widen(x[i]) + widen(y[i]));
}

// x += factor * y, the product rounded as well.
__global__ void add_scaled(half16* x, const half16* y, float factor, long long count) {
    wait_for_it();
    let_next_start();
    change(x, y, count, [&](float x, float y) { return x + widen(narrow(y * factor)); });
}

// x *= factor.
__global__ void scale(half16* x, float factor, long long count) {
    wait_for_it();
    let_next_start();
    change(x, 0, count, [&](float x, float) { return x * factor; });
}

// f32 [count]: x = cap * tanh(x / cap).
__global__ void soft_cap(float* x, float cap, long long count) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    wait_for_it();
    let_next_start();
    if (i < count) x[i] = cap * tanhf(x[i] / cap);
}

// The least index of an element that is infinite or no number, if it is less than *found.
__global__ void first_not_finite(unsigned long long* found, const half16* x, long long count) {
    const unsigned exponent = BF16 ? 0x7f80 : 0x7c00;
    long long step = 8ll * gridDim.x * blockDim.x;
    bool aligned = ((long long)x & 15) == 0;
    for (long long i = 8 * ((long long)blockIdx.x * blockDim.x + threadIdx.x); i < count; i += step) {
        int there = min(8ll, count - i), bad = 8;
        Several<half16, 8> v = {};
        if (aligned && there == 8) {
            v = several<8>(x + i);
        } else {
#pragma unroll
            for (int j = 0; j < 8; j++)
                if (j < there) v.at[j] = x[i + j];
        }
#pragma unroll
        for (int j = 7; j >= 0; j--)
            if ((v.at[j] & exponent) == exponent) bad = j;
        if (bad == 8) continue;
        atomicMin(found, (unsigned long long)(i + bad));
        return;
    }
}

// x [rows, width] += bias [width].
__global__ void add_bias(half16* x, const float* bias, int width, long long count) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) x[i] = narrow(widen(x[i]) + bias[i % width]);
}

// Sixteen-bit [count] from f32.
__global__ void narrow_all(half16* out, const float* x, long long count) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = narrow(x[i]);
}

// f32 [count] from sixteen-bit.
__global__ void widen_all(float* out, const half16* x, long long count) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = widen(x[i]);
}

#define COPY_COLUMNS(VALUES)                                                                         \
    __global__ void copy_columns_##VALUES(half16* out, const half16* x, int pitch, int columns) {    \
        copy_columns<VALUES>(out, x, pitch, columns);                                                \
    }
COPY_COLUMNS(8)
COPY_COLUMNS(1)

// out [n, k] = scale * (code - zero); codes [k, n], scales (always f16) and zeros [groups, n], g_idx
// [k]. A block takes 64 channels of 64 outputs and turns them round. Grid: (n / 64, k / 64), block 256.
__global__ void dequantize(half16* out, const unsigned char* codes, const half16* scales,
                           const half16* zeros, const unsigned* g_idx, int k, int n) {
    __shared__ half16 tile[64][66];
    int column = threadIdx.x & 63, row = threadIdx.x >> 6;
    int output = blockIdx.x * 64 + column;
    for (int i = row; i < 64; i += 4) {
        int channel = blockIdx.y * 64 + i;
        if (channel >= k || output >= n) continue;
        long long at = (long long)g_idx[channel] * n + output;
        float scale;
        asm("cvt.f32.f16 %0, %1;" : "=f"(scale) : "h"(scales[at]));
        float code = codes[(long long)channel * n + output];
        tile[column][i] = narrow(scale * (code - (float)zeros[at]));
    }
    __syncthreads();
    int channel = blockIdx.y * 64 + column;
    for (int i = row; i < 64; i += 4) {
        int to = blockIdx.x * 64 + i;
        if (channel < k && to < n) out[(long long)to * k + channel] = tile[i][column];
    }
}

// What a model says about next tokens, from logits q f32 [rows, vocab] and, if `p` is not null,
// those of a reference. Per row: [log-likelihood of target, KL(p || q), both argmax equal].
// Grid: rows.
__global__ void score(double* out, const float* q, const float* p, const unsigned* targets,
                      int vocab) {
    __shared__ float scratch[32];
    __shared__ int best[2];
    long long at = (long long)blockIdx.x * vocab;
    const float* both[2] = {q + at, p ? p + at : q + at};
    float max[2], log_sum[2];
    for (int m = 0; m < 2; m++) {
        const float* x = both[m];
        float top = -INFINITY;
        for (int i = threadIdx.x; i < vocab; i += blockDim.x) top = fmaxf(top, x[i]);
        max[m] = block_max(top, scratch);
        if (threadIdx.x == 0) best[m] = vocab;
        __syncthreads();
        float sum = 0;
        for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
            sum += expf(x[i] - max[m]);
            if (x[i] == max[m]) atomicMin(&best[m], i);
        }
        log_sum[m] = logf(block_sum(sum, scratch));
    }
    float kl = 0;
    float shift = (max[0] + log_sum[0]) - (max[1] + log_sum[1]);
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        float log_p = both[1][i] - max[1] - log_sum[1];
        kl += expf(log_p) * (both[1][i] - both[0][i] + shift);
    }
    kl = block_sum(kl, scratch);
    if (threadIdx.x == 0) {
        double* to = out + (long long)blockIdx.x * 3;
        to[0] = (double)both[0][targets[blockIdx.x]] - max[0] - log_sum[0];
        to[1] = kl;
        to[2] = best[0] == best[1];
    }
}

}
