// Sparse attention straight from packed FP8 rows in pages and slots, for Hopper (sm_90a); the same op as
// kernels/triton_sparse_attention.py. Roles and layouts: attention_core.cuh.
//
// The gather group asks for 32 rows at a time, two such halves of a tile ahead, past the registers into a raw buffer; then turns
// e4m3 into bf16 by shifting bits into place and an exact multiplication by a power of two. A thread widens what it asked for
// itself, so nothing in the group waits for another warp.
// Should be bound by reads of rows; is by the widening, one warp a scheduler that cannot hide its own latencies.

#include "attention_gather.cuh"
#include "attention_logits.cuh"
#include "attention_values.cuh"

namespace {

using namespace attention;

constexpr int kStages = 2, kHeld = 20;
constexpr int kRows = kKeys / 2;                         // rows requested at a time
constexpr int kAhead = 2, kSlots = kAhead + 1;
constexpr int kRowBytes = kPlain + 2 * (kChannels - kPlain), kScaleBytes = 8;
constexpr int kSharedBytes =
    kStages * kTile + 2 * kWeights + kQueryTile<kHeld> + kSlots * kRows * (kRowBytes + kScaleBytes) + 1024;
static_assert(kGroup == 4 * kRows);

__device__ __forceinline__ void copy_async(uint32_t target, const uint8_t* source, bool live) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(live ? 16 : 0) : "memory");
}

enum Pool { kNowhere, kRing, kChunk, kEntries };

// A row to be requested. Its page (or slot) may still be on its way from memory: nothing looks at it before the next turn.
struct Location {
  Pool pool = kNowhere;
  int page, row;
};

// Walks this thread's rows, one of every half of a tile, a turn ahead of their request.
struct Cursor {
  int number, left;  // item after this one, halves of this one's tiles that are still to be located
  int key, limit;    // of the thread's row: its number among the token's keys, and the first one that is not the item's
  int position, context, fresh, request, token;
  int next_request, next_position;  // of the item after this one, read ahead
  int entry;  // the listed entry of that key, read a turn ahead
};

__device__ __forceinline__ void read_entry(const Arguments& a, Cursor& at, int window_keys) {
  const int place = at.key - window_keys;
  at.entry = load_if(a.selected + static_cast<int64_t>(at.token) * a.stride_selected + place,
                     at.left > 0 && place >= 0 && place < a.num_selected);
}

// Reads the token of an item into `next_*`.
__device__ __forceinline__ void read_token(const Arguments& a, Cursor& at, int number) {
  const bool more = number < a.num_tokens * a.splits;
  const int token = token_of(a, number);
  at.next_request = load_if(a.requests + token, more);
  at.next_position = load_if(reinterpret_cast<const int*>(a.positions + token), more);
}

__device__ __forceinline__ void start_item(const Arguments& a, Cursor& at, int number, int row, int window_keys) {
  at.left = 0;
  for (; at.left == 0 && number < a.num_tokens * a.splits; number += gridDim.x) {
    at.request = at.next_request;
    at.position = at.next_position;
    read_token(a, at, number + static_cast<int>(gridDim.x));
    const Item item = item_of(a, number, at.position);
    if (item.empty()) continue;
    at.token = item.token;
    at.context = a.context_len[at.request];
    at.fresh = a.query_start[at.request] - at.context;
    at.key = item.first * kKeys + row;
    at.limit = item.last * kKeys;
    at.left = 2 * item.num_tiles();
    read_entry(a, at, window_keys);
  }
  at.number = number;
}

// The row of the cursor, which moves on. After the last item nothing is left to be located.
__device__ __forceinline__ Location locate(const Arguments& a, Cursor& at, int row, int window_keys) {
  Location location;
  if (at.left == 0) start_item(a, at, at.number, row, window_keys);
  if (at.left > 0) {
    const int from = at.position - at.key, index = at.key - window_keys;
    const int* source = a.slot_ids + at.request;
    if (index < 0) {
      if (at.key < min(a.window, at.limit) && from >= 0) {
        location.pool = from >= at.context ? kChunk : kRing;
        location.row = from >= at.context ? at.fresh + from : from & (a.window - 1);
      }
    } else {
      const int entry = a.every_ratio ? index : at.entry;
      if (at.key < at.limit && index < num_entries_of(a, at.position) && entry >= 0) {
        location.pool = kEntries;
        location.row = entry & (a.rows_per_page - 1);
        source = a.page_table + static_cast<int64_t>(at.request) * a.stride_pages + (entry >> a.page_shift);
      }
    }
    location.page = load_if(source, location.pool != kNowhere);
    --at.left;
    at.key += kRows;
    read_entry(a, at, window_keys);
  }
  return location;
}

