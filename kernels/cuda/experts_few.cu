// Routed experts with MXFP4 weights and e4m3 activations on Hopper (sm_90a) for up to some 64 rows an expert, as two persistent
// grouped GEMMs (experts_many.cu: the same for more):
//   up:   h = quantise(silu(min(x W1', limit)) * clamp(x W3', -limit, limit) * route_weight)   per row and expert
//   down: y = h W2'
// The weights are the 64-row register operand of wgmma, decoded on the way there, the rows of an expert its N side, so a handful
// of rows wastes little. Weights arrive by bulk copies in the order in which threads consume them.
//
// One CTA: a producer warp and four consumer warpgroups of 64 weight rows, which decode a stage while the tensor cores work on the
// one before.
// A stage is 128 input channels. Bound by weight streaming.

#include "experts.cuh"
#include "tensor_map.cuh"

namespace {

using namespace experts;

constexpr int kConsumers = 128 * kUnits;
constexpr int kThreads = kConsumers + 128;

constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

template <int N, bool UP>
struct Plan {
  static constexpr int kRowsBytes = N * kStageK;
  // The copy engine wants boxes to start on 16 bytes, so a stage holds up to three scales of rows before its own.
  static constexpr int kScales = N + 4;
  static constexpr int kStageBytes = round_up(kRowsBytes + kStagePacked + kScales * 4, 1024);
  static constexpr int kOutputStride = UP ? 128 + 16 : (kTileRows + 8) * 2;  // bytes of a staged row, padded against bank conflicts
  static constexpr int kOutputBytes = round_up(N * kOutputStride, 1024);
  static constexpr int kFixedBytes = 256;  // barriers
  static constexpr int kStaticBytes = sizeof(Walk<N>) + kTableBytes + kConsumers / 32 * N * 4 + 256;
  static constexpr int kFit = (kSharedLimit - kStaticBytes - kOutputBytes - kFixedBytes - 1024) / kStageBytes;
  static constexpr int kStages = kFit > 12 ? 12 : kFit;
  static constexpr int kSharedBytes = kStages * kStageBytes + kOutputBytes + kFixedBytes + 1024;
  static constexpr uint32_t kStageTransaction = kRowsBytes + kStagePacked + kScales * 4;
  static_assert(kStages >= 3, "too few stages");
};

template <int N>
__device__ __forceinline__ void promote(float (&total)[N / 2], const float (&partial)[N / 2], const float* scales,
                                        int lane) {
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    const float* pair = scales + 8 * j + 2 * (lane % 4);
    const float2 scale = make_float2(pair[0], pair[1]);
    total[4 * j] += partial[4 * j] * scale.x;
    total[4 * j + 1] += partial[4 * j + 1] * scale.y;
    total[4 * j + 2] += partial[4 * j + 2] * scale.x;
    total[4 * j + 3] += partial[4 * j + 3] * scale.y;
  }
}

// Accumulator rows 16 warp + lane / 4 are gate rows, the rows 8 further on the linear ones of the same columns of h.
template <int N>
__device__ __forceinline__ void finish_up(float (&total)[N / 2], const Arguments& arguments, const Tile& tile,
                                          const float* weight_scale, uint8_t* staged, float* amax_of, int unit, int thread) {
  const int lane = thread % 32, warp = thread / 32;
  const float gate_scale = weight_scale[16 * warp + lane / 4], linear_scale = weight_scale[16 * warp + lane / 4 + 8];
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = 8 * j + 2 * (lane % 4) + c;
      const float route = column < tile.num_rows ? arguments.route_weight[tile.first_row + column] : 0.0f;
      float& value = total[4 * j + c];
      value = gated(value * gate_scale, total[4 * j + 2 + c] * linear_scale, arguments.limit, route);
      float amax = fabsf(value);
#pragma unroll
      for (int step = 4; step < 32; step *= 2) amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, step));
      if (lane < 4) amax_of[(4 * unit + warp) * N + column] = amax;
    }
  }
  sync_threads_of(1, kConsumers);
  constexpr int kWarps = kConsumers / 32;
  for (int column = 128 * unit + thread; column < N; column += kConsumers) {  // one thread a row of the output
    float amax = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) amax = fmaxf(amax, amax_of[w * N + column]);
    const float scale = power_of_two_scale(amax);
    amax_of[column] = scale;
    if (column < tile.num_rows)
      arguments.output_scale[static_cast<int64_t>(tile.tile) * arguments.scale_stride + tile.first_row + column] = scale;
  }
  sync_threads_of(1, kConsumers);
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    const int column = 8 * j + 2 * (lane % 4);
    const uint32_t codes = pack_e4m3(total[4 * j] * (1.0f / amax_of[column]), total[4 * j + 1] * (1.0f / amax_of[column + 1]));
    uint8_t* target = staged + column * Plan<N, true>::kOutputStride + 32 * unit + 8 * warp + lane / 4;
    target[0] = static_cast<uint8_t>(codes);
    target[Plan<N, true>::kOutputStride] = static_cast<uint8_t>(codes >> 8);
  }
}

