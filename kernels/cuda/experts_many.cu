// Routed experts with MXFP4 weights for many rows an expert, on Hopper (sm_90a): the products of experts_few.cu bit for bit.
// Here the rows are the 64-row side of wgmma and weights its N side, both from shared memory: a warpgroup decodes each 128 x 128
// block of weights once for 256 rows, and a row's scale is one register instead of one load per column.
//
// A cluster of two CTAs owns 256 weight rows (one packed tile) x up to 256 rows of an expert. Each CTA decodes and multiplies half
// of the weight rows; each copies half of the rows for both. For the up product the two exchange maxima of a row's 128 values.
// One CTA: a warpgroup that copies and decodes, two consumer warpgroups of 2 x 64 rows. A stage is 128 input channels.
// Bound by how fast packed weights become operands: the same products without decoding take three quarters of the time.

#include "cluster_copy.cuh"
#include "experts.cuh"
#include "tensor_map.cuh"

namespace {

using namespace experts;

constexpr int kRows = 256;                       // of a block of rows
constexpr int kUnitBytes = kUnitRows * kStageK;  // of rows or decoded weights, one byte a value
constexpr int kCodes = 2 * kUnitCodes, kShifts = 2 * kUnitShifts;  // this CTA's half of a packed stage
constexpr int kStages = 3, kRaw = 5;
constexpr int kStageBytes = 6 * kUnitBytes;      // four units of rows, two of weights
constexpr int kScales = kRows + 4;               // blocks of rows start anywhere, bulk copies on 16 bytes
constexpr int kConsumers = 256, kProducers = 128, kThreads = kConsumers + kProducers;

struct Shared {
  alignas(1024) uint8_t stages[kStages][kStageBytes];
  alignas(128) uint8_t raw[kRaw][kCodes + kShifts];
  alignas(16) float scales[kStages][kScales];
  float weight_scale[2][128], route[2][128];  // for a consumer warpgroup's epilogue
  float amax[2][kRows];                       // of the peer's columns, alternating between tiles
  uint64_t full[kStages], empty[kStages], raw_full[kRaw], raw_empty[kRaw], exchanged[2];
  Walk<kRows> walk;
};

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// A unit in registers (PackedPart::decode) to rows of 128 bytes under the 128-byte swizzle.
__device__ __forceinline__ void store_unit(uint8_t* target, const uint32_t (&a)[4][4], int thread) {
  const int lane = thread % 32, row = 16 * (thread / 32) + lane / 4;
  const uint32_t place = shared_address(target) + row * kStageK + (lane / 4) * 16 + (lane % 4) * 4;
#pragma unroll
  for (int chunk = 0; chunk < 8; ++chunk) {
    const uint32_t swizzled = place ^ (chunk * 16);
    asm volatile("st.shared.u32 [%0], %1;\nst.shared.u32 [%0 + 1024], %2;" ::"r"(swizzled), "r"(a[chunk / 2][2 * (chunk % 2)]),
                 "r"(a[chunk / 2][2 * (chunk % 2) + 1])
                 : "memory");
  }
}

// Word p of lane q of every four lanes becomes word q of lane p.
__device__ __forceinline__ void transpose_quad(uint32_t (&word)[4], int lane) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int low = step == 1 ? 2 * i : i, high = low + step;
      const uint32_t received = __shfl_xor_sync(0xFFFFFFFFu, upper ? word[low] : word[high], step);
      if (upper) word[low] = received; else word[high] = received;
    }
  }
}

