// W8A8 products with block scales on Hopper (sm_90a): y = x W^T, also per group of channels (specification: kernels.fp8_gemm).
// x e4m3 rows with a float32 scale per row and 128 channels, W e4m3 with an E8M0 scale per 128 x 128 tile. y as bf16; or those
// values as e4m3 rows with scales, ready for the next product; or as heads of 512 channels with RMS norm and rotation.
//
// Persistent CTAs walk output tiles. Three threads copy 128 channels a stage: one the weights, which no launch writes, so it does not
// wait for the launch before, one the rows and one their scales; a single thread that asks for all sets the pace for few rows. One or
// two consumer warpgroups multiply them in pieces of 64 x 128, sum 128 channels in the tensor cores and those sums, scaled, in float32
// registers. CTAs of a cluster are neighbours along the outputs: they share rows, of which each copies a part for all. An element's
// sum has one order, whatever the tile: results do not depend on the number of rows.
// Bound by the read of the weight for few rows, by the FP8 tensor cores for many.

#include "early_launch.cuh"
#include "gemm_output.cuh"
#include "tensor_map.cuh"

namespace {

using namespace hopper;

constexpr int kBlockK = 128;
constexpr int kMaxBlocks = 64;  // of 128 channels: a warp keeps the weight scales of a tile in two registers a lane
constexpr int kSharedLimit = 227 * 1024;
constexpr int kMaxStages = 18;
constexpr int kCopies = 3;  // of a stage, by a thread each
constexpr int kAlignment = 1024;  // of a tile of 128-byte rows under the 128-byte swizzle

constexpr int least(int a, int b) { return a < b ? a : b; }

enum Result { kValues = 0, kCodes = 1, kHeads = 2 };

template <int ROWS, int OUTPUTS, int CLUSTER, Result RESULT>
struct Plan {
  static constexpr int kGroups = ROWS >= 128 ? 2 : 1;            // consumer warpgroups, of as many rows each
  static constexpr int kPieceOutputs = least(OUTPUTS, 128);      // a piece: 64 rows, one product of a warpgroup
  static constexpr int kColumns = OUTPUTS / kPieceOutputs;       // pieces beside each other
  static constexpr int kGroupRows = ROWS / kGroups, kPieces = kGroupRows / 64 * kColumns;
  static constexpr int kConsumers = 128 * kGroups, kThreads = kConsumers + 128;
  // Two products in flight where registers allow: one is scaled while the tensor cores work on the next.
  static constexpr bool kDeep = kPieces == 1;
  static constexpr int kRowPart = ROWS / CLUSTER;  // rows one CTA copies for its cluster
  static constexpr int kRowBytes = ROWS * kBlockK, kStageBytes = (ROWS + OUTPUTS) * kBlockK, kScaleBytes = ROWS * 4;
  static constexpr int kValueBytes = RESULT == kCodes ? 1 : 2;
  static constexpr int kPitch = least(kPieceOutputs * kValueBytes, 128);  // bytes of an output row in a staged panel
  static constexpr int kPanels = kPieceOutputs * kValueBytes / kPitch, kPanelBytes = 64 * kPitch;
  static constexpr int kOutputBytes = ROWS * OUTPUTS * kValueBytes;
  static constexpr int kSumBytes = RESULT == kHeads ? 2 * 2 * ROWS * 4 : 0;  // of two tiles: what two CTAs exchange
  static constexpr int kBarriers = 2 * kMaxStages + 2 * kGroups;
  static constexpr int kFixedBytes = kAlignment + kOutputBytes + kSumBytes + kBarriers * 8;
  static constexpr int kStages = least(kMaxStages, (kSharedLimit - kFixedBytes) / (kStageBytes + kScaleBytes));
  static constexpr int kSharedBytes = kFixedBytes + kStages * (kStageBytes + kScaleBytes);
  static_assert(kStages >= 3, "too few stages");
  static_assert(kRowPart % 8 == 0, "parts are whole swizzle atoms");
  static_assert(RESULT != kCodes || kPieceOutputs == 128, "a scale of the output covers 128 of them");
  static_assert(RESULT != kHeads || (CLUSTER == 2 && OUTPUTS == 256 && kGroupRows == 64), "a cluster holds heads of 512");
};

struct Arguments {
  const uint8_t* weight_scale;  // [outputs / 128, weight_scale_stride]
  float* code_scale;            // kCodes: [outputs / 128, code_scale_stride]
  const float *cos, *sin;       // kHeads: [rows, kRotary / 2]
  float eps;                    // kHeads
  int weight_scale_stride, code_scale_stride, rows, outputs, k_blocks, group_outputs, band;
};

struct Tile {
  int row, output;
};

// Tiles of clusters in bands of `band` down the rows, all outputs of a band before the next: neighbours share operands in L2.
__device__ __forceinline__ Tile locate(int index, int tiles_m, int tiles_n, int band) {
  const int in_band = band * tiles_n, number = index / in_band, rest = index - number * in_band;
  const int height = min(tiles_m - number * band, band);
  return {number * band + rest % height, rest / height};
}

// The scales of a row of 128 x 128 weight tiles, spread over a warp.
struct WeightScales {
  uint32_t low, high;
  __device__ __forceinline__ void load(const Arguments& arguments, int output, int lane) {
    const uint8_t* source = arguments.weight_scale + static_cast<int64_t>(output / 128) * arguments.weight_scale_stride;
    low = lane < arguments.k_blocks ? source[lane] : 0;
    high = lane + 32 < arguments.k_blocks ? source[lane + 32] : 0;
  }
  __device__ __forceinline__ float at(int k) const {
    return __uint_as_float(__shfl_sync(0xFFFFFFFFu, k < 32 ? low : high, k & 31) << 23);
  }
};

template <int N>
__device__ __forceinline__ void multiply(float (&partial)[N / 2], uint32_t rows, uint32_t weights) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step)
    wgmma_e4m3<N>(partial, descriptor_at(rows + 2 * step), descriptor_at(weights + 2 * step), step > 0);
  wgmma_commit();
}