template <int N>
__device__ __forceinline__ void finish_down(const float (&total)[N / 2], const float* weight_scale, uint8_t* staged, int unit,
                                            int thread) {
  const int lane = thread % 32, row = 16 * (thread / 32) + lane / 4;
  const float scale[2] = {weight_scale[row], weight_scale[row + 8]};
  sync_threads_of(1, kConsumers);  // the previous tile's rows have left the staging area
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        auto* target = reinterpret_cast<__nv_bfloat16*>(staged + (8 * j + 2 * (lane % 4) + c) * Plan<N, false>::kOutputStride);
        target[64 * unit + row + 8 * i] = __float2bfloat16_rn(total[4 * j + 2 * i + c] * scale[i]);
      }
    }
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
  __shared__ float amax_of[kConsumers / 32 * N];

  if (threadIdx.x < 16) reinterpret_cast<uint2*>(table)[threadIdx.x] = decode_table(threadIdx.x);
  if (threadIdx.x == 0) {
    for (int s = 0; s < P::kStages; ++s) {
      barrier_init(&full[s], 1);
      barrier_init(&empty[s], kConsumers / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  walk.prepare(arguments);
  const int num_tiles = walk.num_tiles(arguments), k_blocks = arguments.k_blocks;

  if (threadIdx.x >= kConsumers) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    if (threadIdx.x == kConsumers) {
      int stage = 0;
      uint32_t phase = 0;
      for (int index = blockIdx.x; index < num_tiles; index += gridDim.x) {
        const Tile tile = walk.locate(index, arguments);
        const uint8_t* weights =
            arguments.weights + (static_cast<int64_t>(tile.expert) * arguments.tiles + tile.tile) * k_blocks * kStagePacked;
        for (int k = 0; k < k_blocks; ++k) {
          barrier_wait(&empty[stage], phase ^ 1);
          uint8_t* target = stages + stage * P::kStageBytes;
          barrier_expect_bytes(&full[stage], P::kStageTransaction);
          bulk_load(target + P::kRowsBytes, weights, kStagePacked, &full[stage]);
          tensor_load(target, &rows_map, k * kStageK, tile.first_row, &full[stage]);
          tensor_load(target + P::kRowsBytes + kStagePacked, &scales_map, tile.first_row & ~3, k, &full[stage]);
          weights += kStagePacked;
          if (++stage == P::kStages) stage = 0, phase ^= 1;
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 112;");
    const int unit = threadIdx.x / 128, thread = threadIdx.x % 128, lane = thread % 32;
    constexpr bool kAhead = N <= 32;  // more rows leave no registers for it
    int loaded = 0, stage = 0;  // the stages whose weights are decoded next, and multiplied next
    uint32_t phase = 0;
    const auto fetch = [&](uint32_t(&a)[4][4]) {
      barrier_wait(&full[loaded], phase);
      const uint8_t* packed = stages + loaded * P::kStageBytes + P::kRowsBytes;
      PackedPart(packed + unit * kUnitCodes, packed + kStageCodes + unit * kUnitShifts, thread).decode(a, table);
      if (++loaded == P::kStages) loaded = 0, phase ^= 1;
    };
    for (int index = blockIdx.x; index < num_tiles; index += gridDim.x) {
      const Tile tile = walk.locate(index, arguments);
      float total[N / 2];
#pragma unroll
      for (int i = 0; i < N / 2; ++i) total[i] = 0.0f;
      uint32_t even[4][4], odd[4][4];
      // Multiplies a stage, and decodes the next one meanwhile.
      const auto advance = [&](const uint32_t(&a)[4][4], uint32_t(&next)[4][4], bool more) {
        const uint8_t* source = stages + stage * P::kStageBytes;
        const uint64_t rows = operand_descriptor(source);
        float partial[N / 2];
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step) wgmma_e4m3<N>(partial, a[step], rows + 2 * step, step > 0);
        wgmma_commit();
        if (kAhead && more) fetch(next);
        wgmma_wait<0>();
        const float* scales = reinterpret_cast<const float*>(source + P::kRowsBytes + kStagePacked) + (tile.first_row & 3);
        promote<N>(total, partial, scales, lane);
        __syncwarp();
        if (lane == 0) barrier_arrive(&empty[stage]);
        if (++stage == P::kStages) stage = 0;
      };
      if constexpr (kAhead) {
        fetch(even);
        for (int k = 0; k < k_blocks; k += 2) {
          advance(even, odd, k + 1 < k_blocks);
          if (k + 1 < k_blocks) advance(odd, even, k + 2 < k_blocks);
        }
      } else {
        for (int k = 0; k < k_blocks; ++k) {
          fetch(even);
          advance(even, odd, false);
        }
      }
      const float* weight_scale = arguments.weight_scale +
                                  (static_cast<int64_t>(tile.expert) * arguments.tiles + tile.tile) * kTileRows + kUnitRows * unit;
      if constexpr (UP) {
        finish_up<N>(total, arguments, tile, weight_scale, staged, amax_of, unit, thread);
      } else {
        finish_down<N>(total, weight_scale, staged, unit, thread);
      }
      sync_threads_of(2, kConsumers);
      constexpr int kRowBytes = UP ? 128 : 2 * kTileRows;
      auto* output = static_cast<uint8_t*>(arguments.output);
      for (int piece = threadIdx.x; piece < tile.num_rows * (kRowBytes / 16); piece += kConsumers) {
        const int row = piece / (kRowBytes / 16), column = piece % (kRowBytes / 16) * 16;
        const int64_t target = (static_cast<int64_t>(tile.first_row + row) * arguments.tiles + tile.tile) * kRowBytes + column;
        *reinterpret_cast<uint4*>(output + target) = *reinterpret_cast<const uint4*>(staged + row * P::kOutputStride + column);
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
                     static_cast<uint64_t>(scale_stride) * 4, block_rows + 4, 1, CU_TENSOR_MAP_SWIZZLE_NONE);
  if (error != cudaSuccess) return error;
  const Arguments arguments{weights,      row_scales, weight_scale, offsets,  route_weight, output,
                            output_scale, experts,    tiles,        k_blocks, scale_stride, limit};
  const auto queue = static_cast<cudaStream_t>(stream);
#define CASE(N) \
  case N: return up ? launch<N, true>(rows_map, scales_map, arguments, grid, queue) : launch<N, false>(rows_map, scales_map, arguments, grid, queue);
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
