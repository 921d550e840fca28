// The seam between two sublayers in one launch: the output goes back to the four streams, and their mix becomes the next
// normed input, in bf16 and in e4m3 (specification: kernels/hyper_connection.py). sm_90a.
//
// A cluster of eight CTAs takes 8 NT tokens, each CTA an eighth of the channels of all four streams, which stay in shared
// memory from the first read to the last use: device memory sees every operand once. The product with the 24 rows of fn runs
// on the tensor cores, fn as two bf16 halves whose products add up in one thread. A thread owns 8 channels of one token in
// exactly the places where the product wants them, so only the sums of a token cross threads: over the warps of a CTA, over the
// CTAs through distributed shared memory, always in the same order. A token's results do not depend on the other tokens.
// Sinkhorn, which only the end of the next sublayer needs, runs while the cluster agrees on the norm.
// Bound by memory: 20 bytes a channel and token. fn is read from L2 once per cluster.

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace {

constexpr int kRanks = 8, kWarps = 4, kThreads = 32 * kWarps;
constexpr int kStreams = 4, kMixes = 24, kSquare = kMixes;  // column behind the mixes: the square sum
constexpr int kColumns = 28;                                // of a row of sums; padded so that rows fall into other banks
constexpr int kCoefficients = 20;                           // of a token: post [4], comb [4][4]
constexpr int kBlocks = 4;                                  // of 32 channels, in a group of 128

struct Arguments {
  const __nv_bfloat16 *output, *streams;
  const float *post, *comb;
  const uint4* fn;
  const float *scale, *base, *norm;
  __nv_bfloat16 *new_streams, *inputs;
  uint8_t* codes;  // may be null: no e4m3 rows wanted
  float *code_scales, *new_post, *new_comb;
  int64_t scale_stride;
  int num_tokens, hidden, iterations;
  float hc_eps, norm_eps;
};

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void copy_async(void* target, const void* source, bool live) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source), "r"(live ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `pending` groups of this thread are under way.
__device__ __forceinline__ void wait_copies(int pending) {
  switch (pending) {
    case 0: asm volatile("cp.async.wait_group 0;" ::: "memory"); break;
    case 1: asm volatile("cp.async.wait_group 1;" ::: "memory"); break;
    case 2: asm volatile("cp.async.wait_group 2;" ::: "memory"); break;
    case 3: asm volatile("cp.async.wait_group 3;" ::: "memory"); break;
    case 4: asm volatile("cp.async.wait_group 4;" ::: "memory"); break;
    case 5: asm volatile("cp.async.wait_group 5;" ::: "memory"); break;
    case 6: asm volatile("cp.async.wait_group 6;" ::: "memory"); break;
    default: asm volatile("cp.async.wait_group 7;" ::: "memory"); break;
  }
}

__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

__device__ __forceinline__ float load_from_rank(const float* local, int rank) {
  uint32_t address;
  float value;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(local)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ float sum_over_ranks(const float* local) {
  float parts[kRanks];
#pragma unroll
  for (int rank = 0; rank < kRanks; ++rank) parts[rank] = load_from_rank(local, rank);
  float total = parts[0];
#pragma unroll
  for (int rank = 1; rank < kRanks; ++rank) total += parts[rank];
  return total;
}

// d[16 x 8] += a[16 x 16] b[16 x 8].
__device__ __forceinline__ void multiply(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }

__device__ __forceinline__ uint32_t pack(float a, float b) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-fmaxf(x, -87.0f))); }

__device__ __forceinline__ float sum_of_quad(float value) {
  value += __shfl_xor_sync(~0u, value, 1);
  return value + __shfl_xor_sync(~0u, value, 2);
}

__device__ __forceinline__ void normalise(float& a, float& b, float& c, float& d, float eps) {
  const float inverse = __fdividef(1.0f, a + b + c + d + eps);
  a *= inverse, b *= inverse, c *= inverse, d *= inverse;
}

// Softmax of the rows of logits m [4 from][4 to], then columns and rows normalised in turn, beginning and ending with columns.
__device__ __forceinline__ void sinkhorn(float (&m)[16], int iterations, float eps) {
#pragma unroll
  for (int row = 0; row < 16; row += 4) {
    const float top = fmaxf(fmaxf(m[row], m[row + 1]), fmaxf(m[row + 2], m[row + 3]));
    float sum = 0.0f;
#pragma unroll
    for (int column = 0; column < 4; ++column) sum += m[row + column] = __expf(m[row + column] - top);
    const float inverse = __fdividef(1.0f, sum);
#pragma unroll
    for (int column = 0; column < 4; ++column) m[row + column] = m[row + column] * inverse + eps;
  }
  for (int step = 0; step < iterations; ++step) {
    if (step) {
#pragma unroll
      for (int row = 0; row < 16; row += 4) normalise(m[row], m[row + 1], m[row + 2], m[row + 3], eps);
    }
#pragma unroll
    for (int column = 0; column < 4; ++column) normalise(m[column], m[column + 4], m[column + 8], m[column + 12], eps);
  }
}