template <int N>
__device__ __forceinline__ void promote(float (&total)[N / 2], const float (&partial)[N / 2], float2 factor) {
#pragma unroll
  for (int j = 0; j < N / 2; j += 4) {
    total[j] += partial[j] * factor.x;
    total[j + 1] += partial[j + 1] * factor.x;
    total[j + 2] += partial[j + 2] * factor.y;
    total[j + 3] += partial[j + 3] * factor.y;
  }
}

template <int ROWS, int OUTPUTS, int CLUSTER, Result RESULT>
__global__ void __launch_bounds__(Plan<ROWS, OUTPUTS, CLUSTER, RESULT>::kThreads, 1)
fp8_gemm_kernel(const __grid_constant__ CUtensorMap rows_map, const __grid_constant__ CUtensorMap scales_map,
                const __grid_constant__ CUtensorMap weights_map, const __grid_constant__ CUtensorMap output_map,
                const Arguments arguments) {
  using P = Plan<ROWS, OUTPUTS, CLUSTER, RESULT>;
  extern __shared__ uint8_t unaligned[];
  uint8_t* stages = aligned_to_1024(unaligned);
  uint8_t* staged = stages + P::kStages * P::kStageBytes;
  uint8_t* scales = staged + P::kOutputBytes;
  float* sums = reinterpret_cast<float*>(scales + P::kStages * P::kScaleBytes);
  uint64_t* full = reinterpret_cast<uint64_t*>(scales + P::kStages * P::kScaleBytes + P::kSumBytes);
  uint64_t* empty = full + kMaxStages;
  uint64_t* sums_arrived = empty + kMaxStages;

  const int rank = CLUSTER > 1 ? cluster_rank() : 0;
  if (threadIdx.x == P::kConsumers) {
    prefetch_map(&rows_map);
    prefetch_map(&scales_map);
    prefetch_map(&weights_map);
    prefetch_map(&output_map);
    for (int s = 0; s < P::kStages; ++s) {
      barrier_init(&full[s], kCopies);
      barrier_init(&empty[s], CLUSTER * (P::kConsumers / 32));
    }
    if constexpr (RESULT == kHeads)
      for (int s = 0; s < 2 * P::kGroups; ++s) barrier_init(&sums_arrived[s], 1);
    fence_barrier_inits();
  }
  if constexpr (CLUSTER > 1) cluster_sync(); else __syncthreads();

  const int k_blocks = arguments.k_blocks, band = arguments.band;
  const int tiles_m = (arguments.rows + ROWS - 1) / ROWS, tiles_n = arguments.outputs / (OUTPUTS * CLUSTER);
  const int first = blockIdx.x / CLUSTER, step = gridDim.x / CLUSTER, tiles = tiles_m * tiles_n;
  const auto first_output = [&](Tile tile) { return (tile.output * CLUSTER + rank) * OUTPUTS; };

  if (threadIdx.x >= P::kConsumers) {
    if constexpr (P::kGroups == 2) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    int stage = 0;
    uint32_t phase = 0;
    const auto advance = [&] {
      if (++stage == P::kStages) stage = 0, phase ^= 1;
    };
    // Every stage of every tile in turn: expects `bytes` at its barrier and lets `copy` ask for them.
    const auto produce = [&](uint32_t bytes, auto copy) {
      for (int index = first; index < tiles; index += step) {
        const Tile tile = locate(index, tiles_m, tiles_n, band);
        const int row = tile.row * ROWS, output = first_output(tile), block = output / arguments.group_outputs * k_blocks;
        for (int k = 0; k < k_blocks; ++k) {
          barrier_wait(&empty[stage], phase ^ 1);
          barrier_expect_bytes(&full[stage], bytes);
          copy(k, block + k, row, output);
          advance();
        }
      }
    };
    if (threadIdx.x == P::kConsumers) {  // weights, which no launch writes
      produce(P::kStageBytes - P::kRowBytes, [&](int k, int, int, int output) {
        tensor_load(stages + stage * P::kStageBytes + P::kRowBytes, &weights_map, k * kBlockK, output, &full[stage]);
      });
      if constexpr (CLUSTER > 1) {  // this CTA's memory goes when it ends: not before every peer has counted at its barriers
        for (int s = 0; s < P::kStages; ++s) {
          barrier_wait(&empty[stage], phase ^ 1);
          advance();
        }
      }
    } else if (threadIdx.x == P::kConsumers + 32) {
      wait_for_previous_launch();
      let_next_launch_begin();
      produce(P::kRowBytes, [&](int, int block, int row, int) {
        uint8_t* target = stages + stage * P::kStageBytes;
        if constexpr (CLUSTER == 1) {
          tensor_load(target, &rows_map, block * kBlockK, row, &full[stage]);
        } else {
          const int part = rank * P::kRowPart;
          tensor_load_multicast(target + part * kBlockK, &rows_map, block * kBlockK, row + part, &full[stage],
                                (1u << CLUSTER) - 1);
        }
      });
    } else if (threadIdx.x == P::kConsumers + 64) {
      wait_for_previous_launch();
      produce(P::kScaleBytes, [&](int, int block, int row, int) {
        tensor_load(scales + stage * P::kScaleBytes, &scales_map, row, block, &full[stage]);
      });
    }
  } else {
    if constexpr (P::kGroups == 2) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int thread = threadIdx.x % 128, lane = thread % 32;
    // The same number in every lane, as the compiler should know: descriptors are then computed once a warp.
    const int group = P::kGroups == 1 ? 0 : __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);
    const int warp = __shfl_sync(0xFFFFFFFFu, thread / 32, 0);
    const int group_row = group * P::kGroupRows;
    uint8_t* output_area = staged + group * P::kPieces * P::kPanels * P::kPanelBytes;
    int stage = 0, released = 0;
    uint32_t phase = 0;
    [[maybe_unused]] uint32_t count = 0;  // of tiles done
    // Descriptors, lower words: of this stage's first row, and how far its pieces lie from there.
    const uint32_t first_place = descriptor_place(stages);
    uint32_t place = first_place;
    WeightScales weight_scales[P::kColumns];

    const auto load_scales = [&](Tile tile) {
      const int output = first_output(tile);
#pragma unroll
      for (int column = 0; column < P::kColumns; ++column) weight_scales[column].load(arguments, output + 128 * column, lane);
    };
    const auto factor_of = [&](int piece, float weight_scale) {
      const float* source = reinterpret_cast<const float*>(scales + stage * P::kScaleBytes) + group_row +
                            piece / P::kColumns * 64 + 16 * warp + lane / 4;
      return make_float2(source[0] * weight_scale, source[8] * weight_scale);
    };
    const auto multiply_piece = [&](float(&partial)[P::kPieceOutputs / 2], int piece) {
      const uint32_t rows = place + (group_row + piece / P::kColumns * 64) * kBlockK / 16;
      const uint32_t weights = place + (P::kRowBytes + piece % P::kColumns * 128 * kBlockK) / 16;
      multiply<P::kPieceOutputs>(partial, rows, weights);
    };
    const auto advance = [&] {
      place += P::kStageBytes / 16;
      if (++stage == P::kStages) stage = 0, phase ^= 1, place = first_place;
    };
    const auto release = [&] {
      __syncwarp();
      if constexpr (CLUSTER == 1) {
        if (lane == 0) barrier_arrive(&empty[released]);
      } else {
        if (lane < CLUSTER) barrier_arrive_at(&empty[released], lane);
      }
      if (++released == P::kStages) released = 0;
    };

    Tile next = locate(first, tiles_m, tiles_n, band);
    if (first < tiles) load_scales(next);
    for (int index = first; index < tiles; index += step) {
      const Tile tile = next;
      float total[P::kPieces][P::kPieceOutputs / 2];
#pragma unroll
      for (int piece = 0; piece < P::kPieces; ++piece)
#pragma unroll
        for (int i = 0; i < P::kPieceOutputs / 2; ++i) total[piece][i] = 0.0f;

      if constexpr (P::kDeep) {
        float even[P::kPieceOutputs / 2], odd[P::kPieceOutputs / 2];
        float2 even_factor, odd_factor;
        const auto begin = [&](float(&partial)[P::kPieceOutputs / 2], float2& factor, int k) {
          const float weight_scale = weight_scales[0].at(k);
          barrier_wait(&full[stage], phase);
          factor = factor_of(0, weight_scale);
          multiply_piece(partial, 0);
          advance();
        };
        begin(even, even_factor, 0);
        int k = 1;
        for (; k + 1 < k_blocks; k += 2) {
          begin(odd, odd_factor, k);
          wgmma_wait<1>();
          release();
          promote<P::kPieceOutputs>(total[0], even, even_factor);
          begin(even, even_factor, k + 1);
          wgmma_wait<1>();
          release();
          promote<P::kPieceOutputs>(total[0], odd, odd_factor);
        }
        if (k < k_blocks) {
          begin(odd, odd_factor, k);
          wgmma_wait<1>();
          release();
          promote<P::kPieceOutputs>(total[0], even, even_factor);
          wgmma_wait<0>();
          release();
          promote<P::kPieceOutputs>(total[0], odd, odd_factor);
        } else {
          wgmma_wait<0>();
          release();
          promote<P::kPieceOutputs>(total[0], even, even_factor);
        }
      } else {
        for (int k = 0; k < k_blocks; ++k) {
          float weight_scale[P::kColumns];
#pragma unroll
          for (int column = 0; column < P::kColumns; ++column) weight_scale[column] = weight_scales[column].at(k);
          barrier_wait(&full[stage], phase);
          float2 factor[P::kPieces];
#pragma unroll
          for (int piece = 0; piece < P::kPieces; ++piece) factor[piece] = factor_of(piece, weight_scale[piece % P::kColumns]);
#pragma unroll
          for (int piece = 0; piece < P::kPieces; ++piece) {
            float partial[P::kPieceOutputs / 2];
            multiply_piece(partial, piece);
            wgmma_wait<0>();
            if (piece + 1 == P::kPieces) release();
            promote<P::kPieceOutputs>(total[piece], partial, factor[piece]);
          }
          advance();
        }
      }

      next = locate(index + step, tiles_m, tiles_n, band);
      if (index + step < tiles) load_scales(next);  // they come while this tile is put away
      const int row = tile.row * ROWS + group_row, output = first_output(tile);
      HeadPairs heads;
      if constexpr (RESULT == kHeads) {
        const int64_t angle = static_cast<int64_t>(row) * (kRotary / 2);
        const HeadSums exchange{sums + ((count & 1) * P::kGroups + group) * 128, &sums_arrived[2 * group + (count & 1)],
                                count / 2 & 1};
        finish_heads(heads, total, exchange, arguments.eps, arguments.cos + angle, arguments.sin + angle, arguments.rows - row, rank,
                     warp, lane);
        ++count;
      }
      if (thread == 0) store_wait_read();
      sync_threads_of(1 + group, 128);
#pragma unroll
      for (int piece = 0; piece < P::kPieces; ++piece) {
        uint8_t* area = output_area + piece * P::kPanels * P::kPanelBytes;
        const int piece_row = row + piece / P::kColumns * 64, piece_output = output + piece % P::kColumns * 128;
        if constexpr (RESULT == kCodes) {
          float* code_scale =
              arguments.code_scale + static_cast<int64_t>(piece_output / 128) * arguments.code_scale_stride + piece_row;
          stage_codes(total[piece], area, code_scale, arguments.rows - piece_row, warp, lane);
        } else if constexpr (RESULT == kHeads) {
          stage_pairs(heads[piece], area, warp, lane);
        } else {
          stage_values<P::kPieceOutputs, P::kPitch>(total[piece], area, warp, lane);
        }
      }
      fence_async_proxy();
      sync_threads_of(1 + group, 128);
      if (thread == 0) {
#pragma unroll
        for (int piece = 0; piece < P::kPieces; ++piece) {
          const int piece_row = row + piece / P::kColumns * 64, piece_output = output + piece % P::kColumns * 128;
          if (piece_row >= arguments.rows) break;
#pragma unroll
          for (int panel = 0; panel < P::kPanels; ++panel)
            tensor_store(&output_map, output_area + (piece * P::kPanels + panel) * P::kPanelBytes,
                         piece_output + panel * (P::kPitch / P::kValueBytes), piece_row);
        }
        store_commit();
      }
    }
    if (thread == 0) store_wait_read();
  }
}

