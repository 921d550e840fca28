// The lightning indexer's scores over paged keys on Hopper (sm_90a), the same op as kernels/triton_index_scores.py:
//   score[t, j] = sum over 64 heads of weight[t, h] * relu(query[t, h] . key[j]),  128 channels.
//
// Keys are the 64-row register operand of wgmma, heads its columns, so that the sum over heads stays within a thread and its
// quad. A thread holds the 32 channels of one MXFP4 group of a key: sums do not mind the order of channels, and queries come
// in the matching one (index_query.cu). 4-bit codes become e4m3 by byte permutation of an eight-entry table that depends on
// the group's exponent relative to the key's largest, which is exact up to 2^14 between them; the key's own power of two is
// applied to the finished sum. Keys go from global memory to registers directly.
//
// Few tokens: a CTA of one warpgroup takes every splits-th tile of 64 keys of one token; bound by the reads of keys.
// Many tokens: persistent CTAs; a producer warp stages the queries of neighbouring tokens, consumer warpgroups share the
// tiles of their keys; bound by the FP8 tensor cores. A score has the same bits either way.

#include "number_formats.cuh"
#include "wgmma_fp8_wide.cuh"

namespace {

using namespace hopper;

constexpr int kHeads = 64, kWidth = 128;
constexpr int kTokenBytes = kHeads * kWidth;
constexpr int kTileKeys = 64;
enum Format { kMxfp4 = 0, kFp8 = 1 };

struct Arguments {
  const uint8_t* queries;      // [tokens, kTokenBytes] in operand order
  const float* query_scales;   // [tokens, kHeads]
  const float* weights;        // [tokens, kHeads], strided
  const uint8_t *keys, *key_scales;
  const int* requests;
  const int64_t* positions;
  const int* page_table;
  float* scores;
  int64_t stride_weights, stride_page, stride_page_scales, stride_scores;  // pages in bytes, the others in elements
  int stride_pages, page_shift, ratio, topk, num_tokens;
};

// e4m3 codes of {0, .5, 1, 1.5, 2, 3, 4, 6} * 2^(6 - shift), exact for shift <= 14; shift 15 is zero.
struct DecodeTables {
  uint2 of_shift[16];
};

constexpr DecodeTables decode_tables() {
  const uint32_t base[8] = {0x00, 0x60, 0x68, 0x6C, 0x70, 0x74, 0x78, 0x7C};
  DecodeTables tables{};
  for (int shift = 0; shift < 15; ++shift) {
    uint32_t word[2] = {0, 0};
    for (int code = 1; code < 8; ++code) {
      const int exponent = static_cast<int>(base[code] >> 3) - shift;
      const uint32_t value = exponent > 0 ? base[code] - 8 * shift : ((base[code] & 7) | 8) >> (1 - exponent);
      word[code / 4] |= value << (8 * (code % 4));
    }
    tables.of_shift[shift] = uint2{word[0], word[1]};
  }
  return tables;
}

__constant__ DecodeTables kDecodeTables = decode_tables();

// Eight e2m1 codes -> two registers of four e4m3. A selector with its high bit set spreads a byte's sign.
__device__ __forceinline__ void decode(uint32_t word, uint2 table, uint32_t& first, uint32_t& second) {
  const uint32_t index = word & 0x77777777u, odd = word << 4;
  first = permute_bytes(table.x, table.y, index) | (permute_bytes(odd, word, 0xD9C8) & 0x80808080u);
  second = permute_bytes(table.x, table.y, index >> 16) | (permute_bytes(odd, word, 0xFBEA) & 0x80808080u);
}

// What a thread reads of a tile: 32 channels of key 16 * warp + lane / 4 and of the key eight rows on.
template <int FORMAT>
struct RawKeys {
  uint4 codes[FORMAT == kMxfp4 ? 2 : 4];
  uint32_t scales[2];
};

__device__ __forceinline__ int first_row(int thread) { return 16 * (thread / 32) + thread % 32 / 4; }

// Page of a warp's 16 keys of a tile; keys behind `last` stand for it.
__device__ __forceinline__ int page_of(const Arguments& a, const int* pages, int tile, int last, int thread) {
  return __ldg(pages + (min(tile * kTileKeys + first_row(thread), last) >> a.page_shift));
}

template <int FORMAT>
__device__ __forceinline__ void load_keys(const Arguments& a, int page, int tile, int last, int thread, RawKeys<FORMAT>& raw) {
  constexpr int kRecord = FORMAT == kMxfp4 ? kWidth / 2 : kWidth;
  const uint8_t* codes = a.keys + page * a.stride_page + thread % 4 * (kRecord / 4);
  const uint8_t* scales = a.key_scales + page * a.stride_page_scales;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = min(tile * kTileKeys + first_row(thread) + 8 * i, last) & ((1 << a.page_shift) - 1);
    const auto* source = reinterpret_cast<const uint4*>(codes + row * kRecord);
    constexpr int kParts = FORMAT == kMxfp4 ? 1 : 2;
#pragma unroll
    for (int part = 0; part < kParts; ++part) raw.codes[kParts * i + part] = __ldg(source + part);
    raw.scales[i] = __ldg(reinterpret_cast<const uint32_t*>(scales) + row);
  }
}

