// x W^T of bf16 operands with float32 results on Hopper (sm_90a), whose sums do not depend on the number of rows
// (specification: kernels/wide_linear.py).
//
// A cluster of SPLIT CTAs takes 64 GROUPS outputs of up to TOKENS rows, each CTA a part of the channels: a thread each copies 64
// channels of weights, which no launch writes, and of rows a stage, a warpgroup multiplies 64 of the outputs, weights as the tall
// operand. The parts meet in shared memory and are added in order, each CTA some of the rows. For many rows one CTA sums the same parts
// one after the other (`IN_TURN`). How many parts there are is the caller's function of the weight's shape, so an element's sum has
// one order: results do not depend on the number of rows, nor on TOKENS, GROUPS and IN_TURN.
// Bound by the read of the weight for few rows, by the copies into shared memory for many.

#include "cluster_copy.cuh"
#include "early_launch.cuh"
#include "tensor_map.cuh"

namespace {

using namespace hopper;

constexpr int kDepth = 64, kRowBytes = kDepth * 2;  // channels of a stage; bytes of an operand's row in it
constexpr int kMaxStages = 8;

template <int TOKENS, int GROUPS>
struct Plan {
  static constexpr int kOutputs = 64 * GROUPS, kConsumers = 128 * GROUPS, kThreads = kConsumers + 64;
  static constexpr int kPitch = kOutputs + 4;  // floats of a row of sums; padded so that rows fall into other banks
  static constexpr int kPiece = TOKENS < 128 ? TOKENS : 128, kPieces = TOKENS / kPiece;  // rows of one product
  static constexpr int kWeightBytes = kOutputs * kRowBytes, kStageBytes = kWeightBytes + TOKENS * kRowBytes;
  static constexpr int kResident = TOKENS * GROUPS > 128 ? 1 : 2;  // CTAs a multiprocessor
  static constexpr int kRoom = (kResident == 1 ? 220 : 108) * 1024 / kStageBytes;
  static constexpr int kStages = kRoom < kMaxStages ? kRoom : kMaxStages;
  static constexpr int kSharedBytes = 1024 + kStages * kStageBytes + 2 * kMaxStages * 8;
  static_assert(TOKENS * kPitch * 4 <= kStages * kStageBytes, "the sums take the place of the stages");
};

// d[64 x N] (+)= a[64 x 16] b[N x 16]^T, both in shared memory with contiguous k.
template <int N>
__device__ __forceinline__ void multiply(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate);

#define DEFINE_MULTIPLY(N, REGISTERS, OUTPUTS, A, B, P)                                                               \
  template <>                                                                                                         \
  __device__ __forceinline__ void multiply<N>(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {           \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\n"                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGISTERS "}, " A ", " B                \
                 ", p, 1, 1, 0, 0;\n}\n"                                                                              \
                 : OUTPUTS                                                                                            \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                                \
  }
DEFINE_MULTIPLY(16, REGISTERS_0_7, D8(0), "%8", "%9", "%10")
DEFINE_MULTIPLY(64, REGISTERS_0_31, D32(0), "%32", "%33", "%34")
DEFINE_MULTIPLY(128, REGISTERS_0_63, D64(0), "%64", "%65", "%66")

// Orders shared memory as well, unlike cluster_sync.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

__device__ __forceinline__ float4 load_from(const float* local, int rank) {
  uint32_t address;
  float4 value;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(local)), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

template <int TOKENS, int GROUPS, int SPLIT, bool IN_TURN>
__global__ void __launch_bounds__(Plan<TOKENS, GROUPS>::kThreads, Plan<TOKENS, GROUPS>::kResident)
wide_gemm_kernel(const __grid_constant__ CUtensorMap weights_map, const __grid_constant__ CUtensorMap rows_map, float* y,
                 int num_rows, int outputs, int steps, int turns) {
  using P = Plan<TOKENS, GROUPS>;
  extern __shared__ uint8_t unaligned[];
  uint8_t* stages = aligned_to_1024(unaligned);
  uint64_t* full = reinterpret_cast<uint64_t*>(stages + P::kStages * P::kStageBytes);
  uint64_t* empty = full + kMaxStages;
  const int rank = blockIdx.x, first_output = blockIdx.y * P::kOutputs, first_token = blockIdx.z * TOKENS;
  const int first_step = rank * steps, all_steps = IN_TURN ? turns * steps : steps;

  if (threadIdx.x == P::kConsumers) {
    for (int s = 0; s < P::kStages; ++s) {
      barrier_init(&full[s], 2);  // weights, rows
      barrier_init(&empty[s], P::kConsumers / 32);
    }
    fence_barrier_inits();
  }
  __syncthreads();

  if (threadIdx.x >= P::kConsumers) {
    // Every stage in turn: expects `bytes` at its barrier and lets `copy` ask for them.
    const auto produce = [&](uint32_t bytes, auto copy) {
      for (int step = 0; step < all_steps; ++step) {
        const int stage = step % P::kStages;
        barrier_wait(&empty[stage], (step / P::kStages & 1) ^ 1);
        barrier_expect_bytes(&full[stage], bytes);
        copy(stages + stage * P::kStageBytes, (first_step + step) * kDepth, &full[stage]);
      }
    };
    if (threadIdx.x == P::kConsumers) {  // weights, which no launch writes
      produce(P::kWeightBytes, [&](uint8_t* target, int channel, uint64_t* barrier) {
        tensor_load(target, &weights_map, channel, first_output, barrier);
      });
    } else if (threadIdx.x == P::kConsumers + 32) {
      wait_for_previous_launch();
      let_next_launch_begin();
      produce(TOKENS * kRowBytes, [&](uint8_t* target, int channel, uint64_t* barrier) {
        tensor_load(target + P::kWeightBytes, &rows_map, channel, first_token, barrier);
      });
    }
    if constexpr (SPLIT > 1) {
      __syncwarp();
      cluster_arrive();
      cluster_wait();
      cluster_arrive();
      cluster_wait();
    }
    return;
  }

  // The same number in every lane, as the compiler should know: descriptors are then computed once a warp.
  const int group = GROUPS == 1 ? 0 : __shfl_sync(~0u, threadIdx.x / 128, 0);
  float total[P::kPieces][P::kPiece / 2];
  [[maybe_unused]] float earlier[P::kPieces][P::kPiece / 2];  // of the parts before
  if constexpr (IN_TURN)
#pragma unroll
    for (int piece = 0; piece < P::kPieces; ++piece)
#pragma unroll
      for (int i = 0; i < P::kPiece / 2; ++i) earlier[piece][i] = -0.0f;  // plus anything is that
  [[maybe_unused]] int left = steps;  // of this part
  for (int step = 0; step < all_steps; ++step) {
    const int stage = step % P::kStages;
    barrier_wait(&full[stage], step / P::kStages & 1);
    const uint64_t weights = operand_descriptor(stages + stage * P::kStageBytes + group * 64 * kRowBytes);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k)
#pragma unroll
      for (int piece = 0; piece < P::kPieces; ++piece) {
        const uint8_t* rows = stages + stage * P::kStageBytes + P::kWeightBytes + piece * P::kPiece * kRowBytes;
        multiply<P::kPiece>(total[piece], weights + 2 * k, operand_descriptor(rows) + 2 * k, (IN_TURN ? left < steps : step > 0) || k > 0);
      }
    wgmma_commit();
    wgmma_wait<1>();
    if (step > 0 && threadIdx.x % 32 == 0) barrier_arrive(&empty[(step - 1) % P::kStages]);
    if constexpr (IN_TURN) {
      if (--left == 0) {
        left = steps;
        wgmma_wait<0>();
#pragma unroll
        for (int piece = 0; piece < P::kPieces; ++piece)
#pragma unroll
          for (int i = 0; i < P::kPiece / 2; ++i) earlier[piece][i] += total[piece][i];
      }
    }
  }
  wgmma_wait<0>();
  sync_threads_of(1, P::kConsumers);  // all warps have read the last stages

