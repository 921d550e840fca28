// The values groups of the attention kernels (attention_core.cuh): the weighted sum of 256 channels, and how it is stored.
#pragma once

#include "attention_core.cuh"

namespace attention {

// d[64 x 128] (+)= a[64 x 16] b[16 x 128], both in shared memory, a with contiguous k, b with contiguous n.
__device__ __forceinline__ void wgmma_values(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" REGISTERS_0_63 "}, %64, %65, p, 1, 1, 0, 1;\n}\n"
      : D64(0)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}

// Of a thread's sums, pair j of group g of 32 channels is total[g / 4][16 * (g % 4) + 4 * j + 2 * i] and the one after it, for
// heads row + 8 * i; its first channel is 32 * g + 8 * (lane % 4) + 2 * j.
__device__ __forceinline__ int64_t place_of(int64_t number, int side, int row, int lane) {
  return (number * kHeads + row) * kChannels + side * kHalf + 8 * (lane % 4);
}

__device__ __forceinline__ void store_parts(const Arguments& a, const float (&total)[2][64], int number, int side, int row,
                                            int lane) {
  const int64_t place = place_of(number, side, row, lane);
#pragma unroll
  for (int group = 0; group < 8; ++group) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* sums = &total[group / 4][16 * (group % 4) + 2 * i];
      auto* target = reinterpret_cast<float4*>(a.parts + place + 8 * i * kChannels + 32 * group);
      target[0] = make_float4(sums[0], sums[1], sums[4], sums[5]);
      target[1] = make_float4(sums[8], sums[9], sums[12], sums[13]);
    }
  }
}

__device__ __forceinline__ void store_output(const Arguments& a, const float (&total)[2][64], const float (&factor)[2], int token,
                                             int side, int row, int lane) {
  const int64_t place = place_of(token, side, row, lane);
#pragma unroll
  for (int group = 0; group < 8; ++group) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* sums = &total[group / 4][16 * (group % 4) + 2 * i];
      uint32_t word[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) word[j] = pack_bf16(sums[4 * j] * factor[i], sums[4 * j + 1] * factor[i]);
      __stcs(reinterpret_cast<uint4*>(a.output + place + 8 * i * kChannels + 32 * group),
             make_uint4(word[0], word[1], word[2], word[3]));
    }
  }
}

__device__ __forceinline__ float rounded_to_bf16(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

// The output as kernels.triton_rotary.inverse_rope_quantize leaves it: rounded, rotated back, rounded, quantised.
__device__ __forceinline__ void store_codes(const Arguments& a, float (&total)[2][64], const float (&factor)[2], int token,
                                            int side, int row, int lane) {
  const int64_t place = place_of(token, side, row, lane);
#pragma unroll
  for (int block = 1; block >= 0; --block) {
    float(&sums)[64] = total[block];
#pragma unroll
    for (int n = 0; n < 64; ++n) sums[n] = rounded_to_bf16(sums[n] * factor[n / 2 % 2]);
    if (block == 1 && side == 1) {
#pragma unroll
      for (int group = 2; group < 4; ++group) {
        const int64_t angle = static_cast<int64_t>(token) * 32 + 16 * (group - 2) + 4 * (lane % 4);
        const float4 cosines = *reinterpret_cast<const float4*>(a.cosines + angle);
        const float4 sines = *reinterpret_cast<const float4*>(a.sines + angle);
        const float c[4] = {cosines.x, cosines.y, cosines.z, cosines.w}, s[4] = {sines.x, sines.y, sines.z, sines.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float &first = sums[16 * group + 4 * j + 2 * i], &second = sums[16 * group + 4 * j + 2 * i + 1];
            const float turned = first * c[j] + second * s[j];
            second = rounded_to_bf16(second * c[j] - first * s[j]);
            first = rounded_to_bf16(turned);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float most = 1e-4f;
#pragma unroll
      for (int n = 0; n < 64; ++n) {
        if (n / 2 % 2 == i) most = fmaxf(most, fabsf(sums[n]));
      }
      most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, 2));
      const uint32_t exponent = (__float_as_uint(most * (1.0f / 448.0f)) + 0x7FFFFF) & 0x7F800000u;
      const float inverse = __uint_as_float(0x7F000000u - exponent);
#pragma unroll
      for (int group = 0; group < 4; ++group) {
        const float* x = &sums[16 * group + 2 * i];
        const uint2 codes = {pack_e4m3(x[0] * inverse, x[1] * inverse, x[4] * inverse, x[5] * inverse),
                             pack_e4m3(x[8] * inverse, x[9] * inverse, x[12] * inverse, x[13] * inverse)};
        *reinterpret_cast<uint2*>(a.codes + place + 8 * i * kChannels + 128 * block + 32 * group) = codes;
      }
      if (lane % 4 == 0) a.scales[((row + 8 * i) * 4 + 2 * side + block) * a.stride_scales + token] = __uint_as_float(exponent);
    }
  }
}

// The part of values group `side`, which has 256 of the channels, in all items of this CTA.
template <int kStages>
__device__ __forceinline__ void sum_values(const Arguments& a, Shared<kStages>& shared, const uint8_t* tiles,
                                           const uint8_t* weights, int side, int thread) {
  const int lane = thread % 32, row = 16 * (thread / 32) + lane / 4;
  int stage = 0, slot = 0;
  uint32_t slot_phase = 0;
  float total[2][64];
  for (int number = blockIdx.x; number < a.num_tokens * a.splits; number += gridDim.x) {
    const Item item = item_of(a, number);
    if (item.empty()) continue;
    bool first = true, last;
    float factor[2];
    if (++stage == kStages) stage = 0;  // the query's
    do {
      barrier_wait(&shared.weights_ready[slot], slot_phase);
      last = shared.last[slot];
      const float shrink[2] = {shared.shrink[slot][row], shared.shrink[slot][row + 8]};
      factor[0] = shared.factor[slot][row], factor[1] = shared.factor[slot][row + 8];
      if (!first && __any_sync(0xFFFFFFFFu, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
        for (int j = 0; j < 16; ++j) {
#pragma unroll
          for (int c = 0; c < 4; ++c) total[0][4 * j + c] *= shrink[c / 2], total[1][4 * j + c] *= shrink[c / 2];
        }
      }
      fence_async_proxy();
      wgmma_fence();
      const uint64_t weight_operand = operand_descriptor(weights + slot * kWeights);
      const uint64_t value_operand = transposed_descriptor(tiles + stage * kTile + side * 4 * kSubTile, kSubTile);
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k) {
#pragma unroll
        for (int part = 0; part < 2; ++part)
          wgmma_values(total[part], weight_operand + (k * 32 >> 4), value_operand + ((2 * part * kSubTile + k * 16 * 128) >> 4),
                       !first || k > 0);
      }
      wgmma_commit();
      wgmma_wait<0>();
      __syncwarp();
      if (lane == 0) {
        arrive_for_warp(&shared.empty[stage][side]);
        arrive_for_warp(&shared.weights_empty[slot]);
      }
      if (++stage == kStages) stage = 0;
      slot ^= 1;
      if (slot == 0) slot_phase ^= 1;
      first = false;
    } while (!last);
    if (!item.whole)
      store_parts(a, total, number, side, row, lane);
    else if (a.codes)
      store_codes(a, total, factor, item.token, side, row, lane);
    else
      store_output(a, total, factor, item.token, side, row, lane);
  }
}

}  // namespace attention
