// Matrix products with packed weights of WIDTH = 4 or 8 bits, out = x W^T. Weights of 2 and 3 bits are stored
// as 4. packed.cuh has the layout.
//   few_rows_<row tiles>_<warps>_<kind>   up to 32 rows
//   more_rows_<row tiles>_<kind>          up to 256 rows
//   dequantize_packed                     beyond: dequantize, then cuBLAS
//   gather_columns                        permutes x into the act-order of a linear
#include "few_rows.cuh"
#include "more_rows.cuh"

#define FEW_ROWS(ROW_TILES, WARPS, KIND)                                                                   \
    __global__ void __launch_bounds__(FewRowsShape<WIDTH, ROW_TILES, WARPS>::K_SLICES * 32 * WARPS)        \
        few_rows_##ROW_TILES##_##WARPS##_##KIND(half16* out, const half16* x, const float* bias, Packed w, \
                                                int rows, int stride, int add) {                           \
        few_rows<WIDTH, ROW_TILES, WARPS, KIND>(out, x, bias, w, rows, stride, add);                       \
    }
#define FEW_ROWS_KINDS(ROW_TILES, WARPS) FEW_ROWS(ROW_TILES, WARPS, PLAIN) FEW_ROWS(ROW_TILES, WARPS, ANY)
#define FEW_ROWS_WARPS(ROW_TILES) \
    FEW_ROWS_KINDS(ROW_TILES, 1)  \
    FEW_ROWS_KINDS(ROW_TILES, 2) FEW_ROWS_KINDS(ROW_TILES, 3) FEW_ROWS_KINDS(ROW_TILES, 6)
#define MORE_ROWS(ROW_TILES, WARPGROUPS, KIND)                                                              \
    __global__ void __launch_bounds__(128 * WARPGROUPS, 4 / WARPGROUPS)                                     \
        more_rows_##ROW_TILES##_##KIND(half16* out, const half16* x, const float* bias, Packed w, int rows, \
                                       int stride, int add, float* partials, unsigned* arrivals) {          \
        more_rows<WIDTH, ROW_TILES, WARPGROUPS, KIND>(out, x, bias, w, rows, stride, add, partials,         \
                                                      arrivals);                                            \
    }

