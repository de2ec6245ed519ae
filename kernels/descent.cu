// Coordinate descent over the codes of a linear after the GPTQ sweep (gptq-quantizer/src/descent.rs): one
// quantization group at a time, or at most 128 channels of a longer one.
//
// With E = V - Q, where V is the weight that the sweep aimed at, tr(E^T H E) is quadratic in each code. The
// best code is the grid point nearest to q_i + (H E)_i / H_ii. cuBLAS computes H E for the rows of a block;
// when a code moves, this kernel updates H E for the rest of the block.
//
// Eight lanes of a warp serve one output. Each keeps 16 of the block's 128 rows in registers: 4 of every 32,
// so that eight lanes read 128 consecutive bytes of a row of H. The lane that owns a row picks its code and
// shuffles the change to the others, so no barrier separates two channels. Bound by the latency of that chain
// of 128 steps.
#include "grid.cuh"

#define OUTPUTS 32
#define LANES 8
#define CHANNELS 128
#define STRIPES 4 // stripes of 32 rows; a lane has 4 rows of each

// y[reg] += a * row[...] for the rows of this lane.
__device__ __forceinline__ void add_row(float* y, float a, const float* row, int lane) {
#pragma unroll
    for (int p = 0; p < STRIPES; p++) {
        float4 h = *(const float4*)(row + p * 32 + lane * 4);
        y[p * 4 + 0] += a * h.x;
        y[p * 4 + 1] += a * h.y;
        y[p * 4 + 2] += a * h.z;
        y[p * 4 + 3] += a * h.w;
    }
}

