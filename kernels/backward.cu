// Gradients of a decoder block's operations, for training its latents and scales: norms, gates and
// activations, the softmax of attention, and the error of a block's output. gptq-kernels/src/backward
// computes the same on a CPU; products are cuBLAS's.
//
// Tensors are row-major 16-bit floats, rows are tokens; d before a name is the gradient of what it names.
// Nothing is kept of the forward pass but its inputs, so values are computed again. Values are computed in
// f32 and rounded once, sums have one order. All kernels are bound by memory bandwidth.
#define SOFT_CAP 1
#define WINDOW 1
#include "attention_scores.cuh"


// With r = 1 / sqrt(mean(x^2) + eps), n = x r and g = dy weight: dx = r (g - n mean(g n)). Where LAYER, n =
// (x - mean(x)) r with r from the variance, and dx = r (g - mean(g) - n mean(g n)). A block takes a run of
// `width` elements; dx may be dy or x. Launch grid: runs.
template <int VALUES, bool LAYER>
__device__ __forceinline__ void norm_backward(half16* dx, const half16* dy, const half16* x,
                                              const float* weight, int width, float eps) {
    __shared__ float scratch[32];
    long long run = (long long)blockIdx.x * width;
    dx += run, dy += run, x += run;
    int first = threadIdx.x * VALUES, block_stride = blockDim.x * VALUES;
    float mean = 0, squares = 0, along = 0, shift = 0;
    if (LAYER) {
        for (int i = first; i < width; i += block_stride) {
            auto v = load_vector<VALUES>(x + i);
#pragma unroll
            for (int j = 0; j < VALUES; j++) mean += widen(v.at[j]);
        }
        mean = block_sum(mean, scratch) / width;
    }
    for (int i = first; i < width; i += block_stride) {
        auto v = load_vector<VALUES>(x + i), d = load_vector<VALUES>(dy + i);
        auto w = load_vector<VALUES>(weight + i);
#pragma unroll
        for (int j = 0; j < VALUES; j++) {
            float centred = widen(v.at[j]) - mean, g = widen(d.at[j]) * w.at[j];
            squares += centred * centred;
            along += g * centred;
            shift += g;
        }
    }
    float scale = rsqrtf(block_sum(squares, scratch) / width + eps);
    along = block_sum(along, scratch) / width * scale * scale; // times x - mean(x): n mean(g n)
    shift = LAYER ? block_sum(shift, scratch) / width : 0.0f;
    for (int i = first; i < width; i += block_stride) {
        auto v = load_vector<VALUES>(x + i), d = load_vector<VALUES>(dy + i);
        auto w = load_vector<VALUES>(weight + i);
#pragma unroll
        for (int j = 0; j < VALUES; j++) {
            float centred = widen(v.at[j]) - mean, g = widen(d.at[j]) * w.at[j];
            d.at[j] = narrow(scale * (g - shift - centred * along));
        }
        store_vector(dx + i, d);
    }
}

// The value and the derivative of an activation.
struct Silu {
    static __device__ __forceinline__ float2 of(float x) {
        float sigmoid = 1.0f / (1.0f + __expf(-x)), value = x * sigmoid;
        return make_float2(value, sigmoid + value * (1.0f - sigmoid));
    }
};

// GELU, tanh approximation: x share, share = 1 / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3).
struct GeluTanh {
    static __device__ __forceinline__ float2 of(float x) {
        const float root = 0.7978845608f, cubic = 0.044715f;
        // Beyond, the share is 0 or 1 to the last bit, and the square of a larger x might be infinite.
        float bounded = fminf(fmaxf(x, -30.0f), 30.0f), square = bounded * bounded;
        float share = 1.0f / (1.0f + __expf(-2.0f * root * bounded * (1.0f + cubic * square)));
        float inner = root * (1.0f + 3.0f * cubic * square);
        return make_float2(x * share, share + 2.0f * bounded * share * (1.0f - share) * inner);
    }
};

// Of y = f(gate) up: gate becomes dy up f'(gate), up becomes dy f(gate). Rows lie pitch_gate, pitch_up and
// pitch_dy elements apart. Launch grid: (columns / (VALUES threads), rows or fewer).
template <int VALUES, class F>
__device__ __forceinline__ void gate_backward(half16* gate, half16* up, const half16* dy, int pitch_gate,
                                              int pitch_up, int pitch_dy, int rows, int columns) {
    int column = (blockIdx.x * blockDim.x + threadIdx.x) * VALUES;
    if (column >= columns) return;
    for (long long row = blockIdx.y; row < rows; row += gridDim.y) {
        half16 *of_gate = gate + row * pitch_gate + column, *of_up = up + row * pitch_up + column;
        auto g = load_vector<VALUES>((const half16*)of_gate), u = load_vector<VALUES>((const half16*)of_up);
        auto d = load_vector<VALUES>(dy + row * pitch_dy + column);
#pragma unroll
        for (int j = 0; j < VALUES; j++) {
            float2 f = F::of(widen(g.at[j]));
            float from = widen(d.at[j]);
            g.at[j] = narrow(from * widen(u.at[j]) * f.y);
            u.at[j] = narrow(from * f.x);
        }
        store_vector(of_gate, g);
        store_vector(of_up, u);
    }
}

