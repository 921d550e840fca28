// Weights of routed experts on their way to experts_many.cu: warps that expand packed weights into a ring in global memory, and the
// counters by which they and the readers of the ring wait for each other.
#pragma once

#include "experts.cuh"

namespace experts {

constexpr int kRows = 128;    // of a block of rows
constexpr int kCluster = 2;   // CTAs with neighbouring tiles
constexpr int kBlockBytes = kTileRows * kStageK;  // of expanded weights, one stage of a tile
constexpr int kPairs = kTileRows / 32;            // of 16 rows, in a block of weights

struct Ring {
  uint8_t* weights;  // [slots, tiles, k / 128, 256 rows of 128 bytes under the 128-byte swizzle]
  int* next;         // [2]: the next block to expand, the next tile of a cluster
  int* ready;        // [experts]: blocks of it that are expanded
  int* done;         // [experts]: tiles whose weights have been read
  int slots;
};

// Experts with rows have numbers, in their order. In shared memory.
struct Order {
  Walk<kRows> walk;
  int number[kMaxExperts], expert_of[kMaxExperts], num_experts;

  // By the whole CTA.
  __device__ __forceinline__ void prepare(const Arguments& arguments) {
    walk.prepare(arguments);
    if (threadIdx.x < 32) {
      int before = 0;
      for (int base = 0; base < arguments.experts; base += 32) {
        const int expert = base + threadIdx.x;
        const bool used = expert < arguments.experts && walk.num_blocks(expert) > 0;
        const uint32_t all = __ballot_sync(0xFFFFFFFFu, used);
        const int place = before + __popc(all & ((1u << threadIdx.x) - 1));
        if (used) number[expert] = place, expert_of[place] = expert;
        before += __popc(all);
      }
      if (threadIdx.x == 0) num_experts = before;
    }
    __syncthreads();
  }
};

__device__ __forceinline__ int cluster_tiles(const Arguments& arguments) { return (arguments.tiles + kCluster - 1) / kCluster; }

__device__ __forceinline__ void count_at(int* counter) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ __forceinline__ void wait_for(const int* counter, int count) {
  for (;;) {
    int seen;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    if (seen >= count) return;
    __nanosleep(64);
  }
}

// Orders what generic accesses to global memory wrote against copies of the copy engine, on both sides of a counter.
__device__ __forceinline__ void fence_global_for_copies() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Sixteen bytes that are read once.
__device__ __forceinline__ uint4 load_streamed(const uint8_t* place) {
  uint4 words;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(place));
  return words;
}

// Word p of lane q of every four lanes becomes word q of lane p.
__device__ __forceinline__ void transpose_quad(uint32_t (&word)[4], int lane) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int low = step == 1 ? 2 * i : i, high = low + step;
      const uint32_t received = __shfl_xor_sync(0xFFFFFFFFu, upper ? word[low] : word[high], step);
      if (upper) word[low] = received; else word[high] = received;
    }
  }
}

// A thread's words of sixteen rows of a packed block. A warp's rows are those of its lane / 4 and eight further on.
struct PackedPart {
  uint4 codes[2];
  uint32_t upper, lower;  // shifts

  // Addresses are this lane's.
  __device__ __forceinline__ PackedPart(const uint8_t* code_place, const uint8_t* shift_place) {
    codes[0] = load_streamed(code_place);
    codes[1] = load_streamed(code_place + kUnitCodes / 2);
    upper = *reinterpret_cast<const uint32_t*>(shift_place);
    lower = *reinterpret_cast<const uint32_t*>(shift_place + kLowerShifts);
  }

  // target: this lane's row of the expanded block. By a warp.
  template <typename TableOf>
  __device__ __forceinline__ void expand(const RowShifts& shifts, uint8_t* target, TableOf table_of, int lane) const {
    uint32_t a[2][2][4];
    shifts.decode_by<0>(a[0], codes[0], table_of);
    shifts.decode_by<1>(a[1], codes[1], table_of);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t chunk[4] = {a[half][0][i], a[half][0][2 + i], a[half][1][i], a[half][1][2 + i]};
        transpose_quad(chunk, lane);
        const int place = (4 * half + lane % 4) ^ (lane / 4);  // under the swizzle
        *reinterpret_cast<uint4*>(target + i * 8 * kStageK + place * 16) = make_uint4(chunk[0], chunk[1], chunk[2], chunk[3]);
      }
    }
  }
};

// Takes blocks and expands them; a warp.
__device__ __forceinline__ void expand(const Order& order, const uint8_t* table, const Arguments& arguments, const Ring& ring,
                                       int lane) {
  const int blocks = arguments.tiles * arguments.k_blocks, all = uniform(order.num_experts) * blocks;
  const auto take = [&] { return lane == 0 ? atomicAdd(ring.next, 1) : 0; };
  int next = take();
  for (int index = uniform(next); index < all; index = uniform(next)) {
    next = take();  // on its way meanwhile
    const int number = index / blocks, block = index - number * blocks, expert = order.expert_of[number];
    const uint8_t* source = arguments.weights + (static_cast<int64_t>(expert) * blocks + block) * kStagePacked;
    uint8_t* target =
        ring.weights + (static_cast<int64_t>(number % ring.slots) * blocks + block) * kBlockBytes + lane / 4 * kStageK;
    // Two parts of sixteen rows at a time, or a warp waits for its own results; a unit has four.
    const uint8_t *codes = source + 16 * lane, *shift_bytes = source + kStageCodes + shifts_place(lane);
    const auto load = [&](int pair, int part) {
      return PackedPart(codes + pair / 2 * kUnitCodes + (pair % 2 * 2 + part) * 512, shift_bytes + (2 * pair + part) * 64);
    };
    PackedPart first = load(0, 0), second = load(0, 1);
    if (number >= ring.slots) {
      const int tiles = order.walk.num_blocks(order.expert_of[number - ring.slots]) * cluster_tiles(arguments) * kCluster;
      if (lane == 0) wait_for(ring.done + number - ring.slots, tiles);
      __syncwarp();
    }
#pragma unroll 1
    for (int pair = 0; pair < kPairs; ++pair, target += 32 * kStageK) {
      const int after = min(pair + 1, kPairs - 1);  // beyond the last pair, the last again
      const PackedPart later = load(after, 0), latest = load(after, 1);
      const RowShifts first_shifts(first.upper, first.lower), second_shifts(second.upper, second.lower);
      const auto both = [&](auto table_of) {
        first.expand(first_shifts, target, table_of, lane);
        second.expand(second_shifts, target + 16 * kStageK, table_of, lane);
      };
      if (first_shifts.subnormal || second_shifts.subnormal) {
        both([&](uint32_t shift_byte) { return *reinterpret_cast<const uint2*>(table + shift_byte); });
      } else {
        both(normal_table);
      }
      first = later, second = latest;
    }
    fence_global_for_copies();
    __syncwarp();
    if (lane == 0) count_at(ring.ready + number);
  }
}

}  // namespace experts
