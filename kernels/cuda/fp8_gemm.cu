// W8A8 products with block scales on Hopper (sm_90a): y = x W^T, also per group of channels (specification: kernels.fp8_gemm).
// x e4m3 rows with a float32 scale per row and 128 channels, W e4m3 with an E8M0 scale per 128 x 128 tile, y bf16.
//
// Persistent clusters walk output tiles. In a CTA one warp copies 128 channels of rows and weights a stage; one or two consumer
// warpgroups multiply them, sum 128 channels in the tensor cores and those sums, scaled, in float32 registers. CTAs of a cluster
// that share rows (neighbours along the outputs) or weights (neighbours along the rows) each copy a part for all of them: at 128 x
// 128 and less the L2 cache could not feed the tensor cores otherwise. An element's sum has one order, whatever the tile and
// cluster: results do not depend on the number of rows.
// Bound by the read of the weight for few rows, by the FP8 tensor cores for many.

#include <cuda_bf16.h>

#include "cluster_copy.cuh"
#include "tensor_map.cuh"

namespace {

using namespace hopper;

constexpr int kStageK = 128;
constexpr int kMaxBlocks = 64;            // of 128 channels: a warp keeps a tile's weight scales in two registers a lane
constexpr int kSharedLimit = 227 * 1024;
constexpr int kMaxStages = 12;
constexpr int kBarrierBytes = 2 * kMaxStages * 8;
constexpr int kAlignment = 1024;          // of a tile of 128-byte rows under the 128-byte swizzle

constexpr int least(int a, int b) { return a < b ? a : b; }

template <int ROWS, int OUTPUTS, int CLUSTER_ROWS, int CLUSTER_OUTPUTS>
struct Plan {
  static constexpr int kCluster = CLUSTER_ROWS * CLUSTER_OUTPUTS;
  static constexpr int kGroups = ROWS >= 128 ? 2 : 1;  // consumer warpgroups
  static constexpr int kWaves = ROWS / 64 / kGroups;   // pieces of 64 rows of a warpgroup
  static constexpr int kConsumers = 128 * kGroups;
  static constexpr int kThreads = kConsumers + 128;
  static constexpr int kRowPart = ROWS / CLUSTER_OUTPUTS, kWeightPart = OUTPUTS / CLUSTER_ROWS;  // what one CTA copies for its peers
  static constexpr int kRowBytes = ROWS * kStageK, kWeightBytes = OUTPUTS * kStageK, kScaleBytes = ROWS * 4;
  static constexpr int kStageBytes = kRowBytes + kWeightBytes;
  static constexpr uint32_t kTransaction = kStageBytes + kScaleBytes;
  static constexpr int kOutputPitch = least(OUTPUTS * 2, 128);  // bytes of an output row in a staged panel
  static constexpr int kPanels = OUTPUTS * 2 / kOutputPitch, kPanelBytes = 64 * kOutputPitch;
  static constexpr int kOutputBytes = ROWS * OUTPUTS * 2;
  static constexpr int kStages =
      least(kMaxStages, (kSharedLimit - kAlignment - kBarrierBytes - kOutputBytes) / (kStageBytes + kScaleBytes));
  static constexpr int kSharedBytes = kAlignment + kBarrierBytes + kOutputBytes + kStages * (kStageBytes + kScaleBytes);
  // Two sums of 128 channels in flight where registers allow: one is scaled while the tensor cores work on the next.
  static constexpr bool kDeep = kWaves == 1;
  static_assert(kStages >= 3, "too few stages");
  static_assert(kRowPart % 8 == 0 && kWeightPart % 8 == 0, "parts are whole swizzle atoms");
};

struct Arguments {
  const uint8_t* weight_scale;  // [outputs / 128, weight_scale_stride]
  int weight_scale_stride, rows, outputs, k_blocks, group_outputs, band;
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

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Place of in-band piece `piece` (16 bytes) of row `row` in a panel under the swizzle of its pitch.
template <int PITCH>
__device__ __forceinline__ uint32_t swizzled(int row, int piece) {
  const uint32_t offset = row * PITCH + piece * 16;
  return offset ^ (((offset >> 7) & (PITCH / 16 - 1)) << 4);
}

// The weight scales of one row of 128 x 128 tiles, spread over a warp.
struct ScaleBytes {
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
__device__ __forceinline__ void multiply(float (&partial)[N / 2], uint64_t rows, uint64_t weights) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) wgmma_e4m3<N>(partial, rows + 2 * step, weights + 2 * step, step > 0);
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

template <int ROWS, int OUTPUTS, int CLUSTER_ROWS, int CLUSTER_OUTPUTS>
__global__ void __launch_bounds__(Plan<ROWS, OUTPUTS, CLUSTER_ROWS, CLUSTER_OUTPUTS>::kThreads, 1)
fp8_gemm_kernel(const __grid_constant__ CUtensorMap rows_map, const __grid_constant__ CUtensorMap scales_map,
                const __grid_constant__ CUtensorMap weights_map, const __grid_constant__ CUtensorMap output_map,
                const Arguments arguments) {
  using P = Plan<ROWS, OUTPUTS, CLUSTER_ROWS, CLUSTER_OUTPUTS>;
  extern __shared__ uint8_t unaligned[];
  uint8_t* stages = aligned_to_1024(unaligned);
  uint8_t* staged = stages + P::kStages * P::kStageBytes;
  uint8_t* scales = staged + P::kOutputBytes;
  uint64_t* full = reinterpret_cast<uint64_t*>(scales + P::kStages * P::kScaleBytes);
  uint64_t* empty = full + P::kStages;

  const int rank = P::kCluster > 1 ? cluster_rank() : 0;
  const int rank_m = rank / CLUSTER_OUTPUTS, rank_n = rank % CLUSTER_OUTPUTS;
  if (threadIdx.x == P::kConsumers) {
    prefetch_map(&rows_map);
    prefetch_map(&scales_map);
    prefetch_map(&weights_map);
    prefetch_map(&output_map);
    for (int s = 0; s < P::kStages; ++s) {
      barrier_init(&full[s], 1);
      barrier_init(&empty[s], P::kCluster * (P::kConsumers / 32));
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if constexpr (P::kCluster > 1) cluster_sync(); else __syncthreads();

  const int k_blocks = arguments.k_blocks, band = arguments.band;
  const int tiles_m = (arguments.rows + ROWS * CLUSTER_ROWS - 1) / (ROWS * CLUSTER_ROWS);
  const int tiles_n = arguments.outputs / (OUTPUTS * CLUSTER_OUTPUTS);
  const int first = blockIdx.x / P::kCluster, step = gridDim.x / P::kCluster, tiles = tiles_m * tiles_n;
  const auto first_row = [&](Tile tile) { return (tile.row * CLUSTER_ROWS + rank_m) * ROWS; };
  const auto first_output = [&](Tile tile) { return (tile.output * CLUSTER_OUTPUTS + rank_n) * OUTPUTS; };

  if (threadIdx.x >= P::kConsumers) {
    if constexpr (P::kGroups == 2) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == P::kConsumers) {
      int stage = 0;
      uint32_t phase = 0;
      for (int index = first; index < tiles; index += step) {
        const Tile tile = locate(index, tiles_m, tiles_n, band);
        const int row = first_row(tile), output = first_output(tile), block = output / arguments.group_outputs * k_blocks;
        for (int k = 0; k < k_blocks; ++k) {
          barrier_wait(&empty[stage], phase ^ 1);
          uint8_t* target = stages + stage * P::kStageBytes;
          barrier_expect_bytes(&full[stage], P::kTransaction);
          tensor_load(scales + stage * P::kScaleBytes, &scales_map, row, block + k, &full[stage]);
          if constexpr (CLUSTER_OUTPUTS == 1) {
            tensor_load(target, &rows_map, (block + k) * kStageK, row, &full[stage]);
          } else {
            constexpr uint32_t kPeers = (1u << CLUSTER_OUTPUTS) - 1;
            const int part = rank_n * P::kRowPart;
            tensor_load_multicast(target + part * kStageK, &rows_map, (block + k) * kStageK, row + part, &full[stage],
                                  static_cast<uint16_t>(kPeers << (rank_m * CLUSTER_OUTPUTS)));
          }
          target += P::kRowBytes;
          if constexpr (CLUSTER_ROWS == 1) {
            tensor_load(target, &weights_map, k * kStageK, output, &full[stage]);
          } else {
            uint32_t peers = 0;
#pragma unroll
            for (int peer = 0; peer < CLUSTER_ROWS; ++peer) peers |= 1u << (peer * CLUSTER_OUTPUTS);
            const int part = rank_m * P::kWeightPart;
            tensor_load_multicast(target + part * kStageK, &weights_map, k * kStageK, output + part, &full[stage],
                                  static_cast<uint16_t>(peers << rank_n));
          }
          if (++stage == P::kStages) stage = 0, phase ^= 1;
        }
      }
    }
  } else {
    if constexpr (P::kGroups == 2) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    const int local_row = group * P::kWaves * 64;
    uint8_t* output_area = staged + group * P::kWaves * P::kPanels * P::kPanelBytes;
    int stage = 0, released = 0;
    uint32_t phase = 0;
    ScaleBytes weight_scales, next_scales;
    if (first < tiles) next_scales.load(arguments, first_output(locate(first, tiles_m, tiles_n, band)), lane);

    const auto release = [&] {
      __syncwarp();
      if constexpr (P::kCluster == 1) {
        if (lane == 0) barrier_arrive(&empty[released]);
      } else {
        if (lane < P::kCluster) barrier_arrive_at(&empty[released], lane);
      }
      if (++released == P::kStages) released = 0;
    };
    const auto factor_of = [&](int wave, float weight_scale) {
      const float* source = reinterpret_cast<const float*>(scales + stage * P::kScaleBytes) + local_row + 64 * wave + 16 * warp;
      return make_float2(source[lane / 4] * weight_scale, source[lane / 4 + 8] * weight_scale);
    };
    const auto rows_of = [&](int wave) {
      return operand_descriptor(stages + stage * P::kStageBytes + (local_row + 64 * wave) * kStageK);
    };
    const auto weights_of = [&] { return operand_descriptor(stages + stage * P::kStageBytes + P::kRowBytes); };
    const auto advance = [&] {
      if (++stage == P::kStages) stage = 0, phase ^= 1;
    };

    for (int index = first; index < tiles; index += step) {
      const Tile tile = locate(index, tiles_m, tiles_n, band);
      weight_scales = next_scales;
      if (index + step < tiles)
        next_scales.load(arguments, first_output(locate(index + step, tiles_m, tiles_n, band)), lane);
      float total[P::kWaves][OUTPUTS / 2];
#pragma unroll
      for (int wave = 0; wave < P::kWaves; ++wave)
#pragma unroll
        for (int i = 0; i < OUTPUTS / 2; ++i) total[wave][i] = 0.0f;

      if constexpr (P::kDeep) {
        float even[OUTPUTS / 2], odd[OUTPUTS / 2];
        float2 even_factor, odd_factor;
        const auto begin = [&](float(&partial)[OUTPUTS / 2], float2& factor, int k) {
          const float weight_scale = weight_scales.at(k);
          barrier_wait(&full[stage], phase);
          factor = factor_of(0, weight_scale);
          multiply<OUTPUTS>(partial, rows_of(0), weights_of());
          advance();
        };
        begin(even, even_factor, 0);
        int k = 1;
        for (; k + 1 < k_blocks; k += 2) {
          begin(odd, odd_factor, k);
          wgmma_wait<1>();
          release();
          promote<OUTPUTS>(total[0], even, even_factor);
          begin(even, even_factor, k + 1);
          wgmma_wait<1>();
          release();
          promote<OUTPUTS>(total[0], odd, odd_factor);
        }
        if (k < k_blocks) {
          begin(odd, odd_factor, k);
          wgmma_wait<1>();
          release();
          promote<OUTPUTS>(total[0], even, even_factor);
          wgmma_wait<0>();
          release();
          promote<OUTPUTS>(total[0], odd, odd_factor);
        } else {
          wgmma_wait<0>();
          release();
          promote<OUTPUTS>(total[0], even, even_factor);
        }
      } else {
        for (int k = 0; k < k_blocks; ++k) {
          const float weight_scale = weight_scales.at(k);
          barrier_wait(&full[stage], phase);
          float2 factor[P::kWaves];
#pragma unroll
          for (int wave = 0; wave < P::kWaves; ++wave) factor[wave] = factor_of(wave, weight_scale);
#pragma unroll
          for (int wave = 0; wave < P::kWaves; ++wave) {
            float partial[OUTPUTS / 2];
            multiply<OUTPUTS>(partial, rows_of(wave), weights_of());
            wgmma_wait<0>();
            if (wave + 1 == P::kWaves) release();
            promote<OUTPUTS>(total[wave], partial, factor[wave]);
          }
          advance();
        }
      }

      if (thread == 0) store_wait_read();
      sync_threads_of(1 + group, 128);
#pragma unroll
      for (int wave = 0; wave < P::kWaves; ++wave) {
#pragma unroll
        for (int j = 0; j < OUTPUTS / 8; j += 2) {
          const float* value = &total[wave][4 * j];
          const uint32_t packed[4] = {pack_bf16(value[0], value[1]), pack_bf16(value[2], value[3]),
                                      pack_bf16(value[4], value[5]), pack_bf16(value[6], value[7])};
          constexpr int kPieces = P::kOutputPitch / 16;
          const int piece = j + lane / 16, row = 16 * warp + lane % 16;
          const uint8_t* panel = output_area + (wave * P::kPanels + j / kPieces) * P::kPanelBytes;
          store_matrices(shared_address(panel) + swizzled<P::kOutputPitch>(row, piece % kPieces), packed);
        }
      }
      fence_for_copies();
      sync_threads_of(1 + group, 128);
      if (thread == 0) {
        const int row = first_row(tile) + local_row, output = first_output(tile);
#pragma unroll
        for (int wave = 0; wave < P::kWaves; ++wave) {
          if (row + 64 * wave >= arguments.rows) break;
#pragma unroll
          for (int panel = 0; panel < P::kPanels; ++panel)
            tensor_store(&output_map, output_area + (wave * P::kPanels + panel) * P::kPanelBytes,
                         output + panel * (P::kOutputPitch / 2), row + 64 * wave);
        }
        store_commit();
      }
    }
    if (thread == 0) store_wait_read();
  }
  __syncwarp();
  if constexpr (P::kCluster > 1) cluster_sync();  // peers may still copy into this CTA's memory
}

constexpr CUtensorMapSwizzle output_swizzle(int pitch) {
  return pitch == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : pitch == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_32B;
}

struct Operands {
  const void* rows;
  const float* row_scales;
  const void* weights;
  void* output;
  int groups, scale_stride, output_stride;
};

template <int ROWS, int OUTPUTS, int CLUSTER_ROWS, int CLUSTER_OUTPUTS>
int launch(const Operands& operands, const Arguments& arguments, cudaStream_t stream) {
  using P = Plan<ROWS, OUTPUTS, CLUSTER_ROWS, CLUSTER_OUTPUTS>;
  if (arguments.group_outputs % (OUTPUTS * CLUSTER_OUTPUTS) != 0) return cudaErrorInvalidValue;
  const uint64_t channels = static_cast<uint64_t>(arguments.k_blocks) * kStageK, all_channels = channels * operands.groups;
  CUtensorMap rows_map, scales_map, weights_map, output_map;
  int error = encode_map(&rows_map, CU_TENSOR_MAP_DATA_TYPE_UINT8, operands.rows, all_channels, arguments.rows, all_channels,
                         kStageK, P::kRowPart, CU_TENSOR_MAP_SWIZZLE_128B);
  if (error != cudaSuccess) return error;
  error = encode_map(&scales_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, operands.row_scales, operands.scale_stride,
                     static_cast<uint64_t>(arguments.k_blocks) * operands.groups, static_cast<uint64_t>(operands.scale_stride) * 4,
                     ROWS, 1, CU_TENSOR_MAP_SWIZZLE_NONE);
  if (error != cudaSuccess) return error;
  error = encode_map(&weights_map, CU_TENSOR_MAP_DATA_TYPE_UINT8, operands.weights, channels, arguments.outputs, channels, kStageK,
                     P::kWeightPart, CU_TENSOR_MAP_SWIZZLE_128B);
  if (error != cudaSuccess) return error;
  error = encode_map(&output_map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, operands.output, arguments.outputs, arguments.rows,
                     static_cast<uint64_t>(operands.output_stride) * 2, P::kOutputPitch / 2, 64, output_swizzle(P::kOutputPitch));
  if (error != cudaSuccess) return error;

  auto kernel = fp8_gemm_kernel<ROWS, OUTPUTS, CLUSTER_ROWS, CLUSTER_OUTPUTS>;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {P::kCluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(P::kThreads);
  config.dynamicSmemBytes = P::kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  static int resident = 0;  // clusters that fit on the chip at once; the same on every GPU of a process
  if (resident == 0) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, P::kSharedBytes);
    if (error != cudaSuccess) return error;
    config.gridDim = dim3(P::kCluster);
    int clusters = 0;
    error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (error != cudaSuccess) return error;
    if (clusters == 0) return cudaErrorInvalidConfiguration;
    resident = clusters;
  }
  const int tiles = (arguments.rows + ROWS * CLUSTER_ROWS - 1) / (ROWS * CLUSTER_ROWS) *
                    (arguments.outputs / (OUTPUTS * CLUSTER_OUTPUTS));
  config.gridDim = dim3(P::kCluster * least(resident, tiles));
  return cudaLaunchKernelEx(&config, kernel, rows_map, scales_map, weights_map, output_map, arguments);
}

}  // namespace

// rows: e4m3 [num_rows, groups * 128 * k_blocks]; row_scales: float32 [groups * k_blocks, scale_stride], scale_stride a multiple of
// 4; weights: e4m3 [outputs, 128 * k_blocks]; output: bf16, rows output_stride elements apart (a multiple of 8). Outputs
// [g * outputs / groups, (g + 1) * outputs / groups) see the channels of group g. A tile has tile_rows x tile_outputs elements, a
// cluster cluster_rows x cluster_outputs tiles. Returns a cudaError_t.
extern "C" int fp8_gemm(int tile_rows, int tile_outputs, int cluster_rows, int cluster_outputs, int band, const void* rows,
                        const float* row_scales, const void* weights, const uint8_t* weight_scale, void* output, int num_rows,
                        int outputs, int k_blocks, int groups, int scale_stride, int weight_scale_stride, int output_stride,
                        void* stream) {
  if (num_rows <= 0 || outputs <= 0 || k_blocks <= 0 || k_blocks > kMaxBlocks || outputs % groups != 0 || band <= 0)
    return cudaErrorInvalidValue;
  const Operands operands{rows, row_scales, weights, output, groups, scale_stride, output_stride};
  const Arguments arguments{weight_scale, weight_scale_stride, num_rows, outputs, k_blocks, outputs / groups, band};
  const auto queue = static_cast<cudaStream_t>(stream);
#define CASE(ROWS, OUTPUTS, CLUSTER_ROWS, CLUSTER_OUTPUTS)                                                \
  if (tile_rows == ROWS && tile_outputs == OUTPUTS && cluster_rows == CLUSTER_ROWS && cluster_outputs == CLUSTER_OUTPUTS) \
    return launch<ROWS, OUTPUTS, CLUSTER_ROWS, CLUSTER_OUTPUTS>(operands, arguments, queue);
  CASE(256, 128, 1, 1)
  CASE(256, 128, 1, 2)
  CASE(256, 128, 2, 1)
  CASE(128, 128, 1, 1)
  CASE(128, 128, 1, 2)
  CASE(128, 128, 2, 1)
  CASE(128, 128, 2, 2)
  CASE(128, 64, 1, 2)
  CASE(128, 64, 2, 2)
  CASE(128, 64, 1, 4)
  CASE(64, 128, 1, 1)
  CASE(64, 128, 1, 2)
  CASE(64, 64, 1, 1)
  CASE(64, 64, 1, 2)
  CASE(64, 64, 1, 4)
  CASE(64, 32, 1, 1)
  CASE(64, 32, 1, 2)
  CASE(64, 32, 1, 4)
  CASE(64, 16, 1, 2)
  CASE(64, 16, 1, 4)
#undef CASE
  return cudaErrorInvalidValue;
}
