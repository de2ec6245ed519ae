// The GPTQ sweep (Frantar et al. 2022, algorithm 1) over at most 128 input channels: round a channel, add its
// error, weighted by the factor, to the channels that follow.
//
// Rows of w, l and codes are in reversed processing order. With J the reversal and J H J = L L^T, row a of l
// = L^-1 holds the effect of the error of channel K-1-a on the channels after it, which are the rows b < a.
// So a sweep runs from the last row to the first and reads l in the layout that the factorization leaves.
//
// A block serves 32 outputs with 8 lanes each; the lanes share the rows of their output. All lanes of an
// output compute its codes redundantly, so one barrier per channel suffices. Bound by latency: the channels
// are sequential.
#include "grid.cuh"
#include "half.cuh"

#define OUTPUTS 32
#define LANES 8
#define CHANNELS 128

// Fits the grid of `count` weights w[(rows ? rows[i] : i) * stride], shared by the lanes of one output.
// importance[i] weights the squared error of row i in the grid search. All threads of the block call it.
__device__ float2 fit_grid(const float* w, long long stride, const unsigned* rows, const float* importance,
                           int count, GridRule rule, bool live) {
    __shared__ float part[3][LANES][OUTPUTS];
    int x = threadIdx.x, lane = threadIdx.y;
    float low = 0, high = 0;
    if (live)
        for (int i = lane; i < count; i += LANES) {
            float v = w[(rows ? rows[i] : i) * stride];
            low = fminf(low, v);
            high = fmaxf(high, v);
        }
    __syncthreads();
    part[0][lane][x] = low;
    part[1][lane][x] = high;
    __syncthreads();
    for (int l = 0; l < LANES; l++) {
        low = fminf(low, part[0][l][x]);
        high = fmaxf(high, part[1][l][x]);
    }
    float2 whole = grid_of_range(low, high, rule);
    if (rule.shares == 1) return whole;
    float best = INFINITY, best_c = 0;
    if (live)
        for (int c = lane; c < rule.shares * rule.variants; c += LANES) {
            float2 grid = candidate(low, high, c, rule);
            float inverse = 1.0f / grid.x, error = 0;
            for (int i = count - 1; i >= 0; i--) {
                unsigned row = rows ? rows[i] : i;
                float v = w[row * stride];
                float e = v - nearest_step(v * inverse, grid.y, rule.max_code) * grid.x;
                error += importance[row] * e * e;
            }
            if (error < best) {
                best = error;
                best_c = c;
            }
        }
    __syncthreads();
    part[0][lane][x] = best;
    part[1][lane][x] = best_c;
    __syncthreads();
    for (int l = 0; l < LANES; l++) {
        float error = part[0][l][x], c = part[1][l][x];
        if (error < best || (error == best && c < best_c)) {
            best = error;
            best_c = c;
        }
    }
    // A range that overflows f16 is kept, so that the host reports it; a smaller share would silently clip.
    if (fabsf(whole.x) > 65504.0f) return whole;
    return candidate(low, high, (int)best_c, rule);
}

