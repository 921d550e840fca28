// Sparse attention of 64 heads x 512 channels over packed FP8 rows in pages and slots, for Hopper (sm_90a); the same op as
// kernels/triton_sparse_attention.py.
//
// A CTA takes one token (or one part of its keys) and all heads. Two producer warpgroups gather 64 rows at a time, turn
// e4m3 into bf16 by shifting bits into place and two exact multiplications by powers of two, and each fill one of two
// swizzled tiles. Two consumer warpgroups each compute all 64 x 64 logits and the softmax, and half of the output channels:
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
constexpr int kRowParts = (kPlain + 2 * 64) / 16;        // 16-byte parts of a packed row
constexpr int kPieces = kKeys * kRowParts / 128;         // of a producer thread per tile
constexpr int kBatch = 6;                                // pieces in flight
constexpr int kConsumers = 256, kProducers = 256, kThreads = kConsumers + kProducers;
constexpr int kTableTiles = 16;                          // tiles whose rows are located at once
constexpr int kSharedBytes = (1 + kStages) * kTile + 1024;
static_assert(kTableTiles % kStages == 0 && kProducers == 128 * kStages);
static_assert(kPieces == 18 && kPieces % kBatch == 0);

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
  int stride_pages, stride_selected, window, num_selected, rows_per_page, splits;
  float logit_scale;
};

struct Row {
  const uint8_t* data;  // null: no key
  uint2 scales;
};

__device__ __forceinline__ int swizzled(int row, int chunk) {
  return (chunk / 8) * kSubTile + row * 128 + (((chunk % 8) ^ (row % 8)) * 16);
}

// Where key `lane` of tile `tile` lies, and its scale bytes.
__device__ __forceinline__ Row locate(const Arguments& a, int64_t token, int tile, int lane) {
  const int request = a.requests[token];
  const int window_tiles = (a.window + kKeys - 1) / kKeys;
  const uint8_t *data = nullptr, *scales = nullptr;
  if (tile < window_tiles) {
    const int step = tile * kKeys + lane;
    const int row = static_cast<int>(a.positions[token]) - step;
    if (step < a.window && row >= 0) {
      const int context = a.context_len[request];
      if (row >= context) {
        const int64_t fresh = a.query_start[request] + row - context;
        data = a.chunk + fresh * a.stride_chunk;
        scales = a.chunk_scales + fresh * a.stride_chunk_scales;
      } else {
        const int64_t slot = a.slot_ids[request];
        data = a.ring + slot * a.stride_slot + row % a.window * a.stride_row;
        scales = a.ring_scales + slot * a.stride_slot_scales + row % a.window * a.stride_row_scales;
      }
    }
  } else {
    const int number = (tile - window_tiles) * kKeys + lane;
    const int entry = number < a.num_selected ? a.selected[token * a.stride_selected + number] : -1;
    if (entry >= 0) {
      const int64_t page = a.page_table[static_cast<int64_t>(request) * a.stride_pages + entry / a.rows_per_page];
      data = a.entries + page * a.stride_page + entry % a.rows_per_page * a.stride_entry;
      scales = a.entry_scales + page * a.stride_page_scales + entry % a.rows_per_page * a.stride_entry_scales;
    }
  }
  Row row{data, make_uint2(0, 0)};
  if (data != nullptr) row.scales = *reinterpret_cast<const uint2*>(scales);
  return row;
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

__device__ __forceinline__ void store_part(uint8_t* tile, int row, int part, uint4 value, uint2 scales) {
  if (part >= kPlain / 16) {
    *reinterpret_cast<uint4*>(tile + swizzled(row, part + kPlain / 16)) = value;
    return;
  }
  const uint32_t byte = ((part / 4 < 4 ? scales.x : scales.y) >> (part / 4 % 4 * 8)) & 0xFF;
  const uint32_t scale = (byte << 7) | (byte << 23);
  const uint32_t word[4] = {value.x, value.y, value.z, value.w};
  uint32_t wide[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    wide[2 * i] = widen(word[i], 0x1404, scale);
    wide[2 * i + 1] = widen(word[i], 0x3424, scale);
  }
  *reinterpret_cast<uint4*>(tile + swizzled(row, 2 * part)) = make_uint4(wide[0], wide[1], wide[2], wide[3]);
  *reinterpret_cast<uint4*>(tile + swizzled(row, 2 * part + 1)) = make_uint4(wide[4], wide[5], wide[6], wide[7]);
}

// A producer warp fills 16 rows: in its first 16 pieces a lane takes one part of each row, in its last two the remaining parts.
__device__ __forceinline__ int row_of(int piece, int thread) {
  return 16 * (thread / 32) + (piece < 16 ? piece : 8 * (piece - 16) + thread % 32 / 4);
}

__device__ __forceinline__ int part_of(int piece, int thread) { return piece < 16 ? thread % 32 : 32 + thread % 4; }

__device__ __forceinline__ void load_batch(uint4 (&values)[kBatch], const Row* rows, int batch, int thread) {
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const int piece = batch * kBatch + i;
    const uint8_t* data = rows[row_of(piece, thread)].data;
    values[i] = make_uint4(0, 0, 0, 0);
    if (data != nullptr) values[i] = __ldg(reinterpret_cast<const uint4*>(data + 16 * part_of(piece, thread)));
  }
}

