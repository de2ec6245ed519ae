// The Hessian of a linear, H = sum of x^T x over calibration rows: symmetrize, scale, permute and damp it for
// cuSOLVER's Cholesky factorization, then invert the factor and convert it to f32.
//
// cuBLAS fills only the tiles on and below the diagonal. H [k, k] is row-major. Bound by memory bandwidth.
#include "half.cuh"

extern "C" {

// Mirrors the lower triangle and scales. h [k, k] row-major. Grid: (k / 32, k / 32), block (32, 8).
__global__ void symmetrize_and_scale(float* h, int k, float scale) {
    __shared__ float tile[32][33];
    int row0 = blockIdx.y * 32, col0 = blockIdx.x * 32;
    if (col0 > row0) return;
    for (int r = threadIdx.y; r < 32; r += 8) {
        int row = row0 + r, col = col0 + threadIdx.x;
        if (row < k && col <= row) tile[r][threadIdx.x] = h[(long long)row * k + col] * scale;
    }
    __syncthreads();
    for (int r = threadIdx.y; r < 32; r += 8) {
        int row = row0 + r, col = col0 + threadIdx.x;
        if (row < k && col <= row) h[(long long)row * k + col] = tile[r][threadIdx.x];
        int mirrored_row = col0 + r, mirrored_col = row0 + threadIdx.x;
        if (mirrored_col < k && mirrored_row < mirrored_col)
            h[(long long)mirrored_row * k + mirrored_col] = tile[threadIdx.x][r];
    }
}

__global__ void scale_in_place(float* x, long long count, float factor) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) x[i] *= factor;
}

// mean += share * (other - mean).
__global__ void update_mean(float* mean, const float* other, long long count, float share) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) mean[i] += share * (other[i] - mean[i]);
}

__global__ void diagonal(float* out, const float* h, int k) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < k) out[i] = h[(long long)i * k + i];
}

// a[i][j] = h[order[i]][order[j]] + (i == j) * added[order[i]] for j <= i: permuted to act-order and damped.
// Launch grid: (k / 256, k).
__global__ void permute_and_damp(double* a, const float* h, const unsigned* order, const double* added,
                                 int k) {
    int i = blockIdx.y, j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= k) return;
    double value = 0;
    if (j <= i) value = h[(long long)order[i] * k + order[j]];
    if (j == i) value += added[order[i]];
    a[(long long)i * k + j] = value;
}

// f64 to f32, `count` elements; the buffers do not overlap.
__global__ void f64_to_f32(float* out, const double* x, long long count) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = (float)x[i];
}

// Zeroes the upper triangle, where the factorization leaves anything. Launch grid: (k / 256, k).
__global__ void zero_above_diagonal(double* a, int k) {
    int i = blockIdx.y, j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j > i && j < k) a[(long long)i * k + j] = 0;
}

// Inverts the lower-triangular 32 x 32 tiles on the diagonal of a [k, k] in place. A thread solves for one
// column of the inverse by forward substitution. Launch grid: k / 32; block: 32.
__global__ void invert_diagonal_tiles(double* a, int k) {
    __shared__ double tile[32][33], inverse[32][32];
    int first = blockIdx.x * 32, rows = min(32, k - first), c = threadIdx.x;
    double* corner = a + (long long)first * k + first;
    for (int r = 0; r < rows; r++)
        if (c <= r) tile[r][c] = corner[(long long)r * k + c];
    __syncthreads();
    if (c >= rows) return;
    for (int r = c; r < rows; r++) {
        double sum = r == c ? 1.0 : 0.0;
        for (int m = c; m < r; m++) sum -= tile[r][m] * inverse[m][c];
        inverse[r][c] = sum / tile[r][r];
    }
    for (int r = c; r < rows; r++) corner[(long long)r * k + c] = inverse[r][c];
}

// out [parts, n]: column sums of a * b, both [k, n], over `rows` rows of each part; f32 products, f64 sums.
// Launch grid: (n / 128, parts).
__global__ void column_dot(double* out, const float* a, const float* b, int k, int n, int rows) {
    int col = blockIdx.x * blockDim.x + threadIdx.x;
    if (col >= n) return;
    int first = blockIdx.y * rows, end = min(k, first + rows);
    double sum = 0;
    for (int row = first; row < end; row += 32) {
        float part = 0;
        int last = min(end, row + 32);
        for (int r = row; r < last; r++) part += a[(long long)r * n + col] * b[(long long)r * n + col];
        sum += part;
    }
    out[(long long)blockIdx.y * n + col] = sum;
}
}