// Requests a row, with four threads of which this one is `quarter`.
__device__ __forceinline__ void request_row(const Arguments& a, const Location& location, uint32_t target, uint32_t scale_target,
                                            int quarter) {
  const int64_t page = location.page, row = location.row;
  const uint8_t *data = a.ring, *scales = a.ring_scales;
  if (location.pool == kEntries) {
    data = a.entries + page * a.stride_page + row * a.stride_entry;
    scales = a.entry_scales + page * a.stride_page_scales + row * a.stride_entry_scales;
  } else if (location.pool == kRing) {
    data += page * a.stride_slot + row * a.stride_row;
    scales += page * a.stride_slot_scales + row * a.stride_row_scales;
  } else if (location.pool == kChunk) {
    data = a.chunk + row * a.stride_chunk;
    scales = a.chunk_scales + row * a.stride_chunk_scales;
  }
  const bool live = location.pool != kNowhere;
#pragma unroll
  for (int i = 0; i < kRowBytes / 64; ++i) copy_async(target + 64 * i, data + 16 * quarter + 64 * i, live);
  if (quarter == 0) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(scale_target), "l"(scales), "r"(live ? 8 : 0) : "memory");
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Sixteen channels of a row, `place` being that of their first chunk.
__device__ __forceinline__ void store_part(uint32_t place, const uint32_t (&word)[8]) {
#pragma unroll
  for (int j = 0; j < 4; ++j)
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(place ^ (16 * j)), "r"(word[j]), "r"(word[4 + j]) : "memory");
}

// This thread's quarter of a raw row -> its row of a tile, in the tiles' order of channels. The next part is read before one is
// widened.
__device__ __forceinline__ void widen_row(uint32_t raw, uint32_t scales, uint32_t row, int swizzle, int quarter) {
  uint32_t exponents[2];
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(exponents[0]), "=r"(exponents[1]) : "r"(scales) : "memory");
  constexpr uint32_t kBounds = kLargestOnce * 0x01010101u;
  const uint32_t bounded[2] = {__vminu4(exponents[0], kBounds), __vminu4(exponents[1], kBounds)};
  uint4 next = read_shared(raw);
  const uint32_t pairs = row + ((quarter / 2 * 64) ^ swizzle) + quarter % 2 * 8;
#pragma unroll
  for (int i = 0; i < kPlain / 64; ++i) {
    const uint4 codes = next;
    next = read_shared(raw + 64 * (i + 1));
    uint32_t word[8];
    widen_part_once(word, codes, (bounded[i / 4] >> (i % 4 * 8)) & 0xFF);
    store_part(pairs + i * kSubTile, word);
  }
  const uint4 rotary[2] = {next, read_shared(raw + kPlain + 64)};
  const uint32_t words = row + swizzle + quarter * 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t word[4] = {rotary[i].x, rotary[i].y, rotary[i].z, rotary[i].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      asm volatile("st.shared.b32 [%0], %1;" ::"r"((words ^ (16 * (4 * i + j))) + kPlain / 64 * kSubTile), "r"(word[j])
                   : "memory");
    }
  }
  if (bounded[0] != exponents[0] || bounded[1] != exponents[1]) {
#pragma unroll 1
    for (int i = 0; i < kPlain / 64; ++i) {
      uint32_t word[8];
      widen_part(word, read_shared(raw + 64 * i), (exponents[i / 4] >> (i % 4 * 8)) & 0xFF);
      store_part(pairs + i * kSubTile, word);
    }
  }
}