extern "C" {

FEW_ROWS_WARPS(1)
FEW_ROWS_WARPS(2)
FEW_ROWS_WARPS(4)
MORE_ROWS(8, 2, PLAIN)
MORE_ROWS(8, 2, ANY)
#if !WGMMA // where 64 rows would need more shared memory than there is
#if WIDTH == 4
MORE_ROWS(4, 2, PLAIN)
MORE_ROWS(4, 2, ANY)
#else
MORE_ROWS(4, 1, PLAIN)
MORE_ROWS(4, 1, ANY)
#endif
#endif

// Dequantizes W to 16 bits, out [n, 128 steps] row-major, K in the order of the layout. A warp takes 64
// positions of 16 outputs. Four lanes write half a tile each, so that each store of a warp fills whole
// 32-byte sectors.
//
// Launch grid: (2 steps / 8, n / 16); block: 256.
__global__ void dequantize_packed(half16* out, Packed w) {
    int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, upper = t & 1;
    int run = blockIdx.x * 8 + (threadIdx.x >> 5);
    if (run >= 2 * w.steps) return;
    constexpr int words = WIDTH == 4 ? 1 : 2; // 16-byte words of a lane in K_RUN positions
    const unsigned* codes =
        (const unsigned*)(w.codes + ((long long)blockIdx.y * 2 * w.steps + run) * words * 32);
    int stride = w.steps * K_STEP, granules = 4 * w.steps >> w.shift;
    for (int pair = 0; pair < 2; pair++) {
        int tile = 2 * pair + (t >> 1), word = WIDTH == 4 ? tile : 2 * tile + upper;
        const unsigned* from = codes + (word >> 2) * 128 + g * 16 + (word & 3);
        unsigned words_of_lane[4];
        for (int i = 0; i < 4; i++) words_of_lane[i] = from[4 * i];
        long long at = ((long long)blockIdx.y * granules + ((run * 2 + pair) >> w.shift)) * 8 + g;
        unsigned scales = w.scales[at], zeros = w.zeros ? w.zeros[at] : pack_pair(w.zero, w.zero);
        for (int high = 0; high < 2; high++) {
            int output = blockIdx.y * 16 + g + 8 * high,
                shift = WIDTH == 4 ? 8 * upper + 4 * high : 16 * high;
            int field_stride = WIDTH == 4 ? 16 : 8, mask = (1 << WIDTH) - 1;
            float scale = widen((half16)(high ? scales >> 16 : scales & 0xffff));
            float zero = widen((half16)(high ? zeros >> 16 : zeros & 0xffff));
            unsigned pairs[4];
            for (int i = 0; i < 4; i++) {
                float low = (words_of_lane[i] >> shift) & mask,
                      next = (words_of_lane[i] >> (shift + field_stride)) & mask;
                pairs[i] = pack_pair((low - zero) * scale, (next - zero) * scale);
            }
            if (output < w.n)
                *(uint4*)(out + (long long)output * stride + run * K_RUN + tile * 16 + upper * 8) =
                    make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
    }
}

// Act-order gather: out[row][i] = x[row][channels[i]], 0 where the channel is negative (padding); out [rows,
// stride], x [rows, k]. Rows pass through shared memory, so that they and the indices load at the same time;
// one load of the indices serves `block_rows` rows. Eight columns per thread. Bound by latency in decode.
//
// Launch grid: (rows / block_rows, up to stride / 8 / threads); shared memory: 2 k bytes per row, rounded up
// to 16.
__global__ void gather_columns(uint4* out, const half16* x, const int4* channels, int k, int stride, int rows,
                               int block_rows) {
    constexpr int UNROLL = 2;
    extern __shared__ __align__(16) half16 staged[];
    int first = blockIdx.y * blockDim.x + threadIdx.x, pieces = stride / 8,
        field_stride = gridDim.y * blockDim.x;
    int row0 = blockIdx.x * block_rows, count = min(block_rows, rows - row0), pitch = (k + 7) / 8 * 8;
    int4 low[UNROLL], high[UNROLL];
    auto load_channels = [&](int piece) {
#pragma unroll
        for (int i = 0; i < UNROLL; i++, piece += field_stride)
            if (piece < pieces) low[i] = channels[2 * piece], high[i] = channels[2 * piece + 1];
    };
    load_channels(first);
    pdl_wait();
    const half16* from = x + (long long)row0 * k;
    unsigned address = (unsigned)__cvta_generic_to_shared(staged);
    if (k % 8 == 0)
        for (int c = threadIdx.x; c < count * (k / 8); c += blockDim.x)
            cp_async(address + 16 * c, from + 8 * c);
    else
        for (int c = threadIdx.x; c < count * k; c += blockDim.x) staged[c / k * pitch + c % k] = from[c];
    pdl_trigger(); // not earlier: the loads of the next kernel would compete with those of the rows
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    for (int piece = first; piece < pieces; piece += UNROLL * field_stride) {
        if (piece > first) load_channels(piece);
        for (int row = 0; row < count; row++) {
            auto at = [&](int channel) { return channel < 0 ? 0u : (unsigned)staged[row * pitch + channel]; };
            auto two = [&](int one, int next) { return at(one) | at(next) << 16; };
            uint4* to = out + (long long)(row0 + row) * pieces + piece;
#pragma unroll
            for (int i = 0; i < UNROLL; i++)
                if (piece + i * field_stride < pieces)
                    to[i * field_stride] = make_uint4(two(low[i].x, low[i].y), two(low[i].z, low[i].w),
                                                      two(high[i].x, high[i].y), two(high[i].z, high[i].w));
        }
    }
}
}
