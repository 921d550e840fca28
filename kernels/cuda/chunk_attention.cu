// Sparse attention of a prompt chunk, for Hopper (sm_90a): the same op as sparse_attention.cu, for passes in which every row is
// read by many tokens. Roles and layouts: attention_core.cuh.
//
// First every row that the pass can read becomes bf16, once: slots' rings, the chunk, the requests' entries, in this order in
// one table, with its channels in the tiles' order. Then the gather group only copies.
// Bound by the tensor cores with hundreds of keys a token, by the memory traffic of query and output with few.

#include "attention_gather.cuh"
#include "attention_logits.cuh"
#include "attention_values.cuh"

namespace {

using namespace attention;

constexpr int kStages = 3, kHeld = 24;
constexpr int kRowBytes = kChannels * 2;
constexpr int kSharedBytes = kStages * kTile + 2 * kWeights + kQueryTile<kHeld> + 1024;

struct Row {
  const uint8_t *data, *scales;
};

// Source of a row of the table; null: nothing has been written there yet, nothing reads it.
__device__ __forceinline__ Row source_of(const Arguments& a, int64_t number) {
  const int64_t num_ring = static_cast<int64_t>(a.num_requests) * a.window;
  if (number < num_ring) {
    const int request = static_cast<int>(number / a.window), row = static_cast<int>(number % a.window);
    if (row >= a.context_len[request]) return {nullptr, nullptr};
    const int64_t slot = a.slot_ids[request];
    return {a.ring + slot * a.stride_slot + row * a.stride_row,
            a.ring_scales + slot * a.stride_slot_scales + row * a.stride_row_scales};
  }
  number -= num_ring;
  if (number < a.num_tokens)
    return {a.chunk + number * a.stride_chunk, a.chunk_scales + number * a.stride_chunk_scales};
  number -= a.num_tokens;
  const int request = static_cast<int>(number / a.entries_each), entry = static_cast<int>(number % a.entries_each);
  const int end = a.context_len[request] + a.query_start[request + 1] - a.query_start[request];
  if (entry >= end / a.ratio) return {nullptr, nullptr};
  const int64_t page = a.page_table[static_cast<int64_t>(request) * a.stride_pages + entry / a.rows_per_page];
  const int row = entry % a.rows_per_page;
  return {a.entries + page * a.stride_page + row * a.stride_entry,
          a.entry_scales + page * a.stride_page_scales + row * a.stride_entry_scales};
}

// A warp widens one row, a lane 16 channels of it.
__global__ void __launch_bounds__(256) widen_kernel(const Arguments a, int64_t num_rows) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
  if (number >= num_rows) return;
  const int lane = threadIdx.x % 32, second = lane % 2;
  const Row source = source_of(a, number);
  if (!source.data) return;
  uint32_t word[8];  // pairs of neighbouring channels
  if (lane < kPlain / 16) {
    widen_part(word, *reinterpret_cast<const uint4*>(source.data + 16 * lane), source.scales[lane / 4]);
  } else {
    const auto* rotary = reinterpret_cast<const uint4*>(source.data + kPlain + 32 * (lane - kPlain / 16));
    const uint4 low = rotary[0], high = rotary[1];
    word[0] = low.x, word[1] = low.y, word[2] = low.z, word[3] = low.w;
    word[4] = high.x, word[5] = high.y, word[6] = high.z, word[7] = high.w;
  }
  // Two lanes share a group of 32 channels; of its four 16-byte parts the first lane stores parts 0 and 2, the second 1 and 3.
  uint8_t* target = a.table + number * kRowBytes + lane / 2 * 64;
#pragma unroll
  for (int part = 0; part < 4; part += 2) {
    const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, second ? word[part] : word[part + 1], 1);
    const uint32_t other_next = __shfl_xor_sync(0xFFFFFFFFu, second ? word[4 + part] : word[4 + part + 1], 1);
    const uint4 value = second ? make_uint4(other, other_next, word[part + 1], word[4 + part + 1])
                               : make_uint4(word[part], word[4 + part], other, other_next);
    *reinterpret_cast<uint4*>(target + 16 * (part + second)) = value;
  }
}

