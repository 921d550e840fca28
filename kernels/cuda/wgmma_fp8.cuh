// Hopper building blocks for the kernels in this folder: bulk copies, wgmma with e4m3 operands. Instruction semantics: PTX ISA,
// sections "cp.async.bulk" and "wgmma".
#pragma once

#include <cuda.h>

#include "shared_memory.cuh"

namespace hopper {

// Contiguous global bytes into shared memory; bytes and both addresses are multiples of 16.
__device__ __forceinline__ void bulk_load(void* target, const void* source, uint32_t bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(target)),
      "l"(source), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// A box of a two-dimensional tensor map; x counts elements of the contiguous dimension.
__device__ __forceinline__ void tensor_load(void* target, const CUtensorMap* map, int x, int y, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(target)),
      "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier))
      : "memory");
}

// Shared-memory operand of wgmma: rows of 128 bytes, 128-byte swizzle, eight rows (1024 bytes) apart.
__device__ __forceinline__ uint64_t operand_descriptor(const void* tile) {
  const uint64_t address = (shared_address(tile) & 0x3FFFF) >> 4;
  return address | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

// operand_descriptor by its lower word, in which addresses count units of 16 bytes; the upper word never changes.
__device__ __forceinline__ uint32_t descriptor_place(const void* tile) { return static_cast<uint32_t>(operand_descriptor(tile)); }
__device__ __forceinline__ uint64_t descriptor_at(uint32_t place) {
  uint64_t descriptor;
  asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(place), "r"(64u | 1u << 30));
  return descriptor;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D8(i) D4(i), D4(i + 4)
#define D16(i) D8(i), D8(i + 8)
#define D32(i) D16(i), D16(i + 16)
#define REGISTERS_0_3 "%0,%1,%2,%3"
#define REGISTERS_0_7 REGISTERS_0_3 ",%4,%5,%6,%7"
#define REGISTERS_0_15 REGISTERS_0_7 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define REGISTERS_0_23 REGISTERS_0_15 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define REGISTERS_0_31 REGISTERS_0_23 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define REGISTERS_0_47 \
  REGISTERS_0_31 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define REGISTERS_0_63 \
  REGISTERS_0_47 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// d[64 x N] (+)= a[64 x 32, registers] * b[32 x N, shared memory], e4m3 operands, float32 accumulators.
// The accumulator fragment of a thread: d[4 * j + 2 * i + c] = row 16 * warp + 8 * i + lane / 4, column 8 * j + 2 * (lane % 4) + c.
template <int N>
__device__ __forceinline__ void wgmma_e4m3(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate);

#define DEFINE_WGMMA(N, REGISTERS, OUTPUTS, A0, A1, A2, A3, B, P)                                                  \
  template <>                                                                                                      \
  __device__ __forceinline__ void wgmma_e4m3<N>(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,             \
                                                bool accumulate) {                                                 \
    asm volatile(                                                                                                  \
        "{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\n"                                                             \
        "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" REGISTERS "}, {" A0 "," A1 "," A2 "," A3 "}, " \
        B ", p, 1, 1;\n}\n"                                                                                        \
        : OUTPUTS                                                                                                  \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));                  \
  }

DEFINE_WGMMA(8, REGISTERS_0_3, D4(0), "%4", "%5", "%6", "%7", "%8", "%9")
DEFINE_WGMMA(16, REGISTERS_0_7, D8(0), "%8", "%9", "%10", "%11", "%12", "%13")
DEFINE_WGMMA(32, REGISTERS_0_15, D16(0), "%16", "%17", "%18", "%19", "%20", "%21")
#define D24(i) D16(i), D8(i + 16)
DEFINE_WGMMA(48, REGISTERS_0_23, D24(0), "%24", "%25", "%26", "%27", "%28", "%29")
DEFINE_WGMMA(64, REGISTERS_0_31, D32(0), "%32", "%33", "%34", "%35", "%36", "%37")
#define D48(i) D32(i), D16(i + 32)
DEFINE_WGMMA(96, REGISTERS_0_47, D48(0), "%48", "%49", "%50", "%51", "%52", "%53")
#define D64(i) D32(i), D32(i + 32)
DEFINE_WGMMA(128, REGISTERS_0_63, D64(0), "%64", "%65", "%66", "%67", "%68", "%69")

// The same with both operands in shared memory.
template <int N>
__device__ __forceinline__ void wgmma_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate);

#define DEFINE_SHARED_WGMMA(N, REGISTERS, OUTPUTS, A, B, P)                                                                    \
  template <>                                                                                                                 \
  __device__ __forceinline__ void wgmma_e4m3<N>(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {                  \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\n"                                                               \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" REGISTERS "}, " A ", " B ", p, 1, 1;\n}\n"       \
                 : OUTPUTS                                                                                                    \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                                        \
  }

DEFINE_SHARED_WGMMA(16, REGISTERS_0_7, D8(0), "%8", "%9", "%10")
DEFINE_SHARED_WGMMA(32, REGISTERS_0_15, D16(0), "%16", "%17", "%18")
DEFINE_SHARED_WGMMA(64, REGISTERS_0_31, D32(0), "%32", "%33", "%34")
DEFINE_SHARED_WGMMA(128, REGISTERS_0_63, D64(0), "%64", "%65", "%66")


}  // namespace hopper
