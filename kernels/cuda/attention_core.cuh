// What the attention kernels of this folder share: 64 heads x 512 channels over rows that are key and value, in tiles of 64
// rows, for Hopper (sm_90a). A persistent kernel walks items, an item being a token, or a part of its tiles. Its warpgroups:
//   logits    the query (a part of its channels in registers, the rest in shared memory), 64 x 64 logits of a tile, softmax,
//             weights to shared memory
//   values    two of them, each 64 x 256 channels of the weighted sum
//   gather    an item's query, then the rows of its tiles, into a ring of swizzled tiles: the part that differs
// A tile is the K-major operand of the logits and the transposed operand of the values, and is freed in halves of 256 channels.
// The second values group starts on a tile when the logits of the next one are there, so that the tensor cores have its work
// while the softmax runs.
//
// Channels are permuted within groups of 32 in all tiles: what a thread holds of the output's fragments is then eight
// neighbouring channels, stored with 16 bytes at a time. Position 8 j + 2 l + c holds channel 8 l + 2 j + c.
#pragma once

#include <cuda_bf16.h>

#include "wgmma_bf16.cuh"

namespace attention {

using namespace hopper;

constexpr int kHeads = 64, kChannels = 512, kPlain = 448, kKeys = 64, kHalf = kChannels / 2;
constexpr int kSubTile = kKeys * 128;                    // 64 rows of 64 bf16 channels
constexpr int kTile = kChannels / 64 * kSubTile;         // 64 KiB
constexpr int kWeights = kHeads * kKeys * 2;             // a tile's softmax weights in bf16
constexpr int kGroup = 128, kThreads = 4 * kGroup;
constexpr int kLogitsBarrier = 1;                        // named barriers
constexpr float kLog2e = 1.4426950408889634f;

struct Arguments {
  const __nv_bfloat16* q;
  const float* sink;
  __nv_bfloat16* output;
  // If not null, in place of `output`: heads rotated back by the angles, e4m3 with a scale per 128 channels.
  uint8_t* codes;
  float* scales;             // [kHeads * 4, stride_scales]
  const float *cosines, *sines;  // [T, 32]
  float *parts, *part_tops, *part_norms;
  uint8_t* table;  // rows widened before, of chunk_attention.cu
  const int* requests;
  const int64_t* positions;
  const int *query_start, *context_len, *slot_ids, *page_table, *selected;
  const uint8_t *ring, *ring_scales, *chunk, *chunk_scales, *entries, *entry_scales;
  int64_t stride_q, stride_slot, stride_slot_scales, stride_row, stride_row_scales, stride_chunk, stride_chunk_scales;
  int64_t stride_page, stride_page_scales, stride_entry, stride_entry_scales, stride_scales;
  int stride_pages, stride_selected, window, num_selected, rows_per_page;
  int every_ratio;  // not 0: no list, a token attends to all entries of that many tokens which it can see
  int ratio;        // tokens of an entry
  int page_shift;   // log2 of rows_per_page; that and `window` are powers of two
  int num_tokens, num_requests;
  int entries_each;  // rows of the table for one request's entries
  int splits;        // items a token's tiles are divided into; more than one: their sums go to `parts`
  float logit_scale;
};

// Reads the arrays of pointers, byte strides and integers that a C entry point takes, in the order of the fields.
inline Arguments arguments_of(const void* const* pointers, const int64_t* strides, const int* integers, float logit_scale) {
  Arguments a;
  int next = 0;
  const auto take = [&](auto& field) {
    field = static_cast<std::remove_reference_t<decltype(field)>>(const_cast<void*>(pointers[next++]));
  };
  take(a.q), take(a.sink), take(a.output), take(a.codes), take(a.scales), take(a.cosines), take(a.sines), take(a.parts), take(a.part_tops), take(a.part_norms), take(a.table);
  take(a.requests), take(a.positions), take(a.query_start), take(a.context_len), take(a.slot_ids), take(a.page_table);
  take(a.selected);
  for (const uint8_t** rows : {&a.ring, &a.ring_scales, &a.chunk, &a.chunk_scales, &a.entries, &a.entry_scales}) take(*rows);
  for (int64_t* stride : {&a.stride_q, &a.stride_slot, &a.stride_slot_scales, &a.stride_row, &a.stride_row_scales,
                          &a.stride_chunk, &a.stride_chunk_scales, &a.stride_page, &a.stride_page_scales, &a.stride_entry,
                          &a.stride_entry_scales, &a.stride_scales})
    *stride = *strides++;
  for (int* integer : {&a.stride_pages, &a.stride_selected, &a.window, &a.num_selected, &a.rows_per_page, &a.every_ratio,
                       &a.ratio, &a.page_shift, &a.num_tokens, &a.num_requests, &a.entries_each, &a.splits})
    *integer = *integers++;
  a.logit_scale = logit_scale;
  return a;
}

// Work of a CTA at a time: tiles first .. last of a token, at least one.
struct Item {
  int token, first, last;
  __device__ __forceinline__ int num_tiles() const { return max(1, last - first); }
};

__device__ __forceinline__ int num_entries_of(const Arguments& a, int position) {
  return a.every_ratio ? (position + 1) / a.every_ratio : a.num_selected;
}

__device__ __forceinline__ Item item_of(const Arguments& a, int number) {
  const int token = number / a.splits, split = number % a.splits;
  const int entries = num_entries_of(a, a.every_ratio ? static_cast<int>(a.positions[token]) : 0);
  const int tiles = (a.window + kKeys - 1) / kKeys + (entries + kKeys - 1) / kKeys;
  return {token, split * tiles / a.splits, (split + 1) * tiles / a.splits};
}

template <int kStages>
struct Shared {
  uint64_t full[kStages][2], empty[kStages][2];  // of the halves of a tile
  uint64_t weights_full[2], weights_empty[2], turn[2];
  float bias[kStages][kKeys];  // 0 or, where there is no key, minus infinity
  float shrink[2][kHeads];     // what the sum so far is multiplied with before a tile's share is added
  float factor[2][kHeads];     // after an item's last tile: what makes the sum the output
  int last[2];                 // whether the tile is an item's last one
};

// A place in the ring of tiles.
template <int kStages>
struct RingPlace {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

// `full_arrivals`: of the gather group's threads, for each half of a tile.
template <int kStages>
__device__ __forceinline__ void init_barriers(Shared<kStages>& shared, const int (&full_arrivals)[2]) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      for (int half = 0; half < 2; ++half) {
        barrier_init(&shared.full[stage][half], full_arrivals[half]);
        barrier_init(&shared.empty[stage][half], kGroup / 32);
      }
    }
    for (int slot = 0; slot < 2; ++slot) {
      barrier_init(&shared.weights_full[slot], kGroup);
      barrier_init(&shared.weights_empty[slot], 2 * kGroup / 32);
      barrier_init(&shared.turn[slot], kGroup / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ float power_of_two(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

// Two e4m3 bytes -> two bf16: the code's bits land seven exponents too low by 2^120, `scale` is the block's power of two.
__device__ __forceinline__ uint32_t widen(uint32_t word, uint32_t selector, uint32_t scale) {
  uint32_t spread;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(spread) : "r"(word), "r"(selector));
  const uint32_t bits = ((spread >> 4) & 0x07F007F0u) | (spread & 0x80008000u);
  return multiply_bf16x2(multiply_bf16x2(bits, 0x7B807B80u), scale);
}

// Sixteen e4m3 codes and their E8M0 exponent -> eight words of neighbouring channels.
__device__ __forceinline__ void widen_part(uint32_t (&word)[8], uint4 codes, uint32_t exponent) {
  const uint32_t scale = exponent * 0x00800080u, packed[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    word[2 * i] = widen(packed[i], 0x1404, scale);
    word[2 * i + 1] = widen(packed[i], 0x3424, scale);
  }
}

// d[64 x 64] (+)= a[64 x 16, registers] b[64 x 16]^T, b in shared memory with contiguous k.
__device__ __forceinline__ void wgmma_logits(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" REGISTERS_0_31 "}, {%32,%33,%34,%35}, %36, p, 1, 1, 0;\n}\n"
      : D32(0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
}

// d[64 x 128] (+)= a[64 x 16] b[16 x 128], both in shared memory, a with contiguous k, b with contiguous n.
__device__ __forceinline__ void wgmma_values(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" REGISTERS_0_63 "}, %64, %65, p, 1, 1, 0, 1;\n}\n"
      : D64(0)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}

