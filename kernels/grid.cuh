// Quantization grids of a group: a scale rounded to f16 and an integer zero point. A weight w is stored as
// code = round(w / scale) + zero, limited to 0..max_code. gptq-quantizer/src/grid.rs computes the same on a
// CPU.
#pragma once

// The rules by which a grid is chosen; `RawGridRule` in cuda/sweep.rs is the same struct.
struct GridRule {
    float max_code;
    float min_zero;
    float min_share; // smallest share of the range that the grid search tries
    int sym;
    int full_range; // symmetric grids may have a negative scale
    int shares;     // shares tried for each group; 1: no search
    // Grids of each share: both signs of a symmetric scale, or zero points beside the computed one.
    int variants;
};

__device__ __forceinline__ float round_to_f16(float x) {
    unsigned short y;
    float z;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    asm("cvt.f32.f16 %0, %1;" : "=f"(z) : "h"(y));
    return z;
}

// The nearest f16 that is neither zero nor subnormal; 1 for an all-zero group. A scale beyond f16 is
// infinite, and the host reports it.
__device__ __forceinline__ float storable_scale(float scale) {
    return scale == 0.0f ? 1.0f : round_to_f16(fmaxf(scale, 6.103515625e-5f));
}

__device__ __forceinline__ float2 grid_of_range(float low, float high, GridRule rule) {
    if (rule.sym) {
        float reach = fmaxf(high, -low);
        float scale = storable_scale(__fdiv_rn(2.0f * reach, rule.max_code));
        // The side of the largest weight gets the extra code.
        return make_float2(rule.full_range && high > -low ? -scale : scale, (rule.max_code + 1.0f) * 0.5f);
    }
    if (low == 0.0f && high == 0.0f) return make_float2(1.0f, fmaxf(rule.min_zero, 1.0f));
    float scale = storable_scale(__fdiv_rn(high - low, rule.max_code));
    // The zero point would be 0 and fall below min_zero. The scale below, of another range, would not show
    // the overflow.
    if (scale > 65504.0f) return make_float2(scale, rule.min_zero);
    float zero = fminf(fmaxf(roundf(__fdiv_rn(-low, scale)), 0.0f), rule.max_code);
    if (zero >= rule.min_zero) return make_float2(scale, zero);
    return make_float2(storable_scale(__fdiv_rn(high, rule.max_code - rule.min_zero)), rule.min_zero);
}

__device__ __forceinline__ float nearest_step(float x, float zero, float max_code) {
    return rintf(fminf(fmaxf(x, -zero), max_code - zero));
}

// Candidate c of the grid search in the range low..high. Variant 0 of a share is the grid of the shrunk
// range. The other variant of a symmetric grid has the opposite sign; those of an asymmetric grid move the
// zero point by 1 or 2.
__device__ __forceinline__ float2 candidate(float low, float high, int c, GridRule rule) {
    int number = c / rule.variants, way = c % rule.variants;
    float share =
        __fsub_rn(1.0f, __fdiv_rn(__fmul_rn((float)number, 1.0f - rule.min_share), (float)(rule.shares - 1)));
    float2 grid = grid_of_range(low * share, high * share, rule);
    if (way == 0) return grid;
    if (rule.sym) return make_float2(-grid.x, grid.y);
    float shift = (float)((way + 1) / 2) * (way % 2 ? -1.0f : 1.0f);
    grid.y = fminf(fmaxf(grid.y + shift, rule.min_zero), rule.max_code);
    return grid;
}
