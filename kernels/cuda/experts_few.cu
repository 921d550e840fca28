// Routed experts with MXFP4 weights and e4m3 activations on Hopper (sm_90a) for up to some 64 rows an expert, as two persistent
// grouped GEMMs (experts_many.cu: the same for more):
//   up:   h = quantise(silu(min(x W1', limit)) * clamp(x W3', -limit, limit) * route_weight)   per row and expert
//   down: y = h W2'
// The weights are the 64-row register operand of wgmma, decoded on the way there, the rows of an expert its N side, so a handful
// of rows wastes little. Weights arrive by bulk copies in the order in which threads consume them.
//
// One CTA: a producer warp and four consumer warpgroups of 64 weight rows, which decode half of a stage while the tensor cores work
// on the other half. A stage is 128 input channels. A block of rows that is hardly filled is multiplied as a smaller one.
// Bound by weight streaming.

#include "experts.cuh"
#include "tensor_map.cuh"

namespace {

using namespace experts;

constexpr int kConsumers = 128 * kUnits;
constexpr int kThreads = kConsumers + 128;

constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

constexpr int kUpStride = 128 + 16, kDownStride = (kTileRows + 8) * 2;  // bytes of a staged row, padded against bank conflicts

template <int N, bool UP>
struct Plan {
  static constexpr int kRowsBytes = N * kStageK;
  static constexpr int kStageBytes = round_up(kRowsBytes + kStagePacked + N * 4, 1024);
  static constexpr int kOutputStride = UP ? kUpStride : kDownStride;
  static constexpr int kOutputBytes = round_up(N * kOutputStride, 1024);
  static constexpr int kFixedBytes = 256;  // barriers
  static constexpr int kStaticBytes = sizeof(Walk<N>) + kTableBytes + 2 * N * 4 + 256;
  static constexpr int kFit = (kSharedLimit - kStaticBytes - kOutputBytes - kFixedBytes - 1024) / kStageBytes;
  static constexpr int kStages = kFit > 12 ? 12 : kFit;
  static constexpr int kSharedBytes = kStages * kStageBytes + kOutputBytes + kFixedBytes + 1024;
  static constexpr uint32_t kStageTransaction = kRowsBytes + kStagePacked + N * 4;
  static_assert(kStages >= 3, "too few stages");
};

// Columns that are multiplied of a block of N rows: all, or if that is enough, the next smaller number.
template <int COLUMNS>
struct Columns {
  static constexpr int kCount = COLUMNS;
};
template <int N>
using Fewer = Columns<N == 64 ? 48 : N == 48 ? 32 : N == 32 ? 16 : 8>;

__device__ __forceinline__ float2 load_pair(uint32_t address) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ uint32_t load_word(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ void prefetch(const float* place) { asm volatile("prefetch.global.L1 [%0];" ::"l"(place)); }

// Two 8 x 8 matrices of 16-bit elements, transposed; lane l of the first 16 gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_transposed(uint32_t address, uint32_t first, uint32_t second) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(first), "r"(second)
               : "memory");
}

// scales: address of those of this thread's first two columns.
template <int N>
__device__ __forceinline__ void promote(float (&total)[N / 2], const float (&partial)[N / 2], uint32_t scales) {
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    const float2 scale = load_pair(scales + 32 * j);
    total[4 * j] += partial[4 * j] * scale.x;
    total[4 * j + 1] += partial[4 * j + 1] * scale.y;
    total[4 * j + 2] += partial[4 * j + 2] * scale.x;
    total[4 * j + 3] += partial[4 * j + 3] * scale.y;
  }
}

// Maxima of |value| of a warp's rows, per column, into `most` as bits: lanes that share columns swap halves of what they hold
// until each is left with few.
template <int N>
__device__ __forceinline__ void add_maxima(const float2 (&value)[N / 8], uint32_t* most, int lane) {
  float amax[N / 4];
#pragma unroll
  for (int j = 0; j < N / 8; ++j) amax[2 * j] = fabsf(value[j].x), amax[2 * j + 1] = fabsf(value[j].y);
  int first = 0, count = N / 4;  // of the columns that are left
#pragma unroll
  for (int step = 16; step >= 4; step /= 2) {
    const bool upper = lane & step, halve = count % 2 == 0;
    if (halve) count /= 2;
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      if (i >= count) break;
      const float sent = halve && !upper ? amax[halve ? i + count : i] : amax[i];
      const float kept = halve && upper ? amax[i + count] : amax[i];
      amax[i] = fmaxf(kept, __shfl_xor_sync(0xFFFFFFFFu, sent, step));
    }
    if (halve && upper) first += count;
  }
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    const int place = first + i;
    if (i < count) atomicMax(&most[place / 2 * 8 + 2 * (lane % 4) + place % 2], __float_as_uint(amax[i]));
  }
}