__device__ __forceinline__ void store_batch(const uint4 (&values)[kBatch], const Row* rows, uint8_t* tile, int batch, int thread) {
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const int piece = batch * kBatch + i, row = row_of(piece, thread);
    store_part(tile, row, part_of(piece, thread), values[i], rows[row].scales);
  }
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

struct Shared {
  uint64_t full[kStages], empty[kStages];
  float bias[kStages][kKeys];
  Row rows[kTableTiles * kKeys];
};

// Each producer warpgroup owns one stage. All of them first locate the rows of the next kTableTiles tiles, so that the chain of
// dependent loads behind a row's address is paid once, not per tile.
__device__ void produce(const Arguments& a, Shared& shared, uint8_t* tiles, int64_t token, int first, int last, int producer) {
  const int stage = producer / 128, thread = producer % 128;
  uint8_t* tile = tiles + stage * kTile;
  uint32_t phase = 1;
  for (int base = first; base < last; base += kTableTiles) {
    const int end = min(last, base + kTableTiles);
    sync_threads_of(3, kProducers);
#pragma unroll
    for (int i = 0; i < kTableTiles * kKeys / kProducers; ++i) {
      const int key = i * kProducers + producer;
      if (base + key / kKeys < end) shared.rows[key] = locate(a, token, base + key / kKeys, key % kKeys);
    }
    sync_threads_of(3, kProducers);
    // kTableTiles is even: tile `base` always belongs to stage 0.
    for (int number = base + stage; number < end; number += kStages) {
      const Row* rows = shared.rows + (number - base) * kKeys;
      uint4 values[kBatch];
      load_batch(values, rows, 0, thread);
      barrier_wait(&shared.empty[stage], phase);
      phase ^= 1;
#pragma unroll 1  // unrolled, the addresses of all pieces would be kept in registers, and spill
      for (int batch = 0; batch < kPieces / kBatch; ++batch) {
        if (batch > 0) load_batch(values, rows, batch, thread);
        store_batch(values, rows, tile, batch, thread);
      }
      if (thread < kKeys) shared.bias[stage][thread] = rows[thread].data != nullptr ? 0.0f : -INFINITY;
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      barrier_arrive(&shared.full[stage]);
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
  for (int turn = 0; turn < num_tiles; ++turn) {
    const int stage = turn % kStages;
    const uint8_t* tile = tiles + stage * kTile;
    barrier_wait(&shared.full[stage], (turn / kStages) & 1);
    float logits[32];
    const uint64_t key_operand = operand_descriptor(tile);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kChannels / 16; ++step) {
      const uint64_t offset = ((step / 4) * kSubTile + (step % 4) * 32) >> 4;
      wgmma_bf16_n64(logits, query_operand + offset, key_operand + offset, step > 0);
    }
    wgmma_commit();
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

__global__ void __launch_bounds__(kThreads, 1) attention_kernel(const Arguments a) {
  extern __shared__ uint8_t unaligned[];
  __shared__ Shared shared;
  uint8_t* query = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(unaligned) + 1023) & ~uintptr_t(1023));
  uint8_t* tiles = query + kTile;
  const int64_t token = blockIdx.x;
  const int split = blockIdx.y;
  const int tiles_of_all = (a.window + kKeys - 1) / kKeys + (a.num_selected + kKeys - 1) / kKeys;
  const int first = split * tiles_of_all / a.splits, last = (split + 1) * tiles_of_all / a.splits;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(&shared.full[stage], 128);
      barrier_init(&shared.empty[stage], kConsumers / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  uint4 queries[kHeads * kChannels / 8 / kThreads];
  const auto* source = reinterpret_cast<const uint4*>(a.q + token * a.stride_q);
#pragma unroll
  for (int i = 0; i < kHeads * kChannels / 8 / kThreads; ++i) queries[i] = __ldg(source + i * kThreads + threadIdx.x);
#pragma unroll
  for (int i = 0; i < kHeads * kChannels / 8 / kThreads; ++i) {
    const int piece = i * kThreads + threadIdx.x;
    *reinterpret_cast<uint4*>(query + swizzled(piece / (kChannels / 8), piece % (kChannels / 8))) = queries[i];
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    if (first < last) produce(a, shared, tiles, token, first, last, threadIdx.x - kConsumers);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 200;");
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
  a.splits = integers[5];
  a.logit_scale = logit_scale;
  const cudaError_t error = cudaFuncSetAttribute(attention_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  attention_kernel<<<dim3(num_tokens, a.splits), kThreads, kSharedBytes, static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}
