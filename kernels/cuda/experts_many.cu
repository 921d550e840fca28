// Routed experts with MXFP4 weights for many rows an expert, on Hopper (sm_90a): the products of experts_few.cu bit for bit.
//
// A persistent kernel in which every CTA does two things. Three of its warps expand packed weights of the experts to come to e4m3,
// in a ring of a few experts that stays in the L2 cache: each weight once, whatever the number of rows. The others are a grouped
// GEMM on what is in the ring: a thread that copies and two consumer warpgroups of 64 rows x 256 weight rows. CTAs of a cluster
// share rows, of which each copies half for both. A stage is 128 input channels.
//
// Experts with rows have numbers, in their order. Warps take blocks of weights to expand, and clusters tiles to multiply, one after
// the other in that order, and count what is done at the expert's counters: blocks at `ready`, tiles whose weights have been read
// at `done`. A tile waits for its expert's blocks, a block for the tiles of the expert that had its place in the ring. So whatever
// somebody waits for comes before it in that order, and was taken by a CTA that runs or will be: nobody waits in a circle, however
// few CTAs the chip has room for.
// Bound by the FP8 tensor cores.

#include "cluster_copy.cuh"
#include "experts_ring.cuh"
#include "tensor_map.cuh"

namespace {

using namespace experts;

constexpr int kStages = 4;
constexpr int kRowBytes = kRows * kStageK, kRowPart = kRows / kCluster;
constexpr int kStageBytes = kRowBytes + kBlockBytes;
constexpr int kConsumers = 256, kProducers = 128, kThreads = kConsumers + kProducers;
constexpr int kExpanders = 3;       // warps

// The tiles of a cluster, taken one ahead.
struct Agenda {
  float index[2];  // bits of an int, from CTA 0
  uint64_t announced[2], read[2];
};

struct Shared {
  alignas(1024) uint8_t stages[kStages][kStageBytes];
  alignas(16) float scales[kStages][kRows];
  alignas(16) float weight_scale[2][kTileRows];  // for a consumer warpgroup's epilogue
  uint64_t full[kStages], empty[kStages];
  Agenda agenda;
  Order order;
};

// The end of the cluster: nobody leaves while a peer may still arrive at its barriers. Orders memory, unlike cluster_sync.
__device__ __forceinline__ void leave_together() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// A tile of the walk: CTAs of a cluster are neighbours; of an odd number of tiles the last one is computed twice.
__device__ __forceinline__ Tile locate(const Shared& shared, int index, const Arguments& arguments, int rank) {
  Tile tile = shared.order.walk.locate(index, arguments.experts, cluster_tiles(arguments));
  tile.tile = min(kCluster * tile.tile + rank, arguments.tiles - 1);
  return tile;
}

// What everybody in a cluster knows of its next tile. A reader of `turn` counts its tiles.
__device__ __forceinline__ int announced_tile(Shared& shared, int turn) {
  barrier_wait(&shared.agenda.announced[turn & 1], turn >> 1 & 1);
  return __float_as_int(*reinterpret_cast<volatile float*>(&shared.agenda.index[turn & 1]));
}
__device__ __forceinline__ void tile_read(Shared& shared, int turn) { barrier_arrive_at(&shared.agenda.read[turn & 1], 0); }

// Takes tiles for the cluster and copies their stages; one thread.
__device__ __forceinline__ void produce(Shared& shared, const CUtensorMap& rows_map, const Arguments& arguments, const Ring& ring,
                                        int num_tiles, int rank) {
  const int k_blocks = arguments.k_blocks, settled = min(kStages, k_blocks) - 1;
  const int ready = arguments.tiles * k_blocks;
  int stage = 0, ready_number = -1, last_number = -1, last_stage = 0;
  uint32_t phase = 0, last_phase = 0;
  const auto count_last = [&] {  // once all weights of the last tile have been read
    barrier_wait(&shared.full[last_stage], last_phase);
    count_at(ring.done + last_number);
  };
  const auto announce = [&](int turn) {
    barrier_expect_bytes(&shared.agenda.announced[turn & 1], sizeof(float));
    if (rank == 0) {
      if (turn >= 2) barrier_wait(&shared.agenda.read[turn & 1], (turn >> 1 & 1) ^ 1);
      const float index = __int_as_float(atomicAdd(ring.next + 1, 1));
      for (int r = 0; r < kCluster; ++r) store_at(&shared.agenda.index[turn & 1], index, &shared.agenda.announced[turn & 1], r);
    }
  };
  announce(0);
  for (int turn = 0;; ++turn) {
    const int index = announced_tile(shared, turn);
    tile_read(shared, turn);
    if (index >= num_tiles) break;
    announce(turn + 1);
    const Tile tile = locate(shared, index, arguments, rank);
    const int number = shared.order.number[tile.expert];
    if (number != ready_number) {
      if (last_number >= 0) count_last();  // before waiting for others, who may wait for this
      last_number = -1;
      wait_for(ring.ready + number, ready);
      fence_global_for_copies();
      ready_number = number;
    }
    const int row = tile.first_row + rank * kRowPart;
    const uint32_t scale_bytes = 4 * min(kRows, arguments.scale_stride - tile.first_row);
    const float* scales = arguments.row_scales + tile.first_row;
    const uint8_t* weights =
        ring.weights + (static_cast<int64_t>(number % ring.slots) * arguments.tiles + tile.tile) * k_blocks * kBlockBytes;
    for (int k = 0; k < k_blocks; ++k) {
      barrier_wait(&shared.empty[stage], phase ^ 1);
      if (k == settled && last_number >= 0) count_last();  // before the barrier is used again
      uint8_t* target = shared.stages[stage];
      barrier_expect_bytes(&shared.full[stage], kStageBytes + scale_bytes);
      tensor_load_multicast(target + rank * kRowPart * kStageK, &rows_map, k * kStageK, row, &shared.full[stage],
                            (1u << kCluster) - 1);
      bulk_load(target + kRowBytes, weights, kBlockBytes, &shared.full[stage]);
      bulk_load(shared.scales[stage], scales, scale_bytes, &shared.full[stage]);
      weights += kBlockBytes;
      scales += arguments.scale_stride;
      if (k + 1 == k_blocks) last_stage = stage, last_phase = phase;
      if (++stage == kStages) stage = 0, phase ^= 1;
    }
    last_number = number;
  }
  if (last_number >= 0) count_last();
}

// Every other eight columns of the accumulator are gates, those after them the linear parts of the same eight columns of h, which
// take the gates' place. The rows' maxima over these 64 columns go to amax.
__device__ __forceinline__ void apply_gate(float (&total)[64], const float* weight_scale, float limit, const float (&route)[2],
                                           float (&amax)[2], int lane) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int column = 16 * j + 2 * (lane % 4);
    const float2 gate_scale = *reinterpret_cast<const float2*>(weight_scale + column);
    const float2 linear_scale = *reinterpret_cast<const float2*>(weight_scale + column + 8);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float* gate = &total[8 * j + 2 * i];
      const float* linear = gate + 4;
      const float2 value =
          gated(make_float2(gate[0] * gate_scale.x, gate[1] * gate_scale.y),
                make_float2(linear[0] * linear_scale.x, linear[1] * linear_scale.y), limit, make_float2(route[i], route[i]));
      gate[0] = value.x, gate[1] = value.y;
      amax[i] = fmaxf(amax[i], fmaxf(fabsf(value.x), fabsf(value.y)));
    }
  }
}