// -> the register operand of four products of 32 channels, and the keys' scales.
template <int FORMAT>
__device__ __forceinline__ void unpack(const RawKeys<FORMAT>& raw, const uint2* tables, int thread, uint32_t (&operand)[4][4],
                                       float (&scale)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if constexpr (FORMAT == kMxfp4) {
      const uint32_t exponents = raw.scales[i];
      const uint32_t top = max(max(exponents & 0xFF, (exponents >> 8) & 0xFF), max((exponents >> 16) & 0xFF, exponents >> 24));
      const uint2 table = tables[min(top - ((exponents >> (8 * (thread % 4))) & 0xFF), 15u)];
      const uint32_t word[4] = {raw.codes[i].x, raw.codes[i].y, raw.codes[i].z, raw.codes[i].w};
#pragma unroll
      for (int step = 0; step < 4; ++step) decode(word[step], table, operand[step][i], operand[step][2 + i]);
      scale[i] = __uint_as_float(top << 23);
    } else {
      const uint32_t word[8] = {raw.codes[2 * i].x,     raw.codes[2 * i].y,     raw.codes[2 * i].z,     raw.codes[2 * i].w,
                                raw.codes[2 * i + 1].x, raw.codes[2 * i + 1].y, raw.codes[2 * i + 1].z, raw.codes[2 * i + 1].w};
#pragma unroll
      for (int step = 0; step < 4; ++step) operand[step][i] = word[2 * step], operand[step][2 + i] = word[2 * step + 1];
      scale[i] = __uint_as_float(raw.scales[i]);
    }
  }
}

// Products of 64 keys with the heads of N / 64 tokens.
template <int N>
__device__ __forceinline__ void multiply(float (&logits)[N / 2], const uint32_t (&operand)[4][4], const uint8_t* queries) {
  const uint64_t heads = operand_descriptor(queries);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) wgmma_e4m3<N>(logits, operand[step], heads + 2 * step, step > 0);
  wgmma_commit();
  wgmma_wait<0>();
}

// What one weight holds besides the head's: the query's scale, and what decoded codes are too large by.
template <int FORMAT>
__device__ __forceinline__ float folded_weight(const Arguments& a, int64_t token, int head) {
  const float weight = a.weights[token * a.stride_weights + head] * a.query_scales[token * kHeads + head];
  return FORMAT == kMxfp4 ? weight * 0.015625f : weight;
}

// A thread's 16 heads of one token, of both keys.
template <int SIZE>
__device__ __forceinline__ void sum_heads(const float (&logits)[SIZE], int first, const float (&weight)[16], float (&sum)[2]) {
  float even[2] = {0.0f, 0.0f}, odd[2] = {0.0f, 0.0f};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      even[i] = fmaf(weight[2 * j], fmaxf(logits[first + 4 * j + 2 * i], 0.0f), even[i]);
      odd[i] = fmaf(weight[2 * j + 1], fmaxf(logits[first + 4 * j + 2 * i + 1], 0.0f), odd[i]);
    }
  }
  sum[0] = even[0] + odd[0];
  sum[1] = even[1] + odd[1];
}

