// Products with packed weights; packed.cuh has their layout.
#include "few_rows.cuh"
#include "more_rows.cuh"

#define FEW_ROWS(BITS, TILES, KIND)                                                                   \
    __global__ void few_rows_##BITS##_##TILES##_##KIND(half16* out, const half16* x,                  \
                                                       const float* bias, Packed w, int rows,         \
                                                       int stride, int add) {                         \
        few_rows<BITS, TILES, KIND>(out, x, bias, w, rows, stride, add);                              \
    }
#define MORE_ROWS(BITS, EIGHTS, WIDE, KIND)                                                           \
    __global__ void __launch_bounds__(128 * WIDE, 4 / WIDE)                                           \
        more_rows_##BITS##_##EIGHTS##_##KIND(half16* out, const half16* x, const float* bias,         \
                                             Packed w, int rows, int stride, int add, float* parts,   \
                                             unsigned* arrived) {                                     \
        more_rows<BITS, EIGHTS, WIDE, KIND>(out, x, bias, w, rows, stride, add, parts, arrived);      \
    }

extern "C" {

FEW_ROWS(4, 1, PLAIN)
FEW_ROWS(4, 1, ANY)
FEW_ROWS(4, 2, PLAIN)
FEW_ROWS(4, 2, ANY)
FEW_ROWS(8, 1, PLAIN)
FEW_ROWS(8, 1, ANY)
MORE_ROWS(4, 2, 1, PLAIN)
MORE_ROWS(4, 2, 1, ANY)
MORE_ROWS(4, 4, 2, PLAIN)
MORE_ROWS(4, 4, 2, ANY)
MORE_ROWS(4, 8, 2, PLAIN)
MORE_ROWS(4, 8, 2, ANY)
MORE_ROWS(8, 2, 1, PLAIN)
MORE_ROWS(8, 2, 1, ANY)
MORE_ROWS(8, 4, 2, PLAIN)
MORE_ROWS(8, 4, 2, ANY)
MORE_ROWS(8, 8, 2, PLAIN)
MORE_ROWS(8, 8, 2, ANY)

// The weight in sixteen bits, [n, 128 steps] row-major, positions as in the layout: for products of
// many rows. A warp takes a run of 64 positions of 16 outputs. Grid: (2 steps / 8, n / 16).
__global__ void widen_packed(half16* out, Packed w, int bits) {
    int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    int run = blockIdx.x * 8 + (threadIdx.x >> 5), tile = blockIdx.y;
    if (run >= 2 * w.steps) return;
    int words = bits == 4 ? 1 : 2; // of 16 bytes
    const uint4* from = w.codes + ((long long)tile * 2 * w.steps + run) * words * 32 + lane;
    uint4 loaded[2];
    for (int i = 0; i < words; i++) loaded[i] = stream(from + i * 32);
    const unsigned* code = (const unsigned*)loaded;
    int stride = w.steps * STEP;
    for (int part = 0; part < 2; part++) { // 32 positions
        int granule = (run * 2 + part) >> w.shift;
        long long at = ((long long)tile * (4 * w.steps >> w.shift) + granule) * 8 + g;
        unsigned pair = w.scales[at], zeros = w.zeros ? w.zeros[at] : pair_of(w.zero, w.zero);
        for (int high = 0; high < 2; high++) {
            int output = tile * 16 + g + 8 * high;
            float scale = widen((half16)(high ? pair >> 16 : pair & 0xffff));
            float zero = widen((half16)(high ? zeros >> 16 : zeros & 0xffff));
            unsigned* to = (unsigned*)(out + (long long)output * stride + run * RUN + part * 32) + t;
            for (int j = 0; j < 2; j++)       // tiles of the part
                for (int p = 0; p < 2; p++) { // pairs of the tile for this output
                    int which = 2 * p + high, tile_of_run = 2 * part + j;
                    float low, up;
                    if (bits == 4) {
                        unsigned word = code[tile_of_run];
                        low = (word >> (4 * which)) & 15;
                        up = (word >> (16 + 4 * which)) & 15;
                    } else {
                        unsigned word = code[2 * tile_of_run + p];
                        low = (word >> (16 * high)) & 255;
                        up = (word >> (16 * high + 8)) & 255;
                    }
                    if (output < w.n) to[8 * j + 4 * p] = pair_of((low - zero) * scale, (up - zero) * scale);
                }
        }
    }
}

// out [rows, stride]: column i of x at the places of `channels`, zero where that is negative. Eight
// columns a thread. Grid: (stride / 1024, rows), block 128.
__global__ void arrange(uint4* out, const half16* x, const int4* channels, int k, int stride) {
    int i = blockIdx.x * 128 + threadIdx.x;
    wait_for_it();
    let_next_start();
    if (8 * i >= stride) return;
    const half16* row = x + (long long)blockIdx.y * k;
    int4 low = channels[2 * i], high = channels[2 * i + 1];
    auto at = [&](int channel) { return channel < 0 ? 0u : (unsigned)row[channel]; };
    out[(long long)blockIdx.y * (stride / 8) + i] =
        make_uint4(at(low.x) | at(low.y) << 16, at(low.z) | at(low.w) << 16,
                   at(high.x) | at(high.y) << 16, at(high.z) | at(high.w) << 16);
}

}
