// What the gather groups of the attention kernels share: e4m3 into bf16, the query into a tile. See attention_core.cuh.
#pragma once

#include "attention_core.cuh"

namespace attention {

__device__ __forceinline__ uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

// Two e4m3 bytes of a word -> the same bits in bf16, whose values come out 2^120 times too small. The selector sign-extends the
// bytes, so that a shift leaves sign, exponent and mantissa in their places.
constexpr uint32_t kLowPair = 0x9180, kHighPair = 0xB3A2;
__device__ __forceinline__ uint32_t spread(uint32_t word, uint32_t selector) {
  uint32_t wide;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(wide) : "r"(word), "r"(selector));
  return (wide << 4) & 0x87F087F0u;
}

// Sixteen e4m3 codes and their E8M0 exponent -> eight words of neighbouring channels. Both multiplications are exact.
__device__ __forceinline__ void widen_part(uint32_t (&word)[8], uint4 codes, uint32_t exponent) {
  const uint32_t scale = exponent * 0x00800080u, packed[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
  for (int i = 0; i < 8; ++i)
    word[i] = multiply_bf16x2(multiply_bf16x2(spread(packed[i / 2], i % 2 ? kHighPair : kLowPair), 0x7B807B80u), scale);
}

// The same for exponents of at most kLargestOnce, with one multiplication.
constexpr uint32_t kLargestOnce = 134;
__device__ __forceinline__ void widen_part_once(uint32_t (&word)[8], uint4 codes, uint32_t exponent) {
  const uint32_t scale = (exponent + 120) * 0x00800080u, packed[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) word[i] = multiply_bf16x2(spread(packed[i / 2], i % 2 ? kHighPair : kLowPair), scale);
}

// *source, or -1 if not wanted: without a branch, so that nothing waits for it before it is used.
__device__ __forceinline__ int load_if(const int* source, bool wanted) {
  int value;
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\nmov.b32 %0, -1;\n@p ld.global.nc.b32 %0, [%1];\n}\n"
               : "=r"(value)
               : "l"(source), "r"(static_cast<int>(wanted)));
  return value;
}

__device__ __forceinline__ void arrive_when_copied(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// A token's query into a tile, in the tiles' order of channels: two at a time, of which a warp takes 64 of a head's. Every
// thread's copies arrive once at each half's barrier.
template <int kStages>
__device__ __forceinline__ void gather_query(const Arguments& a, Shared<kStages>& shared, const uint8_t* tiles, int token,
                                             const RingPlace<kStages>& at, int thread) {
  const int warp = thread / 32, lane = thread % 32, inside = lane % 16;
  const __nv_bfloat16* source = a.q + token * a.stride_q + warp * kChannels + lane / 16 * 32 + 8 * (inside % 4) + 2 * (inside / 4);
  const uint32_t target = shared_address(tiles) + at.stage * kTile + warp * 128 + lane % 4 * 4;
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    barrier_wait(&shared.empty[at.stage][half], at.phase ^ 1);
#pragma unroll 4
    for (int i = 0; i < kHeads / 4; ++i) {
      const uint32_t place = target + half * 4 * kSubTile + i * 512 + (((lane / 4) ^ ((warp + 4 * i) % 8)) * 16);
      const __nv_bfloat16* words = source + half * kHalf + i * 4 * kChannels;
#pragma unroll
      for (int sub = 0; sub < 4; ++sub) {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(place + sub * kSubTile), "l"(words + sub * 64)
                     : "memory");
      }
    }
    arrive_when_copied(&shared.full[at.stage][half]);
  }
}

}  // namespace attention