  // The sums of this part, [row][output].
  float* sums = reinterpret_cast<float*>(stages);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int piece = 0; piece < P::kPieces; ++piece)
#pragma unroll
    for (int i = 0; i < P::kPiece / 2; ++i) {
      const int output = 16 * warp + 8 * (i / 2 % 2) + lane / 4, row = piece * P::kPiece + 8 * (i / 4) + 2 * (lane % 4) + i % 2;
      sums[row * P::kPitch + output] = IN_TURN ? earlier[piece][i] : total[piece][i];
    }
  if constexpr (SPLIT > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    sync_threads_of(1, P::kConsumers);
  }
  constexpr int kRows = TOKENS / SPLIT;  // of this CTA
  for (int item = threadIdx.x; item < kRows * (P::kOutputs / 4); item += P::kConsumers) {
    const int row = rank * kRows + item / (P::kOutputs / 4), output = item % (P::kOutputs / 4) * 4;
    const float* place = &sums[row * P::kPitch + output];
    float4 value;
    if constexpr (SPLIT == 1) {
      value = *reinterpret_cast<const float4*>(place);
    } else {
      float4 parts[SPLIT];
#pragma unroll
      for (int part = 0; part < SPLIT; ++part) parts[part] = load_from(place, part);
      value = parts[0];
#pragma unroll
      for (int part = 1; part < SPLIT; ++part)
        value.x += parts[part].x, value.y += parts[part].y, value.z += parts[part].z, value.w += parts[part].w;
    }
    if (first_token + row >= num_rows) continue;
    float* target = y + static_cast<int64_t>(first_token + row) * outputs + first_output + output;
    if (first_output + output + 4 <= outputs && outputs % 4 == 0) {
      *reinterpret_cast<float4*>(target) = value;
    } else {
      const float values[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (first_output + output + i < outputs) target[i] = values[i];
    }
  }
  if constexpr (SPLIT > 1) {  // others may still read this CTA's sums
    cluster_arrive();
    cluster_wait();
  }
}

