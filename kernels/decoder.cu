// Elementwise and row operations of a decoder block in calibration and evaluation: embedding, RoPE, softmax,
// residual sums, dequantization, log-likelihoods. The norms, SwiGLU and the kernels of prefill and decode are
// in llama_block.cu and other_blocks.cu.
//
// Tensors are row-major 16-bit floats, rows are tokens. Values are computed in f32 and rounded once. All
// kernels are bound by memory bandwidth.
#define SOFT_CAP 1
#define WINDOW 1
#include "attention_scores.cuh"

// RoPE in place on the first 2 `half` elements of each head of x [rows, heads * head_dim]. Row r is at
// position r % tokens of the tables cosine and sine [tokens, half]. Pair i, rotated by angle i, is element
// stride * i and the element `distance` after it.
__device__ __forceinline__ void rope_heads(half16* x, const float* cosine, const float* sine, int heads,
                                           int head_dim, int half, int tokens, int stride, int distance) {
    int pairs = heads * half;
    long long table = (long long)(blockIdx.x % tokens) * half;
    half16* row = x + (long long)blockIdx.x * heads * head_dim;
    for (int p = threadIdx.x; p < pairs; p += blockDim.x) {
        int i = p % half;
        half16* at = row + (p / half) * head_dim + stride * i;
        float a = widen(at[0]), b = widen(at[distance]);
        float c = cosine[table + i], s = sine[table + i];
        at[0] = narrow(a * c - b * s);
        at[distance] = narrow(b * c + a * s);
    }
}

// Causal softmax of a row by one block: score(x, max) gives the exponent of a raw score x. Keys outside
// begin..visible get weight 0.
template <class Score>
__device__ __forceinline__ void softmax_row(half16* p, const float* row, int keys, int begin, int visible,
                                            Score score) {
    __shared__ float scratch[32];
    float max = -INFINITY;
    for (int i = begin + threadIdx.x; i < visible; i += blockDim.x) max = fmaxf(max, row[i]);
    max = block_max(max, scratch);
    float sum = 0;
    for (int i = begin + threadIdx.x; i < visible; i += blockDim.x) sum += __expf(score(row[i], max));
    float inverse = 1.0f / block_sum(sum, scratch);
    for (int i = threadIdx.x; i < keys; i += blockDim.x)
        p[i] = i >= begin && i < visible ? narrow(__expf(score(row[i], max)) * inverse) : (half16)0;
}

// out [rows, columns] from rows that are `pitch` elements apart. Launch grid: rows.
template <int VALUES>
__device__ __forceinline__ void copy_columns(half16* out, const half16* x, int pitch, int columns) {
    x += (long long)blockIdx.x * pitch, out += (long long)blockIdx.x * columns;
    for (int i = threadIdx.x * VALUES; i < columns; i += blockDim.x * VALUES)
        store_vector(out + i, load_vector<VALUES>(x + i));
}

// x = f(x, y), eight elements per thread; f(x, x) where y is null.
template <class F>
__device__ __forceinline__ void update_elements(half16* x, const half16* y, long long count, F f) {
    long long i = 8 * ((long long)blockIdx.x * blockDim.x + threadIdx.x);
    bool aligned = (((long long)x | (long long)y) & 15) == 0;
    if (aligned && i + 8 <= count) {
        auto to = load_vector<8>((const half16*)x + i), from = to;
        if (y) from = load_vector<8>(y + i);
#pragma unroll
        for (int j = 0; j < 8; j++) to.at[j] = narrow(f(widen(to.at[j]), widen(from.at[j])));
        store_vector(x + i, to);
        return;
    }
    for (long long end = min(i + 8, count); i < end; i++)
        x[i] = narrow(f(widen(x[i]), widen(y ? y[i] : x[i])));
}

extern "C" {

// out[row] = table[ids[row]], rows of `width`. Launch grid: rows.
__global__ void embed(half16* out, const half16* table, const unsigned* ids, int width) {
    const half16* from = table + (long long)ids[blockIdx.x] * width;
    half16* to = out + (long long)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) to[i] = from[i];
}

// out[row] = factor * table[ids[row]]. Launch grid: rows.
__global__ void embed_scaled(half16* out, const half16* table, const unsigned* ids, int width, float factor) {
    const half16* from = table + (long long)ids[blockIdx.x] * width;
    half16* to = out + (long long)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) to[i] = narrow(widen(from[i]) * factor);
}

// RoPE of pairs (i, i + half) as in Llama, and of pairs (2i, 2i + 1), interleaved as in GPT-J.
// Launch grid: rows.
__global__ void rope(half16* x, const float* cosine, const float* sine, int heads, int head_dim, int half,
                     int tokens) {
    rope_heads(x, cosine, sine, heads, head_dim, half, tokens, 1, half);
}
__global__ void rope_interleaved(half16* x, const float* cosine, const float* sine, int heads, int head_dim,
                                 int half, int tokens) {
    rope_heads(x, cosine, sine, heads, head_dim, half, tokens, 2, 1);
}