// The end of the cluster: nobody leaves while a peer may still arrive at its barriers. Orders memory, unlike cluster_sync.
__device__ __forceinline__ void leave_together() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Copies and decodes for the consumers; 128 threads. Warps share out what one thread must do: warp 0 asks for rows, warp 1 for
// packed weights, warp 2 for the rows' scales.
__device__ __forceinline__ void produce(Shared& shared, const uint8_t* table, const CUtensorMap& rows_map,
                                        const Arguments& arguments, int num_tiles, int rank, int thread) {
  const int clusters = gridDim.x / 2, k_blocks = arguments.k_blocks, warp = thread / 32;
  const bool leads = thread % 32 == 0;
  int raw_index = blockIdx.x / 2, raw_k = 0, raw_slot = 0;
  uint32_t raw_slot_phase = 1;
  const uint8_t* raw_source = nullptr;
  const auto request_raw = [&] {  // the next packed stage of the walk
    if (raw_index >= num_tiles) return;
    if (raw_k == 0) {
      const Tile tile = shared.walk.locate(raw_index, arguments);
      raw_source = arguments.weights + (static_cast<int64_t>(tile.expert) * arguments.tiles + tile.tile) * k_blocks * kStagePacked;
    }
    barrier_wait(&shared.raw_empty[raw_slot], raw_slot_phase);
    barrier_expect_bytes(&shared.raw_full[raw_slot], kCodes + kShifts);
    bulk_load(shared.raw[raw_slot], raw_source + rank * kCodes, kCodes, &shared.raw_full[raw_slot]);
    bulk_load(shared.raw[raw_slot] + kCodes, raw_source + kStageCodes + rank * kShifts, kShifts, &shared.raw_full[raw_slot]);
    raw_source += kStagePacked;
    if (++raw_k == k_blocks) raw_k = 0, raw_index += clusters;
    if (++raw_slot == kRaw) raw_slot = 0, raw_slot_phase ^= 1;
  };
  if (warp == 1 && leads) {
    for (int i = 0; i + 1 < kRaw; ++i) request_raw();
  }
  int stage = 0, raw = 0;
  uint32_t phase = 0, raw_phase = 0;
  for (int index = blockIdx.x / 2; index < num_tiles; index += clusters) {
    const Tile tile = shared.walk.locate(index, arguments);
    const int units = (tile.num_rows + kUnitRows - 1) / kUnitRows;
    const int scale_start = tile.first_row & ~3;
    uint32_t bytes = 0;  // of a stage that arrive because of this warp, or because of its twin in the other CTA
    if (warp == 0) bytes = units * kUnitBytes;
    if (warp == 2) bytes = 4 * min(kScales, arguments.scale_stride - scale_start);
    for (int k = 0; k < k_blocks; ++k) {
      if (warp == 1 && leads) request_raw();
      __syncwarp();
      uint32_t a[2][4][4];
      barrier_wait(&shared.raw_full[raw], raw_phase);
      const uint8_t* packed = shared.raw[raw];
      const PackedPart first(packed, packed + kCodes, thread), second(packed + kUnitCodes, packed + kCodes + kUnitShifts, thread);
      first.decode(a[0], table);
      second.decode(a[1], table);
      __syncwarp();
      if (leads) barrier_arrive(&shared.raw_empty[raw]);
      if (++raw == kRaw) raw = 0, raw_phase ^= 1;

      uint8_t* target = shared.stages[stage];
      barrier_wait(&shared.empty[stage], phase ^ 1);
      if (warp == 0 && leads) {
        for (int unit = rank; unit < units; unit += 2)
          tensor_load_multicast(target + unit * kUnitBytes, &rows_map, k * kStageK, tile.first_row + unit * kUnitRows,
                                &shared.full[stage], 3);
      }
      if (warp == 2 && leads)
        bulk_load(shared.scales[stage], arguments.row_scales + static_cast<int64_t>(k) * arguments.scale_stride + scale_start,
                  bytes, &shared.full[stage]);
      __syncwarp();
#pragma unroll
      for (int unit = 0; unit < 2; ++unit) store_unit(target + (4 + unit) * kUnitBytes, a[unit], thread);
      fence_for_copies();
      __syncwarp();
      if (leads) barrier_expect_bytes(&shared.full[stage], bytes);
      if (++stage == kStages) stage = 0, phase ^= 1;
    }
  }
}

// Every other eight columns of the accumulator are gates, those after them the linear parts of the same eight columns of h, which
// take the gates' place. Leaves the row's maximum over this CTA's 64 columns.
__device__ __forceinline__ void apply_gate(float (&total)[64], const float* weight_scale, float limit, const float (&route)[2],
                                           float (&amax)[2], int lane) {
  amax[0] = amax[1] = 0.0f;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int column = 16 * j + 2 * (lane % 4);
    const float2 gate_scale = *reinterpret_cast<const float2*>(weight_scale + column);
    const float2 linear_scale = *reinterpret_cast<const float2*>(weight_scale + column + 8);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& value = total[8 * j + 2 * i + c];
        value = gated(value * (c ? gate_scale.y : gate_scale.x),
                      total[8 * j + 4 + 2 * i + c] * (c ? linear_scale.y : linear_scale.x), limit, route[i]);
        amax[i] = fmaxf(amax[i], fabsf(value));
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    amax[i] = fmaxf(amax[i], __shfl_xor_sync(0xFFFFFFFFu, amax[i], 1));
    amax[i] = fmaxf(amax[i], __shfl_xor_sync(0xFFFFFFFFu, amax[i], 2));
  }
}

