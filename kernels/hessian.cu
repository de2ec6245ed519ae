// From the sum of x^T x to the damped matrix that is factored, and back to the factor in f32.
// H is symmetric; only tiles on and below the diagonal of the sum are filled.

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

// Column sums of a * b, [k, n] row-major. Grid: n / 128.
__global__ void column_dot(double* out, const float* a, const float* b, int k, int n) {
    int col = blockIdx.x * blockDim.x + threadIdx.x;
    if (col >= n) return;
    double sum = 0;
    for (int row = 0; row < k; row += 32) {
        float part = 0;
        int last = min(k, row + 32);
        for (int r = row; r < last; r++) part += a[(long long)r * n + col] * b[(long long)r * n + col];
        sum += part;
    }
    out[col] = sum;
}

}