__device__ __forceinline__ void gather(const Arguments& a, Shared<kStages>& shared, const uint8_t* tiles, const uint8_t* raw,
                                       int thread) {
  const int row = thread / 4, quarter = thread % 4, swizzle = row % 8 * 16;
  const int window_keys = (a.window + kKeys - 1) / kKeys * kKeys;
  const uint32_t raw_place = shared_address(raw) + row * kRowBytes + quarter * 16;
  const uint32_t scale_place = shared_address(raw) + kSlots * kRows * kRowBytes + row * kScaleBytes;
  Cursor cursor;
  read_token(a, cursor, blockIdx.x);
  start_item(a, cursor, blockIdx.x, row, window_keys);
  uint32_t live = 0;      // a bit for every half requested, the latest lowest
  int ask = 0, take = 0;  // slots of the raw buffer
  Location location = locate(a, cursor, row, window_keys);
  const auto request_next = [&] {
    live = live << 1 | (location.pool != kNowhere ? 1u : 0u);
    request_row(a, location, raw_place + ask * kRows * kRowBytes, scale_place + ask * kRows * kScaleBytes, quarter);
    if (++ask == kSlots) ask = 0;
    location = locate(a, cursor, row, window_keys);
  };
#pragma unroll 1
  for (int i = 0; i < kAhead; ++i) request_next();
  RingPlace<kStages> at;
  for (int number = blockIdx.x; number < a.num_tokens * a.splits; number += gridDim.x) {
    const Item item = item_of(a, number);
    if (item.empty()) continue;
    gather_query(a, shared, tiles, item.token, at, thread);
    at.advance();
    for (int tile = item.num_tiles(); tile > 0; --tile) {
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        request_next();
        asm volatile("cp.async.wait_group %0;" ::"n"(kAhead) : "memory");
        __syncwarp();  // a row's scales came through one of its four threads
        if (half == 0) {
          barrier_wait(&shared.empty[at.stage][0], at.phase ^ 1);
          barrier_wait(&shared.empty[at.stage][1], at.phase ^ 1);
        }
        const uint32_t target = shared_address(tiles) + at.stage * kTile + (half * kRows + row) * 128;
        widen_row(raw_place + take * kRows * kRowBytes, scale_place + take * kRows * kScaleBytes, target, swizzle, quarter);
        if (quarter == 0) shared.bias[at.stage][half * kRows + row] = live >> kAhead & 1 ? 0.0f : -INFINITY;
        if (++take == kSlots) take = 0;
        __syncwarp();  // before the scales' slot is asked for again
      }
      const int hole = __any_sync(0xFFFFFFFFu, (live >> kAhead & 3) != 3);
      if (thread % 32 == 0) reinterpret_cast<int*>(&shared.holes[at.stage])[thread / 32] = hole;
      fence_async_proxy();
      for (int half = 0; half < 2; ++half) barrier_arrive(&shared.full[at.stage][half]);
      at.advance();
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
}

__global__ void __launch_bounds__(kThreads, 1) sparse_attention_kernel(const Arguments a) {
  extern __shared__ uint8_t unaligned[];
  __shared__ Shared<kStages> shared;
  uint8_t* tiles = aligned_to_1024(unaligned);
  uint8_t* weights = tiles + kStages * kTile;
  uint8_t* query_tile = weights + 2 * kWeights;
  init_barriers(shared, {kGroup, kGroup});
  const int group = threadIdx.x / kGroup, thread = threadIdx.x % kGroup;
  if (group == 0) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 144;");
    weigh<false, kStages, kHeld>(a, shared, tiles, weights, query_tile, thread);
  } else if (group < 3) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    sum_values(a, shared, tiles, weights, group - 1, thread);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 48;");
    gather(a, shared, tiles, query_tile + kQueryTile<kHeld>, thread);
  }
}

}  // namespace

// Arrays of pointers, byte strides and integers in the order of the fields of Arguments. Returns a cudaError_t.
extern "C" int sparse_attention(const void* const* pointers, const int64_t* strides, const int* integers, float logit_scale,
                                int multiprocessors, void* stream) {
  const Arguments a = arguments_of(pointers, strides, integers, logit_scale);
  const cudaError_t error =
      cudaFuncSetAttribute(sparse_attention_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  const int items = a.num_tokens * a.splits, grid = items < multiprocessors ? items : multiprocessors;
  sparse_attention_kernel<<<grid, kThreads, kSharedBytes, static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}
