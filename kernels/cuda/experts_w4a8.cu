// Routed experts with MXFP4 weights and e4m3 activations on Hopper (sm_90a), as two persistent grouped GEMMs:
//   up:   h = quantise(silu(min(x W1', limit)) * clamp(x W3', -limit, limit) * route_weight)   per row and expert
//   down: y = h W2'
// The weights are the 64-row register operand of wgmma, the rows of an expert its N side, so a handful of rows wastes little.
// Weights arrive by bulk copies in the order in which threads consume them (kernels/experts.py: pack_experts), 4-bit codes
// become e4m3 by byte permutation of an eight-entry table that depends on the 32-group's exponent relative to its row, so
// no multiplication touches a weight; a row's own power of two is applied once, to the finished sum.
//
// One CTA: a producer warp and two consumer warpgroups of 2 x 64 weight rows. A stage is 128 input channels.
// Bound by weight streaming up to about 64 rows an expert, by the FP8 tensor cores beyond.

#include <cuda_bf16.h>

#include "wgmma_fp8.cuh"

namespace {

using namespace hopper;

constexpr int kStageK = 128;
constexpr int kWeightBytes = 256 * kStageK / 2;     // codes of a stage
constexpr int kShiftBytes = 256 * kStageK / 32;     // one byte per row and 32-group: 8 * (row exponent - group exponent)
constexpr int kUnitBytes = kWeightBytes / 4;        // codes of one 64-row unit
constexpr int kUnitShiftBytes = kShiftBytes / 4;
constexpr int kMaxExperts = 512;
constexpr int kConsumers = 256;
constexpr int kThreads = 384;
constexpr int kSharedLimit = 227 * 1024;  // of one block, static arrays included

constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

template <int N, bool UP>
struct Plan {
  static constexpr int kRowsBytes = N * kStageK;
  // The copy engine wants boxes to start on 16 bytes, so a stage holds up to three scales of rows before its own.
  static constexpr int kScales = N + 4;
  static constexpr int kStageBytes = round_up(kRowsBytes + kWeightBytes + kShiftBytes + kScales * 4, 1024);
  static constexpr int kOutputStride = UP ? 128 + 16 : (256 + 8) * 2;  // bytes of a staged output row, padded against bank conflicts
  static constexpr int kOutputBytes = round_up(N * kOutputStride, 1024);
  static constexpr int kFixedBytes = 1024;  // barriers and the decoding table
  static constexpr int kStaticBytes = 2 * (kMaxExperts + 1) * 4 + 8 * N * 4 + 256;
  static constexpr int kFit = (kSharedLimit - kStaticBytes - kOutputBytes - kFixedBytes - 1024) / kStageBytes;
  static constexpr int kStages = kFit > 12 ? 12 : kFit;
  static constexpr int kSharedBytes = kStages * kStageBytes + kOutputBytes + kFixedBytes + 1024;
  static constexpr uint32_t kStageTransaction = kRowsBytes + kWeightBytes + kShiftBytes + kScales * 4;
  static_assert(kStages >= 3, "too few stages");
};

struct Arguments {
  const uint8_t* weights;     // [experts, tiles, k / 128, kWeightBytes + kShiftBytes]
  const float* row_scale;     // [experts, 256 * tiles] in the order of the packed rows
  const int* offsets;         // [experts + 1]: rows of expert e are offsets[e] .. offsets[e + 1]
  const float* route_weight;  // [rows]
  void* output;               // up: e4m3 [rows, 128 * tiles]; down: bf16 [rows, 256 * tiles]
  float* output_scale;        // up: [tiles, scale_stride]
  int experts, tiles, k_blocks, scale_stride;
  float limit;
};

__device__ __forceinline__ uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
}

// Eight codes -> two registers of four e4m3. Magnitudes are table indices in the low three bits of each nibble; the sign of
// code i of the first four sits in bit 8i + 7, of the second four in bit 8i + 3.
__device__ __forceinline__ void decode(uint32_t word, uint2 table, uint32_t& first, uint32_t& second) {
  const uint32_t index = word & 0x77777777u;
  first = permute_bytes(table.x, table.y, index) | (word & 0x80808080u);
  second = permute_bytes(table.x, table.y, index >> 16) | ((word << 4) & 0x80808080u);
}

