// The logits group of the attention kernels (attention_core.cuh): 64 x 64 logits of a tile, softmax, weights.
#pragma once

#include "attention_core.cuh"

namespace attention {

// d[64 x 64] (+)= a[64 x 16, registers] b[64 x 16]^T, b in shared memory with contiguous k.
__device__ __forceinline__ void wgmma_logits(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" REGISTERS_0_31 "}, {%32,%33,%34,%35}, %36, p, 1, 1, 0;\n}\n"
      : D32(0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
}

// kHeld: of the 32 steps of 16 channels, those whose query is in registers.
template <int kHeld>
constexpr int kQueryTile = (kChannels / 16 - kHeld) / 4 * kSubTile;  // the others' in shared memory

struct Softmax {
  float top[2], norm[2];
  float sink[2];  // in powers of two
};

template <int kStages>
struct Place {
  RingPlace<kStages> tile;
  int slot = 0;  // of the two buffers for weights
  uint32_t slot_phase = 0;
};

// Takes the query out of its tile: into registers as far as they reach, the rest to `query_tile`.
template <int kStages, int kHeld>
__device__ __forceinline__ void take_query(Shared<kStages>& shared, const uint8_t* tiles, uint8_t* query_tile,
                                           uint32_t (&query)[kHeld][4], RingPlace<kStages>& at, int thread) {
  const int lane = thread % 32, row = 16 * (thread / 32) + lane % 16;
  const uint8_t* tile = tiles + at.stage * kTile;
  for (int half = 0; half < 2; ++half) barrier_wait(&shared.full[at.stage][half], at.phase);
  const uint32_t place = shared_address(tile) + row * 128 + (((lane / 16) ^ (row % 8)) * 16);
#pragma unroll
  for (int step = 0; step < kHeld; ++step) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(query[step][0]), "=r"(query[step][1]), "=r"(query[step][2]), "=r"(query[step][3])
                 : "r"((place ^ (step % 4 * 32)) + step / 4 * kSubTile)
                 : "memory");
  }
  constexpr int kPieces = kQueryTile<kHeld> / 16 / kGroup;
  uint4 piece[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i)
    piece[i] = *reinterpret_cast<const uint4*>(tile + kHeld / 4 * kSubTile + (i * kGroup + thread) * 16);
  sync_threads_of(kLogitsBarrier, kGroup);  // the products with the query before are done
#pragma unroll
  for (int i = 0; i < kPieces; ++i) *reinterpret_cast<uint4*>(query_tile + (i * kGroup + thread) * 16) = piece[i];
  fence_async_proxy();
  sync_threads_of(kLogitsBarrier, kGroup);
  for (int half = 0; half < 2; ++half) barrier_arrive(&shared.empty[at.stage][half]);
  at.advance();
}

// Logits and weights of one tile. kLast: of an item's last one; kLate: see attention_core.cuh.
template <bool kLast, bool kLate, int kStages, int kHeld>
__device__ __forceinline__ void weigh_tile(const Arguments& a, Shared<kStages>& shared, const uint8_t* tiles, uint8_t* weights,
                                           const uint8_t* query_tile, const uint32_t (&query)[kHeld][4], Softmax& state,
                                           Place<kStages>& at, bool first, bool whole, int number, int thread) {
  const int lane = thread % 32, row = 16 * (thread / 32) + lane / 4;
  float logits[32];
  const uint8_t* tile = tiles + at.tile.stage * kTile;
  const uint64_t keys = operand_descriptor(tile), rest = operand_descriptor(query_tile);
  for (int half = 0; half < 2; ++half) barrier_wait(&shared.full[at.tile.stage][half], at.tile.phase);
  fence_async_proxy();
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kChannels / 16; ++step) {
    const uint64_t operand = keys + (((step / 4) * kSubTile + (step % 4) * 32) >> 4);
    if (step < kHeld)
      wgmma_logits(logits, query[step], operand, step > 0);
    else
      wgmma_bf16_n64(logits, rest + ((((step - kHeld) / 4) * kSubTile + (step % 4) * 32) >> 4), operand, true);
  }
  wgmma_commit();
  wgmma_wait<0>();
  if constexpr (kLate) {
    __syncwarp();
    if (!first && lane == 0) arrive_for_warp(&shared.weights_ready[at.slot ^ 1]);
  }

  const int4 holes = shared.holes[at.tile.stage];
  if (holes.x | holes.y | holes.z | holes.w) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 bias = *reinterpret_cast<const float2*>(&shared.bias[at.tile.stage][8 * j + 2 * (lane % 4)]);
