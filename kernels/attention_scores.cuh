// Masks and soft caps of attention scores, chosen at compile time.
//   SOFT_CAP 1: a scaled score s becomes cap * tanh(s / cap).
//   WINDOW 1: sliding window; the query at position p sees keys at positions above p - window.
// Attention kernels always take `cap` and `window`, and ignore them where the macro is 0.
#pragma once
#include "half.cuh"

#ifndef SOFT_CAP
#define SOFT_CAP 0
#endif
#ifndef WINDOW
#define WINDOW 0
#endif

// tanh x = 1 - 2 / (e^2x + 1). The absolute error is some units in the last place of `cap`, also for small
// results; the softmax depends on the absolute error.
__device__ __forceinline__ float soft_capped(float score, float cap) {
    return cap - __fdividef(2 * cap, __expf(score * (2 / cap)) + 1);
}

// The first key that the query at `position` sees.
__device__ __forceinline__ int first_visible_key(int position, int window) {
    return WINDOW ? max(0, position + 1 - window) : 0;
}
