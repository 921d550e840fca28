// Queries of the lightning indexer on Hopper: rotation, Hadamard transform and quantisation in one pass, from bf16 as projected
// to e4m3 codes in the order in which index_scores.cu multiplies them; the same op as kernels/triton_index_query.py.
//
// A CTA takes one token, four lanes a head of 128 channels: 32 channels a lane, which is one MXFP4 group. Five butterflies of the
// transform stay within the lane, two cross the quad. e2m1 values become e4m3 with one power of two for the head: exact up to
// 2^14 between its groups' scales, and a part in 2^15 of the largest value beyond.
// Bound by memory: two bytes in and one out per channel.

#include "number_formats.cuh"

namespace {

using namespace hopper;

constexpr int kHeads = 64, kWidth = 128, kLanes = 4, kChannels = kWidth / kLanes;
constexpr int kRotary = 64;  // the last channels, in adjacent pairs
constexpr int kThreads = kHeads * kLanes;

// Rounds two values to bf16, kept in float32.
__device__ __forceinline__ void round_pair(float& low, float& high) {
  const float2 wide = unpack_bf16(pack_bf16(low, high));
  low = wide.x, high = wide.y;
}

__device__ __forceinline__ float largest_of_quad(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, 2));
}

// Exponent byte of 2^ceil(log2(amax * inverse)).
__device__ __forceinline__ uint32_t scale_exponent(float amax, float inverse) {
  return (__float_as_uint(amax * inverse) + 0x7FFFFFu) >> 23;
}

__device__ __forceinline__ float power_of_two(uint32_t exponent) { return __uint_as_float(exponent << 23); }

__device__ __forceinline__ void load_rotated(const __nv_bfloat16* source, const float* cos, const float* sin, int lane,
                                             float (&x)[kChannels]) {
  uint4 parts[kChannels / 8];
#pragma unroll
  for (int i = 0; i < kChannels / 8; ++i) parts[i] = __ldg(reinterpret_cast<const uint4*>(source) + i);
#pragma unroll
  for (int i = 0; i < kChannels / 8; ++i) {
    const uint32_t word[4] = {parts[i].x, parts[i].y, parts[i].z, parts[i].w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 pair = unpack_bf16(word[k]);
      x[8 * i + 2 * k] = pair.x, x[8 * i + 2 * k + 1] = pair.y;
    }
  }
  constexpr int kPlainLanes = (kWidth - kRotary) / kChannels, kPairs = kChannels / 2;
  if (lane < kPlainLanes) return;
#pragma unroll
  for (int i = 0; i < kPairs / 4; ++i) {
    const float4 c = __ldg(reinterpret_cast<const float4*>(cos + (lane - kPlainLanes) * kPairs) + i);
    const float4 s = __ldg(reinterpret_cast<const float4*>(sin + (lane - kPlainLanes) * kPairs) + i);
    const float cosine[4] = {c.x, c.y, c.z, c.w}, sine[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int at = 8 * i + 2 * k;
      const float a = x[at], b = x[at + 1];
      x[at] = a * cosine[k] - b * sine[k];
      x[at + 1] = b * cosine[k] + a * sine[k];
      round_pair(x[at], x[at + 1]);
    }
  }
}

// Orthonormal Hadamard transform of a head, rounded to bf16.
__device__ __forceinline__ void transform(float (&x)[kChannels], int lane) {
#pragma unroll
  for (int step = 1; step < kChannels; step *= 2) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      if (i & step) continue;
      const float low = x[i], high = x[i + step];
      x[i] = low + high, x[i + step] = low - high;
    }
  }
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const float sign = lane & step ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) x[i] = fmaf(x[i], sign, __shfl_xor_sync(0xFFFFFFFFu, x[i], step));
  }
#pragma unroll
  for (int i = 0; i < kChannels; i += 2) {
    x[i] *= 0.08838834764831845f, x[i + 1] *= 0.08838834764831845f;
    round_pair(x[i], x[i + 1]);
  }
}

