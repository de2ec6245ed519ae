// Products of up to eight rows, by tensor cores as they are in every GPU from Ampere on: bound by what
// comes from memory, and next to that by the instructions that turn codes into numbers.
#pragma once
#include "packed.cuh"

#define AHEAD 2 // steps whose codes are on their way to registers

// What a lane reads of a step: codes and scales of 128 positions.
template <int BITS, int TILES, Kind KIND>
struct Step {
    static constexpr int WORDS = BITS == 4 ? 2 : 4, GRANULES = KIND == PLAIN ? 1 : 4;
    uint4 codes[TILES][WORDS];
    unsigned scale[TILES][GRANULES], zero[TILES][GRANULES];

    __device__ __forceinline__ void read(const Packed& w, const uint4* const* codes_at,
                                         const long long* scales_at, int step) {
        int a_step = KIND == PLAIN ? 1 : 4 >> w.shift;
#pragma unroll
        for (int j = 0; j < TILES; j++) {
#pragma unroll
            for (int i = 0; i < WORDS; i++) codes[j][i] = stream(codes_at[j] + (step * WORDS + i) * 32);
#pragma unroll
            for (int i = 0; i < GRANULES; i++)
                if (i < a_step) {
                    long long at = scales_at[j] + (step * a_step + i) * 8;
                    scale[j][i] = w.scales[at];
                    if (KIND == ANY && w.zeros) zero[j][i] = w.zeros[at];
                }
        }
    }
};

// A block takes TILES times 16 outputs; its warps share the steps and add up at the end, in their
// order. Codes are read AHEAD steps ahead, past shared memory; all of x that a warp needs is copied
// there first, sixteen bytes c of row r at c ^ (r & 7) so that eight rows meet no bank twice. Sums of
// a granule are of whole numbers times x; its scale comes last.
// Grid: n / (16 TILES); threads: 32 times the warps; shared: x, and 512 TILES bytes a warp.
template <int BITS, int TILES, Kind KIND>
__device__ __forceinline__ void few_rows(half16* out, const half16* x, const float* bias, Packed w,
                                         int rows, int stride, int add) {
    constexpr int WORDS = BITS == 4 ? 1 : 2, SUMS = TILES * 128; // of a run; of a warp
    extern __shared__ uint4 shared[];                            // [steps][rows][16]; [warps][SUMS] floats
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    int tile0 = blockIdx.x * TILES, first = w.steps * warp / warps, steps = w.steps * (warp + 1) / warps - first;
    const uint4* codes_at[TILES];
    long long scales_at[TILES];
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        long long begin = (long long)min(tile0 + j, (w.n + 15) / 16 - 1) * w.steps + first;
        codes_at[j] = w.codes + begin * WORDS * 64 + lane;
        scales_at[j] = begin * (KIND == PLAIN ? 1 : 4 >> w.shift) * 8 + (lane >> 2);
    }
    Step<BITS, TILES, KIND> ahead[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
        if (i < steps) ahead[i].read(w, codes_at, scales_at, i);
    wait_for_it();
    let_next_start();

    int a_step = rows * 16; // of x, times 16 bytes
    for (int row = lane >> 4; row < rows; row += 2) {
        const uint4* from = (const uint4*)(x + (long long)row * stride) + first * (STEP / 8) + (lane & 15);
        uint4* to = shared + first * a_step + row * 16 + ((lane & 15) ^ (row & 7));
        for (int step = 0; step < steps; step++) copy_ahead(to + step * a_step, from + step * (STEP / 8), true);
    }
    asm volatile("cp.async.commit_group;");
    int own_row = min(lane & 7, rows - 1); // rows beyond the last repeat it
    unsigned here[2], at_row = (unsigned)__cvta_generic_to_shared(shared + first * a_step + own_row * 16);
    here[0] = at_row + ((lane >> 3) ^ own_row) * 16;
    here[1] = at_row + ((lane >> 3 | 4) ^ own_row) * 16;

    float sum[TILES][4], part_sum[TILES][4];
    unsigned less[TILES][2];
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        sum[j][0] = sum[j][1] = sum[j][2] = sum[j][3] = 0;
        zeros_of<BITS>(less[j], 0, w.zero);
    }
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncwarp();

    for (int step0 = 0; step0 < steps; step0 += AHEAD) {
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            if (step0 + u >= steps) break;
            Step<BITS, TILES, KIND>& now = ahead[u];
#pragma unroll
            for (int part = 0; part < 4; part++) {
                int granule = KIND == PLAIN ? 0 : part >> w.shift, within = KIND == PLAIN ? 3 : (1 << w.shift) - 1;
                bool begins = (part & within) == 0, ends = ((part + 1) & within) == 0;
                unsigned b[4];
                load_four(b, here[part & 1] + (part >> 1) * 128);
                if (KIND == ANY && begins) {
#pragma unroll
                    for (int j = 0; j < TILES; j++) {
                        part_sum[j][0] = part_sum[j][1] = part_sum[j][2] = part_sum[j][3] = 0;
                        unsigned pair = now.zero[j][0];
#pragma unroll
                        for (int i = 1; i < now.GRANULES; i++) pair = granule == i ? now.zero[j][i] : pair;
                        if (w.zeros) zeros_of<BITS>(less[j], &pair, 0);
                    }
                }
#pragma unroll
                for (int upper = 0; upper < 2; upper++)
#pragma unroll
                    for (int j = 0; j < TILES; j++) {
                        unsigned a[4];
                        codes_of<BITS>(a, now.codes[j] + (part >> 1) * WORDS, 2 * (part & 1) + upper, less[j]);
                        if (KIND == PLAIN && part == 0 && upper == 0)
                            multiply_anew(part_sum[j], a, b[0], b[1]);
                        else multiply(part_sum[j], a, b[2 * upper], b[2 * upper + 1]);
                    }
                if (ends) {
#pragma unroll
                    for (int j = 0; j < TILES; j++) {
                        unsigned scale = now.scale[j][0];
#pragma unroll
                        for (int i = 1; i < now.GRANULES; i++) scale = granule == i ? now.scale[j][i] : scale;
                        float of_g = widen((half16)(scale & 0xffff)), of_g8 = widen((half16)(scale >> 16));
#pragma unroll
                        for (int i = 0; i < 4; i++) sum[j][i] += (i < 2 ? of_g : of_g8) * part_sum[j][i];
                    }
                }
            }
            here[0] += a_step * 16, here[1] += a_step * 16;
            if (step0 + u + AHEAD < steps) now.read(w, codes_at, scales_at, u + AHEAD);
        }
#pragma unroll
        for (int j = 0; j < TILES; j++) {
            codes_at[j] += AHEAD * WORDS * 64;
            scales_at[j] += AHEAD * (KIND == PLAIN ? 1 : 4 >> w.shift) * 8;
        }
    }
    float* partial = (float*)(shared + w.steps * a_step);
#pragma unroll
    for (int i = 0; i < SUMS / 32; i++) partial[warp * SUMS + i * 32 + lane] = sum[i / 4][i % 4];
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < SUMS; i += blockDim.x) {
        float total = 0;
#pragma unroll 4
        for (int other = 0; other < warps; other++) total += partial[other * SUMS + i];
        int from = i & 31, at = i >> 5 & 3, output = (tile0 + i / 128) * 16 + (from >> 2) + (at >> 1) * 8;
        int row = 2 * (from & 3) + (at & 1);
        if (output < w.n && row < rows) put(out, total, bias, w.n, output, row, add);
    }
}
