// Sparse attention of 64 heads x 512 channels over packed FP8 rows in pages and slots, for Hopper (sm_90a); the same op as
// kernels/triton_sparse_attention.py.
//
// A CTA takes one token (or one part of its keys) and all heads. Two producer warpgroups gather 64 rows at a time, turn
// e4m3 into bf16 by shifting bits into place and two exact multiplications by powers of two, and fill one of two swizzled
// tiles. Two consumer warpgroups each compute all 64 x 64 logits and the softmax, and half of the output channels:
// doing the logits twice costs half a tile of tensor-core time and saves every exchange between them. The tile is read as
// the K-major operand of the logits and as the transposed operand of the values.
// Bound by the tensor cores (1.5 x the products' work) and by shared-memory bandwidth, which are level here.

#include <cuda_bf16.h>

#include "wgmma_bf16.cuh"

namespace {

using namespace hopper;

constexpr int kHeads = 64, kChannels = 512, kPlain = 448, kKeys = 64;
constexpr int kSubTile = kKeys * 128;                    // 64 rows of 64 bf16 channels
constexpr int kTile = kChannels / 64 * kSubTile;         // one operand: 64 KiB
constexpr int kStages = 2;
constexpr int kConsumers = 256, kProducers = 256, kThreads = kConsumers + kProducers;
constexpr int kTableTiles = 16;                          // tiles whose rows are located at once
constexpr int kTurn = 5;                                 // named barriers kTurn + group
constexpr int kRawBytes = kKeys * kPlain;
constexpr int kSharedBytes = (1 + kStages) * kTile + kRawBytes + 1024;
static_assert(kKeys == 64 && kProducers == 4 * kKeys && kTableTiles * kKeys % kProducers == 0);

struct Arguments {
  const __nv_bfloat16* q;
  const float* sink;
  __nv_bfloat16* output;
  float *parts, *part_tops, *part_norms;
  const int* requests;
  const int64_t* positions;
  const int *query_start, *context_len, *slot_ids, *page_table, *selected;
  const uint8_t *ring, *ring_scales, *chunk, *chunk_scales, *entries, *entry_scales;
  int64_t stride_q, stride_slot, stride_slot_scales, stride_row, stride_row_scales, stride_chunk, stride_chunk_scales;
  int64_t stride_page, stride_page_scales, stride_entry, stride_entry_scales;
  int stride_pages, stride_selected, window, num_selected, rows_per_page;
  int every_ratio;  // not 0: no list, a token attends to all entries of that many tokens which it can see
  int splits;
  float logit_scale;
};

__device__ __forceinline__ int swizzled(int row, int chunk) {
  return (chunk / 8) * kSubTile + row * 128 + (((chunk % 8) ^ (row % 8)) * 16);
}

// What a token's keys have in common.
struct Token {
  int position, context, first_fresh;
  const uint8_t *ring, *ring_scales;
  const int *pages, *selected;
  int num_entries;
};

__device__ __forceinline__ int num_entries_of(const Arguments& a, int64_t token) {
  return a.every_ratio ? (static_cast<int>(a.positions[token]) + 1) / a.every_ratio : a.num_selected;
}

__device__ __forceinline__ Token load_token(const Arguments& a, int64_t token) {
  const int64_t request = a.requests[token];
  const int64_t slot = a.slot_ids[request];
  const int context = a.context_len[request];
  return {static_cast<int>(a.positions[token]),
          context,
          a.query_start[request] - context,
          a.ring + slot * a.stride_slot,
          a.ring_scales + slot * a.stride_slot_scales,
          a.page_table + request * a.stride_pages,
          a.selected + token * a.stride_selected,
          num_entries_of(a, token)};
}

// Where a key's row lies: its pool in the two bits below the sign, its number in the pool below them; negative: no key.
constexpr int kPoolShift = 29;
enum Pool { kRing = 0, kChunk = 1, kEntries = 2 };

__device__ __forceinline__ int locate(const Arguments& a, const Token& token, int tile, int lane) {
  const int window_tiles = (a.window + kKeys - 1) / kKeys;
  if (tile < window_tiles) {
    const int step = tile * kKeys + lane, row = token.position - step;
    if (step >= a.window || row < 0) return -1;
    return row >= token.context ? kChunk << kPoolShift | (token.first_fresh + row) : row % a.window;
  }
  const int number = (tile - window_tiles) * kKeys + lane;
  const int entry = number >= token.num_entries ? -1 : a.every_ratio ? number : token.selected[number];
  if (entry < 0) return -1;
  return kEntries << kPoolShift | (token.pages[entry / a.rows_per_page] * a.rows_per_page + entry % a.rows_per_page);
}

struct Row {
  const uint8_t *data, *scales;
};

__device__ __forceinline__ Row address_of(const Arguments& a, const Token& token, int location) {
  const int64_t number = location & ((1 << kPoolShift) - 1);
  switch (location >> kPoolShift) {
    case kRing:
      return {token.ring + number * a.stride_row, token.ring_scales + number * a.stride_row_scales};
    case kChunk:
      return {a.chunk + number * a.stride_chunk, a.chunk_scales + number * a.stride_chunk_scales};
    default: {
      const int page = static_cast<int>(number) / a.rows_per_page, row = static_cast<int>(number) % a.rows_per_page;
      return {a.entries + page * a.stride_page + row * a.stride_entry,
              a.entry_scales + page * a.stride_page_scales + row * a.stride_entry_scales};
    }
  }
}

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

// Sixteen e4m3 -> two swizzled chunks of eight bf16.
__device__ __forceinline__ void store_part(uint8_t* first, uint8_t* second, uint4 value, uint32_t exponent) {
  const uint32_t scale = exponent * 0x00800080u;
  const uint32_t word[4] = {value.x, value.y, value.z, value.w};
  uint32_t wide[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    wide[2 * i] = widen(word[i], 0x1404, scale);
    wide[2 * i + 1] = widen(word[i], 0x3424, scale);
  }
  *reinterpret_cast<uint4*>(first) = make_uint4(wide[0], wide[1], wide[2], wide[3]);
  *reinterpret_cast<uint4*>(second) = make_uint4(wide[4], wide[5], wide[6], wide[7]);
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

struct Shared {
  uint64_t full[kStages], empty[kStages];
  float bias[kStages][kKeys];
  uint8_t raw_scales[kKeys * 8];
  int locations[kTableTiles * kKeys];
};

__device__ __forceinline__ void copy_async(void* target, const void* source, bool live) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source), "r"(live ? 16 : 0)
               : "memory");
}