// --- gather --------------------------------------------------------------------------------------------------------------

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

// --- logits --------------------------------------------------------------------------------------------------------------

// kHeld: of the 32 steps of 16 channels, those whose query is in registers.
template <int kHeld>
constexpr int kQueryTile = (kChannels / 16 - kHeld) / 4 * kSubTile;  // the others' in shared memory

struct Softmax {
  float top[2], norm[2];
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
  sync_threads_of(kLogitsBarrier, kGroup);  // the products with the query before are done
#pragma unroll
  for (int i = 0; i < kQueryTile<kHeld> / 16 / kGroup; ++i) {
    const int at_byte = (i * kGroup + thread) * 16;
    *reinterpret_cast<uint4*>(query_tile + at_byte) = *reinterpret_cast<const uint4*>(tile + kHeld / 4 * kSubTile + at_byte);
  }
  fence_async_proxy();
  sync_threads_of(kLogitsBarrier, kGroup);
  if (lane == 0) {
    for (int half = 0; half < 2; ++half) barrier_arrive(&shared.empty[at.stage][half]);
  }
  at.advance();
}

// Logits and weights of one tile. kLast: of an item's last one.
template <bool kLast, int kStages, int kHeld>
__device__ __forceinline__ void weigh_tile(const Arguments& a, Shared<kStages>& shared, const uint8_t* tiles, uint8_t* weights,
                                           const uint8_t* query_tile, const uint32_t (&query)[kHeld][4], Softmax& state,
                                           Place<kStages>& at, bool first, int number, int thread) {
  const int lane = thread % 32, row = 16 * (thread / 32) + lane / 4;
  float logits[32];
  const uint8_t* tile = tiles + at.tile.stage * kTile;
  const uint64_t keys = operand_descriptor(tile), rest = operand_descriptor(query_tile);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    barrier_wait(&shared.full[at.tile.stage][half], at.tile.phase);
    fence_async_proxy();
    wgmma_fence();
#pragma unroll
    for (int step = 16 * half; step < 16 * half + 16; ++step) {
      const uint64_t operand = keys + (((step / 4) * kSubTile + (step % 4) * 32) >> 4);
      if (step < kHeld)
        wgmma_logits(logits, query[step], operand, step > 0);
      else
        wgmma_bf16_n64(logits, rest + ((((step - kHeld) / 4) * kSubTile + (step % 4) * 32) >> 4), operand, true);
    }
    wgmma_commit();
  }
  wgmma_wait<0>();
  __syncwarp();
  if (!first && lane == 0) barrier_arrive(&shared.turn[at.slot ^ 1]);

  float highest[2] = {state.top[0], state.top[1]}, shrink[2];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float2 bias = *reinterpret_cast<const float2*>(&shared.bias[at.tile.stage][8 * j + 2 * (lane % 4)]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float &low = logits[4 * j + 2 * i], &high = logits[4 * j + 2 * i + 1];
      low = fmaf(low, a.logit_scale, bias.x);
      high = fmaf(high, a.logit_scale, bias.y);
      highest[i] = fmaxf(highest[i], fmaxf(low, high));
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    highest[i] = fmaxf(highest[i], __shfl_xor_sync(0xFFFFFFFFu, highest[i], 1));
    highest[i] = fmaxf(highest[i], __shfl_xor_sync(0xFFFFFFFFu, highest[i], 2));
    shrink[i] = power_of_two(state.top[i] - highest[i]);
    state.top[i] = highest[i];
    state.norm[i] *= shrink[i];
  }
  uint32_t packed[16];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float low = power_of_two(logits[4 * j + 2 * i] - state.top[i]);
      const float high = power_of_two(logits[4 * j + 2 * i + 1] - state.top[i]);
      state.norm[i] += low + high;
      packed[2 * j + i] = pack_bf16(low, high);
    }
  }
  barrier_wait(&shared.weights_empty[at.slot], at.slot_phase ^ 1);
  const uint32_t place = shared_address(weights + at.slot * kWeights) + row * 128 + (row % 8) * 16 + lane % 4 * 4;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      asm volatile("st.shared.b32 [%0], %1;" ::"r"((place ^ (16 * j)) + 1024 * i), "r"(packed[2 * j + i]) : "memory");
  }
  float factor[2] = {1.0f, 1.0f};
  if (kLast) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float norm = state.norm[i];
      norm += __shfl_xor_sync(0xFFFFFFFFu, norm, 1);
      norm += __shfl_xor_sync(0xFFFFFFFFu, norm, 2);
      const int head = row + 8 * i;
      if (a.splits == 1) {
        const float sunk = a.sink[head] * kLog2e, final_top = fmaxf(state.top[i], sunk);
        const float final_shrink = exp2f(state.top[i] - final_top);
        factor[i] = final_shrink / (norm * final_shrink + exp2f(sunk - final_top));
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
  barrier_arrive(&shared.weights_full[at.slot]);
  if (kLast) {
    __syncwarp();
    if (lane == 0) barrier_arrive(&shared.turn[at.slot]);
  }
  at.tile.advance();
  at.slot ^= 1;
  if (at.slot == 0) at.slot_phase ^= 1;
}

