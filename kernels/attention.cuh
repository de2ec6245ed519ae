// All attention kernels, instantiated for their head dimensions. llama_block.cu compiles them as they are;
// three other files compile them with a soft cap of the scores, a sliding window, or both
// (attention_scores.cuh).
//
//   decode    attention_decode_*          split-KV, one query head per block       any head dimension
//             attention_decode_gqa_*      split-KV, up to 8 query heads by mma     64 and 128
//             merge_splits                combines the splits of both
//   prefill   attention_prefill_*         FlashAttention by mma                    64 and 128
//             attention_prefill_wgmma_*   FlashAttention by wgmma, Hopper only     64 and 128
#pragma once
#include "attention_prefill_wgmma.cuh"
#include "attention_decode_gqa.cuh"
#include "attention_decode.cuh"
#include "attention_prefill.cuh"

// BLOCKS: blocks resident on a multiprocessor; fewer leave more registers to each thread.
#define ATTENTION_DECODE(VALUES, LOADS, KEYS, BLOCKS)                                                    \
    __global__ void __launch_bounds__(128, BLOCKS) attention_decode_##VALUES##_##LOADS(                  \
        float* partials, const half16* q, const half16* keys, const half16* values, const int* lengths,  \
        int capacity, int kv_heads, int d, int split_keys, float scale, float cap, int window) {         \
        attention_decode<VALUES, LOADS, KEYS>(partials, q, keys, values, lengths, capacity, kv_heads, d, \
                                              split_keys, scale, cap, window);                           \
    }

#define ATTENTION_DECODE_GQA(D)                                                                             \
    __global__ void __launch_bounds__(128, 4) attention_decode_gqa_##D(                                     \
        float* partials, const half16* q, const half16* keys, const half16* values, const int* lengths,     \
        int capacity, int kv_heads, int heads_per_kv, int split_keys, float scale, float cap, int window) { \
        attention_decode_gqa<D>(partials, q, keys, values, lengths, capacity, kv_heads, heads_per_kv,       \
                                split_keys, scale, cap, window);                                            \
    }

#define ATTENTION_PREFILL(D)                                                                            \
    __global__ void __launch_bounds__(128)                                                              \
        attention_prefill_##D(half16* out, const half16* q, const half16* keys, const half16* values,   \
                              int count, int first, int kv_heads, float scale, float cap, int window) { \
        attention_prefill<D>(out, q, keys, values, count, first, kv_heads, scale, cap, window);         \
    }

#define ATTENTION_PREFILL_WGMMA(D)                                                                    \
    __global__ void __launch_bounds__(256) attention_prefill_wgmma_##D(                               \
        half16* out, const half16* q, const half16* keys, const half16* values, int count, int first, \
        int kv_heads, float scale, float cap, int window) {                                           \
        attention_prefill_wgmma<D>(out, q, keys, values, count, first, kv_heads, scale, cap, window); \
    }

extern "C" {

ATTENTION_DECODE(8, 1, 4, 4) // d = 64
ATTENTION_DECODE(8, 2, 4, 4) // d = 128
ATTENTION_DECODE(8, 4, 2, 4) // d = 256
ATTENTION_DECODE(8, 8, 1, 2) // d up to 512, a multiple of 8
ATTENTION_DECODE(2, 8, 2, 4) // d up to 128, even
ATTENTION_DECODE(2, 16, 1, 4)

ATTENTION_DECODE_GQA(64)
ATTENTION_DECODE_GQA(128)

ATTENTION_PREFILL(64)
ATTENTION_PREFILL(128)
#if WGMMA
ATTENTION_PREFILL_WGMMA(64)
ATTENTION_PREFILL_WGMMA(128)
#endif
}