// e4m3 codes of {0, .5, 1, 1.5, 2, 3, 4, 6} * 2^(6 - shift), exact for shift <= 14; shift 15 is zero.
__device__ uint2 decode_table(int shift) {
  const uint8_t base[8] = {0x00, 0x60, 0x68, 0x6C, 0x70, 0x74, 0x78, 0x7C};
  uint32_t word[2] = {0, 0};
  for (int code = 1; code < 8; ++code) {
    int value = base[code] - 8 * shift;
    if (value < 8) {  // subnormal: mantissa with the hidden bit, shifted once per missing exponent
      const int missing = 1 - (base[code] >> 3) + shift;
      value = ((base[code] & 7) | 8) >> missing;
    }
    if (shift > 14) value = 0;
    word[code / 4] |= static_cast<uint32_t>(value) << (8 * (code % 4));
  }
  return make_uint2(word[0], word[1]);
}

// 2^ceil(log2(amax / 448)), on exponent bits.
__device__ __forceinline__ float power_of_two_scale(float amax) {
  const uint32_t bits = __float_as_uint(fmaxf(amax, 1e-4f) * (1.0f / 448.0f));
  return __uint_as_float((bits + 0x7FFFFFu) & 0x7F800000u);
}

template <int N>
__device__ __forceinline__ void multiply(float (&partial)[N / 2], const uint32_t (&a)[4][4], uint64_t rows) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) wgmma_e4m3<N>(partial, a[step], rows + 2 * step, step > 0);
  wgmma_commit();
}

__device__ __forceinline__ void load_unit(uint32_t (&a)[4][4], const uint8_t* codes, const uint8_t* shifts,
                                          const uint8_t* table, int thread) {
  const int row = 16 * (thread / 32) + (thread % 32) / 4;
  const uint32_t shift_low = *reinterpret_cast<const uint32_t*>(shifts + 4 * row);
  const uint32_t shift_high = *reinterpret_cast<const uint32_t*>(shifts + 4 * row + 32);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 words = *reinterpret_cast<const uint4*>(codes + 2048 * half + 16 * thread);
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int step = 2 * half + i;
      const uint2 low = *reinterpret_cast<const uint2*>(table + ((shift_low >> (8 * step)) & 0xFF));
      const uint2 high = *reinterpret_cast<const uint2*>(table + ((shift_high >> (8 * step)) & 0xFF));
      decode(word[2 * i], low, a[step][0], a[step][2]);
      decode(word[2 * i + 1], high, a[step][1], a[step][3]);
    }
  }
}

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

// Swish with the upper clamp on the gate, both clamps on the linear part, times the routing weight, rounded to bf16.
__device__ __forceinline__ float gated(float gate, float linear, float limit, float route_weight) {
  gate = fminf(gate, limit);
  linear = fminf(fmaxf(linear, -limit), limit);
  const float value = gate / (1.0f + __expf(-gate)) * linear * route_weight;
  return __bfloat162float(__float2bfloat16_rn(value));
}

__device__ __forceinline__ uint32_t pack_e4m3(float low, float high) {
  uint16_t packed;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
  return packed;
}

template <int N>
__device__ void finish_up(float (&gate)[N / 2], float (&linear)[N / 2], const Arguments& arguments, int expert, int tile,
                          int first_row, int num_rows, uint8_t* staged, float* amax_of, int group, int thread) {
  const int lane = thread % 32, warp = thread / 32;
  const float* scale = arguments.row_scale + (static_cast<int64_t>(expert) * arguments.tiles + tile) * 256 + 128 * group;
  const int row = 16 * warp + lane / 4;
  const float gate_scale[2] = {scale[row], scale[row + 8]}, linear_scale[2] = {scale[64 + row], scale[64 + row + 8]};
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = 8 * j + 2 * (lane % 4) + c;
      const float route = column < num_rows ? arguments.route_weight[first_row + column] : 0.0f;
      float amax = 0.0f;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& value = gate[4 * j + 2 * i + c];
        value = gated(value * gate_scale[i], linear[4 * j + 2 * i + c] * linear_scale[i], arguments.limit, route);
        amax = fmaxf(amax, fabsf(value));
      }