// Accumulator rows 16 warp + lane / 4 are gate rows, the rows 8 further on the linear ones of the same columns of h.
// most: maxima of the columns, zero at first; the next tile's are made so.
template <int N, int M>
__device__ __forceinline__ void finish_up(const float (&total)[M / 2], const Arguments& arguments, const Tile& tile,
                                          const float* weight_scale, uint8_t* staged, uint32_t* most, uint32_t* next_most, int unit,
                                          int thread) {
  const int lane = thread % 32, warp = thread / 32, rows = tile.num_rows - 2 * (lane % 4);
  const float gate_scale = weight_scale[16 * warp + lane / 4], linear_scale = weight_scale[16 * warp + lane / 4 + 8];
  const float* route = arguments.route_weight + tile.first_row + 2 * (lane % 4);
  float2 value[M / 8];
#pragma unroll
  for (int j = 0; j < M / 8; ++j) {
    const float2 weight = make_float2(8 * j < rows ? route[8 * j] : 0.0f, 8 * j + 1 < rows ? route[8 * j + 1] : 0.0f);
    value[j] = gated(make_float2(total[4 * j] * gate_scale, total[4 * j + 1] * gate_scale),
                     make_float2(total[4 * j + 2] * linear_scale, total[4 * j + 3] * linear_scale), arguments.limit, weight);
  }
  add_maxima<M>(value, most, lane);
  sync_threads_of(1, kConsumers);
  const int own = 128 * unit + thread;  // a column, and row of the output, for each of the first threads
  if (own < N) {
    next_most[own] = 0;
    if (own < tile.num_rows)
      arguments.output_scale[static_cast<int64_t>(tile.tile) * arguments.scale_stride + tile.first_row + own] =
          power_of_two_scale(__uint_as_float(most[own]));
  }
#pragma unroll
  for (int j = 0; j < M / 8; ++j) {
    const int column = 8 * j + 2 * (lane % 4);
    const uint2 bits = *reinterpret_cast<const uint2*>(most + column);
    const uint32_t codes = pack_e4m3(value[j].x * inverse_of(power_of_two_scale(__uint_as_float(bits.x))),
                                     value[j].y * inverse_of(power_of_two_scale(__uint_as_float(bits.y))));
    uint8_t* target = staged + column * kUpStride + 32 * unit + 8 * warp + lane / 4;
    target[0] = static_cast<uint8_t>(codes);
    target[kUpStride] = static_cast<uint8_t>(codes >> 8);
  }
}

// Eight columns of a warp's 16 rows are two matrices of 8 x 8, stored transposed: a column's rows lie together.
template <int N>
__device__ __forceinline__ void finish_down(const float (&total)[N / 2], const float* weight_scale, uint8_t* staged, int unit,
                                            int thread) {
  const int lane = thread % 32, warp = thread / 32, row = 16 * warp + lane / 4;
  const float upper = weight_scale[row], lower = weight_scale[row + 8];
  sync_threads_of(1, kConsumers);  // the previous tile's rows have left the staging area
  const uint8_t* target = staged + lane % 8 * kDownStride + 2 * (64 * unit + 16 * warp) + lane / 8 % 2 * 16;
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    store_transposed(shared_address(target + 8 * j * kDownStride),
                     pack_bf16(total[4 * j] * upper, total[4 * j + 1] * upper),
                     pack_bf16(total[4 * j + 2] * lower, total[4 * j + 3] * lower));
  }
}