__device__ __forceinline__ void finish_up(float (&total)[2][64], const Arguments& arguments, const Tile& tile,
                                          const float* weight_scale, const float (&route)[2], int first, int lane) {
  float amax[2] = {0.0f, 0.0f};
#pragma unroll
  for (int piece = 0; piece < 2; ++piece) apply_gate(total[piece], weight_scale + 128 * piece, arguments.limit, route, amax, lane);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    amax[i] = fmaxf(amax[i], __shfl_xor_sync(0xFFFFFFFFu, amax[i], 1));
    amax[i] = fmaxf(amax[i], __shfl_xor_sync(0xFFFFFFFFu, amax[i], 2));
    const int row = first + 8 * i;
    const float scale = power_of_two_scale(amax[i]), inverse = inverse_of(scale);
    if (row < tile.num_rows && lane % 4 == 0)
      arguments.output_scale[static_cast<int64_t>(tile.tile) * arguments.scale_stride + tile.first_row + row] = scale;
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) {
      uint32_t word[4];  // of column blocks 2 p and 2 p + 1
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const float* value = &total[piece][16 * p + 2 * i];
        word[p] = pack_e4m3(value[0] * inverse, value[1] * inverse) | (pack_e4m3(value[8] * inverse, value[9] * inverse) << 16);
      }
      transpose_quad(word, lane);
      if (row < tile.num_rows) {
        const uint4 bytes = make_uint4(permute_bytes(word[0], word[1], 0x5410), permute_bytes(word[2], word[3], 0x5410),
                                       permute_bytes(word[0], word[1], 0x7632), permute_bytes(word[2], word[3], 0x7632));
        auto* output = static_cast<uint8_t*>(arguments.output) +
                       (static_cast<int64_t>(tile.first_row + row) * arguments.tiles + tile.tile) * 128 + piece * 64;
        *reinterpret_cast<uint4*>(output + 16 * (lane % 4)) = bytes;
      }
    }
  }
}