// The logits group's part of all items of this CTA.
template <int kStages, int kHeld>
__device__ __forceinline__ void weigh(const Arguments& a, Shared<kStages>& shared, const uint8_t* tiles, uint8_t* weights,
                                      uint8_t* query_tile, int thread) {
  Place<kStages> at;
  for (int number = blockIdx.x; number < a.num_tokens * a.splits; number += gridDim.x) {
    const int num_tiles = item_of(a, number).num_tiles();
    uint32_t query[kHeld][4];
    take_query(shared, tiles, query_tile, query, at.tile, thread);
    // A finite start: a tile without a valid key then leaves zero weights instead of NaN.
    Softmax state = {{-1e30f, -1e30f}, {0.0f, 0.0f}};
    for (int tile = 0; tile < num_tiles - 1; ++tile)
      weigh_tile<false>(a, shared, tiles, weights, query_tile, query, state, at, tile == 0, number, thread);
    weigh_tile<true>(a, shared, tiles, weights, query_tile, query, state, at, num_tiles == 1, number, thread);
  }
}

// --- values --------------------------------------------------------------------------------------------------------------

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

// Four float32 -> four e4m3 bytes.
__device__ __forceinline__ uint32_t pack_e4m3(float a, float b, float c, float d) {
  uint16_t low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return low | static_cast<uint32_t>(high) << 16;
}

