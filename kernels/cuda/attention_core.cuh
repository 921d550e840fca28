// What the attention kernels of this folder share: 64 heads x 512 channels over rows that are key and value, in tiles of 64
// rows, for Hopper (sm_90a). A persistent kernel walks items, an item being a token, or a part of its tiles. Its warpgroups:
//   logits    the query (a part of its channels in registers, the rest in shared memory), 64 x 64 logits of a tile, softmax,
//             weights to shared memory
//   values    two of them, each 64 x 256 channels of the weighted sum
//   gather    an item's query, then the rows of its tiles, into a ring of swizzled tiles: the part that differs
// A tile is the K-major operand of the logits and the transposed operand of the values, and is freed in halves of 256 channels.
// The values groups can wait with a tile until the logits of the next one are there (kLate), so that the tensor cores have their
// work while the softmax runs: a tenth faster where rows only need copying, a tenth slower where they are widened meanwhile.
//
// Channels are permuted within groups of 32 in all tiles: what a thread holds of the output's fragments is then eight
// neighbouring channels, stored with 16 bytes at a time. Position 8 j + 2 l + c holds channel 8 l + 2 j + c.
#pragma once

#include <type_traits>

#include "number_formats.cuh"
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
  int splits;        // items of a token, as many as that with the most keys has
  int part_tiles;    // tiles of an item
  float logit_scale;
};

// Reads the arrays of pointers, byte strides and integers that a C entry point takes, in the order of the fields.
inline Arguments arguments_of(const void* const* pointers, const int64_t* strides, const int* integers, float logit_scale) {
  Arguments a;
  int next = 0;
  const auto take = [&](auto& field) {
    field = static_cast<std::remove_reference_t<decltype(field)>>(const_cast<void*>(pointers[next++]));
  };
  take(a.q), take(a.sink), take(a.output), take(a.codes), take(a.scales), take(a.cosines), take(a.sines);
  take(a.parts), take(a.part_tops), take(a.part_norms), take(a.table);
  take(a.requests), take(a.positions), take(a.query_start), take(a.context_len), take(a.slot_ids), take(a.page_table);
  take(a.selected);
  for (const uint8_t** rows : {&a.ring, &a.ring_scales, &a.chunk, &a.chunk_scales, &a.entries, &a.entry_scales}) take(*rows);
  for (int64_t* stride : {&a.stride_q, &a.stride_slot, &a.stride_slot_scales, &a.stride_row, &a.stride_row_scales,
                          &a.stride_chunk, &a.stride_chunk_scales, &a.stride_page, &a.stride_page_scales, &a.stride_entry,
                          &a.stride_entry_scales, &a.stride_scales})
    *stride = *strides++;
  for (int* integer : {&a.stride_pages, &a.stride_selected, &a.window, &a.num_selected, &a.rows_per_page, &a.every_ratio,
                       &a.ratio, &a.page_shift, &a.num_tokens, &a.num_requests, &a.entries_each, &a.splits, &a.part_tiles})
    *integer = *integers++;
  a.logit_scale = logit_scale;
  return a;
}

__device__ __forceinline__ int num_entries_of(const Arguments& a, int position) {
  return a.every_ratio ? (position + 1) / a.every_ratio : a.num_selected;
}

// Work of a CTA at a time: tiles first .. last of a token. How a token is divided depends on its own keys alone, so that its
// sums are the same in every batch; the last items of one with fewer keys than others are empty.
struct Item {
  int token, first, last;
  bool whole;  // all of the token's tiles: the sums are the output
  __device__ __forceinline__ bool empty() const { return first >= last; }
  __device__ __forceinline__ int num_tiles() const { return last - first; }
};

__device__ __forceinline__ int token_of(const Arguments& a, int number) { return a.splits == 1 ? number : number / a.splits; }

__device__ __forceinline__ Item item_of(const Arguments& a, int number, int position) {
  const int token = token_of(a, number), first = (number - token * a.splits) * a.part_tiles;
  const int tiles = (a.window + kKeys - 1) / kKeys + (num_entries_of(a, position) + kKeys - 1) / kKeys;
  return {token, first, min(tiles, first + a.part_tiles), tiles <= a.part_tiles};
}

__device__ __forceinline__ Item item_of(const Arguments& a, int number) {
  return item_of(a, number, a.every_ratio ? static_cast<int>(a.positions[token_of(a, number)]) : 0);
}

template <int kStages>
struct Shared {
  uint64_t full[kStages][2], empty[kStages][2];  // of the halves of a tile
  uint64_t weights_ready[2], weights_empty[2];  // ready with kLate: and the logits of the tile after theirs are there, if any
  float bias[kStages][kKeys];  // 0 or, where there is no key, minus infinity
  int4 holes[kStages];         // of each warp of the gather group: not 0 if a row of its is no key
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

// Barriers count threads. `full_arrivals`: of the gather group's, for each half of a tile.
template <int kStages>
__device__ __forceinline__ void init_barriers(Shared<kStages>& shared, const int (&full_arrivals)[2]) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      for (int half = 0; half < 2; ++half) {
        barrier_init(&shared.full[stage][half], full_arrivals[half]);
        barrier_init(&shared.empty[stage][half], kGroup);
      }
    }
    for (int slot = 0; slot < 2; ++slot) {
      barrier_init(&shared.weights_ready[slot], kGroup);
      barrier_init(&shared.weights_empty[slot], 2 * kGroup);
    }
    fence_barrier_inits();
  }
  __syncthreads();
}

// One lane arrives for its warp, which has waited for a product since the accesses that this ends. Elsewhere every thread arrives
// itself: of a warp that cannot have diverged the compiler drops __syncwarp(), so that no race checker sees what orders its lanes.
__device__ __forceinline__ void arrive_for_warp(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], 32;" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ float power_of_two(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace attention
