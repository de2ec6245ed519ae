// Which keys a query sees and what becomes of its scores. CAP 1: scaled scores s become cap * tanh(s / cap).
// WINDOW 1: the query at position p sees keys at positions above p - window. Kernels of attention take
// `cap` and `window` always, and read neither where CAP or WINDOW is 0.
#pragma once
#include "half.cuh"

#ifndef CAP
#define CAP 0
#endif
#ifndef WINDOW
#define WINDOW 0
#endif

// tanh x = 1 - 2 / (e^2x + 1): wrong by some units in the last place of `cap`, also where the result is small,
// which is what a weight feels of it.
__device__ __forceinline__ float capped(float score, float cap) {
    return cap - __fdividef(2 * cap, __expf(score * (2 / cap)) + 1);
}

// The first key that the query at `position` sees.
__device__ __forceinline__ int first_seen(int position, int window) {
    return WINDOW ? max(0, position + 1 - window) : 0;
}
