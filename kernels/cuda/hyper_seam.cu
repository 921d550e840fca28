// The seam between two sublayers: the output goes back to the four streams, and their mix becomes the next normed input, in bf16
// and in e4m3 (specification: kernels/hyper_connection.py). sm_90a.
//
// `hyper_project` gives a CTA 8 NT tokens and 256 channels of all four streams. A thread has 8 channels of a token in exactly the
// places where the tensor cores want them: it writes the new streams and multiplies them with the 24 rows of fn, held as two bf16
// halves whose products add up in one thread; so do the square sums. A CTA leaves its part of the sums. `hyper_input` gives a CTA
// one token: the parts are added in order, the streams, which L2 still has in a decode step, are mixed, normed and quantised, while
// one warp runs Sinkhorn for the next seam. A token's results do not depend on the other tokens.
// Bound by memory: 20 bytes a channel and token, 28 when L2 has lost the streams in between.

#include <cuda_runtime.h>

#include "early_launch.cuh"
#include "number_formats.cuh"
#include "shared_memory.cuh"

namespace {

using namespace hopper;

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kStreams = 4, kMixes = 24, kSquare = kMixes;  // column behind the mixes: the square sum
constexpr int kColumns = 28;                                // of a row of sums in shared memory; padded for the banks
constexpr int kPartColumns = 32;                            // of a row of sums in device memory
constexpr int kCoefficients = 36;                           // of a token: for each new stream its 5 weights in 8 places; padded
constexpr int kBlock = 32;                                  // channels of a warp
constexpr int kSlice = kWarps * kBlock;                     // channels of a CTA
constexpr int kMostHidden = 8192;
constexpr int kOutput = kStreams;                           // the output's slot behind those of the streams

struct Arguments {
  const __nv_bfloat16 *output, *streams;
  const float *post, *comb;
  const uint4* fn;
  const float *scale, *base, *norm;
  __nv_bfloat16 *new_streams, *inputs;
  uint8_t* codes;  // may be null: no e4m3 rows wanted
  float *code_scales, *new_post, *new_comb, *parts;
  int64_t scale_stride;
  int num_tokens, hidden, iterations;
  float hc_eps, norm_eps;
};

__device__ __forceinline__ void copy_async(void* target, const void* source, bool live) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source), "r"(live ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most PENDING groups of this thread are under way.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// d[16 x 8] += a[16 x 16] b[16 x 8].
__device__ __forceinline__ void multiply(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// Eight channels.
__device__ __forceinline__ void widen(float (&wide)[8], const uint4& x) {
  const float2 a = unpack_bf16(x.x), b = unpack_bf16(x.y), c = unpack_bf16(x.z), d = unpack_bf16(x.w);
  wide[0] = a.x, wide[1] = a.y, wide[2] = b.x, wide[3] = b.y, wide[4] = c.x, wide[5] = c.y, wide[6] = d.x, wide[7] = d.y;
}

__device__ __forceinline__ uint4 narrow(const float (&wide)[8]) {
  return make_uint4(pack_bf16(wide[0], wide[1]), pack_bf16(wide[2], wide[3]), pack_bf16(wide[4], wide[5]),
                    pack_bf16(wide[6], wide[7]));
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

// Adds the square sums of eight tokens to the diagonal of the first eight rows; a lane gives 8 channels of token lane / 4.
__device__ __forceinline__ void add_squares(float (&d)[2], const uint4& x) {
  float rows[4] = {d[0], d[1], 0.0f, 0.0f};
  multiply(rows, make_uint4(x.x, 0, x.y, 0), x.x, x.y);
  multiply(rows, make_uint4(x.z, 0, x.w, 0), x.z, x.w);
  d[0] = rows[0], d[1] = rows[1];
}

// Shared memory of hyper_project.
template <int NT, bool WRITE>
struct Plan {
  static constexpr int kCoefficientBytes = 8 * NT * kCoefficients * 4;
  static constexpr int kSlotBytes = NT * (kStreams + WRITE) * kThreads * 16, kSumBytes = kWarps * 8 * NT * kColumns * 4;
  static constexpr int kBytes = kCoefficientBytes + (kSlotBytes > kSumBytes ? kSlotBytes : kSumBytes);
};

// WRITE: there is an output to write back; without it the streams are only read.
template <int NT, bool WRITE>
__global__ void __launch_bounds__(kThreads, 2) hyper_project(const Arguments a) {
  extern __shared__ __align__(16) uint8_t shared[];
  float(*coefficients)[kCoefficients] = reinterpret_cast<float(*)[kCoefficients]>(shared);
  uint8_t* const area = shared + Plan<NT, WRITE>::kCoefficientBytes;
  uint4* const slots = reinterpret_cast<uint4*>(area) + threadIdx.x;
  float(*of_warp)[8 * NT][kColumns] = reinterpret_cast<float(*)[8 * NT][kColumns]>(area);  // in the place of the slots

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
  const int block = blockIdx.x * kWarps + warp, channel = block * kBlock + quad * 8;  // this thread's first channel
  const int64_t first_token = static_cast<int64_t>(blockIdx.y) * 8 * NT, last = a.num_tokens - 1;
  const auto slot = [&](int tile, int s) -> uint4& { return slots[(tile * (kStreams + WRITE) + s) * kThreads]; };

  uint4 fragments[2][6];
  const auto load_fragments = [&](int s) {
    const uint4* source = a.fn + (static_cast<int64_t>(block) * kStreams + s) * (6 * 32) + lane;
#pragma unroll
    for (int i = 0; i < 6; ++i) fragments[s % 2][i] = __ldg(source + 32 * i);
  };
  wait_for_previous_launch();

  float weight[5];
  if (WRITE && threadIdx.x < 8 * NT * kStreams) {
    const int64_t token = min(first_token + threadIdx.x / kStreams, last);
    const int to = threadIdx.x % kStreams;
    weight[0] = a.post[token * kStreams + to];
#pragma unroll
    for (int from = 0; from < kStreams; ++from) weight[1 + from] = a.comb[(token * kStreams + from) * kStreams + to];
  }
#pragma unroll
  for (int tile = 0; tile < NT; ++tile) {
    const int64_t token = first_token + 8 * tile + row;
    const bool live = token <= last;
    const __nv_bfloat16* source = a.streams + min(token, last) * kStreams * a.hidden + channel;
#pragma unroll
    for (int s = 0; s < kStreams; ++s) copy_async(&slot(tile, s), source + static_cast<int64_t>(s) * a.hidden, live);
    if (WRITE) copy_async(&slot(tile, kOutput), a.output + min(token, last) * a.hidden + channel, live);
    commit_copies();
  }
  if (WRITE) {
    if (threadIdx.x < 8 * NT * kStreams) {
      float* target = &coefficients[threadIdx.x / kStreams][8 * (threadIdx.x % kStreams)];
      *reinterpret_cast<float4*>(target) = make_float4(weight[0], weight[1], weight[2], weight[3]);
      target[4] = weight[4];
    }
    __syncthreads();
  }
  let_next_launch_begin();

  const auto write_back = [&](int tile) {
    const int64_t token = first_token + 8 * tile + row;
    float x[kStreams][8], output[8];
#pragma unroll
    for (int s = 0; s < kStreams; ++s) widen(x[s], slot(tile, s));
    widen(output, slot(tile, kOutput));
#pragma unroll
    for (int to = 0; to < kStreams; ++to) {
      const float* weights = &coefficients[8 * tile + row][8 * to];
      const float4 w = *reinterpret_cast<const float4*>(weights);
      const float w3 = weights[4];
      float mixed[8];
#pragma unroll
      for (int i = 0; i < 8; ++i)
        mixed[i] = fmaf(w3, x[3][i], fmaf(w.w, x[2][i], fmaf(w.z, x[1][i], fmaf(w.y, x[0][i], w.x * output[i]))));
      const uint4 written = narrow(mixed);
      slot(tile, to) = written;
      if (token <= last) *reinterpret_cast<uint4*>(a.new_streams + (token * kStreams + to) * a.hidden + channel) = written;
    }
  };
  wait_copies<NT - 1>();
  if (WRITE) write_back(0);
  if constexpr (NT > 1) {
    wait_copies<NT - 2>();
    if (WRITE) write_back(1);
  }
  if constexpr (NT > 2) {
    wait_copies<NT - 3>();
    if (WRITE) write_back(2);
  }
  if constexpr (NT > 3) {
    wait_copies<NT - 4>();
    if (WRITE) write_back(3);
  }

  load_fragments(0);
  load_fragments(1);
  float products[3][NT][4] = {}, squares[NT][2] = {};
#pragma unroll
  for (int s = 0; s < kStreams; ++s) {
#pragma unroll
    for (int tile = 0; tile < NT; ++tile) {
      const uint4 x = slot(tile, s);
#pragma unroll
      for (int t = 0; t < 3; ++t) {
        multiply(products[t][tile], fragments[s % 2][2 * t], x.x, x.y);
        multiply(products[t][tile], fragments[s % 2][2 * t + 1], x.z, x.w);
      }
      add_squares(squares[tile], x);
    }
    if (s + 2 < kStreams) load_fragments(s + 2);
  }
  __syncthreads();  // the slots have been read
#pragma unroll
  for (int tile = 0; tile < NT; ++tile) {
    float(*target)[kColumns] = &of_warp[warp][8 * tile];
#pragma unroll
    for (int t = 0; t < 3; ++t) {
      target[2 * quad][8 * t + row] = products[t][tile][0] + products[t][tile][2];
      target[2 * quad + 1][8 * t + row] = products[t][tile][1] + products[t][tile][3];
    }
    if (quad == row / 2) target[row][kSquare] = row % 2 ? squares[tile][1] : squares[tile][0];
  }
  __syncthreads();
  const int slices = gridDim.x;
#pragma unroll
  for (int tile = 0; tile < NT; ++tile) {  // a warp adds a token's parts, a lane a column
    const int64_t token = first_token + 8 * tile + warp;
    if (lane > kSquare || token > last) continue;
    float total = of_warp[0][8 * tile + warp][lane];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) total += of_warp[w][8 * tile + warp][lane];
    a.parts[(token * slices + blockIdx.x) * kPartColumns + lane] = total;
  }
}

__device__ __forceinline__ float sum_over_warp(float value) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

// CHUNKS: of 8 channels, of a thread; changes speed only. The last warp makes the mix of the next seam, the others the input.
template <int CHUNKS>
__global__ void __launch_bounds__(544) hyper_input(const Arguments a) {
  __shared__ float pre[kStreams], squares[kMostHidden / kBlock / 8];  // of 256 channels
  const int64_t token = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, workers = blockDim.x - 32, slices = a.hidden / kSlice;

  if (threadIdx.x >= workers) {
    const int column = min(lane, kMixes - 1);
    const float scale = __ldg(a.scale + column), base = __ldg(a.base + column);
    wait_for_previous_launch();
    const float* source = a.parts + token * slices * kPartColumns + min(lane, kSquare);
    float total = 0.0f;
    for (int first = 0; first < slices; first += 4) {
      float part[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) part[i] = source[(first + i) * kPartColumns];
#pragma unroll
      for (int i = 0; i < 4; ++i) total += part[i];
    }
    const float square = __shfl_sync(~0u, total, kSquare);
    const float value = total * rsqrtf(square / (static_cast<float>(kStreams) * a.hidden) + a.norm_eps) * scale + base;
    const float gate = sigmoid(value);
    if (lane < kStreams) pre[lane] = gate + a.hc_eps;
    arrive_for(2, blockDim.x);  // the weights of the input are there
    if (lane >= kStreams && lane < 2 * kStreams) a.new_post[token * kStreams + lane - kStreams] = 2.0f * gate;
    float m[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) m[i] = __shfl_sync(~0u, value, 2 * kStreams + i);
    sinkhorn(m, a.iterations, a.hc_eps);
    if (lane == 0) {
      float4* target = reinterpret_cast<float4*>(a.new_comb + token * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) target[i] = make_float4(m[4 * i], m[4 * i + 1], m[4 * i + 2], m[4 * i + 3]);
    }
    return;
  }

  const auto channel_of = [&](int chunk) { return (chunk * workers + static_cast<int>(threadIdx.x)) * 8; };
  wait_for_previous_launch();
  let_next_launch_begin();
  uint4 x[CHUNKS][kStreams];
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk)
#pragma unroll
    for (int s = 0; s < kStreams; ++s)
      x[chunk][s] = *reinterpret_cast<const uint4*>(a.streams + (token * kStreams + s) * a.hidden + channel_of(chunk));
  float4 norm[CHUNKS][2];
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk)
#pragma unroll
    for (int i = 0; i < 2; ++i) norm[chunk][i] = __ldg(reinterpret_cast<const float4*>(a.norm + channel_of(chunk)) + i);
  sync_threads_of(2, blockDim.x);

  uint4 mixed[CHUNKS];
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    float total[8] = {};
#pragma unroll
    for (int s = 0; s < kStreams; ++s) {
      float wide[8];
      widen(wide, x[chunk][s]);
      const float weight = pre[s];
#pragma unroll
      for (int i = 0; i < 8; ++i) total[i] = fmaf(weight, wide[i], total[i]);
    }
    mixed[chunk] = narrow(total);
    widen(total, mixed[chunk]);
    float square = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) square = fmaf(total[i], total[i], square);
    square = sum_over_warp(square);
    if (lane == 0) squares[chunk * (workers / 32) + warp] = square;
  }
  sync_threads_of(1, workers);
  float square = squares[0];
  for (int i = 1; i < CHUNKS * (workers / 32); ++i) square += squares[i];
  const float inverse = rsqrtf(square / a.hidden + a.norm_eps);

