// Straight-through rounding of a linear that is trained (gptq-kernels/src/backward/rounding.rs): latents to
// weights and codes, and the step of latents and scales by LSQ's gradients (Esser et al. 2020) and Adam
// (Kingma and Ba 2015). With s the stored scale, z the zero and x = latent / s, the code is clamp(round(x) +
// z) and the weight (code - z) s; dw / dlatent is 1 where nothing was clamped, else 0, and dw / ds is
// round(x) - x there, else code - z.
//
// Latents are f32 [k, n] in stored order, scales and zeros f32 [groups, n], g_idx [k] the group of a
// channel. A thread serves one output, so that neighbours read neighbours, and every sum runs over channels
// in one order. Operations are rounded one by one, as on a CPU: weights and codes are its own bit for bit,
// and so are latents and scales after a step on equal gradients of weights. Bound by memory bandwidth.
#include "grid.cuh"
#include "half.cuh"

#define TILE 64   // channels and outputs
#define AT_ONCE 4 // channels that a thread reads before it moves the first

// A number to the nearest whole one, half to even, by adding 1.5 * 2^23: 0 has no sign then.
__device__ __forceinline__ float whole(float x) {
    return __fsub_rn(__fadd_rn(x, 12582912.0f), 12582912.0f);
}

// The nearest f16 that is neither zero nor subnormal, its sign kept.
__device__ __forceinline__ float stored_scale(float scale) {
    float stored = round_to_f16(scale);
    return fabsf(stored) < 6.103515625e-5f ? copysignf(6.103515625e-5f, stored) : stored;
}

// A grid of a group and an output.
struct Grid {
    float scale, zero, low, high; // low and high: steps from the zero to the first and the last code
};

__device__ __forceinline__ Grid grid_at(const float* scales, const float* zeros, long long at,
                                        float max_code) {
    float zero = zeros[at];
    return {stored_scale(scales[at]), zero, 0.0f - zero, max_code - zero}; // not -zero, the other 0
}

// Steps from the zero to the weight of x = latent / scale; `inside`: it is x rounded, not clamped.
__device__ __forceinline__ float rounded(float x, Grid grid, bool& inside) {
    // A step beyond the codes, so that rounding by addition is right for any x.
    float steps = whole(fminf(fmaxf(x, grid.low - 1.0f), grid.high + 1.0f));
    inside = steps >= grid.low && steps <= grid.high;
    steps = steps < grid.low ? grid.low : steps;
    return steps > grid.high ? grid.high : steps;
}

// The numbers of a step of Adam; `RawAdamStep` in cuda/latents.rs is the same struct.
struct AdamStep {
    float decays[2], shares[2];
    float rate, correction, epsilon; // the correction is of the root of the mean square
};

// Moves a parameter; the moments `mean` and `square` are updated.
__device__ __forceinline__ float moved(float parameter, float gradient, float& mean, float& square,
                                       const AdamStep& step) {
    mean = __fadd_rn(__fmul_rn(step.decays[0], mean), __fmul_rn(step.shares[0], gradient));
    square = __fadd_rn(__fmul_rn(step.decays[1], square),
                       __fmul_rn(step.shares[1], __fmul_rn(gradient, gradient)));
    float root = __fmul_rn(__fsqrt_rn(square), step.correction);
    return __fsub_rn(parameter, __fdiv_rn(__fmul_rn(step.rate, mean), __fadd_rn(root, step.epsilon)));
}