// Of y = f(x): x becomes dy f'(x). As above.
template <int VALUES, class F>
__device__ __forceinline__ void activate_backward(half16* x, const half16* dy, int pitch_x, int pitch_dy,
                                                  int rows, int columns) {
    int column = (blockIdx.x * blockDim.x + threadIdx.x) * VALUES;
    if (column >= columns) return;
    for (long long row = blockIdx.y; row < rows; row += gridDim.y) {
        half16* of_x = x + row * pitch_x + column;
        auto v = load_vector<VALUES>((const half16*)of_x);
        auto d = load_vector<VALUES>(dy + row * pitch_dy + column);
#pragma unroll
        for (int j = 0; j < VALUES; j++) v.at[j] = narrow(widen(d.at[j]) * F::of(widen(v.at[j])).y);
        store_vector(of_x, v);
    }
}

// out = x, rows of `columns` that are `pitch` elements apart in out. Launch grid: rows.
template <int VALUES>
__device__ __forceinline__ void place_columns(half16* out, const half16* x, int pitch, int columns) {
    out += (long long)blockIdx.x * pitch, x += (long long)blockIdx.x * columns;
    for (int i = threadIdx.x * VALUES; i < columns; i += blockDim.x * VALUES)
        store_vector(out + i, load_vector<VALUES>(x + i));
}

#define BACKWARD(VALUES)                                                                                     \
    __global__ void __launch_bounds__(1024)                                                                  \
        rms_norm_backward_##VALUES(half16* dx, const half16* dy, const half16* x, const float* weight,       \
                                   int width, float eps) {                                                   \
        norm_backward<VALUES, false>(dx, dy, x, weight, width, eps);                                         \
    }                                                                                                        \
    __global__ void __launch_bounds__(1024)                                                                  \
        layer_norm_backward_##VALUES(half16* dx, const half16* dy, const half16* x, const float* weight,     \
                                     int width, float eps) {                                                 \
        norm_backward<VALUES, true>(dx, dy, x, weight, width, eps);                                          \
    }                                                                                                        \
    __global__ void place_columns_##VALUES(half16* out, const half16* x, int pitch, int columns) {           \
        place_columns<VALUES>(out, x, pitch, columns);                                                       \
    }                                                                                                        \
    ACTIVATION(silu, VALUES, Silu)                                                                           \
    ACTIVATION(gelu, VALUES, GeluTanh)

#define ACTIVATION(NAME, VALUES, F)                                                                          \
    __global__ void NAME##_gate_backward_##VALUES(half16* gate, half16* up, const half16* dy,                \
                                                  int pitch_gate, int pitch_up, int pitch_dy, int rows,      \
                                                  int columns) {                                             \
        gate_backward<VALUES, F>(gate, up, dy, pitch_gate, pitch_up, pitch_dy, rows, columns);               \
    }                                                                                                        \
    __global__ void NAME##_backward_##VALUES(half16* x, const half16* dy, int pitch_x, int pitch_dy,         \
                                             int rows, int columns) {                                        \
        activate_backward<VALUES, F>(x, dy, pitch_x, pitch_dy, rows, columns);                               \
    }