// Asks for a tile's rows: plain channels and scales past the registers into the raw buffer, two rotary parts into registers.
// Four threads a row.
__device__ __forceinline__ void request_tile(const Arguments& a, const Token& token, const int* locations, uint8_t* raw,
                                             uint8_t* raw_scales, uint4 (&rotary)[2], int producer) {
  const int row = producer / 4, quarter = producer % 4, location = locations[row];
  const bool live = location >= 0;
  const Row source = address_of(a, token, live ? location : 0);
#pragma unroll
  for (int i = 0; i < kPlain / 16 / 4; ++i) {
    const int part = 4 * i + quarter;
    copy_async(raw + row * kPlain + 16 * part, source.data + 16 * part, live);
  }
  if (quarter == 0) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(raw_scales + 8 * row)), "l"(source.scales),
                 "r"(live ? 8 : 0)
                 : "memory");
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    rotary[i] = make_uint4(0, 0, 0, 0);
    if (live) rotary[i] = __ldg(reinterpret_cast<const uint4*>(source.data + kPlain + 16 * (4 * i + quarter)));
  }
}

// Raw rows -> a swizzled bf16 tile: a warp takes eight rows, a lane one 16-byte part of each (four lanes have none).
__device__ __forceinline__ void widen_tile(const uint8_t* raw, const uint8_t* raw_scales, uint8_t* tile, int warp, int lane) {
  if (lane >= kPlain / 16) return;
  const uint8_t* source = raw + 8 * warp * kPlain + 16 * lane;
  const uint8_t* exponents = raw_scales + 64 * warp + lane / 4;
  uint8_t* target = tile + lane / 4 * kSubTile + 8 * warp * 128;
  const int chunk = 2 * lane % 8 * 16;
#pragma unroll
  for (int row = 0; row < 8; ++row) {
    uint8_t* place = target + row * 128;
    store_part(place + (chunk ^ (row * 16)), place + ((chunk + 16) ^ (row * 16)),
               *reinterpret_cast<const uint4*>(source + row * kPlain), exponents[8 * row]);
  }
}