constexpr CUtensorMapSwizzle output_swizzle(int pitch) {
  return pitch == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
}

struct Operands {
  const void* rows;
  const float* row_scales;
  const void* weights;
  void* output;
  int groups, scale_stride, output_stride;
};

template <int ROWS, int OUTPUTS, int CLUSTER, Result RESULT>
int launch(const Operands& operands, const Arguments& arguments, cudaStream_t stream) {
  using P = Plan<ROWS, OUTPUTS, CLUSTER, RESULT>;
  if (arguments.group_outputs % (OUTPUTS * CLUSTER) != 0) return cudaErrorInvalidValue;
  const uint64_t channels = static_cast<uint64_t>(arguments.k_blocks) * kBlockK, all_channels = channels * operands.groups;
  CUtensorMap rows_map, scales_map, weights_map, output_map;
  int error = encode_map(&rows_map, CU_TENSOR_MAP_DATA_TYPE_UINT8, operands.rows, all_channels, arguments.rows, all_channels,
                         kBlockK, P::kRowPart, CU_TENSOR_MAP_SWIZZLE_128B);
  if (error != cudaSuccess) return error;
  error = encode_map(&scales_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, operands.row_scales, operands.scale_stride,
                     static_cast<uint64_t>(arguments.k_blocks) * operands.groups, static_cast<uint64_t>(operands.scale_stride) * 4,
                     ROWS, 1, CU_TENSOR_MAP_SWIZZLE_NONE);
  if (error != cudaSuccess) return error;
  error = encode_map(&weights_map, CU_TENSOR_MAP_DATA_TYPE_UINT8, operands.weights, channels, arguments.outputs, channels, kBlockK,
                     OUTPUTS, CU_TENSOR_MAP_SWIZZLE_128B);
  if (error != cudaSuccess) return error;
  error = encode_map(&output_map, RESULT == kCodes ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                     operands.output, arguments.outputs, arguments.rows,
                     static_cast<uint64_t>(operands.output_stride) * P::kValueBytes, P::kPitch / P::kValueBytes, 64,
                     output_swizzle(P::kPitch));
  if (error != cudaSuccess) return error;

  auto kernel = fp8_gemm_kernel<ROWS, OUTPUTS, CLUSTER, RESULT>;
  cudaLaunchAttribute attributes[2] = {begins_early(), {}};
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {CLUSTER, 1, 1};
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(P::kThreads);
  config.dynamicSmemBytes = P::kSharedBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  static int resident = 0;  // clusters that fit on the chip at once; the same on every GPU of a process
  if (resident == 0) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, P::kSharedBytes);
    if (error != cudaSuccess) return error;
    config.gridDim = dim3(CLUSTER);
    int clusters = 0;
    error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (error != cudaSuccess) return error;
    if (clusters == 0) return cudaErrorInvalidConfiguration;
    resident = clusters;
  }
  const int tiles = (arguments.rows + ROWS - 1) / ROWS * (arguments.outputs / (OUTPUTS * CLUSTER));
  config.gridDim = dim3(CLUSTER * least(resident, tiles));
  return cudaLaunchKernelEx(&config, kernel, rows_map, scales_map, weights_map, output_map, arguments);
}

}  // namespace