#pragma unroll
      for (int step = 4; step < 32; step *= 2) amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, step));
      if (lane < 4) amax_of[(4 * group + warp) * N + column] = amax;
    }
  }
  sync_threads_of(1, kConsumers);
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = 8 * j + 2 * (lane % 4) + c;
      float amax = 0.0f;
#pragma unroll
      for (int w = 0; w < 8; ++w) amax = fmaxf(amax, amax_of[w * N + column]);
      const float scale_value = power_of_two_scale(amax);
      const float inverse = 1.0f / scale_value;
      const uint32_t codes = pack_e4m3(gate[4 * j + c] * inverse, gate[4 * j + 2 + c] * inverse);
      uint8_t* target = staged + column * Plan<N, true>::kOutputStride + 64 * group + row;
      target[0] = static_cast<uint8_t>(codes);
      target[8] = static_cast<uint8_t>(codes >> 8);
      if (group == 0 && warp == 0 && lane < 4 && column < num_rows)
        arguments.output_scale[static_cast<int64_t>(tile) * arguments.scale_stride + first_row + column] = scale_value;
    }
  }
}

template <int N>
__device__ void finish_down(float (&upper)[N / 2], float (&lower)[N / 2], const Arguments& arguments, int expert, int tile,
                            uint8_t* staged, int group, int thread) {
  const int lane = thread % 32, warp = thread / 32;
  const float* scale = arguments.row_scale + (static_cast<int64_t>(expert) * arguments.tiles + tile) * 256 + 128 * group;
  sync_threads_of(1, kConsumers);  // the previous tile's rows have left the staging area
#pragma unroll
  for (int unit = 0; unit < 2; ++unit) {
    const int row = 64 * unit + 16 * warp + lane / 4;
    const float row_scale[2] = {scale[row], scale[row + 8]};
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float value = (unit == 0 ? upper : lower)[4 * j + 2 * i + c] * row_scale[i];
          auto* target = reinterpret_cast<__nv_bfloat16*>(staged + (8 * j + 2 * (lane % 4) + c) * Plan<N, false>::kOutputStride);
          target[128 * group + row + 8 * i] = __float2bfloat16_rn(value);
        }
      }
    }
  }
}

struct Tile {
  int expert, tile, first_row, num_rows;
};

// Tile `index` of the persistent walk: all weight tiles of one block of rows, then the next block of rows.
__device__ __forceinline__ Tile locate(int index, const int* first_block, const int* offsets, const Arguments& arguments,
                                       int block_rows) {
  const int block = index / arguments.tiles;
  int low = 0, high = arguments.experts - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first_block[middle] <= block) low = middle; else high = middle - 1;
  }
  const int first_row = offsets[low] + (block - first_block[low]) * block_rows;
  return {low, index % arguments.tiles, first_row, min(block_rows, offsets[low + 1] - first_row)};
}