__device__ __forceinline__ float sum_of_lanes(float x) {
    for (int apart = LANES / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(~0u, x, apart, LANES);
    return x;
}

// The least-squares scale: the f16 nearest to scale + gradient_along / curvature. Taken only if it is a
// normal f16 of the same sign and lowers the error.
__device__ __forceinline__ float refit_scale(float scale, float gradient_along, float curvature) {
    float refit = round_to_f16(scale + __fdiv_rn(gradient_along, curvature));
    float moved = refit - scale;
    bool storable_scale =
        fabsf(refit) <= 65504.0f && fabsf(refit) >= 6.103515625e-5f && (refit < 0) == (scale < 0);
    return storable_scale && moved * (2.0f * gradient_along - moved * curvature) > 0.0f ? refit : scale;
}

extern "C" {

// One pass over the rows of a block, stored channels channel[0..rows] of one group.
//   gradient [parts, rows, n]   partial sums of H E (split-K)
//   hessian [rows, k]           the rows of H, columns in stored order, without the damping added [k]
//   codes, error [k, n], scales [groups, n]   updated in place
// `whole_group`: the block is its whole group, and the scale is refitted too.
// Launch grid: n / 32; block: (8, 32).
__global__ void coordinate_descent(unsigned char* codes, float* scales, const float* zeros, float* error,
                                   const float* gradient, int parts, const float* hessian,
                                   const double* added, const unsigned* channel, int k, int n, int rows,
                                   int group, int whole_group, float max_code) {
    extern __shared__ float shared[];
    __shared__ float grid[3][OUTPUTS];  // zero point, scale before, scale after
    __shared__ float inverse[CHANNELS]; // 1 / H_ii
    float* h = shared;                  // [CHANNELS][CHANNELS]
    float (*tile)[OUTPUTS + 1] = (float (*)[OUTPUTS + 1])(shared + CHANNELS * CHANNELS); // [CHANNELS]
    int lane = threadIdx.x, y = threadIdx.y, thread = y * LANES + lane;
    int first = blockIdx.x * OUTPUTS;
    for (int at = thread; at < CHANNELS * CHANNELS; at += LANES * OUTPUTS) {
        int i = at / CHANNELS, j = at % CHANNELS;
        float value = i < rows && j < rows ? hessian[(long long)i * k + channel[j]] : (float)(i == j);
        h[at] = i == j && i < rows ? (float)((double)value + added[channel[i]]) : value;
    }
    if (thread < OUTPUTS) {
        bool live = first + thread < n;
        long long at = (long long)group * n + first + thread;
        grid[0][thread] = live ? zeros[at] : 0.0f;
        grid[1][thread] = live ? scales[at] : 1.0f;
    }
    for (int at = thread; at < CHANNELS * OUTPUTS; at += LANES * OUTPUTS) {
        int i = at / OUTPUTS, c = at % OUTPUTS;
        float sum = 0.0f;
        if (i < rows && first + c < n) {
            for (int part = 0; part < parts; part++)
                sum += gradient[((long long)part * rows + i) * n + first + c];
            sum += (float)added[channel[i]] * error[(long long)channel[i] * n + first + c];
        }
        tile[i][c] = sum;
    }
    __syncthreads();
    if (thread < CHANNELS) inverse[thread] = 1.0f / h[thread * CHANNELS + thread];
    float zero = grid[0][y], scale = grid[1][y], per_scale = 1.0f / scale;
    float residual[STRIPES * 4], steps[STRIPES * 4];
#pragma unroll
    for (int reg = 0; reg < STRIPES * 4; reg++) residual[reg] = tile[reg / 4 * 32 + lane * 4 + reg % 4][y];
    __syncthreads();
    for (int at = thread; at < CHANNELS * OUTPUTS; at += LANES * OUTPUTS) {
        int i = at / OUTPUTS, c = at % OUTPUTS;
        bool there = i < rows && first + c < n;
        tile[i][c] = there ? (float)codes[(long long)channel[i] * n + first + c] - grid[0][c] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int reg = 0; reg < STRIPES * 4; reg++) steps[reg] = tile[reg / 4 * 32 + lane * 4 + reg % 4][y];

#pragma unroll
    for (int p = 0; p < STRIPES; p++)
        for (int owner = 0; owner < LANES; owner++)
#pragma unroll
            for (int t = 0; t < 4; t++) {
                int i = p * 32 + owner * 4 + t, reg = p * 4 + t;
                if (i >= rows) break;
                // A step waits for the shuffle alone: 128 of them follow one another.
                float best = steps[reg] + residual[reg] * inverse[i] * per_scale;
                float code = nearest_step(best, zero, max_code);
                float moved = __shfl_sync(~0u, (code - steps[reg]) * scale, owner, LANES);
                if (lane == owner) steps[reg] = code;
                add_row(residual, -moved, h + i * CHANNELS, lane);
            }

    float refit = scale;
    if (whole_group) {
        float product[STRIPES * 4] = {}, gradient_along = 0, curvature = 0;
#pragma unroll
        for (int p = 0; p < STRIPES; p++)
            for (int owner = 0; owner < LANES; owner++)
#pragma unroll
                for (int t = 0; t < 4; t++) {
                    int i = p * 32 + owner * 4 + t;
                    if (i >= rows) break;
                    float step = __shfl_sync(~0u, steps[p * 4 + t], owner, LANES);
                    add_row(product, step, h + i * CHANNELS, lane);
                }
#pragma unroll
        for (int reg = 0; reg < STRIPES * 4; reg++) {
            gradient_along += steps[reg] * residual[reg];
            curvature += steps[reg] * product[reg];
        }
        refit = refit_scale(scale, sum_of_lanes(gradient_along), sum_of_lanes(curvature));
    }

    __syncthreads();
    if (lane == 0) {
        grid[2][y] = refit;
        if (whole_group && first + y < n) scales[(long long)group * n + first + y] = refit;
    }
#pragma unroll
    for (int reg = 0; reg < STRIPES * 4; reg++) tile[reg / 4 * 32 + lane * 4 + reg % 4][y] = steps[reg];
    __syncthreads();
    for (int at = thread; at < rows * OUTPUTS; at += LANES * OUTPUTS) {
        int i = at / OUTPUTS, c = at % OUTPUTS;
        if (first + c >= n) continue;
        long long place = (long long)channel[i] * n + first + c;
        float before = (float)codes[place] - grid[0][c], after = tile[i][c];
        float moved = after * grid[2][c] - before * grid[1][c];
        if (moved == 0.0f) continue;
        codes[place] = (unsigned char)(int)(after + grid[0][c]);
        error[place] -= moved;
    }
}

// out[i][j] = h[channel[i]][j], h [k, k]. Launch grid: (k / 256, rows).
__global__ void gather_rows(float* out, const float* h, const unsigned* channel, int k) {
    int j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j < k) out[(long long)blockIdx.y * k + j] = h[(long long)channel[blockIdx.y] * k + j];
}

// out[channel[a]][n] = x[a][n], f32 [k, n]. Launch grid: (n / 256, k).
__global__ void scatter_rows(float* out, const float* x, const unsigned* channel, int n) {
    int col = blockIdx.x * blockDim.x + threadIdx.x;
    if (col < n) out[(long long)channel[blockIdx.y] * n + col] = x[(long long)blockIdx.y * n + col];
}

// e[c][n] -= scale * (code - zero), in stored order. Launch grid: (n / 256, k).
__global__ void subtract_dequantized(float* e, const unsigned char* codes, const float* scales,
                                     const float* zeros, const unsigned* g_idx, int n) {
    int col = blockIdx.x * blockDim.x + threadIdx.x;
    if (col >= n) return;
    long long at = (long long)blockIdx.y * n + col, grid = (long long)g_idx[blockIdx.y] * n + col;
    e[at] -= scales[grid] * ((float)codes[at] - zeros[grid]);
}
}