// Adds over a pair of lanes: one of them keeps `low`, the other `high`.
__device__ __forceinline__ float share(float low, float high, int lane, int step) {
  const bool upper = lane & step;
  return (upper ? high : low) + __shfl_xor_sync(0xFFFFFFFFu, upper ? low : high, step);
}

__device__ __forceinline__ int candidates(const Arguments& a, int64_t token) {
  const int seen = (static_cast<int>(a.positions[token]) + 1) / a.ratio;
  return seen > a.topk ? seen : 0;
}

constexpr int kFewThreads = 128, kFewCtas = 4;
constexpr int kAhead = 2;  // tiles on their way

template <int FORMAT>
__global__ void __launch_bounds__(kFewThreads, kFewCtas) few_kernel(const __grid_constant__ Arguments a) {
  __shared__ __align__(1024) uint8_t queries[kTokenBytes];
  __shared__ uint2 tables[16];
  __shared__ uint64_t arrived;
  const int token = blockIdx.x, thread = threadIdx.x, lane = thread % 32, step = gridDim.y;
  const int count = candidates(a, token);
  const int num_tiles = (count + kTileKeys - 1) / kTileKeys;
  int tile = blockIdx.y;
  if (tile >= num_tiles) return;
  if (thread == 0) {
    barrier_init(&arrived, 1);
    fence_barrier_inits();
    barrier_expect_bytes(&arrived, kTokenBytes);
    bulk_load(queries, a.queries + static_cast<int64_t>(token) * kTokenBytes, kTokenBytes, &arrived);
  }
  const int* pages = a.page_table + static_cast<int64_t>(a.requests[token]) * a.stride_pages;
  RawKeys<FORMAT> raw[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const int ahead = min(tile + i * step, num_tiles - 1);
    load_keys<FORMAT>(a, page_of(a, pages, ahead, count - 1, thread), ahead, count - 1, thread, raw[i]);
  }
  int page = page_of(a, pages, tile + kAhead * step, count - 1, thread);
  if (thread < 16) tables[thread] = kDecodeTables.of_shift[thread];
  float weight[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) weight[i] = folded_weight<FORMAT>(a, token, 8 * (i / 2) + 2 * (lane % 4) + i % 2);
  __syncthreads();
  barrier_wait(&arrived, 0);

  float* scores = a.scores + token * a.stride_scores;
  while (tile < num_tiles) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (tile < num_tiles) {
        uint32_t operand[4][4];
        float scale[2], logits[32], sum[2];
        unpack<FORMAT>(raw[i], tables, thread, operand, scale);
        const int ahead = tile + kAhead * step;
        if (ahead < num_tiles) load_keys<FORMAT>(a, page, ahead, count - 1, thread, raw[i]);
        page = page_of(a, pages, ahead + step, count - 1, thread);
        multiply<64>(logits, operand, queries);
        sum_heads(logits, 0, weight, sum);
        float score = share(sum[0], sum[1], lane, 2);
        score += __shfl_xor_sync(0xFFFFFFFFu, score, 1);
        const int key = (lane & 2) / 2, entry = tile * kTileKeys + first_row(thread) + 8 * key;
        if (lane % 2 == 0 && entry < count) scores[entry] = score * (key ? scale[1] : scale[0]);
        tile += step;
      }
    }
  }
}

constexpr int kTokens = 4;                       // of a product
constexpr int kPasses = 2;                       // products for every unpacked tile
constexpr int kMembers = kTokens * kPasses;
constexpr int kGroups = 2;                       // consumer warpgroups
constexpr int kConsumers = 128 * kGroups, kManyThreads = kConsumers + 128;
constexpr int kStageBytes = kMembers * kTokenBytes;
constexpr int kManySharedBytes = 2 * kStageBytes + 1024;

struct Task {
  const int* pages;
  int num_tiles;  // negative: there is no more work
  int last;       // the last entry that any member sees
  int first_member;
  int visible[kMembers];
  alignas(16) float weights[kMembers * kHeads];  // of a member: [4][lane of the quad][4], see weight_head
};

// Head of the weight at a place of Task::weights.
__device__ __forceinline__ int weight_head(int place) {
  const int part = place / 16, lane = place / 4 % 4, i = place % 4;
  return 8 * (2 * part + i / 2) + 2 * lane + i % 2;
}

