// The seam between two sublayers in one launch: the output goes back to the four streams, and their mix becomes the next
// normed input, in bf16 and in e4m3 (specification: kernels/hyper_connection.py). sm_90a.
//
// A cluster of eight CTAs takes 8 NT tokens, each CTA an eighth of the channels of all four streams, which stay in shared
// memory from the first read to the last use: device memory sees every operand once. The product with the 24 rows of fn runs
// on the tensor cores, fn as two bf16 halves whose products add up in one thread; so do the square sums. A thread owns 8
// channels of one token in exactly the places where the products want them, so only the sums of a token cross threads: over
// the warps of a CTA, over the CTAs through distributed shared memory, always in the same order. A token's results do not
// depend on the other tokens. How the sublayer's output will go back leaves as logits; the next seam runs Sinkhorn on them
// while its streams are on their way from memory.
// Bound by memory: 20 bytes a channel and token. fn is read from L2 once per cluster.

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace {

constexpr int kRanks = 8, kWarps = 8, kThreads = 32 * kWarps;
constexpr int kStreams = 4, kMixes = 24, kSquare = kMixes;  // column behind the mixes: the square sum
constexpr int kLogits = kMixes - kStreams;                 // of a token: post [4], comb [4 from][4 to]
constexpr int kColumns = 28;                                // of a row of sums; padded so that rows fall into other banks
constexpr int kCoefficients = 36;                           // of a token: for each new stream its 5 weights in 8 places; padded
constexpr int kBlock = 32, kMostBlocks = 32;                // channels a warp takes together; blocks of a CTA
constexpr int kOutput = kStreams;                           // the output's slot behind those of the streams

struct Arguments {
  const __nv_bfloat16 *output, *streams;
  const float* mix;  // logits
  const uint4* fn;
  const float *scale, *base, *norm;
  __nv_bfloat16 *new_streams, *inputs;
  uint8_t* codes;  // may be null: no e4m3 rows wanted
  float *code_scales, *new_mix;
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
  if (pending >= 3) {
    asm volatile("cp.async.wait_group 3;" ::: "memory");
  } else if (pending == 2) {
    asm volatile("cp.async.wait_group 2;" ::: "memory");
  } else if (pending == 1) {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  } else {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
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

__device__ __forceinline__ float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ void normalise(float& a, float& b, float& c, float& d, float eps) {
  const float inverse = reciprocal((a + b) + ((c + d) + eps));
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
    const float inverse = reciprocal(sum);
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

// Shared memory before the slots of the streams.
template <int NT>
struct alignas(16) Sums {
  float coefficients[8 * NT][kCoefficients];
  float of_warp[kWarps][8 * NT][kColumns];
  float of_rank[8 * NT][kColumns];  // read by the whole cluster
  float square_of_warp[kWarps][8 * NT];
  float square_of_rank[8 * NT];  // read by the whole cluster
  float pre[8 * NT][kStreams];
  float inverse[8 * NT];
  float top_of_block[8 * NT][kMostBlocks];
  float norm[kMostBlocks * kBlock];
};

__device__ __forceinline__ void widen(float (&wide)[8], const uint4& x) {
  wide[0] = low(x.x), wide[1] = high(x.x), wide[2] = low(x.y), wide[3] = high(x.y);
  wide[4] = low(x.z), wide[5] = high(x.z), wide[6] = low(x.w), wide[7] = high(x.w);
}

__device__ __forceinline__ uint4 narrow(const float (&wide)[8]) {
  return make_uint4(pack(wide[0], wide[1]), pack(wide[2], wide[3]), pack(wide[4], wide[5]), pack(wide[6], wide[7]));
}

// Adds the square sums of eight tokens to the diagonal of the first eight rows; a lane gives 8 channels of token lane / 4.
__device__ __forceinline__ void add_squares(float (&d)[2], const uint4& x) {
  float rows[4] = {d[0], d[1], 0.0f, 0.0f};
  multiply(rows, make_uint4(x.x, 0, x.y, 0), x.x, x.y);
  multiply(rows, make_uint4(x.z, 0, x.w, 0), x.z, x.w);
  d[0] = rows[0], d[1] = rows[1];
}

// The lane of a row's place in the diagonal.
__device__ __forceinline__ bool owns_square(int row, int quad) { return quad == row / 2; }
__device__ __forceinline__ float square_of(const float (&d)[2], int row) { return row % 2 ? d[1] : d[0]; }

struct Mix {
  float post[4], comb[16];  // comb [from][to]
};

__device__ __forceinline__ Mix load_logits(const float* logits) {
  Mix mix;
#pragma unroll
  for (int i = 0; i < kLogits; i += 4) {
    const float4 four = __ldg(reinterpret_cast<const float4*>(logits + i));
    float* target = i ? mix.comb + i - 4 : mix.post;
    target[0] = four.x, target[1] = four.y, target[2] = four.z, target[3] = four.w;
  }
  return mix;
}

// How a sublayer's output returns to the streams: gates and a doubly stochastic matrix.
__device__ __forceinline__ Mix mix_of(Mix mix, int iterations, float eps) {
#pragma unroll
  for (int i = 0; i < 4; ++i) mix.post[i] = 2.0f * sigmoid(mix.post[i]);
  sinkhorn(mix.comb, iterations, eps);
  return mix;
}

// WRITE: there is an output to write back; without it the streams are only read.
template <int NT, bool WRITE>
__global__ void __cluster_dims__(kRanks, 1, 1) __launch_bounds__(kThreads, NT <= 2 ? 2 : 1) hyper_seam(const Arguments a) {
  extern __shared__ __align__(16) uint8_t shared[];
  Sums<NT>& sums = *reinterpret_cast<Sums<NT>*>(shared);
  const int rank = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
  const int first_token = blockIdx.y * 8 * NT;
  const float features = static_cast<float>(kStreams) * a.hidden;
  const int64_t last = a.num_tokens - 1;

  uint4* const slots = reinterpret_cast<uint4*>(shared + sizeof(Sums<NT>)) + threadIdx.x;
  const int rank_blocks = a.hidden / (kRanks * kBlock);
  const int first_block = warp * rank_blocks / kWarps, num_blocks = (warp + 1) * rank_blocks / kWarps - first_block;
  // This thread's first channel in block b of its warp.
  const auto channel_of = [&](int b) { return (rank * rank_blocks + first_block + b) * kBlock + quad * 8; };
  const auto slot = [&](int b, int tile, int s) -> uint4& {
    return slots[((b * NT + tile) * (kStreams + WRITE) + s) * kThreads];
  };
  const auto token_of = [&](int tile) { return static_cast<int64_t>(first_token + 8 * tile + row); };

  // What is needed first is asked for first; what is needed last is long there by then.
  Mix mix = {};
  if (WRITE && threadIdx.x < 8 * NT)
    mix = load_logits(a.mix + min(static_cast<int64_t>(first_token + threadIdx.x), last) * kLogits);
  for (int b = 0; b < num_blocks; ++b) {
    const int channel = channel_of(b);
#pragma unroll
    for (int tile = 0; tile < NT; ++tile) {
      const bool live = token_of(tile) <= last;
      const int64_t token = live ? token_of(tile) : last;
      const __nv_bfloat16* source = a.streams + token * kStreams * a.hidden + channel;
#pragma unroll
      for (int s = 0; s < kStreams; ++s) copy_async(&slot(b, tile, s), source + static_cast<int64_t>(s) * a.hidden, live);
      if (WRITE) copy_async(&slot(b, tile, kOutput), a.output + token * a.hidden + channel, live);
    }
    commit_copies();
  }
  for (int i = threadIdx.x; i < rank_blocks * (kBlock / 4); i += kThreads)
    copy_async(&sums.norm[4 * i], a.norm + rank * rank_blocks * kBlock + 4 * i, true);
  commit_copies();
  const int input_mix = threadIdx.x % kStreams, logit = min(lane, kMixes - 1);
  const float input_scale = __ldg(a.scale + input_mix), input_base = __ldg(a.base + input_mix);
  const float logit_scale = __ldg(a.scale + logit), logit_base = __ldg(a.base + logit);
  if (WRITE) {
    if (threadIdx.x < 8 * NT) {
      mix = mix_of(mix, a.iterations, a.hc_eps);
#pragma unroll
      for (int to = 0; to < kStreams; ++to) {
        float* weights = &sums.coefficients[threadIdx.x][8 * to];
        *reinterpret_cast<float4*>(weights) =
            make_float4(mix.post[to], mix.comb[to], mix.comb[4 + to], mix.comb[8 + to]);
        weights[4] = mix.comb[12 + to];
      }
    }
    __syncthreads();
  }

  // The new streams, and this warp's part of the products.
  float products[3][NT][4] = {}, squares[NT][2] = {};
  uint4 fragments[2][6];
  const auto load_fragments = [&](int b, int s) {
    const uint4* source = a.fn + ((channel_of(b) / kBlock) * kStreams + s) * (6 * 32) + lane;
#pragma unroll
    for (int i = 0; i < 6; ++i) fragments[s % 2][i] = __ldg(source + 32 * i);
  };
  for (int b = 0; b < num_blocks; ++b) {
    wait_copies(num_blocks - b);
    const int channel = channel_of(b);
    if (WRITE) {
#pragma unroll
      for (int tile = 0; tile < NT; ++tile) {
        const bool live = token_of(tile) <= last;
        float x[kStreams][8], output[8];
#pragma unroll
        for (int s = 0; s < kStreams; ++s) widen(x[s], slot(b, tile, s));
        widen(output, slot(b, tile, kOutput));
#pragma unroll
        for (int to = 0; to < kStreams; ++to) {
          const float* weights = &sums.coefficients[8 * tile + row][8 * to];
          const float4 w = *reinterpret_cast<const float4*>(weights);
          const float w3 = weights[4];
          float mixed[8];
#pragma unroll
          for (int i = 0; i < 8; ++i)
            mixed[i] = fmaf(w3, x[3][i], fmaf(w.w, x[2][i], fmaf(w.z, x[1][i], fmaf(w.y, x[0][i], w.x * output[i]))));
          const uint4 written = narrow(mixed);
          slot(b, tile, to) = written;
          if (live)
            *reinterpret_cast<uint4*>(a.new_streams + (token_of(tile) * kStreams + to) * a.hidden + channel) = written;
        }
      }
    }
    load_fragments(b, 0);
#pragma unroll
    for (int s = 0; s < kStreams; ++s) {
      if (s + 1 < kStreams) load_fragments(b, s + 1);
#pragma unroll
      for (int tile = 0; tile < NT; ++tile) {
        const uint4 x = slot(b, tile, s);
#pragma unroll
        for (int t = 0; t < 3; ++t) {
          multiply(products[t][tile], fragments[s % 2][2 * t], x.x, x.y);
          multiply(products[t][tile], fragments[s % 2][2 * t + 1], x.z, x.w);
        }
        add_squares(squares[tile], x);
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
    if (owns_square(row, quad)) target[row][kSquare] = square_of(squares[tile], row);
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
  if (threadIdx.x < 8 * NT * kStreams) {
    const int token = threadIdx.x / kStreams;
    const float square = sum_over_ranks(&sums.of_rank[token][kSquare]);
    const float total = sum_over_ranks(&sums.of_rank[token][input_mix]);
    const float value = total * rsqrtf(square / features + a.norm_eps) * input_scale + input_base;
    sums.pre[token][input_mix] = sigmoid(value) + a.hc_eps;
  }
  __syncthreads();

  // The mix of the streams, which takes the place of the first, and its square sum.
#pragma unroll
  for (int tile = 0; tile < NT; ++tile) squares[tile][0] = squares[tile][1] = 0.0f;
  for (int b = 0; b < num_blocks; ++b) {
#pragma unroll
    for (int tile = 0; tile < NT; ++tile) {
      const float* weights = sums.pre[8 * tile + row];
      float total[8] = {};
#pragma unroll
      for (int s = 0; s < kStreams; ++s) {
        float x[8];
        widen(x, slot(b, tile, s));
#pragma unroll
        for (int i = 0; i < 8; ++i) total[i] = fmaf(weights[s], x[i], total[i]);
      }
      const uint4 mixed = narrow(total);
      slot(b, tile, 0) = mixed;
      add_squares(squares[tile], mixed);
    }
  }
#pragma unroll
  for (int tile = 0; tile < NT; ++tile)
    if (owns_square(row, quad)) sums.square_of_warp[warp][8 * tile + row] = square_of(squares[tile], row);
  __syncthreads();
  if (threadIdx.x < 8 * NT) {
    float total = sums.square_of_warp[0][threadIdx.x];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) total += sums.square_of_warp[w][threadIdx.x];
    sums.square_of_rank[threadIdx.x] = total;
  }
  cluster_arrive();
  if (warp == kWarps - 1) {  // row `rank` of every tile: its logits are this CTA's to write
#pragma unroll
    for (int tile = 0; tile < NT; ++tile) {
      const int column = min(lane, kSquare);
      const float total = sum_over_ranks(&sums.of_rank[8 * tile + rank][column]);
      const float factor = rsqrtf(__shfl_sync(~0u, total, kSquare) / features + a.norm_eps);
      const int64_t token = first_token + 8 * tile + rank;
      if (lane >= kStreams && lane < kMixes && token <= last)
        a.new_mix[token * kLogits + lane - kStreams] = total * factor * logit_scale + logit_base;
    }
  }
  cluster_wait();
  wait_copies(0);  // the norm's weights
  if (threadIdx.x < 8 * NT)
    sums.inverse[threadIdx.x] = rsqrtf(sum_over_ranks(&sums.square_of_rank[threadIdx.x]) / a.hidden + a.norm_eps);
  __syncthreads();
  cluster_arrive();  // this CTA has read all it needs of others

  for (int b = 0; b < num_blocks; ++b) {
    const int channel = channel_of(b);
    float weights[8];
    const float* norm = &sums.norm[(first_block + b) * kBlock + quad * 8];
    *reinterpret_cast<float4*>(&weights[0]) = *reinterpret_cast<const float4*>(norm);
    *reinterpret_cast<float4*>(&weights[4]) = *reinterpret_cast<const float4*>(norm + 4);
#pragma unroll
    for (int tile = 0; tile < NT; ++tile) {
      const float inverse = sums.inverse[8 * tile + row];
      float x[8];
      widen(x, slot(b, tile, 0));
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = x[i] * inverse * weights[i];
      const uint4 normed = narrow(x);
      if (token_of(tile) <= last) *reinterpret_cast<uint4*>(a.inputs + token_of(tile) * a.hidden + channel) = normed;
      if (a.codes == nullptr) continue;
      slot(b, tile, 0) = normed;
      widen(x, normed);
      float top = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) top = fmaxf(top, fabsf(x[i]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      if (quad == 0) sums.top_of_block[8 * tile + row][first_block + b] = top;
    }
  }
  if (a.codes != nullptr) {
    __syncthreads();
    for (int b = 0; b < num_blocks; ++b) {
      const int channel = channel_of(b), group = (first_block + b) / 4 * 4;
#pragma unroll
      for (int tile = 0; tile < NT; ++tile) {
        // A scale per 128 channels: the smallest power of two that brings the largest value to at most 448.
        const float4 tops = *reinterpret_cast<const float4*>(&sums.top_of_block[8 * tile + row][group]);
        const float top = fmaxf(fmaxf(fmaxf(tops.x, tops.y), fmaxf(tops.z, tops.w)), 1e-4f);
        const uint32_t scale = (__float_as_uint(top * (1.0f / 448.0f)) + 0x7FFFFFu) & 0x7F800000u;
        const float shrink = 1.0f / __uint_as_float(scale);
        if (token_of(tile) > last) continue;
        if (quad == 0 && channel % 128 == 0)
          a.code_scales[channel / 128 * a.scale_stride + token_of(tile)] = __uint_as_float(scale);
        float x[8];
        widen(x, slot(b, tile, 0));
        uint32_t codes[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          codes[i] = __nv_cvt_float2_to_fp8x2(make_float2(x[2 * i] * shrink, x[2 * i + 1] * shrink), __NV_SATFINITE, __NV_E4M3);
        *reinterpret_cast<uint2*>(a.codes + token_of(tile) * a.hidden + channel) =
            make_uint2(codes[0] | codes[1] << 16, codes[2] | codes[3] << 16);
      }
    }
  }
  cluster_wait();
}

__global__ void hyper_mix(const float* logits, float* post, float* comb, int num_tokens, int iterations, float eps) {
  const int64_t token = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (token >= num_tokens) return;
  const Mix mix = mix_of(load_logits(logits + token * kLogits), iterations, eps);
  float4* target = reinterpret_cast<float4*>(comb + token * 16);
  *reinterpret_cast<float4*>(post + token * 4) = make_float4(mix.post[0], mix.post[1], mix.post[2], mix.post[3]);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    target[i] = make_float4(mix.comb[4 * i], mix.comb[4 * i + 1], mix.comb[4 * i + 2], mix.comb[4 * i + 3]);
}

template <int NT, bool WRITE>
cudaError_t launch(const Arguments& arguments, cudaStream_t stream) {
  const int blocks = (arguments.hidden / (kRanks * kBlock) + kWarps - 1) / kWarps;  // of a warp, at most
  const size_t bytes = sizeof(Sums<NT>) + static_cast<size_t>(blocks) * NT * (kStreams + WRITE) * kThreads * sizeof(uint4);
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

// `mix` and `new_mix`: float32 [num_tokens][20] logits, 4 of the gates, then [4 from][4 to]. `tiles`: of eight tokens, a cluster
// takes 1 to 4; changes speed only. A null output only reads the streams. hidden is a multiple of 1024 and at most 8192.
extern "C" int hyper_seam(const void* output, const void* streams, const void* mix, const void* fn, const void* scale,
                          const void* base, const void* norm, void* new_streams, void* inputs, void* codes,
                          void* code_scales, void* new_mix, int64_t scale_stride, int num_tokens, int hidden,
                          int iterations, float hc_eps, float norm_eps, int tiles, cudaStream_t stream) {
  const Arguments arguments{static_cast<const __nv_bfloat16*>(output),
                            static_cast<const __nv_bfloat16*>(streams),
                            static_cast<const float*>(mix),
                            static_cast<const uint4*>(fn),
                            static_cast<const float*>(scale),
                            static_cast<const float*>(base),
                            static_cast<const float*>(norm),
                            static_cast<__nv_bfloat16*>(new_streams),
                            static_cast<__nv_bfloat16*>(inputs),
                            static_cast<uint8_t*>(codes),
                            static_cast<float*>(code_scales),
                            static_cast<float*>(new_mix),
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

// logits [num_tokens][20] -> post [num_tokens][4] and comb [num_tokens][4 from][4 to], float32.
extern "C" int hyper_mix_of_logits(const void* logits, void* post, void* comb, int num_tokens, int iterations, float hc_eps,
                                   cudaStream_t stream) {
  if (num_tokens == 0) return cudaSuccess;
  hyper_mix<<<(num_tokens + 63) / 64, 64, 0, stream>>>(static_cast<const float*>(logits), static_cast<float*>(post),
                                                       static_cast<float*>(comb), num_tokens, iterations, hc_eps);
  return cudaGetLastError();
}