__device__ __forceinline__ void finish_down(const float (&total)[2][64], const Arguments& arguments, const Tile& tile,
                                            const float* weight_scale, int first, int lane) {
#pragma unroll
  for (int piece = 0; piece < 2; ++piece) {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      uint32_t word[2][4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int j = 4 * m + q;
        const float2 scale = *reinterpret_cast<const float2*>(weight_scale + 128 * piece + 8 * j + 2 * (lane % 4));
        word[0][q] = pack_bf16(total[piece][4 * j] * scale.x, total[piece][4 * j + 1] * scale.y);
        word[1][q] = pack_bf16(total[piece][4 * j + 2] * scale.x, total[piece][4 * j + 3] * scale.y);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        transpose_quad(word[i], lane);
        const int row = first + 8 * i;
        if (row < tile.num_rows) {
          auto* output = static_cast<__nv_bfloat16*>(arguments.output) +
                         (static_cast<int64_t>(tile.first_row + row) * arguments.tiles + tile.tile) * 256 + piece * 128;
          *reinterpret_cast<uint4*>(output + 32 * m + 8 * (lane % 4)) = make_uint4(word[i][0], word[i][1], word[i][2], word[i][3]);
        }
      }
    }
  }
}

template <bool UP>
__device__ __forceinline__ void consume(Shared& shared, const Arguments& arguments, int num_tiles, int rank, int group,
                                        int thread) {
  const int k_blocks = arguments.k_blocks, lane = thread % 32;
  const int first = 64 * group + 16 * (thread / 32) + lane / 4;
  int stage = 0;
  uint32_t phase = 0;
  const uint32_t first_place = descriptor_place(shared.stages[0]);
  uint32_t place = first_place;
  int index;
  const auto next_tile = [&](int turn) {
    index = announced_tile(shared, turn);
    __syncwarp();
    if (lane == 0) tile_read(shared, turn);
    index = uniform(index);
  };
  next_tile(0);
  for (int turn = 1; __all_sync(0xFFFFFFFFu, index < num_tiles); next_tile(turn++)) {
    const Tile tile = locate(shared, index, arguments, rank).in_uniform();
    // What the end needs is asked for now: a thread's share of the weight rows' scales, to be handed round through shared memory.
    const float2 my_scale = *reinterpret_cast<const float2*>(
        arguments.weight_scale + (static_cast<int64_t>(tile.expert) * arguments.tiles + tile.tile) * kTileRows + 2 * thread);
    float route[2] = {0.0f, 0.0f};
    if constexpr (UP) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (first + 8 * i < tile.num_rows) route[i] = arguments.route_weight[tile.first_row + first + 8 * i];
    }
    float total[2][64];
#pragma unroll
    for (int i = 0; i < 64; ++i) total[0][i] = total[1][i] = 0.0f;
    const bool busy = 64 * group < tile.num_rows;
    for (int k = 0; k < k_blocks; ++k) {
      barrier_wait(&shared.full[stage], phase);
      if (busy) {
        const float upper = shared.scales[stage][first], lower = shared.scales[stage][first + 8];
#pragma unroll
        for (int piece = 0; piece < 2; ++piece) {
          float partial[64];
          const uint32_t rows = place + group * (64 * kStageK / 16), weights = place + (kRowBytes + piece * 128 * kStageK) / 16;
          wgmma_fence();
#pragma unroll
          for (int step = 0; step < 4; ++step)
            wgmma_e4m3<128>(partial, descriptor_at(rows + 2 * step), descriptor_at(weights + 2 * step), step > 0);
          wgmma_commit();
          wgmma_wait<0>();
          if (piece == 1) {
            __syncwarp();
            if (lane < kCluster) barrier_arrive_at(&shared.empty[stage], lane);
          }
#pragma unroll
          for (int j = 0; j < 64; j += 4) {
            total[piece][j] += partial[j] * upper;
            total[piece][j + 1] += partial[j + 1] * upper;
            total[piece][j + 2] += partial[j + 2] * lower;
            total[piece][j + 3] += partial[j + 3] * lower;
          }
        }
      } else {
        __syncwarp();
        if (lane < kCluster) barrier_arrive_at(&shared.empty[stage], lane);
      }
      place += kStageBytes / 16;
      if (++stage == kStages) stage = 0, phase ^= 1, place = first_place;
    }
    sync_threads_of(1 + group, 128);  // the previous tile's have been read
    *reinterpret_cast<float2*>(&shared.weight_scale[group][2 * thread]) = my_scale;
    sync_threads_of(1 + group, 128);
    if (busy) {
      if constexpr (UP)
        finish_up(total, arguments, tile, shared.weight_scale[group], route, first, lane);
      else
        finish_down(total, arguments, tile, shared.weight_scale[group], first, lane);
    }
  }
}

