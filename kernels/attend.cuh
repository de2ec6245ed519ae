// The kernels of attention, compiled for scores as they are, for those with a cap, for windows, and for both
// (scores.cuh).
#pragma once
#include "attend_group.cuh"
#include "attend_heads.cuh"
#include "attend_newest.cuh"
#include "attend_prompt.cuh"

// BLOCKS of them on a multiprocessor at a time: fewer have more registers each.
#define ATTEND_SHARE(VALUES, PIECES, KEYS, BLOCKS)                                                     \
    __global__ void __launch_bounds__(128, BLOCKS) attend_share_##VALUES##_##PIECES(                   \
        float* parts, const half16* q, const half16* keys, const half16* values, const int* held,      \
        int capacity, int kv_heads, int d, int share, float scale, float cap, int window) {            \
        attend_share<VALUES, PIECES, KEYS>(parts, q, keys, values, held, capacity, kv_heads, d, share, \
                                           scale, cap, window);                                        \
    }

#define ATTEND_HEADS(D)                                                                                \
    __global__ void __launch_bounds__(128, 4) attend_heads_##D(                                        \
        float* parts, const half16* q, const half16* keys, const half16* values, const int* held,      \
        int capacity, int kv_heads, int of, int share, float scale, float cap, int window) {           \
        attend_heads<D>(parts, q, keys, values, held, capacity, kv_heads, of, share, scale, cap, window); \
    }

#define ATTEND_PROMPT(D)                                                                               \
    __global__ void __launch_bounds__(128) attend_prompt_##D(                                          \
        half16* out, const half16* q, const half16* keys, const half16* values, int count, int first,  \
        int kv_heads, float scale, float cap, int window) {                                            \
        attend_prompt<D>(out, q, keys, values, count, first, kv_heads, scale, cap, window);            \
    }

#define ATTEND_GROUP(D)                                                                                \
    __global__ void __launch_bounds__(256) attend_group_##D(                                           \
        half16* out, const half16* q, const half16* keys, const half16* values, int count, int first,  \
        int kv_heads, float scale, float cap, int window) {                                            \
        attend_group<D>(out, q, keys, values, count, first, kv_heads, scale, cap, window);             \
    }

extern "C" {

ATTEND_SHARE(8, 1, 4, 4) // heads of 64
ATTEND_SHARE(8, 2, 4, 4) // of 128
ATTEND_SHARE(8, 4, 2, 4) // of 256
ATTEND_SHARE(8, 8, 1, 2) // any multiple of 8 up to 512
ATTEND_SHARE(2, 8, 2, 4) // any even width up to 128
ATTEND_SHARE(2, 16, 1, 4)

ATTEND_HEADS(64)
ATTEND_HEADS(128)

ATTEND_PROMPT(64)
ATTEND_PROMPT(128)
#if WGMMA
ATTEND_GROUP(64)
ATTEND_GROUP(128)
#endif

}