// Stages one task after another: tokens of one request among kMembers neighbours. Those that see most come first, and CTAs
// are dealt tasks to and fro, so that their sums are alike.
template <int FORMAT>
__device__ void produce(const Arguments& a, uint8_t* stages, Task* tasks, uint64_t* full, uint64_t* empty, int lane) {
  const int num_items = (a.num_tokens + kMembers - 1) / kMembers;
  int stage = 0;
  uint32_t phase = 1;
  for (int round = 0; round * static_cast<int>(gridDim.x) < num_items; ++round) {
    const int turn = round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const int item = num_items - 1 - (round * static_cast<int>(gridDim.x) + turn);
    if (item < 0) continue;
    const int first = item * kMembers, here = min(kMembers, a.num_tokens - first);
    const bool live = lane < here;
    const int owner = live ? a.requests[first + lane] : -1, seen = live ? candidates(a, first + lane) : 0;
    uint32_t remaining = __ballot_sync(0xFFFFFFFFu, seen > 0);
    while (remaining) {
      const int request = __shfl_sync(0xFFFFFFFFu, owner, __ffs(remaining) - 1);
      const int visible = owner == request ? seen : 0;
      const int count = __reduce_max_sync(0xFFFFFFFFu, visible);
      remaining &= ~__ballot_sync(0xFFFFFFFFu, owner == request);
      barrier_wait(&empty[stage], phase);
      Task& task = tasks[stage];
      for (int i = lane; i < here * kHeads; i += 32)
        task.weights[i] = folded_weight<FORMAT>(a, first + i / kHeads, weight_head(i % kHeads));
      if (lane < kMembers) task.visible[lane] = visible;
      if (lane == 0) {
        task.pages = a.page_table + static_cast<int64_t>(request) * a.stride_pages;
        task.num_tiles = (count + kTileKeys - 1) / kTileKeys;
        task.last = count - 1;
        task.first_member = first;
      }
      if (lane == 0) {
        barrier_expect_bytes(&full[stage], here * kTokenBytes);
        bulk_load(stages + stage * kStageBytes, a.queries + static_cast<int64_t>(first) * kTokenBytes, here * kTokenBytes,
                  &full[stage]);
      } else {
        barrier_arrive(&full[stage]);
      }
      if (++stage == 2) stage = 0, phase ^= 1;
    }
  }
  barrier_wait(&empty[stage], phase);
  if (lane == 0) tasks[stage].num_tiles = -1;
  barrier_arrive(&full[stage]);
}

// Scores of kTokens members for one tile of keys, from their logits.
__device__ __forceinline__ void finish(const Arguments& a, const Task& task, int first_member, const float (&logits)[32 * kTokens],
                                       const float (&scale)[2], int first_entry, int lane) {
  static_assert(kTokens == 4, "a lane of the quad ends with one member's sums");
  float sums[kTokens][2];
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    float weight[16];
    const float* source = task.weights + (first_member + token) * kHeads + lane % 4 * 4;
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const float4 four = *reinterpret_cast<const float4*>(source + 16 * part);
      weight[4 * part] = four.x, weight[4 * part + 1] = four.y, weight[4 * part + 2] = four.z, weight[4 * part + 3] = four.w;
    }
    sum_heads(logits, 32 * token, weight, sums[token]);
  }
  const int member = first_member + lane % 4, visible = task.visible[member];
  float* target = a.scores + (task.first_member + member) * a.stride_scores;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float lower = share(sums[0][i], sums[2][i], lane, 2), upper = share(sums[1][i], sums[3][i], lane, 2);
    const float score = share(lower, upper, lane, 1) * scale[i];
    if (first_entry + 8 * i < visible) target[first_entry + 8 * i] = score;
  }
}

