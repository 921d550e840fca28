// wgmma with bf16 operands, beside wgmma_fp8.cuh. Accumulator fragments are laid out as described there.
#pragma once

#include "wgmma_fp8.cuh"

namespace hopper {

// Shared-memory operand whose contiguous dimension is N: 64 channels x 8 rows per 1024 bytes, 128-byte swizzle; the next 8 rows
// follow at once, the next 64 channels `channel_stride` bytes later.
__device__ __forceinline__ uint64_t transposed_descriptor(const void* tile, uint32_t channel_stride) {
  const uint64_t address = (shared_address(tile) & 0x3FFFF) >> 4;
  return address | (static_cast<uint64_t>(channel_stride >> 4) << 16) | (64ull << 32) | (1ull << 62);
}

// d[64 x 64] (+)= a[64 x 16] b[64 x 16]^T, both in shared memory with contiguous k.
__device__ __forceinline__ void wgmma_bf16_n64(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" REGISTERS_0_31 "}, %32, %33, p, 1, 1, 0, 0;\n}\n"
      : D32(0)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}

// d[64 x 128] += a[64 x 16, registers] b[16 x 128], b in shared memory with contiguous n.
__device__ __forceinline__ void wgmma_bf16_n128_transposed(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" REGISTERS_0_63 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;\n"
      : D64(0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

}  // namespace hopper
