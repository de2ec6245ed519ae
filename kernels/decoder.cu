// The operations of a decoder block beside its matrix products, its norms and its gate (text.cu).
// Tensors are row-major sixteen-bit floats, rows are tokens; every value is computed in f32 and rounded
// once.
#include "half.cuh"

extern "C" {

// out[row] = table[ids[row]], rows of `width`. Grid: rows.
__global__ void embed(half16* out, const half16* table, const unsigned* ids, int width) {
    const half16* from = table + (long long)ids[blockIdx.x] * width;
    half16* to = out + (long long)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) to[i] = from[i];
}

// Rotary embedding in the rotate-half layout, in place. x [rows, heads * head_dim]; row r stands
// at position r % tokens of cos and sin [tokens, head_dim / 2]. Grid: rows.
__global__ void rotate(half16* x, const float* cosine, const float* sine, int heads, int head_dim,
                       int tokens) {
    int half_dim = head_dim / 2, pairs = heads * half_dim;
    long long table = (long long)(blockIdx.x % tokens) * half_dim;
    half16* row = x + (long long)blockIdx.x * heads * head_dim;
    for (int p = threadIdx.x; p < pairs; p += blockDim.x) {
        int i = p % half_dim;
        half16* at = row + (p / half_dim) * head_dim + i;
        float a = widen(at[0]), b = widen(at[half_dim]);
        float c = cosine[table + i], s = sine[table + i];
        at[0] = narrow(a * c - b * s);
        at[half_dim] = narrow(b * c + a * s);
    }
}

// Softmax over the keys 0..=first + row of each score row, zero beyond.
// scores f32 [matrices, rows, keys] -> p [matrices, rows, keys]. Grid: (rows, matrices).
__global__ void causal_softmax(half16* p, const float* scores, int keys, int first, float scale) {
    __shared__ float scratch[32];
    long long at = ((long long)blockIdx.y * gridDim.x + blockIdx.x) * keys;
    int seen = min(keys, first + (int)blockIdx.x + 1);
    const float* row = scores + at;
    float max = -INFINITY;
    for (int i = threadIdx.x; i < seen; i += blockDim.x) max = fmaxf(max, row[i]);
    max = block_max(max, scratch);
    float sum = 0;
    for (int i = threadIdx.x; i < seen; i += blockDim.x) sum += __expf((row[i] - max) * scale);
    float inverse = 1.0f / block_sum(sum, scratch);
    for (int i = threadIdx.x; i < keys; i += blockDim.x)
        p[at + i] = i < seen ? narrow(__expf((row[i] - max) * scale) * inverse) : (half16)0;
}

// One new token a sequence against its cache. q [sequences, heads * d]; k, v caches
// [sequences, capacity, kv_heads * d] with `seen` tokens; scores in shared memory [seen].
// Grid: (heads, sequences); threads: a multiple of 32.
__global__ void attend_cached(half16* out, const half16* q, const half16* k, const half16* v,
                              int capacity, int seen, int kv_heads, int d, float scale) {
    extern __shared__ float weight[];
    __shared__ float scratch[32];
    int heads = gridDim.x, head = blockIdx.x, kv = head / (heads / kv_heads);
    const half16* query = q + ((long long)blockIdx.y * heads + head) * d;
    long long row = (long long)kv_heads * d, base = (long long)blockIdx.y * capacity * row + kv * d;
    float max = -INFINITY;
    for (int t = threadIdx.x; t < seen; t += blockDim.x) {
        float dot = 0;
        for (int i = 0; i < d; i++) dot += widen(query[i]) * widen(k[base + t * row + i]);
        weight[t] = dot * scale;
        max = fmaxf(max, weight[t]);
    }
    max = block_max(max, scratch);
    float sum = 0;
    for (int t = threadIdx.x; t < seen; t += blockDim.x) {
        weight[t] = __expf(weight[t] - max);
        sum += weight[t];
    }
    float inverse = 1.0f / block_sum(sum, scratch);
    for (int i = threadIdx.x; i < d; i += blockDim.x) {
        float value = 0;
        for (int t = 0; t < seen; t++) value += weight[t] * widen(v[base + t * row + i]);
        out[((long long)blockIdx.y * heads + head) * d + i] = narrow(value * inverse);
    }
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

// out [n, k] = scale * (code - zero); codes [k, n], scales (always f16) and zeros [groups, n], g_idx
// [k]. A block takes 64 channels of 64 outputs and turns them round. Grid: (n / 64, k / 64), block 256.
__global__ void dequantise(half16* out, const unsigned char* codes, const half16* scales,
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