// Shared memory behind the slots of the streams.
template <int NT>
struct Sums {
  float coefficients[8 * NT][kCoefficients];
  float of_warp[kWarps][8 * NT][kColumns];
  float of_rank[8 * NT][kColumns];  // read by the whole cluster
  float square_of_warp[kWarps][8 * NT];
  float square_of_rank[8 * NT];  // read by the whole cluster
  float pre[8 * NT][kStreams];
  float inverse[8 * NT];
  float mixes[NT][kColumns];  // of the tokens whose Sinkhorn is this CTA's
};

// The post step for 8 channels of a token: x [4 streams] -> new streams, in place.
__device__ __forceinline__ void write_back(uint4 (&x)[kStreams], const uint4& output, const float* coefficients) {
  float c[kCoefficients];
#pragma unroll
  for (int i = 0; i < kCoefficients; i += 4)
    *reinterpret_cast<float4*>(&c[i]) = *reinterpret_cast<const float4*>(&coefficients[i]);
  uint32_t in[kStreams][4], out[kStreams][4];
#pragma unroll
  for (int s = 0; s < kStreams; ++s) in[s][0] = x[s].x, in[s][1] = x[s].y, in[s][2] = x[s].z, in[s][3] = x[s].w;
  const uint32_t o[4] = {output.x, output.y, output.z, output.w};
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
#pragma unroll
    for (int to = 0; to < kStreams; ++to) {
      float a = c[to] * low(o[pair]), b = c[to] * high(o[pair]);
#pragma unroll
      for (int from = 0; from < kStreams; ++from) {
        const float weight = c[4 + 4 * from + to];
        a += weight * low(in[from][pair]);
        b += weight * high(in[from][pair]);
      }
      out[to][pair] = pack(a, b);
    }
  }
#pragma unroll
  for (int s = 0; s < kStreams; ++s) x[s] = make_uint4(out[s][0], out[s][1], out[s][2], out[s][3]);
}

__device__ __forceinline__ float square_sum(const uint4& x) {
  float a = low(x.x) * low(x.x), b = high(x.x) * high(x.x);
  a += low(x.y) * low(x.y), b += high(x.y) * high(x.y);
  a += low(x.z) * low(x.z), b += high(x.z) * high(x.z);
  a += low(x.w) * low(x.w), b += high(x.w) * high(x.w);
  return a + b;
}

__device__ __forceinline__ void add_weighted(float (&total)[8], float weight, const uint4& x) {
  const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    total[2 * pair] += weight * low(pairs[pair]);
    total[2 * pair + 1] += weight * high(pairs[pair]);
  }
}