template <bool UP>
__device__ __forceinline__ void consume(Shared& shared, const Arguments& arguments, int num_tiles, int rank, int group,
                                        int thread) {
  const int clusters = gridDim.x / 2, k_blocks = arguments.k_blocks, lane = thread % 32;
  const int row_in_unit = 16 * (thread / 32) + lane / 4;
  int stage = 0, turn = 0;
  uint32_t phase = 0, exchange_phase = 0;
  for (int index = blockIdx.x / 2; index < num_tiles; index += clusters) {
    const Tile tile = shared.walk.locate(index, arguments);
    float total[2][64];  // units `group` and `group + 2`
#pragma unroll
    for (int i = 0; i < 64; ++i) total[0][i] = total[1][i] = 0.0f;
    for (int k = 0; k < k_blocks; ++k) {
      barrier_wait(&shared.full[stage], phase);
      const uint8_t* source = shared.stages[stage];
      const uint64_t weights = operand_descriptor(source + 4 * kUnitBytes);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int unit = group + 2 * i;
        if (unit * kUnitRows < tile.num_rows) {
          const float* scales = shared.scales[stage] + (tile.first_row & 3) + unit * kUnitRows + row_in_unit;
          const float upper = scales[0], lower = scales[8];
          const uint64_t rows = operand_descriptor(source + unit * kUnitBytes);
          float partial[64];
          wgmma_fence();
#pragma unroll
          for (int step = 0; step < 4; ++step) wgmma_e4m3<128>(partial, rows + 2 * step, weights + 2 * step, step > 0);
          wgmma_commit();
          wgmma_wait<0>();
#pragma unroll
          for (int j = 0; j < 64; j += 4) {
            total[i][j] += partial[j] * upper;
            total[i][j + 1] += partial[j + 1] * upper;
            total[i][j + 2] += partial[j + 2] * lower;
            total[i][j + 3] += partial[j + 3] * lower;
          }
        }
      }
      __syncwarp();
      if (lane < 2) barrier_arrive_at(&shared.empty[stage], lane);
      if (++stage == kStages) stage = 0, phase ^= 1;
    }

    // Through shared memory: registers are too few to have a thread's own 32 scales in flight at once.
    const float my_scale = arguments.weight_scale[(static_cast<int64_t>(tile.expert) * arguments.tiles + tile.tile) * kTileRows +
                                                  rank * 128 + thread];
    const int my_row = (group + 2 * (thread / kUnitRows)) * kUnitRows + thread % kUnitRows;
    const float my_route = UP && my_row < tile.num_rows ? arguments.route_weight[tile.first_row + my_row] : 0.0f;
    sync_threads_of(2 + group, 128);  // the previous tile's have been read
    shared.weight_scale[group][thread] = my_scale;
    shared.route[group][thread] = my_route;
    sync_threads_of(2 + group, 128);
    const float* weight_scale = shared.weight_scale[group];
    if constexpr (UP) {
      float amax[2][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int first = (group + 2 * i) * kUnitRows + row_in_unit;
        const float* routes = shared.route[group] + i * kUnitRows + row_in_unit;
        const float route[2] = {routes[0], routes[8]};
        apply_gate(total[i], weight_scale, arguments.limit, route, amax[i], lane);
        if (lane % 4 == 0) {
          store_at(&shared.amax[turn][first], amax[i][0], &shared.exchanged[turn], rank ^ 1);
          store_at(&shared.amax[turn][first + 8], amax[i][1], &shared.exchanged[turn], rank ^ 1);
        }
      }
      if (group == 0 && thread == 0) barrier_expect_bytes(&shared.exchanged[turn], sizeof(shared.amax[turn]));
      __syncwarp();
      barrier_wait(&shared.exchanged[turn], exchange_phase);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int first = (group + 2 * i) * kUnitRows + row_in_unit;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = first + 8 * r;
          const float scale = power_of_two_scale(fmaxf(amax[i][r], shared.amax[turn][row]));
          const float inverse = 1.0f / scale;
          uint32_t word[4];  // of column blocks 2 p and 2 p + 1
#pragma unroll
          for (int p = 0; p < 4; ++p) {
            const float* value = &total[i][16 * p + 2 * r];
            word[p] = pack_e4m3(value[0] * inverse, value[1] * inverse) |
                      (pack_e4m3(value[8] * inverse, value[9] * inverse) << 16);
          }
          transpose_quad(word, lane);
          if (row < tile.num_rows) {
            const uint4 bytes = make_uint4(permute_bytes(word[0], word[1], 0x5410), permute_bytes(word[2], word[3], 0x5410),
                                           permute_bytes(word[0], word[1], 0x7632), permute_bytes(word[2], word[3], 0x7632));
            auto* output = static_cast<uint8_t*>(arguments.output) +
                           (static_cast<int64_t>(tile.first_row + row) * arguments.tiles + tile.tile) * 128 + rank * 64;
            *reinterpret_cast<uint4*>(output + 16 * (lane % 4)) = bytes;
            if (rank == 0 && lane % 4 == 0)
              arguments.output_scale[static_cast<int64_t>(tile.tile) * arguments.scale_stride + tile.first_row + row] = scale;
          }
        }
      }
      if (turn == 1) exchange_phase ^= 1;
      turn ^= 1;
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int first = (group + 2 * i) * kUnitRows + row_in_unit;
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          uint32_t word[2][4];
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            const int j = 4 * m + q;
            const float2 scale = *reinterpret_cast<const float2*>(weight_scale + 8 * j + 2 * (lane % 4));
            word[0][q] = pack_bf16(total[i][4 * j] * scale.x, total[i][4 * j + 1] * scale.y);
            word[1][q] = pack_bf16(total[i][4 * j + 2] * scale.x, total[i][4 * j + 3] * scale.y);
          }
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            transpose_quad(word[r], lane);
            const int row = first + 8 * r;
            if (row < tile.num_rows) {
              auto* output = static_cast<__nv_bfloat16*>(arguments.output) +
                             (static_cast<int64_t>(tile.first_row + row) * arguments.tiles + tile.tile) * 256 + rank * 128;
              *reinterpret_cast<uint4*>(output + 32 * m + 8 * (lane % 4)) =
                  make_uint4(word[r][0], word[r][1], word[r][2], word[r][3]);
            }
          }
        }
      }
    }
  }
}