template <int N, bool UP>
__global__ void __launch_bounds__(kThreads, 1)
experts_few_kernel(const __grid_constant__ CUtensorMap rows_map, const __grid_constant__ CUtensorMap scales_map,
                   const Arguments arguments) {
  using P = Plan<N, UP>;
  extern __shared__ uint8_t unaligned[];
  uint8_t* stages = aligned_to_1024(unaligned);
  uint8_t* staged = stages + P::kStages * P::kStageBytes;
  uint8_t* fixed = staged + P::kOutputBytes;
  uint64_t* full = reinterpret_cast<uint64_t*>(fixed);
  uint64_t* empty = full + P::kStages;
  __shared__ Walk<N> walk;
  __shared__ alignas(8) uint8_t table[kTableBytes];
  __shared__ alignas(8) uint32_t most[2][N];

  if (threadIdx.x < 2 * N) most[threadIdx.x / N][threadIdx.x % N] = 0;
  if (threadIdx.x < 16) reinterpret_cast<uint2*>(table)[threadIdx.x] = decode_table(threadIdx.x);
  if (threadIdx.x == 0) {
    for (int s = 0; s < P::kStages; ++s) {
      barrier_init(&full[s], 1);
      barrier_init(&empty[s], kConsumers / 32);
    }
    fence_barrier_inits();
  }
  walk.prepare(arguments);
  const int num_tiles = uniform(walk.first_block[arguments.experts] * arguments.tiles), k_blocks = arguments.k_blocks;

  if (threadIdx.x >= kConsumers) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    if (threadIdx.x == kConsumers) {
      int stage = 0;
      uint32_t phase = 0;
      for (int index = blockIdx.x; index < num_tiles; index += gridDim.x) {
        const Tile tile = walk.locate(index, arguments.experts, arguments.tiles);
        const uint8_t* weights =
            arguments.weights + (static_cast<int64_t>(tile.expert) * arguments.tiles + tile.tile) * k_blocks * kStagePacked;
        for (int k = 0; k < k_blocks; ++k) {
          barrier_wait(&empty[stage], phase ^ 1);
          uint8_t* target = stages + stage * P::kStageBytes;
          barrier_expect_bytes(&full[stage], P::kStageTransaction);
          bulk_load(target + P::kRowsBytes, weights, kStagePacked, &full[stage]);
          tensor_load(target, &rows_map, k * kStageK, tile.first_row, &full[stage]);
          tensor_load(target + P::kRowsBytes + kStagePacked, &scales_map, tile.first_row, k, &full[stage]);
          weights += kStagePacked;
          if (++stage == P::kStages) stage = 0, phase ^= 1;
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 112;");
    const int unit = uniform(threadIdx.x / 128), thread = threadIdx.x % 128, lane = thread % 32;
    // Addresses in shared memory of this thread's part of stage 0; `at` leads on to the stage at hand.
    const uint32_t packed = shared_address(stages) + P::kRowsBytes;
    uint32_t my_codes = packed + unit * kUnitCodes + 16 * thread;
    uint32_t my_shifts = packed + kStageCodes + unit * kUnitShifts + shifts_place(thread);
    uint32_t my_scales = packed + kStagePacked + 8 * (lane % 4);
    asm("" : "+r"(my_codes), "+r"(my_shifts), "+r"(my_scales));  // or they are computed anew every time
    const uint32_t first_place = descriptor_place(stages);
    uint32_t place = first_place;
    int stage = 0;
    [[maybe_unused]] int turn = 0;
    uint32_t phase = 0, at = 0;
    const auto work = [&](const Tile& tile, auto columns) {
      constexpr int M = decltype(columns)::kCount;
      const float* weight_scale = arguments.weight_scale +
                                  (static_cast<int64_t>(tile.expert) * arguments.tiles + tile.tile) * kTileRows + kUnitRows * unit;
      // What the end needs.
      if (lane < 2) prefetch(weight_scale + 32 * lane);
      if (UP && lane == 2) prefetch(arguments.route_weight + tile.first_row);
      if (UP && lane == 3) prefetch(arguments.route_weight + tile.first_row + tile.num_rows - 1);
      float total[M / 2];
#pragma unroll
      for (int i = 0; i < M / 2; ++i) total[i] = 0.0f;
      // Two of the four steps of a stage are decoded while the tensor cores multiply the two before them.
      uint32_t first[2][4], second[2][4];
      barrier_wait(&full[stage], phase);
      RowShifts shifts(load_word(my_shifts + at), load_word(my_shifts + at + kLowerShifts));
      shifts.decode<0>(first, read_shared(my_codes + at), table);
      for (int k = 0; k < k_blocks; ++k) {
        float partial[M / 2];
        wgmma_fence();
        wgmma_e4m3<M>(partial, first[0], descriptor_at(place), false);
        wgmma_e4m3<M>(partial, first[1], descriptor_at(place + 2), true);
        wgmma_commit();
        shifts.decode<1>(second, read_shared(my_codes + at + kUnitCodes / 2), table);
        wgmma_fence();
        wgmma_e4m3<M>(partial, second[0], descriptor_at(place + 4), true);
        wgmma_e4m3<M>(partial, second[1], descriptor_at(place + 6), true);
        wgmma_commit();
        const uint32_t scales = my_scales + at;
        const int done = stage;
        place += P::kStageBytes / 16, at += P::kStageBytes;
        if (++stage == P::kStages) stage = 0, phase ^= 1, at = 0, place = first_place;
        wgmma_wait<1>();
        if (k + 1 < k_blocks) {
          barrier_wait(&full[stage], phase);
          shifts = RowShifts(load_word(my_shifts + at), load_word(my_shifts + at + kLowerShifts));
          shifts.decode<0>(first, read_shared(my_codes + at), table);
        }
        wgmma_wait<0>();
        promote<M>(total, partial, scales);
        __syncwarp();
        if (lane == 0) barrier_arrive(&empty[done]);
      }
      if constexpr (UP) {
        finish_up<N, M>(total, arguments, tile, weight_scale, staged, most[turn], most[turn ^ 1], unit, thread);
        turn ^= 1;
      } else {
        finish_down<M>(total, weight_scale, staged, unit, thread);
      }
      sync_threads_of(2, kConsumers);
      constexpr int kRowBytes = UP ? 128 : 2 * kTileRows;
      auto* output = static_cast<uint8_t*>(arguments.output);
      for (int piece = threadIdx.x; piece < tile.num_rows * (kRowBytes / 16); piece += kConsumers) {
        const int row = piece / (kRowBytes / 16), column = piece % (kRowBytes / 16) * 16;
        const int64_t target = (static_cast<int64_t>(tile.first_row + row) * arguments.tiles + tile.tile) * kRowBytes + column;
        *reinterpret_cast<uint4*>(output + target) = *reinterpret_cast<const uint4*>(staged + row * P::kOutputStride + column);
      }
    };
    for (int index = blockIdx.x; index < num_tiles; index += gridDim.x) {
      const Tile tile = walk.locate(index, arguments.experts, arguments.tiles).in_uniform();
      if (__all_sync(0xFFFFFFFFu, N > Fewer<N>::kCount && tile.num_rows <= Fewer<N>::kCount)) {
        work(tile, Fewer<N>());
      } else {
        work(tile, Columns<N>());
      }
    }
  }
}

template <int N, bool UP>
int launch(const CUtensorMap& rows_map, const CUtensorMap& scales_map, const Arguments& arguments, int grid, cudaStream_t stream) {
  using P = Plan<N, UP>;
  auto kernel = experts_few_kernel<N, UP>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, P::kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, kThreads, P::kSharedBytes, stream>>>(rows_map, scales_map, arguments);
  return cudaGetLastError();
}

}  // namespace

// rows: e4m3 [num_rows, 128 * k_blocks]; row_scales: float32 [k_blocks, scale_stride], scale_stride a multiple of 4.
// Returns a cudaError_t.
extern "C" int experts_few(int up, int block_rows, const void* rows, const float* row_scales, int num_rows, int k_blocks,
                           int scale_stride, const uint8_t* weights, const float* weight_scale, const int* offsets,
                           const float* route_weight, void* output, float* output_scale, int experts, int tiles, float limit,
                           int grid, void* stream) {
  if (experts > kMaxExperts || num_rows <= 0 || k_blocks <= 0) return cudaErrorInvalidValue;
  CUtensorMap rows_map, scales_map;
  const uint64_t channels = static_cast<uint64_t>(k_blocks) * kStageK;
  int error = encode_map(&rows_map, CU_TENSOR_MAP_DATA_TYPE_UINT8, rows, channels, num_rows, channels, kStageK, block_rows,
                         CU_TENSOR_MAP_SWIZZLE_128B);
  if (error != cudaSuccess) return error;
  error = encode_map(&scales_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, row_scales, scale_stride, k_blocks,
                     static_cast<uint64_t>(scale_stride) * 4, block_rows, 1, CU_TENSOR_MAP_SWIZZLE_NONE);
  if (error != cudaSuccess) return error;
  const Arguments arguments{weights,      row_scales, weight_scale, offsets,  route_weight, output,
                            output_scale, experts,    tiles,        k_blocks, scale_stride, limit};
  const auto queue = static_cast<cudaStream_t>(stream);
#define CASE(N)                                                               \
  case N:                                                                     \
    return up ? launch<N, true>(rows_map, scales_map, arguments, grid, queue) \
              : launch<N, false>(rows_map, scales_map, arguments, grid, queue);
  switch (block_rows) {
    CASE(8)
    CASE(16)
    CASE(32)
    CASE(48)
    CASE(64)
  }
#undef CASE
  return cudaErrorInvalidValue;
}