// WRITE: there is an output to write back; without it the streams are only read.
template <int NT, bool WRITE>
__global__ void __cluster_dims__(kRanks, 1, 1) __launch_bounds__(kThreads, NT <= 3 ? 2 : 1) hyper_seam(const Arguments a) {
  extern __shared__ __align__(16) uint8_t shared[];
  Sums<NT>& sums = *reinterpret_cast<Sums<NT>*>(shared);
  uint4* const slots = reinterpret_cast<uint4*>(shared + (sizeof(Sums<NT>) + 15) / 16 * 16) + threadIdx.x;
  const int rank = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
  const int first_token = blockIdx.y * 8 * NT;
  const int rank_channels = a.hidden / kRanks, groups = rank_channels / 128;
  const int my_groups = warp < groups ? (groups - warp + kWarps - 1) / kWarps : 0, my_blocks = kBlocks * my_groups;
  // Channel of this thread's first element in its block number b.
  const auto channel_of = [&](int b) {
    return rank * rank_channels + (warp + b / kBlocks * kWarps) * 128 + b % kBlocks * 32 + quad * 8;
  };
  const auto slot = [&](int b, int tile, int stream) -> uint4& { return slots[((b * NT + tile) * kStreams + stream) * kThreads]; };
  const auto token_of = [&](int tile) { return static_cast<int64_t>(first_token + 8 * tile + row); };
  const int64_t last = a.num_tokens - 1;

  if (WRITE) {
    for (int i = threadIdx.x; i < 8 * NT * 5; i += kThreads) {
      const int64_t token = min(static_cast<int64_t>(first_token + i / 5), last);
      const float* source = i % 5 ? a.comb + token * 16 + (i % 5 - 1) * 4 : a.post + token * 4;
      copy_async(&sums.coefficients[i / 5][i % 5 * 4], source, true);
    }
    commit_copies();
  }
  for (int b = 0; b < my_blocks; ++b) {
    const int channel = channel_of(b);
#pragma unroll
    for (int tile = 0; tile < NT; ++tile) {
      const bool live = token_of(tile) <= last;
      const __nv_bfloat16* source = a.streams + (live ? token_of(tile) : last) * kStreams * a.hidden + channel;
#pragma unroll
      for (int s = 0; s < kStreams; ++s) copy_async(&slot(b, tile, s), source + static_cast<int64_t>(s) * a.hidden, live);
      if (WRITE && b > 0 && quad % 2 == 0)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(a.output + (live ? token_of(tile) : last) * a.hidden + channel));
    }
    commit_copies();
  }
  uint4 output[NT], fragments[2][6];
  const auto load_output = [&](int b) {
    const int channel = channel_of(b);
#pragma unroll
    for (int tile = 0; tile < NT; ++tile)
      output[tile] = __ldg(reinterpret_cast<const uint4*>(a.output + min(token_of(tile), last) * a.hidden + channel));
  };
  const auto load_fragments = [&](int buffer, int b, int s) {
    const uint4* source = a.fn + ((channel_of(b) / 32) * kStreams + s) * (6 * 32) + lane;
#pragma unroll
    for (int i = 0; i < 6; ++i) fragments[buffer][i] = __ldg(source + 32 * i);
  };
  if (my_blocks) {
    if (WRITE) load_output(0);
    load_fragments(0, 0, 0);
  }
  if (WRITE) {
    wait_copies(min(my_blocks, 7));
    __syncthreads();  // everybody's coefficients are there
  }

  // The new streams, and this thread's part of the product.
  float products[3][NT][4] = {}, squares[NT] = {};
  for (int b = 0; b < my_blocks; ++b) {
    wait_copies(my_blocks - 1 - b);
    const int channel = channel_of(b);
#pragma unroll
    for (int tile = 0; tile < NT; ++tile) {
      uint4 x[kStreams];
#pragma unroll
      for (int s = 0; s < kStreams; ++s) x[s] = slot(b, tile, s);
      if (WRITE) {
        write_back(x, output[tile], sums.coefficients[8 * tile + row]);
        const bool live = token_of(tile) <= last;
#pragma unroll
        for (int s = 0; s < kStreams; ++s) {
          slot(b, tile, s) = x[s];
          if (live)
            *reinterpret_cast<uint4*>(a.new_streams + (token_of(tile) * kStreams + s) * a.hidden + channel) = x[s];
        }
      }
      squares[tile] += (square_sum(x[0]) + square_sum(x[1])) + (square_sum(x[2]) + square_sum(x[3]));
    }
    if (WRITE && b + 1 < my_blocks) load_output(b + 1);
#pragma unroll
    for (int s = 0; s < kStreams; ++s) {
      if (s + 1 < kStreams)
        load_fragments((s + 1) % 2, b, s + 1);
      else if (b + 1 < my_blocks)
        load_fragments(0, b + 1, 0);
#pragma unroll
      for (int tile = 0; tile < NT; ++tile) {
        const uint4 x = slot(b, tile, s);
#pragma unroll
        for (int t = 0; t < 3; ++t) {
          multiply(products[t][tile], fragments[s % 2][2 * t], x.x, x.y);
          multiply(products[t][tile], fragments[s % 2][2 * t + 1], x.z, x.w);
        }
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < NT; ++tile) {
    float(*target)[kColumns] = &sums.of_warp[warp][8 * tile];
#pragma unroll
    for (int t = 0; t < 3; ++t) {
      target[2 * quad][8 * t + row] = products[t][tile][0] + products[t][tile][2];
      target[2 * quad + 1][8 * t + row] = products[t][tile][1] + products[t][tile][3];
    }
    const float square = sum_of_quad(squares[tile]);
    if (quad == 0) target[row][kSquare] = square;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 8 * NT * (kMixes + 1); i += kThreads) {
    const int token = i / (kMixes + 1), column = i % (kMixes + 1);
    float total = sums.of_warp[0][token][column];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) total += sums.of_warp[w][token][column];
    sums.of_rank[token][column] = total;
  }
  cluster_arrive();
  cluster_wait();

  // The weights of the input.
  const float features = static_cast<float>(kStreams) * a.hidden;
  if (threadIdx.x < 8 * NT * kStreams) {
    const int token = threadIdx.x / kStreams, s = threadIdx.x % kStreams;
    const float factor = rsqrtf(sum_over_ranks(&sums.of_rank[token][kSquare]) / features + a.norm_eps);
    const float value = sum_over_ranks(&sums.of_rank[token][s]) * factor * __ldg(a.scale + s) + __ldg(a.base + s);
    sums.pre[token][s] = sigmoid(value) + a.hc_eps;
  }
  __syncthreads();

  // The mix of the streams, which takes the place of the first, and its square sum.
#pragma unroll
  for (int tile = 0; tile < NT; ++tile) squares[tile] = 0.0f;
  for (int b = 0; b < my_blocks; ++b) {
#pragma unroll
    for (int tile = 0; tile < NT; ++tile) {
      const float4 weights = *reinterpret_cast<const float4*>(sums.pre[8 * tile + row]);
      float total[8] = {};
      add_weighted(total, weights.x, slot(b, tile, 0));
      add_weighted(total, weights.y, slot(b, tile, 1));
      add_weighted(total, weights.z, slot(b, tile, 2));
      add_weighted(total, weights.w, slot(b, tile, 3));
      const uint4 mixed = make_uint4(pack(total[0], total[1]), pack(total[2], total[3]), pack(total[4], total[5]),
                                     pack(total[6], total[7]));
      slot(b, tile, 0) = mixed;
      squares[tile] += square_sum(mixed);
    }
  }
#pragma unroll
  for (int tile = 0; tile < NT; ++tile) {
    const float square = sum_of_quad(squares[tile]);
    if (quad == 0) sums.square_of_warp[warp][8 * tile + row] = square;
  }
  __syncthreads();
  if (threadIdx.x < 8 * NT) {
    float total = sums.square_of_warp[0][threadIdx.x];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) total += sums.square_of_warp[w][threadIdx.x];
    sums.square_of_rank[threadIdx.x] = total;
  }
  cluster_arrive();

  // Row `rank` of every tile is this CTA's to mix.
  if (warp == kWarps - 1) {
    if (lane <= kSquare) {
#pragma unroll
      for (int tile = 0; tile < NT; ++tile) sums.mixes[tile][lane] = sum_over_ranks(&sums.of_rank[8 * tile + rank][lane]);
    }
    __syncwarp();
    const int64_t token = first_token + 8 * lane + rank;
    if (lane < NT && token <= last) {
      const float* mixes = sums.mixes[lane];
      const float factor = rsqrtf(mixes[kSquare] / features + a.norm_eps);
      float post[4], comb[16];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        post[i] = 2.0f * sigmoid(mixes[4 + i] * factor * __ldg(a.scale + 4 + i) + __ldg(a.base + 4 + i));
#pragma unroll
      for (int i = 0; i < 16; ++i) comb[i] = mixes[8 + i] * factor * __ldg(a.scale + 8 + i) + __ldg(a.base + 8 + i);
      sinkhorn(comb, a.iterations, a.hc_eps);
      *reinterpret_cast<float4*>(a.new_post + token * 4) = *reinterpret_cast<const float4*>(post);
#pragma unroll
      for (int i = 0; i < 16; i += 4)
        *reinterpret_cast<float4*>(a.new_comb + token * 16 + i) = *reinterpret_cast<const float4*>(&comb[i]);
    }
    __syncwarp();
  }
  cluster_wait();
  if (threadIdx.x < 8 * NT)
    sums.inverse[threadIdx.x] = rsqrtf(sum_over_ranks(&sums.square_of_rank[threadIdx.x]) / a.hidden + a.norm_eps);
  __syncthreads();
  cluster_arrive();  // this CTA has read all it needs of others

  for (int g = 0; g < my_groups; ++g) {
#pragma unroll
    for (int tile = 0; tile < NT; ++tile) {
      const int64_t token = token_of(tile);
      const bool live = token <= last;
      const float inverse = sums.inverse[8 * tile + row];
      uint4 normed[kBlocks];
      float top = 0.0f;
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        const int b = g * kBlocks + i, channel = channel_of(b);
        const uint4 mixed = slot(b, tile, 0);
        const float4 w0 = __ldg(reinterpret_cast<const float4*>(a.norm + channel));
        const float4 w1 = __ldg(reinterpret_cast<const float4*>(a.norm + channel) + 1);
        normed[i] = make_uint4(pack(low(mixed.x) * inverse * w0.x, high(mixed.x) * inverse * w0.y),
                               pack(low(mixed.y) * inverse * w0.z, high(mixed.y) * inverse * w0.w),
                               pack(low(mixed.z) * inverse * w1.x, high(mixed.z) * inverse * w1.y),
                               pack(low(mixed.w) * inverse * w1.z, high(mixed.w) * inverse * w1.w));
        if (live) *reinterpret_cast<uint4*>(a.inputs + token * a.hidden + channel) = normed[i];
        const uint32_t pairs[4] = {normed[i].x, normed[i].y, normed[i].z, normed[i].w};
#pragma unroll
        for (int p = 0; p < 4; ++p) top = fmaxf(top, fmaxf(fabsf(low(pairs[p])), fabsf(high(pairs[p]))));
      }
      if (a.codes == nullptr) continue;
      // A scale per 128 channels: the smallest power of two that brings the largest value to at most 448.
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const uint32_t exponent = (__float_as_uint(fmaxf(top, 1e-4f) * (1.0f / 448.0f)) + 0x7FFFFFu) & 0x7F800000u;
      const float shrink = 1.0f / __uint_as_float(exponent);
      if (!live) continue;
      if (quad == 0)
        a.code_scales[(channel_of(g * kBlocks) / 128) * a.scale_stride + token] = __uint_as_float(exponent);
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        const uint32_t pairs[4] = {normed[i].x, normed[i].y, normed[i].z, normed[i].w};
        uint32_t codes[4];
#pragma unroll
        for (int p = 0; p < 4; ++p)
          codes[p] = __nv_cvt_float2_to_fp8x2(make_float2(low(pairs[p]) * shrink, high(pairs[p]) * shrink), __NV_SATFINITE,
                                              __NV_E4M3);
        *reinterpret_cast<uint2*>(a.codes + token * a.hidden + channel_of(g * kBlocks + i)) =
            make_uint2(codes[0] | codes[1] << 16, codes[2] | codes[3] << 16);
      }
    }
  }
  cluster_wait();
}