// All producers fill one tile together. They locate the rows of kTableTiles tiles at once, so that the chain of dependent loads
// behind a row's address is paid once, and ask for a tile's rows as soon as the tile before has left the raw buffer: the rows
// arrive while the consumers work.
__device__ void produce(const Arguments& a, Shared& shared, uint8_t* tiles, uint8_t* raw, const Token& token, int first, int last,
                        int producer) {
  const int warp = producer / 32, lane = producer % 32, row = producer / 4, quarter = producer % 4;
  uint4 rotary[2];
  int stage = 0;
  uint32_t phase = 1;
  for (int base = first; base < last; base += kTableTiles) {
    const int end = min(last, base + kTableTiles);
#pragma unroll
    for (int i = 0; i < kTableTiles * kKeys / kProducers; ++i) {
      const int key = i * kProducers + producer;
      if (base + key / kKeys < end) shared.locations[key] = locate(a, token, base + key / kKeys, key % kKeys);
    }
    sync_threads_of(3, kProducers);
    request_tile(a, token, shared.locations, raw, shared.raw_scales, rotary, producer);
    for (int number = base; number < end; ++number) {
      const int* locations = shared.locations + (number - base) * kKeys;
      uint8_t* tile = tiles + stage * kTile;
      asm volatile("cp.async.wait_all;" ::: "memory");
      sync_threads_of(3, kProducers);
      barrier_wait(&shared.empty[stage], phase);
      widen_tile(raw, shared.raw_scales, tile, warp, lane);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        *reinterpret_cast<uint4*>(tile + swizzled(row, kPlain / 8 + 4 * i + quarter)) = rotary[i];
      if (producer < kKeys) shared.bias[stage][producer] = locations[producer] >= 0 ? 0.0f : -INFINITY;
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      barrier_arrive(&shared.full[stage]);
      sync_threads_of(3, kProducers);
      if (number + 1 < end) request_tile(a, token, locations + kKeys, raw, shared.raw_scales, rotary, producer);
      if (++stage == kStages) stage = 0, phase ^= 1;
    }
  }
}

