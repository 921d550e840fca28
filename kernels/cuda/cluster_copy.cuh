// Copies of tensor-map boxes within clusters of CTAs, and back to global memory. Semantics: PTX ISA, sections
// "cp.async.bulk.tensor", "mapa", "barrier.cluster" and "stmatrix".
#pragma once

#include "wgmma_fp8.cuh"

namespace hopper {

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Every thread of the cluster. Orders no memory but barriers whose initialisation was fenced: fences of a whole GPU take a
// microsecond.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// Arrives at the same barrier of another CTA of the cluster.
__device__ __forceinline__ void barrier_arrive_at(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Writes to the same place of another CTA of the cluster; the four bytes count at the same barrier there.
__device__ __forceinline__ void store_at(float* target, float value, uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote, counted;\n"
      "mapa.shared::cluster.u32 remote, %0, %3;\n"
      "mapa.shared::cluster.u32 counted, %2, %3;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [remote], %1, [counted];\n}\n" ::"r"(
          shared_address(target)),
      "f"(value), "r"(shared_address(barrier)), "r"(rank)
      : "memory");
}

// tensor_load into the same place of every CTA whose bit is set, each counting the bytes at its own barrier.
__device__ __forceinline__ void tensor_load_multicast(void* target, const CUtensorMap* map, int x, int y, uint64_t* barrier,
                                                      uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(target)),
      "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier)), "h"(ranks)
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Shared memory into a box of a tensor map; parts of the box outside the tensor are not written.
__device__ __forceinline__ void tensor_store(const CUtensorMap* map, const void* source, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(x), "r"(y),
               "r"(shared_address(source))
               : "memory");
}

__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until this thread's stores have read shared memory.
__device__ __forceinline__ void store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&values)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(values[0]),
               "r"(values[1]), "r"(values[2]), "r"(values[3])
               : "memory");
}

}  // namespace hopper