// Rounds a group to its e2m1 grid, ties to the even code, and scales the head to e4m3's range; returns the head's scale.
__device__ __forceinline__ float to_mxfp4(float (&x)[kChannels], float amax) {
  const uint32_t group = scale_exponent(fmaxf(amax, 7.052966104933725e-38f), 1.0f / 6.0f);
  uint32_t head = max(group, __shfl_xor_sync(0xFFFFFFFFu, group, 1));
  head = max(head, __shfl_xor_sync(0xFFFFFFFFu, head, 2));
  head = max(head, 7u);
  const float factor = power_of_two(254 + 6 - head);
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    // A float whose last place is the grid's step at x: half of x's power of two, at least half of the group's.
    const uint32_t bits = __float_as_uint(x[i]);
    const uint32_t coarse = max(bits & 0x7F800000u, group << 23) + (22u << 23);
    const float ruler = __uint_as_float(coarse | (bits & 0x80000000u));
    x[i] = __fsub_rn(__fadd_rn(x[i], ruler), ruler) * factor;
  }
  return power_of_two(head - 6);
}

template <bool FP8>
__global__ void __launch_bounds__(kThreads) query_kernel(const __nv_bfloat16* query, int64_t stride_query, const float* cos,
                                                         const float* sin, uint8_t* codes, float* scales) {
  __shared__ __align__(16) uint8_t staged[kHeads * kWidth];
  const int64_t token = blockIdx.x;
  const int head = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  float x[kChannels];
  load_rotated(query + token * stride_query + head * kWidth + lane * kChannels, cos + token * (kRotary / 2),
               sin + token * (kRotary / 2), lane, x);
  transform(x, lane);
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) amax = fmaxf(amax, fabsf(x[i]));
  float scale;
  if constexpr (FP8) {
    const uint32_t exponent = scale_exponent(fmaxf(largest_of_quad(amax), 1e-4f), 1.0f / 448.0f);
    scale = power_of_two(exponent);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) x[i] *= power_of_two(254 - exponent);
  } else {
    scale = to_mxfp4(x, amax);
  }
  if (lane == 0) scales[token * kHeads + head] = scale;
  // Word w of the four lanes is 16-byte chunk w of the head's row, under the 128-byte swizzle.
#pragma unroll
  for (int word = 0; word < kChannels / 4; ++word) {
    *reinterpret_cast<uint32_t*>(staged + head * kWidth + (word ^ (head % 8)) * 16 + lane * 4) =
        pack_e4m3(x[4 * word], x[4 * word + 1], x[4 * word + 2], x[4 * word + 3]);
  }
  __syncwarp();
  const int warp_bytes = threadIdx.x / 32 * (8 * kWidth), place = threadIdx.x % 32 * 16;
  uint8_t* target = codes + token * (kHeads * kWidth) + warp_bytes + place;
#pragma unroll
  for (int half = 0; half < 1024; half += 512)
    *reinterpret_cast<uint4*>(target + half) = *reinterpret_cast<const uint4*>(staged + warp_bytes + half + place);
}

}  // namespace

// query: bf16 [num_tokens, 64, 128], a stride between tokens; cos, sin: float32 [num_tokens, 32]; codes: uint8 [num_tokens, 8192];
// scales: float32 [num_tokens, 64]. All 16-byte aligned. Returns a cudaError_t.
extern "C" int index_query(int fp8, const void* query, int64_t stride_query, const float* cos, const float* sin, uint8_t* codes,
                           float* scales, int num_tokens, void* stream) {
  const auto* source = static_cast<const __nv_bfloat16*>(query);
  const auto queue = static_cast<cudaStream_t>(stream);
  if (fp8) query_kernel<true><<<num_tokens, kThreads, 0, queue>>>(source, stride_query, cos, sin, codes, scales);
  else query_kernel<false><<<num_tokens, kThreads, 0, queue>>>(source, stride_query, cos, sin, codes, scales);
  return cudaGetLastError();
}