__device__ void consume(const Arguments& a, Shared& shared, const uint8_t* query, const uint8_t* tiles, int64_t token, int split,
                        int num_tiles, int group, int thread) {
  const int lane = thread % 32, row = 16 * (thread / 32) + lane / 4;
  float total[2][64];
#pragma unroll
  for (int i = 0; i < 64; ++i) total[0][i] = total[1][i] = 0.0f;
  // A finite start: a tile without a valid key then leaves zero weights instead of NaN.
  float top[2] = {-1e30f, -1e30f}, norm[2] = {0.0f, 0.0f};
  const uint64_t query_operand = operand_descriptor(query);
  if (group == 1 && num_tiles > 0) arrive_for(kTurn, kConsumers);
  for (int turn = 0; turn < num_tiles; ++turn) {
    const int stage = turn % kStages;
    const uint8_t* tile = tiles + stage * kTile;
    barrier_wait(&shared.full[stage], (turn / kStages) & 1);
    // The groups take turns at the logits, so that one's softmax runs beside the other's products.
    sync_threads_of(kTurn + group, kConsumers);
    float logits[32];
    const uint64_t key_operand = operand_descriptor(tile);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kChannels / 16; ++step) {
      const uint64_t offset = ((step / 4) * kSubTile + (step % 4) * 32) >> 4;
      wgmma_bf16_n64(logits, query_operand + offset, key_operand + offset, step > 0);
    }
    wgmma_commit();
    if (group == 0 || turn + 1 < num_tiles) arrive_for(kTurn + 1 - group, kConsumers);
    wgmma_wait<0>();
    float highest[2] = {top[0], top[1]};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 bias = *reinterpret_cast<const float2*>(&shared.bias[stage][8 * j + 2 * (lane % 4)]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        logits[4 * j + 2 * i] = fmaf(logits[4 * j + 2 * i], a.logit_scale, bias.x);
        logits[4 * j + 2 * i + 1] = fmaf(logits[4 * j + 2 * i + 1], a.logit_scale, bias.y);
        highest[i] = fmaxf(highest[i], fmaxf(logits[4 * j + 2 * i], logits[4 * j + 2 * i + 1]));
      }
    }
    float shrink[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      highest[i] = fmaxf(highest[i], __shfl_xor_sync(0xFFFFFFFFu, highest[i], 1));
      highest[i] = fmaxf(highest[i], __shfl_xor_sync(0xFFFFFFFFu, highest[i], 2));
      shrink[i] = exp2f(top[i] - highest[i]);
      top[i] = highest[i];
      norm[i] *= shrink[i];
    }
    uint32_t weights[4][4];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float low = exp2f(logits[4 * j + 2 * i] - top[i]), high = exp2f(logits[4 * j + 2 * i + 1] - top[i]);
        norm[i] += low + high;
        weights[j / 2][2 * (j % 2) + i] = pack_bf16(low, high);
      }
    }
#pragma unroll
    for (int j = 0; j < 16; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          total[0][4 * j + 2 * i + c] *= shrink[i];
          total[1][4 * j + 2 * i + c] *= shrink[i];
        }
      }
    }
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint8_t* values = tile + (4 * group + 2 * half) * kSubTile + step * 16 * 128;
        wgmma_bf16_n128_transposed(total[half], weights[step], transposed_descriptor(values, kSubTile));
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
    __syncwarp();
    if (lane == 0) barrier_arrive(&shared.empty[stage]);
  }

  float factor[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    norm[i] += __shfl_xor_sync(0xFFFFFFFFu, norm[i], 1);
    norm[i] += __shfl_xor_sync(0xFFFFFFFFu, norm[i], 2);
    factor[i] = 1.0f;
    const int head = row + 8 * i;
    if (a.splits == 1) {
      const float sunk = a.sink[head] * 1.4426950408889634f;
      const float final_top = fmaxf(top[i], sunk);
      const float shrink = exp2f(top[i] - final_top);
      factor[i] = shrink / (norm[i] * shrink + exp2f(sunk - final_top));
    } else if (group == 0 && lane % 4 == 0) {
      const int64_t part = (token * a.splits + split) * kHeads + head;
      a.part_tops[part] = top[i];
      a.part_norms[part] = norm[i];
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int channel = 256 * group + 128 * half + 8 * j + 2 * (lane % 4), head = row + 8 * i;
        const float low = total[half][4 * j + 2 * i] * factor[i], high = total[half][4 * j + 2 * i + 1] * factor[i];
        if (a.splits == 1) {
          *reinterpret_cast<uint32_t*>(a.output + (token * kHeads + head) * kChannels + channel) = pack_bf16(low, high);
        } else {
          const int64_t part = (token * a.splits + split) * kHeads + head;
          *reinterpret_cast<float2*>(a.parts + part * kChannels + channel) = make_float2(low, high);
        }
      }
    }
  }
}