template <int N, bool UP>
__global__ void __launch_bounds__(kThreads, 1)
experts_kernel(const __grid_constant__ CUtensorMap rows_map, const __grid_constant__ CUtensorMap scales_map,
               const Arguments arguments) {
  using P = Plan<N, UP>;
  extern __shared__ uint8_t unaligned[];
  uint8_t* stages = aligned_to_1024(unaligned);
  uint8_t* staged = stages + P::kStages * P::kStageBytes;
  uint8_t* fixed = staged + P::kOutputBytes;
  // fixed area: barriers [0, 256), table [256, 384); the row bookkeeping lives in its own static arrays
  uint64_t* full = reinterpret_cast<uint64_t*>(fixed);
  uint64_t* empty = full + P::kStages;
  uint8_t* table = fixed + 256;
  __shared__ int offsets[kMaxExperts + 1];
  __shared__ int first_block[kMaxExperts + 1];
  __shared__ float amax_of[8 * N];

  const int experts = arguments.experts;
  for (int e = threadIdx.x; e <= experts; e += kThreads) offsets[e] = arguments.offsets[e];
  if (threadIdx.x < 16) reinterpret_cast<uint2*>(table)[threadIdx.x] = decode_table(threadIdx.x);
  if (threadIdx.x == 0) {
    for (int s = 0; s < P::kStages; ++s) {
      barrier_init(&full[s], 1);
      barrier_init(&empty[s], kConsumers / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x < 32) {  // exclusive sum of every expert's blocks of N rows, a warp over chunks of 32 experts
    int before = 0;
    for (int base = 0; base <= experts; base += 32) {
      const int e = base + threadIdx.x;
      const int blocks = e < experts ? (offsets[e + 1] - offsets[e] + N - 1) / N : 0;
      int sum = blocks;
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(0xFFFFFFFFu, sum, step);
        if (threadIdx.x >= step) sum += other;
      }
      if (e <= experts) first_block[e] = before + sum - blocks;
      before += __shfl_sync(0xFFFFFFFFu, sum, 31);
    }
  }
  __syncthreads();
  const int num_tiles = first_block[experts] * arguments.tiles;
  const int k_blocks = arguments.k_blocks;

  if (threadIdx.x >= kConsumers) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == kConsumers) {
      int stage = 0;
      uint32_t phase = 0;
      for (int index = blockIdx.x; index < num_tiles; index += gridDim.x) {
        const Tile tile = locate(index, first_block, offsets, arguments, N);
        const uint8_t* weights = arguments.weights + (static_cast<int64_t>(tile.expert) * arguments.tiles + tile.tile) *
                                                         k_blocks * (kWeightBytes + kShiftBytes);
        for (int k = 0; k < k_blocks; ++k) {
          barrier_wait(&empty[stage], phase ^ 1);
          uint8_t* target = stages + stage * P::kStageBytes;
          barrier_expect_bytes(&full[stage], P::kStageTransaction);
          tensor_load(target, &rows_map, k * kStageK, tile.first_row, &full[stage]);
          bulk_load(target + P::kRowsBytes, weights + static_cast<int64_t>(k) * (kWeightBytes + kShiftBytes),
                    kWeightBytes + kShiftBytes, &full[stage]);
          tensor_load(target + P::kRowsBytes + kWeightBytes + kShiftBytes, &scales_map, tile.first_row & ~3, k, &full[stage]);
          if (++stage == P::kStages) stage = 0, phase ^= 1;
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128, lane = thread % 32;
    int stage = 0;
    uint32_t phase = 0;
    for (int index = blockIdx.x; index < num_tiles; index += gridDim.x) {
      const Tile tile = locate(index, first_block, offsets, arguments, N);
      float total[2][N / 2];
#pragma unroll
      for (int i = 0; i < N / 2; ++i) total[0][i] = total[1][i] = 0.0f;
      for (int k = 0; k < k_blocks; ++k) {
        barrier_wait(&full[stage], phase);
        const uint8_t* source = stages + stage * P::kStageBytes;
        const uint8_t* codes = source + P::kRowsBytes + 2 * group * kUnitBytes;
        const uint8_t* shifts = source + P::kRowsBytes + kWeightBytes + 2 * group * kUnitShiftBytes;
        const float* scales =
            reinterpret_cast<const float*>(source + P::kRowsBytes + kWeightBytes + kShiftBytes) + (tile.first_row & 3);
        const uint64_t rows = operand_descriptor(source);
        uint32_t a[2][4][4];
        load_unit(a[0], codes, shifts, table, thread);
        // The second unit is decoded while the tensor cores work on the first.
        if constexpr (N <= 64) {
          float partial[2][N / 2];
          multiply<N>(partial[0], a[0], rows);
          load_unit(a[1], codes + kUnitBytes, shifts + kUnitShiftBytes, table, thread);
          multiply<N>(partial[1], a[1], rows);
          wgmma_wait<1>();
          promote<N>(total[0], partial[0], scales, lane);
          wgmma_wait<0>();
          promote<N>(total[1], partial[1], scales, lane);
        } else {
          float partial[N / 2];
          multiply<N>(partial, a[0], rows);
          load_unit(a[1], codes + kUnitBytes, shifts + kUnitShiftBytes, table, thread);
          wgmma_wait<0>();
          promote<N>(total[0], partial, scales, lane);
          multiply<N>(partial, a[1], rows);
          wgmma_wait<0>();
          promote<N>(total[1], partial, scales, lane);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(&empty[stage]);
        if (++stage == P::kStages) stage = 0, phase ^= 1;
      }
      if constexpr (UP) {
        finish_up<N>(total[0], total[1], arguments, tile.expert, tile.tile, tile.first_row, tile.num_rows, staged, amax_of,
                     group, thread);
      } else {
        finish_down<N>(total[0], total[1], arguments, tile.expert, tile.tile, staged, group, thread);
      }
      sync_threads_of(2, kConsumers);
      constexpr int kRowBytes = UP ? 128 : 512;
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
  auto kernel = experts_kernel<N, UP>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, P::kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, kThreads, P::kSharedBytes, stream>>>(rows_map, scales_map, arguments);
  return cudaGetLastError();
}

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                                 const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

int encode(CUtensorMap* map, CUtensorMapDataType type, const void* base, uint64_t width, uint64_t height, uint64_t stride,
           uint32_t box_width, uint32_t box_height, CUtensorMapSwizzle swizzle) {
  static EncodeTiled encode_tiled = nullptr;
  if (encode_tiled == nullptr) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult status;
    cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status);
    if (error != cudaSuccess) return error;
    if (status != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    encode_tiled = reinterpret_cast<EncodeTiled>(function);
  }
  const cuuint64_t sizes[2] = {width, height}, strides[1] = {stride};
  const cuuint32_t box[2] = {box_width, box_height}, steps[2] = {1, 1};
  const CUresult result =
      encode_tiled(map, type, 2, const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

// rows: e4m3 [num_rows, 128 * k_blocks]; row_scales: float32 [k_blocks, scale_stride], scale_stride a multiple of 4.
// Returns a cudaError_t.
extern "C" int experts_w4a8(int up, int block_rows, const void* rows, const float* row_scales, int num_rows, int k_blocks,
                            int scale_stride, const uint8_t* weights, const float* weight_scale, const int* offsets,
                            const float* route_weight, void* output, float* output_scale, int experts, int tiles, float limit,
                            int grid, void* stream) {
  if (experts > kMaxExperts || num_rows <= 0 || k_blocks <= 0) return cudaErrorInvalidValue;
  CUtensorMap rows_map, scales_map;
  int error = encode(&rows_map, CU_TENSOR_MAP_DATA_TYPE_UINT8, rows, static_cast<uint64_t>(k_blocks) * kStageK, num_rows,
                     static_cast<uint64_t>(k_blocks) * kStageK, kStageK, block_rows, CU_TENSOR_MAP_SWIZZLE_128B);
  if (error != cudaSuccess) return error;
  error = encode(&scales_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, row_scales, scale_stride, k_blocks,
                 static_cast<uint64_t>(scale_stride) * 4, block_rows + 4, 1, CU_TENSOR_MAP_SWIZZLE_NONE);
  if (error != cudaSuccess) return error;
  const Arguments arguments{weights, weight_scale, offsets, route_weight, output,       output_scale,
                            experts, tiles,        k_blocks, scale_stride, limit};
  const auto queue = static_cast<cudaStream_t>(stream);
#define CASE(N) \
  case N: return up ? launch<N, true>(rows_map, scales_map, arguments, grid, queue) : launch<N, false>(rows_map, scales_map, arguments, grid, queue);
  switch (block_rows) {
    CASE(8)
    CASE(16)
    CASE(32)
    CASE(48)
    CASE(64)
    CASE(96)
    CASE(128)
  }
#undef CASE
  return cudaErrorInvalidValue;
}
