// Products with packed weights of WIDTH = 4 or 8 bits (2 and 3 take the place of 4); packed.cuh has their
// layout.
#include "few_rows.cuh"
#include "more_rows.cuh"

#define FEW_ROWS(EIGHTS, WARPS, KIND)                                                                 \
    __global__ void __launch_bounds__(Few<WIDTH, EIGHTS, WARPS>::TEAMS * 32 * WARPS)                  \
        few_rows_##EIGHTS##_##WARPS##_##KIND(half16* out, const half16* x, const float* bias,         \
                                             Packed w, int rows, int stride, int add) {               \
        few_rows<WIDTH, EIGHTS, WARPS, KIND>(out, x, bias, w, rows, stride, add);                     \
    }
#define FEW_KINDS(EIGHTS, WARPS) FEW_ROWS(EIGHTS, WARPS, PLAIN) FEW_ROWS(EIGHTS, WARPS, ANY)
#define FEW_WIDTHS(EIGHTS) FEW_KINDS(EIGHTS, 1) FEW_KINDS(EIGHTS, 2) FEW_KINDS(EIGHTS, 3) FEW_KINDS(EIGHTS, 6)
#define MORE_ROWS(EIGHTS, WIDE, KIND)                                                                 \
    __global__ void __launch_bounds__(128 * WIDE, 4 / WIDE)                                           \
        more_rows_##EIGHTS##_##KIND(half16* out, const half16* x, const float* bias, Packed w,        \
                                    int rows, int stride, int add, float* parts,                      \
                                    unsigned* arrived) {                                              \
        more_rows<WIDTH, EIGHTS, WIDE, KIND>(out, x, bias, w, rows, stride, add, parts, arrived);     \
    }

extern "C" {

FEW_WIDTHS(1)
FEW_WIDTHS(2)
FEW_WIDTHS(4)
MORE_ROWS(8, 2, PLAIN)
MORE_ROWS(8, 2, ANY)
#if !WGMMA // where blocks of 64 rows find too little shared memory
#if WIDTH == 4
MORE_ROWS(4, 2, PLAIN)
MORE_ROWS(4, 2, ANY)
#else
MORE_ROWS(4, 1, PLAIN)
MORE_ROWS(4, 1, ANY)
#endif
#endif

// The weight in sixteen bits, [n, 128 steps] row-major, positions as in the layout: for products of
// many rows. A warp takes a run of 64 positions of 16 outputs; four lanes write half a tile each, so
// that what a warp writes at once fills sectors. Grid: (2 steps / 8, n / 16).
__global__ void widen_packed(half16* out, Packed w) {
    int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, upper = t & 1;
    int run = blockIdx.x * 8 + (threadIdx.x >> 5);
    if (run >= 2 * w.steps) return;
    constexpr int words = WIDTH == 4 ? 1 : 2; // of 16 bytes
    const unsigned* codes = (const unsigned*)(w.codes + ((long long)blockIdx.y * 2 * w.steps + run) * words * 32);
    int stride = w.steps * STEP, granules = 4 * w.steps >> w.shift;
    for (int pair = 0; pair < 2; pair++) {
        int tile = 2 * pair + (t >> 1), word = WIDTH == 4 ? tile : 2 * tile + upper;
        const unsigned* from = codes + (word >> 2) * 128 + g * 16 + (word & 3);
        unsigned of_lane[4];
        for (int i = 0; i < 4; i++) of_lane[i] = from[4 * i];
        long long at = ((long long)blockIdx.y * granules + ((run * 2 + pair) >> w.shift)) * 8 + g;
        unsigned scales = w.scales[at], zeros = w.zeros ? w.zeros[at] : pair_of(w.zero, w.zero);
        for (int high = 0; high < 2; high++) {
            int output = blockIdx.y * 16 + g + 8 * high, shift = WIDTH == 4 ? 8 * upper + 4 * high : 16 * high;
            int apart = WIDTH == 4 ? 16 : 8, mask = (1 << WIDTH) - 1;
            float scale = widen((half16)(high ? scales >> 16 : scales & 0xffff));
            float zero = widen((half16)(high ? zeros >> 16 : zeros & 0xffff));
            unsigned both[4];
            for (int i = 0; i < 4; i++) {
                float low = (of_lane[i] >> shift) & mask, next = (of_lane[i] >> (shift + apart)) & mask;
                both[i] = pair_of((low - zero) * scale, (next - zero) * scale);
            }
            if (output < w.n)
                *(uint4*)(out + (long long)output * stride + run * RUN + tile * 16 + upper * 8) =
                    make_uint4(both[0], both[1], both[2], both[3]);
        }
    }
}

// out [rows, stride]: column i of x at the places of `channels`, zero where that is negative. Rows go
// through shared memory, so that they and the channels come at the same time; those serve all rows of a
// block. Eight columns a thread at a time. Grid: (rows / of_block, up to stride / 8 / threads); shared: 2 k
// of_block bytes, rounded up to 16 for each row.
__global__ void arrange(uint4* out, const half16* x, const int4* channels, int k, int stride, int rows,
                        int of_block) {
    constexpr int AT_ONCE = 2;
    extern __shared__ __align__(16) half16 of_rows[];
    int first = blockIdx.y * blockDim.x + threadIdx.x, pieces = stride / 8, apart = gridDim.y * blockDim.x;
    int row0 = blockIdx.x * of_block, count = min(of_block, rows - row0), pitch = (k + 7) / 8 * 8;
    int4 low[AT_ONCE], high[AT_ONCE];
    auto ask = [&](int piece) {
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++, piece += apart)
            if (piece < pieces) low[i] = channels[2 * piece], high[i] = channels[2 * piece + 1];
    };
    ask(first);
    wait_for_it();
    const half16* from = x + (long long)row0 * k;
    unsigned place = (unsigned)__cvta_generic_to_shared(of_rows);
    if (k % 8 == 0)
        for (int c = threadIdx.x; c < count * (k / 8); c += blockDim.x) copy_to(place + 16 * c, from + 8 * c);
    else
        for (int c = threadIdx.x; c < count * k; c += blockDim.x) of_rows[c / k * pitch + c % k] = from[c];
    let_next_start(); // not earlier: what it asks for would come before the rows
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    for (int piece = first; piece < pieces; piece += AT_ONCE * apart) {
        if (piece > first) ask(piece);
        for (int row = 0; row < count; row++) {
            auto at = [&](int channel) { return channel < 0 ? 0u : (unsigned)of_rows[row * pitch + channel]; };
            auto two = [&](int one, int next) { return at(one) | at(next) << 16; };
            uint4* to = out + (long long)(row0 + row) * pieces + piece;
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                if (piece + i * apart < pieces)
                    to[i * apart] = make_uint4(two(low[i].x, low[i].y), two(low[i].z, low[i].w),
                                               two(high[i].x, high[i].y), two(high[i].z, high[i].w));
        }
    }
}

}