__device__ __forceinline__ void load_query(const Arguments& a, uint8_t* query, int64_t token, int consumer) {
  constexpr int kPieces = kHeads * kChannels / 8 / kConsumers;
  uint4 pieces[kPieces];
  const auto* source = reinterpret_cast<const uint4*>(a.q + token * a.stride_q);
#pragma unroll
  for (int i = 0; i < kPieces; ++i) pieces[i] = __ldg(source + i * kConsumers + consumer);
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int piece = i * kConsumers + consumer;
    *reinterpret_cast<uint4*>(query + swizzled(piece / (kChannels / 8), piece % (kChannels / 8))) = pieces[i];
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__global__ void __launch_bounds__(kThreads, 1) attention_kernel(const Arguments a) {
  extern __shared__ uint8_t unaligned[];
  __shared__ Shared shared;
  uint8_t* query = aligned_to_1024(unaligned);
  uint8_t* tiles = query + kTile;
  const int64_t token = blockIdx.x;
  const int split = blockIdx.y;
  const int tiles_of_all = (a.window + kKeys - 1) / kKeys + (num_entries_of(a, token) + kKeys - 1) / kKeys;
  const int first = split * tiles_of_all / a.splits, last = (split + 1) * tiles_of_all / a.splits;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(&shared.full[stage], kProducers);
      barrier_init(&shared.empty[stage], kConsumers / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    const int producer = threadIdx.x - kConsumers;
    if (first < last) produce(a, shared, tiles, tiles + kStages * kTile, load_token(a, token), first, last, producer);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 200;");
    load_query(a, query, token, threadIdx.x);
    sync_threads_of(4, kConsumers);
    consume(a, shared, query, tiles, token, split, last - first, threadIdx.x / 128, threadIdx.x % 128);
  }
}

}  // namespace

// Arrays of pointers, byte strides and integers in the order of the fields of Arguments. Returns a cudaError_t.
extern "C" int sparse_attention(const void* const* pointers, const int64_t* strides, const int* integers, float logit_scale,
                                int num_tokens, void* stream) {
  Arguments a;
  a.q = static_cast<const __nv_bfloat16*>(pointers[0]);
  a.sink = static_cast<const float*>(pointers[1]);
  a.output = static_cast<__nv_bfloat16*>(const_cast<void*>(pointers[2]));
  a.parts = static_cast<float*>(const_cast<void*>(pointers[3]));
  a.part_tops = static_cast<float*>(const_cast<void*>(pointers[4]));
  a.part_norms = static_cast<float*>(const_cast<void*>(pointers[5]));
  a.requests = static_cast<const int*>(pointers[6]);
  a.positions = static_cast<const int64_t*>(pointers[7]);
  a.query_start = static_cast<const int*>(pointers[8]);
  a.context_len = static_cast<const int*>(pointers[9]);
  a.slot_ids = static_cast<const int*>(pointers[10]);
  a.page_table = static_cast<const int*>(pointers[11]);
  a.selected = static_cast<const int*>(pointers[12]);
  const uint8_t** rows[6] = {&a.ring, &a.ring_scales, &a.chunk, &a.chunk_scales, &a.entries, &a.entry_scales};
  for (int i = 0; i < 6; ++i) *rows[i] = static_cast<const uint8_t*>(pointers[13 + i]);
  a.stride_q = strides[0];
  int64_t* row_strides[10] = {&a.stride_slot,  &a.stride_slot_scales,  &a.stride_row,   &a.stride_row_scales, &a.stride_chunk,
                              &a.stride_chunk_scales, &a.stride_page, &a.stride_page_scales, &a.stride_entry, &a.stride_entry_scales};
  for (int i = 0; i < 10; ++i) *row_strides[i] = strides[1 + i];
  a.stride_pages = integers[0];
  a.stride_selected = integers[1];
  a.window = integers[2];
  a.num_selected = integers[3];
  a.rows_per_page = integers[4];
  a.every_ratio = integers[5];
  a.splits = integers[6];
  a.logit_scale = logit_scale;
  const cudaError_t error = cudaFuncSetAttribute(attention_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  attention_kernel<<<dim3(num_tokens, a.splits), kThreads, kSharedBytes, static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}