// Eight threads take a row and a thread takes four rows of a tile, so that a warp reads whole lines. What a tile's rows are is
// read while the tile before is copied, and whose token comes next while this one's tiles are.
__device__ __forceinline__ void gather(const Arguments& a, Shared<kStages>& shared, const uint8_t* tiles, int thread) {
  const int row = thread / 8, part = thread % 8;
  const int window_keys = (a.window + kKeys - 1) / kKeys * kKeys, num_ring = a.num_requests * a.window;
  const uint32_t place = shared_address(tiles) + row * 128 + ((part ^ (row % 8)) * 16);
  const uint8_t* table = a.table + part * 16;
  RingPlace<kStages> at;
  int request = a.requests[blockIdx.x], position = static_cast<int>(a.positions[blockIdx.x]);
  for (int token = blockIdx.x; token < a.num_tokens; token += gridDim.x) {
    const bool more = token + static_cast<int>(gridDim.x) < a.num_tokens;
    const int next_request = load_if(a.requests + token + gridDim.x, more);
    const int next_position = load_if(reinterpret_cast<const int*>(a.positions + token + gridDim.x), more);
    const int context = a.context_len[request], fresh = num_ring + a.query_start[request] - context;
    const int first_entry = num_ring + a.num_tokens + request * a.entries_each, num_entries = num_entries_of(a, position);
    const int num_tiles = (window_keys + num_entries + kKeys - 1) / kKeys;
    const int* selected = a.selected + static_cast<int64_t>(token) * a.stride_selected;
    if (thread == 0 && more) {
      asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(a.q + (token + gridDim.x) * a.stride_q),
                   "r"(kHeads * kChannels * 2));
    }
    gather_query(a, shared, tiles, token, at, thread);
    if (part == 0) barrier_arrive(&shared.full[at.stage][0]);
    at.advance();
    int listed[4];  // of the next tile
    for (int tile = 0; tile < num_tiles; ++tile) {
      int number[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = tile * kKeys + row + 16 * i, from = position - key, index = key - window_keys;
        number[i] = -1;
        if (index < 0) {
          if (key < a.window && from >= 0) number[i] = from >= context ? fresh + from : request * a.window + from % a.window;
        } else if (index < num_entries) {
          const int entry = a.every_ratio ? index : listed[i];
          if (entry >= 0) number[i] = first_entry + entry;
        }
        const int next = index + kKeys;
        listed[i] = load_if(selected + next, next >= 0 && next < a.num_selected);
      }
      const int hole = __any_sync(0xFFFFFFFFu, (number[0] | number[1] | number[2] | number[3]) < 0);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        barrier_wait(&shared.empty[at.stage][half], at.phase ^ 1);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint8_t* source = table + static_cast<int64_t>(max(number[i], 0)) * kRowBytes + half * kHalf * 2;
          const uint32_t target = place + at.stage * kTile + half * 4 * kSubTile + i * 2048;
          const int bytes = number[i] >= 0 ? 16 : 0;
#pragma unroll
          for (int sub = 0; sub < 4; ++sub) {
            asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target + sub * kSubTile),
                         "l"(source + sub * 128), "r"(bytes)
                         : "memory");
          }
          if (half == 0 && part == 0) shared.bias[at.stage][row + 16 * i] = number[i] >= 0 ? 0.0f : -INFINITY;
        }
        if (half == 0 && thread % 32 == 0) reinterpret_cast<int*>(&shared.holes[at.stage])[thread / 32] = hole;
        arrive_when_copied(&shared.full[at.stage][half]);
        if (half == 0 && part == 0) barrier_arrive(&shared.full[at.stage][0]);  // for the biases
      }
      at.advance();
    }
    request = next_request, position = next_position;
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
}

__global__ void __launch_bounds__(kThreads, 1) chunk_attention_kernel(const Arguments a) {
  extern __shared__ uint8_t unaligned[];
  __shared__ Shared<kStages> shared;
  uint8_t* tiles = aligned_to_1024(unaligned);
  uint8_t* weights = tiles + kStages * kTile;
  uint8_t* query_tile = weights + 2 * kWeights;
  init_barriers(shared, {kGroup + kGroup / 8, kGroup});
  const int group = threadIdx.x / kGroup, thread = threadIdx.x % kGroup;
  if (group == 0) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    weigh<true, kStages, kHeld>(a, shared, tiles, weights, query_tile, thread);
  } else if (group < 3) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    sum_values(a, shared, tiles, weights, group - 1, thread);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    gather(a, shared, tiles, thread);
  }
}

}  // namespace

// Arrays of pointers, byte strides and integers in the order of the fields of Arguments. Returns a cudaError_t.
extern "C" int chunk_attention(const void* const* pointers, const int64_t* strides, const int* integers, float logit_scale,
                               int multiprocessors, void* stream) {
  const Arguments a = arguments_of(pointers, strides, integers, logit_scale);
  const auto queue = static_cast<cudaStream_t>(stream);
  const int64_t num_rows = static_cast<int64_t>(a.num_requests) * (a.window + a.entries_each) + a.num_tokens;
  widen_kernel<<<static_cast<unsigned>((num_rows + 7) / 8), 256, 0, queue>>>(a, num_rows);
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(chunk_attention_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  const int grid = multiprocessors < a.num_tokens ? multiprocessors : a.num_tokens;
  chunk_attention_kernel<<<grid, kThreads, kSharedBytes, queue>>>(a);
  return cudaGetLastError();
}