#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    const int channel = channel_of(chunk);
    const float4 w0 = norm[chunk][0], w1 = norm[chunk][1];
    const float weights[8] = {w0.x, w0.y, w0.z, w0.w, w1.x, w1.y, w1.z, w1.w};
    float wide[8];
    widen(wide, mixed[chunk]);
#pragma unroll
    for (int i = 0; i < 8; ++i) wide[i] = wide[i] * inverse * weights[i];
    const uint4 normed = narrow(wide);
    *reinterpret_cast<uint4*>(a.inputs + token * a.hidden + channel) = normed;
    if (a.codes == nullptr) continue;
    // A scale per 128 channels, which 16 lanes hold.
    widen(wide, normed);
    float top = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) top = fmaxf(top, fabsf(wide[i]));
#pragma unroll
    for (int distance = 8; distance; distance /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, distance));
    const float scale = power_of_two_scale(top), shrink = 1.0f / scale;
    if (lane % 16 == 0) a.code_scales[channel / 128 * a.scale_stride + token] = scale;
    uint32_t codes[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) codes[i] = pack_e4m3(wide[2 * i] * shrink, wide[2 * i + 1] * shrink);
    *reinterpret_cast<uint2*>(a.codes + token * a.hidden + channel) =
        make_uint2(codes[0] | codes[1] << 16, codes[2] | codes[3] << 16);
  }
}

