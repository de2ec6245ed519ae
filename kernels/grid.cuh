// Stored grids: a scale rounded to f16 and a whole zero, as gptq-quantizer/src/grid.rs has them.
#pragma once

struct Rule {
    float max_code;
    float min_zero;
    float least; // smallest share of the range that the search tries
    int sym;
    int full_range; // symmetric scales may be negative
    int shares;     // tried for each group; 1 is no search
    int ways;       // grids of each share: of either sign, or with zeros beside the one that follows
};

__device__ __forceinline__ float to_half(float x) {
    unsigned short y;
    float z;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    asm("cvt.f32.f16 %0, %1;" : "=f"(z) : "h"(y));
    return z;
}

// The nearest f16 that is neither zero nor subnormal; 1 for an all-zero group. A scale beyond f16 is
// infinite, and the host reports it.
__device__ __forceinline__ float storable(float scale) {
    return scale == 0.0f ? 1.0f : to_half(fmaxf(scale, 6.103515625e-5f));
}

__device__ __forceinline__ float2 fit_range(float low, float high, Rule rule) {
    if (rule.sym) {
        float reach = fmaxf(high, -low);
        float scale = storable(__fdiv_rn(2.0f * reach, rule.max_code));
        // The side of the largest weight gets the code that the other side has not.
        return make_float2(rule.full_range && high > -low ? -scale : scale, (rule.max_code + 1.0f) * 0.5f);
    }
    if (low == 0.0f && high == 0.0f) return make_float2(1.0f, fmaxf(rule.min_zero, 1.0f));
    float scale = storable(__fdiv_rn(high - low, rule.max_code));
    // Its zero would be 0 and choose another scale, which says nothing of what went wrong.
    if (scale > 65504.0f) return make_float2(scale, rule.min_zero);
    float zero = fminf(fmaxf(roundf(__fdiv_rn(-low, scale)), 0.0f), rule.max_code);
    if (zero >= rule.min_zero) return make_float2(scale, zero);
    return make_float2(storable(__fdiv_rn(high, rule.max_code - rule.min_zero)), rule.min_zero);
}

__device__ __forceinline__ float nearest(float x, float zero, float max_code) {
    return rintf(fminf(fmaxf(x, -zero), max_code - zero));
}

// Candidate c of a group with this range. Way 0 of a share is the grid that follows from it; the other
// way of a symmetric one has the other sign, those of an asymmetric one have zeros up to two steps away.
__device__ __forceinline__ float2 candidate(float low, float high, int c, Rule rule) {
    int number = c / rule.ways, way = c % rule.ways;
    float share = __fsub_rn(1.0f, __fdiv_rn(__fmul_rn((float)number, 1.0f - rule.least), (float)(rule.shares - 1)));
    float2 grid = fit_range(low * share, high * share, rule);
    if (way == 0) return grid;
    if (rule.sym) return make_float2(-grid.x, grid.y);
    float shift = (float)((way + 1) / 2) * (way % 2 ? -1.0f : 1.0f);
    grid.y = fminf(fmaxf(grid.y + shift, rule.min_zero), rule.max_code);
    return grid;
}