template <bool UP>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1)
experts_many_kernel(const __grid_constant__ CUtensorMap rows_map, const Arguments arguments) {
  extern __shared__ uint8_t unaligned[];
  Shared& shared = *reinterpret_cast<Shared*>(aligned_to_1024(unaligned));
  const int rank = cluster_rank();
  __shared__ alignas(8) uint8_t table[kTableBytes];
  if (threadIdx.x < 16) reinterpret_cast<uint2*>(table)[threadIdx.x] = decode_table(threadIdx.x);
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(&shared.full[s], kProducers / 32);
      barrier_init(&shared.empty[s], 2 * kConsumers / 32);  // the consumers of both CTAs
    }
    for (int s = 0; s < kRaw; ++s) {
      barrier_init(&shared.raw_full[s], 1);
      barrier_init(&shared.raw_empty[s], kProducers / 32);
    }
    for (int s = 0; s < 2; ++s) barrier_init(&shared.exchanged[s], 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  shared.walk.prepare(arguments);
  cluster_sync();
  const int num_tiles = shared.walk.num_tiles(arguments);
  if (threadIdx.x >= kConsumers) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
    produce(shared, table, rows_map, arguments, num_tiles, rank, threadIdx.x - kConsumers);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");
    consume<UP>(shared, arguments, num_tiles, rank, threadIdx.x / 128, threadIdx.x % 128);
  }
  __syncwarp();
  leave_together();
}

template <bool UP>
int launch(const CUtensorMap& rows_map, const Arguments& arguments, int grid, cudaStream_t stream) {
  auto kernel = experts_many_kernel<UP>;
  constexpr int kSharedBytes = sizeof(Shared) + 1024;
  static_assert(kSharedBytes + kTableBytes <= kSharedLimit, "a stage too many");
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, kThreads, kSharedBytes, stream>>>(rows_map, arguments);
  return cudaGetLastError();
}

}  // namespace

// rows: e4m3 [num_rows, 128 * k_blocks]; row_scales: float32 [k_blocks, scale_stride], scale_stride a multiple of 4.
// Returns a cudaError_t.
extern "C" int experts_many(int up, const void* rows, const float* row_scales, int num_rows, int k_blocks, int scale_stride,
                            const uint8_t* weights, const float* weight_scale, const int* offsets, const float* route_weight,
                            void* output, float* output_scale, int experts, int tiles, float limit, int grid, void* stream) {
  if (experts > kMaxExperts || num_rows <= 0 || k_blocks <= 0) return cudaErrorInvalidValue;
  CUtensorMap rows_map;
  const uint64_t channels = static_cast<uint64_t>(k_blocks) * kStageK;
  const int error = encode_map(&rows_map, CU_TENSOR_MAP_DATA_TYPE_UINT8, rows, channels, num_rows, channels, kStageK, kUnitRows,
                               CU_TENSOR_MAP_SWIZZLE_128B);
  if (error != cudaSuccess) return error;
  const Arguments arguments{weights,      row_scales, weight_scale, offsets,  route_weight, output,
                            output_scale, experts,    tiles,        k_blocks, scale_stride, limit};
  const auto queue = static_cast<cudaStream_t>(stream);
  return up ? launch<true>(rows_map, arguments, grid & ~1, queue) : launch<false>(rows_map, arguments, grid & ~1, queue);
}
