// What becomes of a warpgroup's 64 x N float32 sums: staged in shared memory as bf16 values, as e4m3 codes with scales, or as heads
// with RMS norm and rotation. Fragments lie as wgmma leaves them: see wgmma_fp8.cuh.
#pragma once

#include "cluster_copy.cuh"
#include "number_formats.cuh"

namespace hopper {

constexpr int kRotary = 64;  // channels at the end of a head that are rotated, in neighbouring pairs

__device__ __forceinline__ float rounded(float value) { return __bfloat162float(__float2bfloat16_rn(value)); }

// Place of 16-byte piece `piece` of row `row` in a panel under the swizzle of its pitch.
template <int PITCH>
__device__ __forceinline__ uint32_t swizzled(int row, int piece) {
  const uint32_t offset = row * PITCH + piece * 16;
  return offset ^ (((offset >> 7) & (PITCH / 16 - 1)) << 4);
}

// bf16 into panels of PITCH bytes a row, one after the other.
template <int OUTPUTS, int PITCH>
__device__ __forceinline__ void stage_values(const float (&total)[OUTPUTS / 2], uint8_t* area, int warp, int lane) {
  constexpr int kPieces = PITCH / 16;
#pragma unroll
  for (int j = 0; j < OUTPUTS / 8; j += 2) {
    const float* value = &total[4 * j];
    const uint32_t packed[4] = {pack_bf16(value[0], value[1]), pack_bf16(value[2], value[3]), pack_bf16(value[4], value[5]),
                                pack_bf16(value[6], value[7])};
    const int piece = j + lane / 16, row = 16 * warp + lane % 16;
    const uint8_t* panel = area + j / kPieces * (64 * PITCH);
    store_matrices(shared_address(panel) + swizzled<PITCH>(row, piece % kPieces), packed);
  }
}

// e4m3 codes of the bf16 values into a panel of 128 bytes a row, and the scale of each of `rows` rows to its place in `scales`.
__device__ __forceinline__ void stage_codes(float (&total)[64], uint8_t* area, float* scales, int rows, int warp, int lane) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float amax = 0.0f;
#pragma unroll
    for (int j = 0; j < 64; j += 4) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& value = total[j + 2 * i + c];
        value = rounded(value);
        amax = fmaxf(amax, fabsf(value));
      }
    }
    amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, 1));
    amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, 2));
    const float scale = power_of_two_scale(amax), inverse = 1.0f / scale;
    const int row = 16 * warp + lane / 4 + 8 * i;
    if (lane % 4 == 0 && row < rows) scales[row] = scale;
    const bool odd = lane & 1;
#pragma unroll
    for (int j = 0; j < 16; j += 2) {  // neighbours swap pairs: the even lane gets four codes of block j, the odd one of block j + 1
      const float* value = &total[4 * j + 2 * i];
      const uint32_t first = pack_e4m3(value[0] * inverse, value[1] * inverse);
      const uint32_t second = pack_e4m3(value[4] * inverse, value[5] * inverse);
      const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, odd ? first : second, 1);
      uint8_t* target = area + swizzled<128>(row, j / 2) + 8 * (lane & 1) + 4 * (lane % 4 / 2);
      *reinterpret_cast<uint32_t*>(target) = odd ? other | second << 16 : first | other << 16;
    }
  }
}

// Sums of squares that the two CTAs of a cluster exchange: each has half of the channels of a head.
struct HeadSums {
  float* sums;        // [2 CTAs][64 rows], of this warpgroup
  uint64_t* arrived;  // of one arrival and the bytes of both CTAs
  uint32_t parity;
};

// Two pieces of 128 channels in bf16: pairs[piece][i][j] = row lane / 4 + 8 * i, channels 8 * j + 2 * (lane % 4) and the next.
using HeadPairs = uint32_t[2][2][16];

// RMS norm over the head that this CTA and its peer share, and the rotation of the last channels, which are CTA 1's. total: two
// pieces, in the order of the head. angles: cos and sin of the first row, [rows, kRotary / 2].
__device__ __forceinline__ void finish_heads(HeadPairs& pairs, const float (&total)[2][64], const HeadSums& exchange, float eps,
                                             const float* cos, const float* sin, int rows, int rank, int warp, int lane) {
  const int first = 16 * warp + lane / 4;
  if (warp == 0 && lane == 0) barrier_expect_bytes(exchange.arrived, 2 * 64 * 4);
  if (rank == 1 && 16 * warp + lane / 2 < rows)  // the angles of this warp's 16 rows are two lines of 128 bytes a row
    asm volatile("prefetch.global.L1 [%0];" ::"l"((lane % 2 ? sin : cos) + (16 * warp + lane / 2) * (kRotary / 2)));
  float square[2][2] = {};
#pragma unroll
  for (int piece = 0; piece < 2; ++piece) {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        pairs[piece][i][j] = pack_bf16(total[piece][4 * j + 2 * i], total[piece][4 * j + 2 * i + 1]);
        const float2 value = unpack_bf16(pairs[piece][i][j]);
        square[i][0] += value.x * value.x;
        square[i][1] += value.y * value.y;
      }
    }
  }
#pragma unroll
  for (int piece = 0; piece < 2; ++piece)
#pragma unroll
    for (int j = 0; j < 16; ++j)  // what was unpacked is not worth registers until the sums are there
      asm volatile("" : "+r"(pairs[piece][0][j]), "+r"(pairs[piece][1][j]));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = square[i][0] + square[i][1];
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
    if (lane % 4 < 2) store_at(&exchange.sums[64 * rank + first + 8 * i], sum, exchange.arrived, lane % 4);
  }
  barrier_wait(exchange.arrived, exchange.parity);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first + 8 * i;
    const float factor = rsqrtf((exchange.sums[row] + exchange.sums[64 + row]) / 512.0f + eps);
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) {
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const float2 value = unpack_bf16(pairs[piece][i][j]);
        pairs[piece][i][j] = pack_bf16(value.x * factor, value.y * factor);
      }
    }
    if (rank == 1 && row < rows) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int place = row * (kRotary / 2) + 4 * j + lane % 4;
        const float c = cos[place], s = sin[place];
        const float2 value = unpack_bf16(pairs[1][i][8 + j]);
        pairs[1][i][8 + j] = pack_bf16(value.x * c - value.y * s, value.y * c + value.x * s);
      }
    }
  }
}

// A piece of finished heads into two panels of 128 bytes a row.
__device__ __forceinline__ void stage_pairs(const uint32_t (&pairs)[2][16], uint8_t* area, int warp, int lane) {
#pragma unroll
  for (int j = 0; j < 16; j += 2) {
    const uint32_t packed[4] = {pairs[0][j], pairs[1][j], pairs[0][j + 1], pairs[1][j + 1]};
    const uint8_t* panel = area + j / 8 * (64 * 128);
    store_matrices(shared_address(panel) + swizzled<128>(16 * warp + lane % 16, (j + lane / 16) % 8), packed);
  }
}

}  // namespace hopper