// p = causal softmax(scale * scores), scores f32 and p 16-bit [matrices, rows, keys].
// Launch grid: (rows, matrices).
__global__ void causal_softmax(half16* p, const float* scores, int keys, int first, float scale) {
    long long at = ((long long)blockIdx.y * gridDim.x + blockIdx.x) * keys;
    int visible = min(keys, first + (int)blockIdx.x + 1);
    softmax_row(p + at, scores + at, keys, 0, visible, [&](float x, float max) { return (x - max) * scale; });
}
// Causal softmax with a soft cap, unless `cap` is 0, and a sliding window.
__global__ void windowed_softmax(half16* p, const float* scores, int keys, int first, float scale, float cap,
                                 int window) {
    long long at = ((long long)blockIdx.y * gridDim.x + blockIdx.x) * keys;
    int position = first + (int)blockIdx.x, begin = first_visible_key(position, window);
    softmax_row(p + at, scores + at, keys, begin, min(keys, position + 1), [&](float x, float max) {
        return cap ? soft_capped(x * scale, cap) - soft_capped(max * scale, cap) : (x - max) * scale;
    });
}

// x += y, eight elements per thread.
__global__ void add(half16* x, const half16* y, long long count) {
    long long i = 8 * ((long long)blockIdx.x * blockDim.x + threadIdx.x);
    bool aligned = (((long long)x | (long long)y) & 15) == 0;
    if (aligned && i + 8 <= count) {
        auto sum = load_vector<8>((const half16*)x + i), more = load_vector<8>(y + i);
#pragma unroll
        for (int j = 0; j < 8; j++) sum.at[j] = narrow(widen(sum.at[j]) + widen(more.at[j]));
        store_vector(x + i, sum);
        return;
    }
    for (long long end = min(i + 8, count); i < end; i++) x[i] = narrow(widen(x[i]) + widen(y[i]));
}

// x += factor * y; the product is rounded to 16 bits before the sum.
__global__ void add_scaled(half16* x, const half16* y, float factor, long long count) {
    pdl_wait();
    pdl_trigger();
    update_elements(x, y, count, [&](float x, float y) { return x + widen(narrow(y * factor)); });
}

// x *= factor.
__global__ void scale(half16* x, float factor, long long count) {
    pdl_wait();
    pdl_trigger();
    update_elements(x, 0, count, [&](float x, float) { return x * factor; });
}

// x = cap * tanh(x / cap), f32 [count].
__global__ void soft_cap(float* x, float cap, long long count) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    pdl_wait();
    pdl_trigger();
    if (i < count) x[i] = cap * tanhf(x[i] / cap);
}

// *found = min(*found, index of the first element that is infinite or NaN).
__global__ void first_not_finite(unsigned long long* found, const half16* x, long long count) {
    const unsigned exponent = BF16 ? 0x7f80 : 0x7c00;
    long long stride = 8ll * gridDim.x * blockDim.x;
    bool aligned = ((long long)x & 15) == 0;
    for (long long i = 8 * ((long long)blockIdx.x * blockDim.x + threadIdx.x); i < count; i += stride) {
        int there = min(8ll, count - i), bad = 8;
        Vector<half16, 8> v = {};
        if (aligned && there == 8) {
            v = load_vector<8>(x + i);
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

// f32 to 16 bits.
__global__ void narrow_all(half16* out, const float* x, long long count) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = narrow(x[i]);
}

// 16 bits to f32.
__global__ void widen_all(float* out, const half16* x, long long count) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = widen(x[i]);
}

#define COPY_COLUMNS(VALUES)                                                                      \
    __global__ void copy_columns_##VALUES(half16* out, const half16* x, int pitch, int columns) { \
        copy_columns<VALUES>(out, x, pitch, columns);                                             \
    }
COPY_COLUMNS(8)
COPY_COLUMNS(1)

// Dequantizes: out [n, k] = scale * (code - zero), with codes [k, n], scales (always f16) and zeros [groups,
// n], g_idx [k]. A block transposes a tile of 64 channels by 64 outputs in shared memory.
// Launch grid: (n / 64, k / 64); block: 256.
__global__ void dequantize(half16* out, const unsigned char* codes, const half16* scales, const half16* zeros,
                           const unsigned* g_idx, int k, int n) {
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

// Scores next-token predictions from logits q f32 [rows, vocab] and, unless p is null, logits p of a
// reference. out f64 [rows, 3]: log-likelihood of the target, KL(p || q), whether both have the same argmax.
// Launch grid: rows.
__global__ void score(double* out, const float* q, const float* p, const unsigned* targets, int vocab) {
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