// rows: e4m3 [num_rows, groups * 128 * k_blocks]; row_scales: float32 [groups * k_blocks, scale_stride], scale_stride a multiple of
// 4; weights: e4m3 [outputs, 128 * k_blocks], weight_scale [outputs / 128, weight_scale_stride]. Outputs [g * outputs / groups,
// (g + 1) * outputs / groups) see the channels of group g. A tile has tile_rows x tile_outputs elements, a cluster `cluster` tiles.
// result 0: output bf16, rows output_stride elements apart (a multiple of 8). 1: output e4m3 (a multiple of 16), code_scale
// [outputs / 128, code_scale_stride]. 2: heads of 512 outputs in bf16, cos and sin [num_rows, 32]. Returns a cudaError_t.
extern "C" int fp8_gemm(int result, int tile_rows, int tile_outputs, int cluster, int band, const void* rows,
                        const float* row_scales, const void* weights, const uint8_t* weight_scale, void* output,
                        float* code_scale, const float* cos, const float* sin, float eps, int num_rows, int outputs, int k_blocks,
                        int groups, int scale_stride, int weight_scale_stride, int output_stride, int code_scale_stride,
                        void* stream) {
  if (num_rows <= 0 || outputs <= 0 || k_blocks <= 0 || k_blocks > kMaxBlocks || outputs % groups != 0 || band <= 0)
    return cudaErrorInvalidValue;
  const Operands operands{rows, row_scales, weights, output, groups, scale_stride, output_stride};
  const Arguments arguments{weight_scale,        code_scale,        cos,      sin,     eps,
                            weight_scale_stride, code_scale_stride, num_rows, outputs, k_blocks,
                            outputs / groups,    band};
  const auto queue = static_cast<cudaStream_t>(stream);
#define CASE(ROWS, OUTPUTS, CLUSTER, RESULT)                                                                  \
  if (tile_rows == ROWS && tile_outputs == OUTPUTS && cluster == CLUSTER && result == static_cast<int>(RESULT)) \
    return launch<ROWS, OUTPUTS, CLUSTER, RESULT>(operands, arguments, queue);
  CASE(64, 32, 1, kValues)
  CASE(64, 64, 1, kValues)
  CASE(64, 128, 1, kValues)
  CASE(128, 64, 1, kValues)
  CASE(128, 128, 1, kValues)
  CASE(128, 256, 2, kValues)
  CASE(256, 128, 1, kValues)
  CASE(64, 128, 1, kCodes)
  CASE(128, 128, 1, kCodes)
  CASE(128, 256, 2, kCodes)
  CASE(256, 128, 1, kCodes)
  CASE(64, 256, 2, kHeads)
  CASE(128, 256, 2, kHeads)
#undef CASE
  return cudaErrorInvalidValue;
}