#pragma unroll
      for (int i = 0; i < 2; ++i) logits[4 * j + 2 * i] += bias.x, logits[4 * j + 2 * i + 1] += bias.y;
    }
  }
  // Several chains of comparisons and of sums, for the latency.
  float highest[2][2] = {}, sums[2][2] = {}, shrink[2], minus_top[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    highest[i][0] = fmaxf(logits[2 * i], logits[2 * i + 1]), highest[i][1] = fmaxf(logits[4 + 2 * i], logits[4 + 2 * i + 1]);
#pragma unroll
    for (int j = 2; j < 8; ++j)
      highest[i][j % 2] = fmaxf(highest[i][j % 2], fmaxf(logits[4 * j + 2 * i], logits[4 * j + 2 * i + 1]));
    float most = fmaxf(highest[i][0], highest[i][1]);
    most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, 2));
    const float top = fmaxf(state.top[i], most * a.logit_scale);
    shrink[i] = power_of_two(state.top[i] - top);
    state.top[i] = top;
    minus_top[i] = -top;
  }
  uint32_t packed[16];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float low = power_of_two(fmaf(logits[4 * j + 2 * i], a.logit_scale, minus_top[i]));
      const float high = power_of_two(fmaf(logits[4 * j + 2 * i + 1], a.logit_scale, minus_top[i]));
      sums[i][j % 2] += low + high;
      packed[2 * j + i] = pack_bf16(low, high);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) state.norm[i] = fmaf(state.norm[i], shrink[i], sums[i][0] + sums[i][1]);
  barrier_wait(&shared.weights_empty[at.slot], at.slot_phase ^ 1);
  const int matrix_row = 16 * (thread / 32) + lane % 16;
  const uint32_t place =
      shared_address(weights + at.slot * kWeights) + matrix_row * 128 + (((lane / 16) ^ (lane % 8)) * 16);
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(place ^ (16 * j)),
                 "r"(packed[2 * j]), "r"(packed[2 * j + 1]), "r"(packed[2 * j + 2]), "r"(packed[2 * j + 3])
                 : "memory");
  }
  float factor[2] = {1.0f, 1.0f};
  if (kLast) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float norm = state.norm[i];
      norm += __shfl_xor_sync(0xFFFFFFFFu, norm, 1);
      norm += __shfl_xor_sync(0xFFFFFFFFu, norm, 2);
      const int head = row + 8 * i;
      if (whole) {
        const float final_top = fmaxf(state.top[i], state.sink[i]);
        const float final_shrink = power_of_two(state.top[i] - final_top);
        factor[i] = __fdividef(final_shrink, fmaf(norm, final_shrink, power_of_two(state.sink[i] - final_top)));
      } else if (lane % 4 == 0) {
        a.part_tops[static_cast<int64_t>(number) * kHeads + head] = state.top[i];
        a.part_norms[static_cast<int64_t>(number) * kHeads + head] = norm;
      }
    }
  }
  if (lane % 4 == 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      shared.shrink[at.slot][row + 8 * i] = shrink[i];
      if (kLast) shared.factor[at.slot][row + 8 * i] = factor[i];
    }
  }
  if (row == 0 && lane == 0) shared.last[at.slot] = kLast;
  fence_async_proxy();
  if constexpr (kLast || !kLate) barrier_arrive(&shared.weights_ready[at.slot]);
  at.tile.advance();
  at.slot ^= 1;
  if (at.slot == 0) at.slot_phase ^= 1;
}

// The logits group's part of all items of this CTA.
template <bool kLate, int kStages, int kHeld>
__device__ __forceinline__ void weigh(const Arguments& a, Shared<kStages>& shared, const uint8_t* tiles, uint8_t* weights,
                                      uint8_t* query_tile, int thread) {
  Place<kStages> at;
  Softmax state;
  for (int i = 0; i < 2; ++i) state.sink[i] = a.sink[16 * (thread / 32) + thread % 32 / 4 + 8 * i] * kLog2e;
  for (int number = blockIdx.x; number < a.num_tokens * a.splits; number += gridDim.x) {
    const Item item = item_of(a, number);
    if (item.empty()) continue;
    const int num_tiles = item.num_tiles();
    uint32_t query[kHeld][4];
    take_query(shared, tiles, query_tile, query, at.tile, thread);
    // A finite start: a tile without a valid key then leaves zero weights instead of NaN.
    for (int i = 0; i < 2; ++i) state.top[i] = -1e30f, state.norm[i] = 0.0f;
    for (int tile = 0; tile < num_tiles - 1; ++tile)
      weigh_tile<false, kLate>(a, shared, tiles, weights, query_tile, query, state, at, tile == 0, false, number, thread);
    weigh_tile<true, kLate>(a, shared, tiles, weights, query_tile, query, state, at, num_tiles == 1, item.whole, number, thread);
  }
}

}  // namespace attention