template <int TOKENS, int GROUPS, int SPLIT, bool IN_TURN>
int launch(const void* rows, int64_t row_stride, const void* weights, int64_t weight_stride, float* y, int num_rows, int outputs,
           int channels, int parts, cudaStream_t stream) {
  using P = Plan<TOKENS, GROUPS>;
  CUtensorMap weights_map, rows_map;
  int error = encode_map(&weights_map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, weights, channels, outputs, 2 * weight_stride, kDepth,
                         P::kOutputs, CU_TENSOR_MAP_SWIZZLE_128B);
  if (error != cudaSuccess) return error;
  error = encode_map(&rows_map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rows, channels, num_rows, 2 * row_stride, kDepth, TOKENS,
                     CU_TENSOR_MAP_SWIZZLE_128B);
  if (error != cudaSuccess) return error;
  const auto kernel = wide_gemm_kernel<TOKENS, GROUPS, SPLIT, IN_TURN>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, P::kSharedBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2] = {begins_early(), {}};
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {SPLIT, 1, 1};
  cudaLaunchConfig_t config = {};
  // Neighbours share rows: all weights stay in L2, many rows do not.
  config.gridDim = dim3(SPLIT, (outputs + P::kOutputs - 1) / P::kOutputs, (num_rows + TOKENS - 1) / TOKENS);
  config.blockDim = dim3(P::kThreads);
  config.dynamicSmemBytes = P::kSharedBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, weights_map, rows_map, y, num_rows, outputs, channels / kDepth / parts, parts);
}

}  // namespace

// rows bf16 [num_rows, channels] and weights bf16 [outputs, channels], rows of both strides elements apart (multiples of 8), channels
// a multiple of 64 parts; y float32 [num_rows, outputs], contiguous. `parts` (1, 2, 4, 8) decides the order of the sums, `tokens` and
// `groups` (16, 64, 128 or 256 and 1, or 128 or 256 and 2: rows and 64s of outputs of a cluster) and `in_turn` (with 128 and 2) only
// speed. Returns a cudaError_t.
extern "C" int wide_gemm(int tokens, int groups, int in_turn, int parts, const void* rows, int64_t row_stride, const void* weights,
                         int64_t weight_stride, float* y, int num_rows, int outputs, int channels, cudaStream_t stream) {
  if (num_rows <= 0 || outputs <= 0 || channels % (kDepth * parts)) return cudaErrorInvalidValue;
#define LAUNCH(TOKENS, GROUPS, SPLIT, IN_TURN)                                                                                  \
  launch<TOKENS, GROUPS, SPLIT, IN_TURN>(rows, row_stride, weights, weight_stride, y, num_rows, outputs, channels, parts, stream)
  if (in_turn) return tokens == 128 && groups == 2 ? LAUNCH(128, 2, 1, true) : cudaErrorInvalidValue;
#define CASE(TOKENS, GROUPS, SPLIT)                           \
  if (tokens == TOKENS && groups == GROUPS && parts == SPLIT) \
    return LAUNCH(TOKENS, GROUPS, SPLIT, false);
#define CASES(TOKENS, GROUPS) \
  CASE(TOKENS, GROUPS, 1) CASE(TOKENS, GROUPS, 2) CASE(TOKENS, GROUPS, 4) CASE(TOKENS, GROUPS, 8)
  CASES(16, 1)
  CASES(64, 1)
  CASES(128, 1)
  CASES(256, 1)
  CASES(128, 2)
  CASES(256, 2)
  return cudaErrorInvalidValue;
}