template <bool UP>
__global__ void __launch_bounds__(kThreads, 1)
experts_many_kernel(const __grid_constant__ CUtensorMap rows_map, const Arguments arguments, const Ring ring) {
  extern __shared__ uint8_t unaligned[];
  Shared& shared = *reinterpret_cast<Shared*>(aligned_to_1024(unaligned));
  const int rank = cluster_rank();
  __shared__ alignas(8) uint8_t table[kTableBytes];
  if (threadIdx.x < 16) reinterpret_cast<uint2*>(table)[threadIdx.x] = decode_table(threadIdx.x);
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(&shared.full[s], 1);
      barrier_init(&shared.empty[s], kCluster * kConsumers / 32);
    }
    for (int s = 0; s < 2; ++s) {
      barrier_init(&shared.agenda.announced[s], 1);
      barrier_init(&shared.agenda.read[s], kCluster * (kConsumers / 32 + 1));
    }
    fence_barrier_inits();
  }
  shared.order.prepare(arguments);
  cluster_sync();
  const int num_tiles = uniform(shared.order.walk.first_block[arguments.experts] * cluster_tiles(arguments));
  if (threadIdx.x >= kConsumers) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
    const int thread = threadIdx.x - kConsumers, warp = uniform(thread / 32);
    if (warp < kExpanders) {
      expand(shared.order, table, arguments, ring, thread % 32);
    } else if (thread % 32 == 0) {
      produce(shared, rows_map, arguments, ring, num_tiles, rank);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
    const int group = uniform(threadIdx.x / 128);
    consume<UP>(shared, arguments, num_tiles, rank, group, threadIdx.x % 128);
  }
  __syncwarp();
  leave_together();
}

template <bool UP>
int launch(const CUtensorMap& rows_map, const Arguments& arguments, const Ring& ring, cudaStream_t stream) {
  auto kernel = experts_many_kernel<UP>;
  constexpr int kSharedBytes = sizeof(Shared) + 1024;
  static_assert(kSharedBytes + kTableBytes <= kSharedLimit, "a stage too many");
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(kCluster);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  static int resident = 0;  // clusters that fit on the chip at once; the same on every GPU of a process
  if (resident == 0) {
    int clusters = 0, error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (error != cudaSuccess) return error;
    if (clusters == 0) return cudaErrorInvalidConfiguration;
    resident = clusters;
  }
  config.gridDim = dim3(kCluster * resident);
  return cudaLaunchKernelEx(&config, kernel, rows_map, arguments, ring);
}

}  // namespace

// rows: e4m3 [num_rows, 128 * k_blocks]; row_scales: float32 [k_blocks, scale_stride], scale_stride a multiple of 4. ring_weights:
// scratch of `slots` expanded experts, tiles * k_blocks * 32,768 bytes each; counters: int [2 + 2 * experts], zero. Returns a
// cudaError_t.
extern "C" int experts_many(int up, const void* rows, const float* row_scales, int num_rows, int k_blocks, int scale_stride,
                            const uint8_t* weights, const float* weight_scale, const int* offsets, const float* route_weight,
                            void* output, float* output_scale, int experts, int tiles, float limit, uint8_t* ring_weights,
                            int* counters, int slots, void* stream) {
  if (experts > kMaxExperts || num_rows <= 0 || k_blocks <= 0 || slots <= 0) return cudaErrorInvalidValue;
  CUtensorMap rows_map;
  const uint64_t channels = static_cast<uint64_t>(k_blocks) * kStageK;
  const int error = encode_map(&rows_map, CU_TENSOR_MAP_DATA_TYPE_UINT8, rows, channels, num_rows, channels, kStageK, kRowPart,
                               CU_TENSOR_MAP_SWIZZLE_128B);
  if (error != cudaSuccess) return error;
  const Arguments arguments{weights,      row_scales, weight_scale, offsets,  route_weight, output,
                            output_scale, experts,    tiles,        k_blocks, scale_stride, limit};
  const Ring ring{ring_weights, counters, counters + 2, counters + 2 + experts, slots};
  const auto queue = static_cast<cudaStream_t>(stream);
  return up ? launch<true>(rows_map, arguments, ring, queue) : launch<false>(rows_map, arguments, ring, queue);
}