extern "C" {

// Fits grids of groups that span several sweeps. The rows of group g = first_group + blockIdx.y are
// rows[starts[g]..starts[g + 1]], or first_row.. where rows is null.
// Launch grid: (n / 32, groups); block: (32, 8).
__global__ void fit_groups(float* scales, float* zeros, const float* w, const float* weight,
                           const unsigned* rows, const unsigned* starts, int first_row, int count,
                           int first_group, int n, GridRule rule) {
    int col = blockIdx.x * OUTPUTS + threadIdx.x;
    bool live = col < n;
    int group = first_group + blockIdx.y;
    const unsigned* list = 0;
    const float *from = w + col, *importance = weight;
    if (rows) {
        list = rows + starts[group];
        count = starts[group + 1] - starts[group];
    } else {
        from += (long long)first_row * n;
        importance += first_row;
    }
    float2 grid = fit_grid(from, n, list, importance, count, rule, live);
    if (live && threadIdx.y == 0) {
        scales[(long long)group * n + col] = grid.x;
        zeros[(long long)group * n + col] = grid.y;
    }
}

// Sweeps rows last - 1 down to first of w [k, n], at most 128.
//   errors [128, n]     (w - q) / l_aa of row a, at row a - first
//   codes [k, n]        in stored order; channel[a] is the stored channel of row a
//   latents [k, n]      what is rounded, in stored order; null: not kept
//   groups [k]          the group of each row
// `fit_inside`: fit the grid where a group begins, which then ends inside this sweep. Else scales and zeros
// hold it.
// Launch grid: n / 32; block: (32, 8).
__global__ void sweep(unsigned char* codes, float* scales, float* zeros, float* errors, float* latents,
                      const float* w, const float* l, const float* weight, const unsigned* groups,
                      const unsigned* channel, int k, int n, int first, int last, int fit_inside,
                      GridRule rule) {
    extern __shared__ float shared[];
    float* tile = shared;                        // [CHANNELS][OUTPUTS]
    float* factor = shared + CHANNELS * OUTPUTS; // [CHANNELS][CHANNELS]
    int x = threadIdx.x, lane = threadIdx.y, rows = last - first;
    int col = blockIdx.x * OUTPUTS + x;
    bool live = col < n;
    for (int r = lane; r < rows; r += LANES)
        tile[r * OUTPUTS + x] = live ? w[(long long)(first + r) * n + col] : 0.0f;
    for (int at = lane * OUTPUTS + x; at < rows * rows; at += LANES * OUTPUTS) {
        int r = at / rows, c = at % rows;
        factor[r * CHANNELS + c] = c <= r ? l[(long long)(first + r) * k + first + c] : 0.0f;
    }
    __syncthreads();

    float scale = 1, zero = 0;
    unsigned current = 0xffffffffu;
    for (int r = rows - 1; r >= 0; r--) {
        unsigned group = groups[first + r];
        if (group != current) {
            current = group;
            if (fit_inside) {
                int begin = r;
                while (begin > 0 && groups[first + begin - 1] == group) begin--;
                float2 grid = fit_grid(tile + begin * OUTPUTS + x, OUTPUTS, 0, weight + first + begin,
                                       r + 1 - begin, rule, live);
                scale = grid.x;
                zero = grid.y;
                if (live && lane == 0) {
                    scales[(long long)group * n + col] = scale;
                    zeros[(long long)group * n + col] = zero;
                }
            } else if (live) {
                scale = scales[(long long)group * n + col];
                zero = zeros[(long long)group * n + col];
            }
        }
        float v = tile[r * OUTPUTS + x];
        float steps = nearest_step(__fdiv_rn(v, scale), zero, rule.max_code);
        float error = __fdiv_rn(v - steps * scale, factor[r * CHANNELS + r]);
        if (lane == (r & (LANES - 1)) && live) {
            long long stored = (long long)channel[first + r] * n + col;
            codes[stored] = (unsigned char)(int)(steps + zero);
            if (latents) latents[stored] = v;
            errors[(long long)r * n + col] = error;
        }
        for (int b = lane; b < r; b += LANES) tile[b * OUTPUTS + x] -= error * factor[r * CHANNELS + b];
        __syncthreads();
    }
}

// e = w - round_to_nearest(w), w [k, n] in stored order, groups of `size` channels.
// Launch grid: (n / 32, groups); block: (32, 8).
__global__ void rounding_error(float* e, const float* w, int k, int n, int size, GridRule rule) {
    int col = blockIdx.x * OUTPUTS + threadIdx.x;
    bool live = col < n;
    int first = blockIdx.y * size, count = min(size, k - first);
    const float* from = w + (long long)first * n + col;
    rule.shares = 1;
    rule.full_range = 0;
    float2 grid = fit_grid(from, n, 0, 0, count, rule, live);
    if (!live) return;
    for (int i = threadIdx.y; i < count; i += LANES) {
        float v = from[(long long)i * n];
        float steps = nearest_step(__fdiv_rn(v, grid.x), grid.y, rule.max_code);
        e[(long long)(first + i) * n + col] = v - steps * grid.x;
    }
}

// out[a][n] = weight[n][channel[a]]: transposes and permutes 16-bit [n, k] to f32 [k, n]. Reads are scattered
// only where the permutation is. Launch grid: (k / 32, n / 32); block: (32, 8).
__global__ void gather_weight(float* out, const half16* weight, const unsigned* channel, int k, int n) {
    __shared__ float tile[32][33];
    int a0 = blockIdx.x * 32, n0 = blockIdx.y * 32;
    int a = a0 + threadIdx.x;
    unsigned from = a < k ? channel[a] : 0;
    for (int i = threadIdx.y; i < 32; i += 8)
        if (a < k && n0 + i < n) tile[i][threadIdx.x] = widen(weight[(long long)(n0 + i) * k + from]);
    __syncthreads();
    for (int i = threadIdx.y; i < 32; i += 8)
        if (a0 + i < k && n0 + threadIdx.x < n)
            out[(long long)(a0 + i) * n + n0 + threadIdx.x] = tile[threadIdx.x][i];
}

// out = a - b, 16-bit.
__global__ void subtract(half16* out, const half16* a, const half16* b, long long count) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = narrow(widen(a[i]) - widen(b[i]));
}

// out[a][n] = x[channel[a]][n], f32 [k, n]. Launch grid: (n / 256, k).
__global__ void gather_rows(float* out, const float* x, const unsigned* channel, int n) {
    int col = blockIdx.x * blockDim.x + threadIdx.x;
    if (col < n) out[(long long)blockIdx.y * n + col] = x[(long long)channel[blockIdx.y] * n + col];
}

// Replaces the weight by its quantized values: weight[n][c] = scale * (code - zero) rounded to 16 bits, and
// e[c][n] = the weight before - scale * (code - zero) in f32. Launch grid: (k / 32, n / 32); block: (32, 8).
__global__ void write_back(half16* weight, float* e, const unsigned char* codes, const float* scales,
                           const float* zeros, const unsigned* g_idx, int k, int n) {
    __shared__ float tile[32][33];
    int c0 = blockIdx.x * 32, n0 = blockIdx.y * 32;
    for (int i = threadIdx.y; i < 32; i += 8) {
        int c = c0 + i, col = n0 + threadIdx.x;
        if (c < k && col < n) {
            long long grid = (long long)g_idx[c] * n + col;
            tile[i][threadIdx.x] = scales[grid] * ((float)codes[(long long)c * n + col] - zeros[grid]);
        }
    }
    __syncthreads();
    for (int i = threadIdx.y; i < 32; i += 8) {
        int c = c0 + threadIdx.x, col = n0 + i;
        if (c < k && col < n) {
            long long at = (long long)col * k + c;
            float q = tile[threadIdx.x][i], before = widen(weight[at]);
            weight[at] = narrow(q);
            tile[threadIdx.x][i] = before - q;
        }
    }
    __syncthreads();
    for (int i = threadIdx.y; i < 32; i += 8) {
        int c = c0 + i, col = n0 + threadIdx.x;
        if (c < k && col < n) e[(long long)c * n + col] = tile[i][threadIdx.x];
    }
}
}