template <int NT, bool WRITE>
cudaError_t launch(const Arguments& arguments, cudaStream_t stream) {
  const int groups = (arguments.hidden / kRanks / 128 + kWarps - 1) / kWarps;  // of a warp
  const size_t slots = static_cast<size_t>(groups) * kBlocks * NT * kStreams * kThreads * sizeof(uint4);
  const size_t bytes = (sizeof(Sums<NT>) + 15) / 16 * 16 + slots;
  const cudaError_t error =
      cudaFuncSetAttribute(hyper_seam<NT, WRITE>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  const dim3 grid(kRanks, (arguments.num_tokens + 8 * NT - 1) / (8 * NT));
  hyper_seam<NT, WRITE><<<grid, kThreads, bytes, stream>>>(arguments);
  return cudaGetLastError();
}

template <bool WRITE>
cudaError_t dispatch(int tiles, const Arguments& arguments, cudaStream_t stream) {
  switch (tiles) {
    case 1: return launch<1, WRITE>(arguments, stream);
    case 2: return launch<2, WRITE>(arguments, stream);
    case 3: return launch<3, WRITE>(arguments, stream);
    case 4: return launch<4, WRITE>(arguments, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

// `tiles`: of eight tokens, a cluster takes 1 to 4; changes speed only. A null output only reads the streams. hidden is a
// multiple of 1024 and at most 8192.
extern "C" int hyper_seam(const void* output, const void* streams, const void* post, const void* comb, const void* fn,
                          const void* scale, const void* base, const void* norm, void* new_streams, void* inputs, void* codes,
                          void* code_scales, void* new_post, void* new_comb, int64_t scale_stride, int num_tokens, int hidden,
                          int iterations, float hc_eps, float norm_eps, int tiles, cudaStream_t stream) {
  const Arguments arguments{static_cast<const __nv_bfloat16*>(output),
                            static_cast<const __nv_bfloat16*>(streams),
                            static_cast<const float*>(post),
                            static_cast<const float*>(comb),
                            static_cast<const uint4*>(fn),
                            static_cast<const float*>(scale),
                            static_cast<const float*>(base),
                            static_cast<const float*>(norm),
                            static_cast<__nv_bfloat16*>(new_streams),
                            static_cast<__nv_bfloat16*>(inputs),
                            static_cast<uint8_t*>(codes),
                            static_cast<float*>(code_scales),
                            static_cast<float*>(new_post),
                            static_cast<float*>(new_comb),
                            scale_stride,
                            num_tokens,
                            hidden,
                            iterations,
                            hc_eps,
                            norm_eps};
  if (num_tokens == 0) return cudaSuccess;
  if (hidden % 1024 || hidden > 8192) return cudaErrorInvalidValue;
  return output ? dispatch<true>(tiles, arguments, stream) : dispatch<false>(tiles, arguments, stream);
}