template <int FORMAT>
__device__ void consume(const Arguments& a, const uint8_t* stages, const Task* tasks, const uint2* tables, uint64_t* full,
                        uint64_t* empty, int group, int thread) {
  const int lane = thread % 32;
  int stage = 0;
  uint32_t phase = 0;
  while (true) {
    barrier_wait(&full[stage], phase);
    const Task& task = tasks[stage];
    const int num_tiles = task.num_tiles, last = task.last;
    if (num_tiles < 0) break;
    const int* pages = task.pages;
    RawKeys<FORMAT> raw;
    int page = page_of(a, pages, group, last, thread);
    load_keys<FORMAT>(a, page, group, last, thread, raw);
    page = page_of(a, pages, group + kGroups, last, thread);
    for (int tile = group; tile < num_tiles; tile += kGroups) {
      uint32_t operand[4][4];
      float scale[2];
      unpack<FORMAT>(raw, tables, thread, operand, scale);
      load_keys<FORMAT>(a, page, tile + kGroups, last, thread, raw);
      page = page_of(a, pages, tile + 2 * kGroups, last, thread);
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        float logits[32 * kTokens];
        multiply<64 * kTokens>(logits, operand, stages + stage * kStageBytes + pass * kTokens * kTokenBytes);
        finish(a, task, pass * kTokens, logits, scale, tile * kTileKeys + first_row(thread), lane);
      }
    }
    barrier_arrive(&empty[stage]);
    if (++stage == 2) stage = 0, phase ^= 1;
  }
}

template <int FORMAT>
__global__ void __launch_bounds__(kManyThreads, 1) many_kernel(const __grid_constant__ Arguments a) {
  extern __shared__ uint8_t unaligned[];
  __shared__ Task tasks[2];
  __shared__ uint2 tables[16];
  __shared__ uint64_t full[2], empty[2];
  uint8_t* stages = aligned_to_1024(unaligned);
  if (threadIdx.x < 16) tables[threadIdx.x] = kDecodeTables.of_shift[threadIdx.x];
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < 2; ++stage) {
      barrier_init(&full[stage], 32);
      barrier_init(&empty[stage], kConsumers);
    }
    fence_barrier_inits();
  }
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    const int lane = threadIdx.x - kConsumers;
    if (lane < 32) produce<FORMAT>(a, stages, tasks, full, empty, lane);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume<FORMAT>(a, stages, tasks, tables, full, empty, threadIdx.x / 128, threadIdx.x % 128);
  }
}

template <int FORMAT>
int launch(const Arguments& a, int splits, int grid, cudaStream_t stream) {
  if (splits > 0) {
    few_kernel<FORMAT><<<dim3(a.num_tokens, splits), kFewThreads, 0, stream>>>(a);
    return cudaGetLastError();
  }
  const cudaError_t error =
      cudaFuncSetAttribute(many_kernel<FORMAT>, cudaFuncAttributeMaxDynamicSharedMemorySize, kManySharedBytes);
  if (error != cudaSuccess) return error;
  many_kernel<FORMAT><<<grid, kManyThreads, kManySharedBytes, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

// Arrays of pointers, strides and integers in the order of the fields of Arguments, then format, splits (0: many tokens) and
// the CTAs of the persistent grid. Returns a cudaError_t.
extern "C" int index_scores(const void* const* pointers, const int64_t* strides, const int* integers, void* stream) {
  Arguments a;
  a.queries = static_cast<const uint8_t*>(pointers[0]);
  a.query_scales = static_cast<const float*>(pointers[1]);
  a.weights = static_cast<const float*>(pointers[2]);
  a.keys = static_cast<const uint8_t*>(pointers[3]);
  a.key_scales = static_cast<const uint8_t*>(pointers[4]);
  a.requests = static_cast<const int*>(pointers[5]);
  a.positions = static_cast<const int64_t*>(pointers[6]);
  a.page_table = static_cast<const int*>(pointers[7]);
  a.scores = static_cast<float*>(const_cast<void*>(pointers[8]));
  a.stride_weights = strides[0];
  a.stride_page = strides[1];
  a.stride_page_scales = strides[2];
  a.stride_scores = strides[3];
  a.stride_pages = integers[0];
  a.page_shift = integers[1];
  a.ratio = integers[2];
  a.topk = integers[3];
  a.num_tokens = integers[4];
  const auto queue = static_cast<cudaStream_t>(stream);
  return integers[5] == kMxfp4 ? launch<kMxfp4>(a, integers[6], integers[7], queue)
                               : launch<kFp8>(a, integers[6], integers[7], queue);
}
