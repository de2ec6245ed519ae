// From the sum of x^T x to the damped matrix that is factored, and back to the factor in f32.
// H is symmetric; only tiles on and below the diagonal of the sum are filled.
#include "half.cuh"

extern "C" {

// Mirrors the lower triangle and scales. h [k, k] row-major. Grid: (k / 32, k / 32), block (32, 8).
__global__ void finish_sum(float* h, int k, float scale) {
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

__global__ void multiply_by(float* x, long long count, float factor) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) x[i] *= factor;
}

// mean += share * (other - mean).
__global__ void move_towards(float* mean, const float* other, long long count, float share) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) mean[i] += share * (other[i] - mean[i]);
}

__global__ void diagonal(float* out, const float* h, int k) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < k) out[i] = h[(long long)i * k + i];
}

// a[i][j] = h[order[i]][order[j]] + (i == j) * added[order[i]] for j <= i. Grid: (k / 256, k).
__global__ void damp(double* a, const float* h, const unsigned* order, const double* added, int k) {
    int i = blockIdx.y, j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= k) return;
    double value = 0;
    if (j <= i) value = h[(long long)order[i] * k + order[j]];
    if (j == i) value += added[order[i]];
    a[(long long)i * k + j] = value;
}

// f32 of `count` elements; in place only through a buffer of its own.
__global__ void narrow_f64(float* out, const double* x, long long count) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = (float)x[i];
}

// Zeros above the diagonal: the factorization may leave anything there. Grid: (k / 256, k).
__global__ void clear_above(double* a, int k) {
    int i = blockIdx.y, j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j > i && j < k) a[(long long)i * k + j] = 0;
}

// Inverts lower triangles of up to 32 rows on the diagonal of a [k, k], row-major, in place. A thread
// solves for a column of its inverse, first row to last. Grid: (k / 32), block 32.
__global__ void invert_tiles(double* a, int k) {
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

// Column sums of a * b, [k, n] row-major, over `rows` rows of each part. out [parts, n].
// Grid: (n / 128, parts).
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