template <typename Kernel>
cudaError_t launch(Kernel kernel, dim3 grid, int threads, int bytes, const Arguments& arguments, cudaStream_t stream) {
  cudaLaunchAttribute attribute = begins_early();
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

template <int NT, bool WRITE>
cudaError_t project(const Arguments& arguments, cudaStream_t stream) {
  constexpr int bytes = Plan<NT, WRITE>::kBytes;
  const cudaError_t error = cudaFuncSetAttribute(hyper_project<NT, WRITE>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(arguments.hidden / kSlice, (arguments.num_tokens + 8 * NT - 1) / (8 * NT));
  return launch(hyper_project<NT, WRITE>, grid, kThreads, bytes, arguments, stream);
}

template <int NT>
cudaError_t project(const Arguments& arguments, cudaStream_t stream) {
  return arguments.output ? project<NT, true>(arguments, stream) : project<NT, false>(arguments, stream);
}

}  // namespace

// post and new_post: float32 [num_tokens][4]; comb and new_comb: [num_tokens][4 from][4 to]; parts: scratch, float32
// [num_tokens][hidden / 256][32]. `tiles` of eight tokens (2 or 4) to a CTA of the first launch and `chunks` of eight channels (1 or
// 2) to a thread of the second change speed only. A null output only reads the streams, null codes make no e4m3 rows. hidden is a
// multiple of 1024, at most 8192, of 4096 for one chunk.
extern "C" int hyper_seam(const void* output, const void* streams, const float* post, const float* comb, const void* fn,
                          const float* scale, const float* base, const float* norm, void* new_streams, void* inputs,
                          uint8_t* codes, float* code_scales, float* new_post, float* new_comb, float* parts, int64_t scale_stride,
                          int num_tokens, int hidden, int iterations, float hc_eps, float norm_eps, int tiles, int chunks,
                          cudaStream_t stream) {
  if (num_tokens == 0) return cudaSuccess;
  const bool known = (tiles == 2 || tiles == 4) && (chunks == 1 || chunks == 2);
  if (!known || hidden % 1024 || hidden > kMostHidden / (3 - chunks)) return cudaErrorInvalidValue;
  Arguments arguments{static_cast<const __nv_bfloat16*>(output),
                      static_cast<const __nv_bfloat16*>(streams),
                      post,
                      comb,
                      static_cast<const uint4*>(fn),
                      scale,
                      base,
                      norm,
                      static_cast<__nv_bfloat16*>(new_streams),
                      static_cast<__nv_bfloat16*>(inputs),
                      codes,
                      code_scales,
                      new_post,
                      new_comb,
                      parts,
                      scale_stride,
                      num_tokens,
                      hidden,
                      iterations,
                      hc_eps,
                      norm_eps};
  const cudaError_t error = tiles == 2 ? project<2>(arguments, stream) : project<4>(arguments, stream);
  if (error != cudaSuccess) return error;
  if (output) arguments.streams = arguments.new_streams;
  const int threads = hidden / (8 * chunks) + 32;
  return chunks == 1 ? launch(hyper_input<1>, num_tokens, threads, 0, arguments, stream)
                     : launch(hyper_input<2>, num_tokens, threads, 0, arguments, stream);
}
