// What is between the packed products of a pass that reads or writes text, rows are tokens (rows.cuh): in
// blocks as Llama has them. What others have is in other_blocks.cu, which a Llama does not compile.
//
// Norms, turned heads and gates are rounded to sixteen bits where Hugging Face rounds them; weights of
// attention are rounded once where the tensor cores multiply them, their sum is not.
#include "attend.cuh"
#include "rows.cuh"

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
        norm_rows<VALUES, false>(out, x, weight, 0, channels, width, stride, eps);                     \
    }                                                                                                  \
    WRITE_ROWS(gate_rows, VALUES, Gate<Silu>)                                                          \
    __global__ void place_heads_##VALUES(                                                              \
        half16* to_q, half16* keys, half16* values, const half16* q, const half16* k, const half16* v, \
        const float* q_norm, const float* k_norm, const float* cosine, const float* sine, Rows rows,   \
        int heads, int kv_heads, int d, int lanes, int pitch_q, int pitch_kv, int capacity, float eps) { \
        place_heads<VALUES>(to_q, keys, values, q, k, v, q_norm, k_norm, cosine, sine, rows, heads,    \
                            kv_heads, d, lanes, pitch_q, pitch_kv, capacity, eps);                     \
    }

extern "C" {

TEXT(8)
TEXT(1)

}