// The output as kernels.triton_rotary.inverse_rope_quantize leaves it: rounded, rotated back, rounded, quantised.
template <int kSide>
__device__ __forceinline__ void store_codes(const Arguments& a, float (&total)[2][64], const float (&factor)[2], int token,
                                            int row, int lane) {
  const int64_t place = place_of(token, kSide, row, lane);
#pragma unroll
  for (int block = 1; block >= 0; --block) {
    float(&sums)[64] = total[block];
#pragma unroll
    for (int n = 0; n < 64; ++n) sums[n] = rounded_to_bf16(sums[n] * factor[n / 2 % 2]);
    if (kSide == 1 && block == 1) {
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
      if (lane % 4 == 0) a.scales[((row + 8 * i) * 4 + 2 * kSide + block) * a.stride_scales + token] = __uint_as_float(exponent);
    }
  }
}

// The part of values group kSide, which has 256 of the channels, in all items of this CTA.
template <int kSide, int kStages>
__device__ __forceinline__ void sum_values(const Arguments& a, Shared<kStages>& shared, const uint8_t* tiles,
                                           const uint8_t* weights, int thread) {
  const int lane = thread % 32, row = 16 * (thread / 32) + lane / 4;
  int stage = 0, slot = 0;
  uint32_t slot_phase = 0;
  float total[2][64];
  for (int number = blockIdx.x; number < a.num_tokens * a.splits; number += gridDim.x) {
    bool first = true, last;
    float factor[2];
    if (++stage == kStages) stage = 0;  // the query's
    do {
      barrier_wait(kSide == 0 ? &shared.weights_full[slot] : &shared.turn[slot], slot_phase);
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
      const uint64_t value_operand = transposed_descriptor(tiles + stage * kTile + kSide * 4 * kSubTile, kSubTile);
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
        barrier_arrive(&shared.empty[stage][kSide]);
        barrier_arrive(&shared.weights_empty[slot]);
      }
      if (++stage == kStages) stage = 0;
      slot ^= 1;
      if (slot == 0) slot_phase ^= 1;
      first = false;
    } while (!last);
    if (a.splits > 1)
      store_parts(a, total, number, kSide, row, lane);
    else if (a.codes)
      store_codes<kSide>(a, total, factor, number, row, lane);
    else
      store_output(a, total, factor, number, kSide, row, lane);
  }
}

}  // namespace attention