extern "C" {

BACKWARD(8)
BACKWARD(1)

// The softmax of attention, from raw scores s and dp, the gradients of the weights, both f32 [matrices,
// rows, keys]: with t = cap tanh(scale s / cap) or, where cap is 0, scale s, p = softmax(t) over the keys
// that a query sees and ds = p (dp - sum(p dp)) dt / d(scale s), both 0 for other keys. The factor `scale`
// of ds is left to the products that follow, so that small gradients are not smaller still in 16 bits. A
// block takes a row, and reads it three times, from the cache but for the first. Launch grid: (rows,
// matrices).
__global__ void softmax_backward(half16* p, half16* ds, const float* scores, const float* dp, int keys,
                                 int first, float scale, float cap, int window) {
    __shared__ float scratch[32];
    long long at = ((long long)blockIdx.y * gridDim.x + blockIdx.x) * keys;
    p += at, ds += at, scores += at, dp += at;
    int position = first + (int)blockIdx.x, begin = first_visible_key(position, window);
    int visible = min(keys, position + 1);
    float max = -INFINITY;
    for (int i = begin + threadIdx.x; i < visible; i += blockDim.x) max = fmaxf(max, scores[i]);
    max = block_max(max, scratch);
    float top = cap ? soft_capped(max * scale, cap) : 0.0f;
    // The exponent of a score and, with a cap, the slope there.
    auto exponent = [&](float x, float& slope) {
        slope = 1.0f;
        if (!cap) return (x - max) * scale;
        float capped = soft_capped(x * scale, cap), tanh = capped / cap;
        slope = 1.0f - tanh * tanh;
        return capped - top;
    };
    float sum = 0, along = 0, slope;
    for (int i = begin + threadIdx.x; i < visible; i += blockDim.x) {
        float e = __expf(exponent(scores[i], slope));
        sum += e;
        along += e * dp[i];
    }
    float inverse = 1.0f / block_sum(sum, scratch);
    float mean = block_sum(along, scratch) * inverse;
    for (int i = threadIdx.x; i < keys; i += blockDim.x) {
        half16 weight = 0, gradient = 0;
        if (i >= begin && i < visible) {
            float w = __expf(exponent(scores[i], slope)) * inverse;
            weight = narrow(w);
            gradient = narrow(w * (dp[i] - mean) * slope);
        }
        p[i] = weight;
        ds[i] = gradient;
    }
}

// out [rows, columns] = x rounded, x f32; rows of out are `pitch` elements apart. Launch grid: rows.
__global__ void narrow_rows(half16* out, const float* x, int pitch, int columns) {
    out += (long long)blockIdx.x * pitch, x += (long long)blockIdx.x * columns;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) out[i] = narrow(x[i]);
}

// The sum over a block of 256 threads, for all of them; always added in the same order.
__device__ double block_sum(double sum, double* warps) {
    for (int offset = 16; offset; offset >>= 1) sum += __shfl_xor_sync(~0u, sum, offset);
    if ((threadIdx.x & 31) == 0) warps[threadIdx.x >> 5] = sum;
    __syncthreads();
    sum = 0;
    for (int warp = 0; warp < 8; warp++) sum += warps[warp];
    __syncthreads();
    return sum;
}

// The mean square of a row.
__device__ double mean_square(const half16* row, int columns, double* warps) {
    double sum = 0;
    for (int c = threadIdx.x; c < columns; c += blockDim.x) {
        float x = widen(row[c]);
        sum += (double)x * x;
    }
    return block_sum(sum, warps) / columns;
}

// squares[row] = mean(x^2). Grid: (rows), block: 256.
__global__ void row_squares(double* squares, const half16* x, int columns) {
    __shared__ double warps[8];
    double square = mean_square(x + (long long)blockIdx.x * columns, columns, warps);
    if (threadIdx.x == 0) squares[blockIdx.x] = square;
}

// What the squares of the error of a row are divided by: see RowScale.
struct RowScale {
    double floor, share;
};

__device__ double row_weight(const half16* target, int columns, RowScale of, double* warps) {
    double scale = of.share * (mean_square(target, columns, warps) + of.floor);
    return scale > 0 ? 1 / scale : 1;
}

// errors[row] = weight |y - target|^2, in f64. Grid: (rows), block: 256.
__global__ void row_error(double* errors, const half16* y, const half16* target, int columns, RowScale of) {
    __shared__ double warps[8];
    y += (long long)blockIdx.x * columns, target += (long long)blockIdx.x * columns;
    double weight = row_weight(target, columns, of, warps), sum = 0;
    for (int c = threadIdx.x; c < columns; c += blockDim.x) {
        float difference = widen(y[c]) - widen(target[c]);
        sum += (double)difference * difference;
    }
    sum = block_sum(sum, warps);
    if (threadIdx.x == 0) errors[blockIdx.x] = weight * sum;
}

// out = factor weight (y - target); out may be y or target. Grid: (rows), block: 256.
__global__ void row_error_gradient(half16* out, const half16* y, const half16* target, float factor,
                                   int columns, RowScale of) {
    __shared__ double warps[8];
    long long first = (long long)blockIdx.x * columns;
    out += first, y += first, target += first;
    float weight = (float)(factor * row_weight(target, columns, of, warps));
    for (int c = threadIdx.x; c < columns; c += blockDim.x)
        out[c] = narrow(weight * (widen(y[c]) - widen(target[c])));
}
}