extern "C" {

// weight [n, k] = (code - zero) stored scale, computed in f32 and rounded once. A block transposes a tile of
// 64 channels by 64 outputs in shared memory. Launch grid: (n / 64, k / 64); block: 256.
__global__ void round_latents(half16* weight, const float* latents, const float* scales, const float* zeros,
                              const unsigned* g_idx, int k, int n, float max_code) {
    __shared__ half16 tile[TILE][TILE + 2];
    int column = threadIdx.x & (TILE - 1), row = threadIdx.x / TILE;
    int output = blockIdx.x * TILE + column;
    for (int i = row; i < TILE; i += 4) {
        int channel = blockIdx.y * TILE + i;
        if (channel >= k || output >= n) continue;
        Grid grid = grid_at(scales, zeros, (long long)g_idx[channel] * n + output, max_code);
        bool inside;
        float steps = rounded(__fdiv_rn(latents[(long long)channel * n + output], grid.scale), grid, inside);
        tile[column][i] = narrow(__fmul_rn(steps, grid.scale));
    }
    __syncthreads();
    int channel = blockIdx.y * TILE + column;
    for (int i = row; i < TILE; i += 4) {
        int to = blockIdx.x * TILE + i;
        if (channel < k && to < n) weight[(long long)to * k + channel] = tile[i][column];
    }
}

// codes [k, n] of the latents. Launch grid: (n / 256, k).
__global__ void latent_codes(unsigned char* codes, const float* latents, const float* scales,
                             const float* zeros, const unsigned* g_idx, int n, float max_code) {
    int output = blockIdx.x * blockDim.x + threadIdx.x;
    if (output >= n) return;
    long long at = (long long)blockIdx.y * n + output;
    Grid grid = grid_at(scales, zeros, (long long)g_idx[blockIdx.y] * n + output, max_code);
    bool inside;
    float steps = rounded(__fdiv_rn(latents[at], grid.scale), grid, inside);
    codes[at] = (unsigned char)(int)(steps + grid.zero);
}

// Moves latents to the nearest number that rounds to their code; those that do stay. A latent on a grid
// whose scale overflowed stays too: no number rounds to a code there, and who reads the scale reports it.
// Launch grid: (n / 256, k).
__global__ void move_to_codes(float* latents, const unsigned char* codes, const float* scales,
                              const float* zeros, const unsigned* g_idx, int n, float max_code) {
    int output = blockIdx.x * blockDim.x + threadIdx.x;
    if (output >= n) return;
    long long at = (long long)blockIdx.y * n + output;
    Grid grid = grid_at(scales, zeros, (long long)g_idx[blockIdx.y] * n + output, max_code);
    float latent = latents[at], steps = (float)codes[at] - grid.zero;
    auto rounds = [&](float latent) {
        bool inside;
        return rounded(__fdiv_rn(latent, grid.scale), grid, inside) == steps;
    };
    if (rounds(latent)) return;
    // Exact: a half of a whole number below 512 times eleven bits. A tie goes to the even side, so the border
    // itself may belong to the neighbour; and a quotient may be rounded to it.
    float border = __fdiv_rn(latent, grid.scale) < steps ? -0.5f : 0.5f;
    float nearest = __fmul_rn(steps + border, grid.scale), middle = __fmul_rn(steps, grid.scale);
    for (int moves = 0; moves < 4; moves++) {
        if (rounds(nearest)) {
            latents[at] = nearest;
            return;
        }
        nearest = nextafterf(nearest, nearest < middle ? INFINITY : -INFINITY);
    }
}

// One step of the latents of `columns` outputs from output `first` on, and the sums of their scales'
// gradients.
//   gradient [k, columns]   of the weights
//   mean, square [k, n]     Adam's moments of the latents
//   sums [parts, n]         of a part: channel[starts[part]..starts[part + 1]], at most 128 channels of the
//                           group groups[part]
// Launch grid: (columns / 128, parts); block: 128.
__global__ void train_latents(float* latents, float* mean, float* square, float* sums, const float* gradient,
                              const float* scales, const float* zeros, const unsigned* channel,
                              const unsigned* starts, const unsigned* groups, int first, int columns, int n,
                              float max_code, AdamStep step) {
    int column = blockIdx.x * blockDim.x + threadIdx.x, part = blockIdx.y;
    if (column >= columns) return;
    int output = first + column;
    Grid grid = grid_at(scales, zeros, (long long)groups[part] * n + output, max_code);
    float sum = 0;
    int end = starts[part + 1];
    for (int i = starts[part]; i < end; i += AT_ONCE) {
        // All loads before the first store, so that they wait for memory together.
        long long at[AT_ONCE];
        float latent[AT_ONCE], dw[AT_ONCE], of_mean[AT_ONCE], of_square[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            if (i + j >= end) continue;
            long long row = channel[i + j];
            at[j] = row * n + output;
            latent[j] = latents[at[j]], dw[j] = gradient[row * columns + column];
            of_mean[j] = mean[at[j]], of_square[j] = square[at[j]];
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            if (i + j >= end) continue;
            float x = __fdiv_rn(latent[j], grid.scale);
            bool inside;
            float steps = rounded(x, grid, inside);
            sum = __fadd_rn(sum, __fmul_rn(dw[j], inside ? __fsub_rn(steps, x) : steps));
            latents[at[j]] = moved(latent[j], inside ? dw[j] : 0.0f, of_mean[j], of_square[j], step);
            mean[at[j]] = of_mean[j];
            square[at[j]] = of_square[j];
        }
    }
    sums[(long long)part * n + output] = sum;
}

// One step of the scales [groups, n], which keep their signs, from the sums over the parts of each group: parts[group]..parts[group +
// 1].
// Launch grid: (n / 128, groups); block: 128.
__global__ void train_scales(float* scales, float* mean, float* square, const float* sums,
                             const unsigned* parts, int n, AdamStep step) {
    int output = blockIdx.x * blockDim.x + threadIdx.x;
    if (output >= n) return;
    float gradient = 0;
    for (unsigned part = parts[blockIdx.y]; part < parts[blockIdx.y + 1]; part++)
        gradient = __fadd_rn(gradient, sums[(long long)part * n + output]);
    long long at = (long long)blockIdx.y * n + output;
    float of_mean = mean[at], of_square = square[at];
    float before = scales[at], after = moved(before, gradient, of_mean, of_square, step);
    scales[at] = signbit(after) == signbit(before) ? after : copysignf(6.103515625e-5f, before);
    mean[at] = of_mean;
    square[at] = of_square;
}
}
