// The K best-scored entries of every token, the same op as kernels/triton_top_entries.py: int32 [T, K], ascending, then -1; of
// equal scores the lowest entries.
//
// A CTA takes one token. Scores become integers in the same order. A histogram over their range finds the bin that holds the K-th
// best; its few members are ranked against each other, or, if they are many, get a finer histogram. One scan then gives every
// chosen entry its place. Counts depend on the scores alone, so atomics do not make the result depend on timing. The row is read
// once per step and stays in L1 or L2. Bound by latency at decode, by instructions at prefill.

#include <cuda_runtime.h>
#include <stdint.h>

namespace {

constexpr int kItems = 8;  // neighbouring entries of a thread
constexpr int kBinBits = 11, kBins = 1 << kBinBits;
constexpr uint32_t kAll = 0xFFFFFFFFu;

// An integer that orders as the score does; -0 equals 0.
__device__ __forceinline__ uint32_t key_of(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

template <int THREADS>
struct Shared {
  int bins[kBins];
  uint32_t list[THREADS];
  uint32_t lowest[32], highest[32];
  int sums[2][32];
  int bin, above, inside, listed;
  uint32_t threshold;
  int spare;
};

// Keys of a thread's kItems entries; entries from `seen` on get no bit in the mask.
__device__ __forceinline__ uint32_t load_keys(const float* row, int first, int seen, uint32_t (&key)[kItems]) {
  if (first >= seen) return 0;
#pragma unroll
  for (int i = 0; i < kItems; i += 4) {
    float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (first + i < seen) four = *reinterpret_cast<const float4*>(row + first + i);
    key[i] = key_of(four.x), key[i + 1] = key_of(four.y), key[i + 2] = key_of(four.z), key[i + 3] = key_of(four.w);
  }
  const int here = min(seen - first, kItems);
  return (1u << here) - 1;
}

// Exclusive sum over the CTA; `total` gets the whole. `sums` must not be in use by another call.
template <int THREADS>
__device__ __forceinline__ int sum_before(int value, int* sums, int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int running = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAll, running, step);
    if (lane >= step) running += other;
  }
  if (lane == 31) sums[warp] = running;
  __syncthreads();
  int before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < THREADS / 32; ++w) {
    const int sum = sums[w];
    before += w < warp ? sum : 0;
    total += sum;
  }
  return before + running - value;
}

// The bin, counted from the top, in which the `wanted`-th lies: shared.bin, .above (in higher bins), .inside.
template <int THREADS>
__device__ __forceinline__ void find_bin(Shared<THREADS>& shared, int wanted) {
  constexpr int kMine = kBins / THREADS < 1 ? 1 : kBins / THREADS;
  const int first = kBins - (threadIdx.x + 1) * kMine;  // thread 0 has the highest bins
  int count[kMine], sum = 0, total;
#pragma unroll
  for (int i = 0; i < kMine; ++i) count[i] = shared.bins[first + i], sum += count[i];
  int above = sum_before<THREADS>(sum, shared.sums[0], total);
  if (above < wanted && wanted <= above + sum) {
#pragma unroll
    for (int i = kMine - 1; i >= 0; --i) {
      if (above < wanted && wanted <= above + count[i]) shared.bin = first + i, shared.above = above, shared.inside = count[i];
      above += count[i];
    }
  }
  __syncthreads();
}

template <int THREADS>
__global__ void __launch_bounds__(THREADS) top_kernel(const float* scores, int64_t stride_scores, const int64_t* positions,
                                                      int* output, int ratio, int topk) {
  __shared__ Shared<THREADS> shared;
  constexpr int kChunk = THREADS * kItems;
  const int64_t token = blockIdx.x;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int seen = (static_cast<int>(positions[token]) + 1) / ratio;
  int* chosen = output + token * topk;
  if (seen <= topk) {
    for (int i = thread; i < topk; i += THREADS) chosen[i] = i < seen ? i : -1;
    return;
  }
  const float* row = scores + token * stride_scores;

  uint32_t low = kAll, high = 0, key[kItems];
  for (int base = 0; base < seen; base += kChunk) {
    const uint32_t known = load_keys(row, base + thread * kItems, seen, key);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (known >> i & 1) low = min(low, key[i]), high = max(high, key[i]);
    }
  }
  low = __reduce_min_sync(kAll, low);
  high = __reduce_max_sync(kAll, high);
  if (lane == 0) shared.lowest[warp] = low, shared.highest[warp] = high;
  if (thread == 0) shared.listed = 0;
  for (int i = thread; i < kBins; i += THREADS) shared.bins[i] = 0;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < THREADS / 32; ++w) low = min(low, shared.lowest[w]), high = max(high, shared.highest[w]);

  // The K-th best lies in [low, low + reach]; `wanted` counts from the top of that range.
  uint32_t reach = high - low;
  int shift = max(0, 32 - kBinBits - __clz(reach)), wanted = topk;
  uint32_t threshold;
  int spare;
  while (true) {
    for (int base = 0; base < seen; base += kChunk) {
      const uint32_t known = load_keys(row, base + thread * kItems, seen, key);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if ((known >> i & 1) && key[i] - low <= reach) atomicAdd(&shared.bins[(key[i] - low) >> shift], 1);
      }
    }
    __syncthreads();
    find_bin(shared, wanted);
    const int inside = shared.inside;
    wanted -= shared.above;
    low += static_cast<uint32_t>(shared.bin) << shift;
    reach = (1u << shift) - 1;
    threshold = low, spare = wanted;
    if (shift == 0) break;  // all inside are equal
    if (inside == wanted) {
      threshold = low - 1, spare = 0;
      break;
    }
    if (inside <= THREADS) {
      for (int base = 0; base < seen; base += kChunk) {
        const uint32_t known = load_keys(row, base + thread * kItems, seen, key);
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          if ((known >> i & 1) && key[i] - low <= reach) shared.list[atomicAdd(&shared.listed, 1)] = key[i];
        }
      }
      __syncthreads();
      if (thread < inside) {
        const uint32_t mine = shared.list[thread];
        int greater = 0, equal = 0;
        for (int i = 0; i < inside; ++i) {
          const uint32_t other = shared.list[i];
          greater += other > mine, equal += other == mine;
        }
        if (greater < wanted && wanted <= greater + equal) shared.threshold = mine, shared.spare = wanted - greater;
      }
      __syncthreads();
      threshold = shared.threshold, spare = shared.spare;
      break;
    }
    for (int i = thread; i < kBins; i += THREADS) shared.bins[i] = 0;
    shift = max(0, shift - kBinBits);
    __syncthreads();
  }

  // Chosen: all above the threshold and the first `spare` at it. Counts travel together, those at it in the low 20 bits.
  int before = 0;
  for (int base = 0, turn = 0; base < seen; base += kChunk, turn ^= 1) {
    const int first = base + thread * kItems;
    const uint32_t known = load_keys(row, first, seen, key);
    int pair = 0, total;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (known >> i & 1) pair += (key[i] > threshold ? 1 << 20 : 0) + (key[i] == threshold ? 1 : 0);
    }
    const int mine = before + sum_before<THREADS>(pair, shared.sums[turn ^ 1], total);
    before += total;
    int above = mine >> 20, level = mine & 0xFFFFF;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!(known >> i & 1)) continue;
      const bool over = key[i] > threshold, at = key[i] == threshold;
      if (over || (at && level < spare)) chosen[above + min(level, spare)] = first + i;
      above += over, level += at;
    }
  }
}

template <int THREADS>
int launch(const float* scores, int64_t stride_scores, const int64_t* positions, int* output, int num_tokens, int ratio, int topk,
           cudaStream_t stream) {
  top_kernel<THREADS><<<num_tokens, THREADS, 0, stream>>>(scores, stride_scores, positions, output, ratio, topk);
  return cudaGetLastError();
}

}  // namespace

// scores: float32 [num_tokens, L], a stride, rows on 16 bytes and L a multiple of 4, below 2^20; positions int64; output int32
// [num_tokens, topk], topk < 2048. `threads` of a CTA: 256, 512 or 1024. Returns a cudaError_t.
extern "C" int top_entries(const float* scores, int64_t stride_scores, const int64_t* positions, int* output, int num_tokens,
                           int ratio, int topk, int threads, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (threads) {
    case 256: return launch<256>(scores, stride_scores, positions, output, num_tokens, ratio, topk, queue);
    case 512: return launch<512>(scores, stride_scores, positions, output, num_tokens, ratio, topk, queue);
    case 1024: return launch<1024>(scores, stride_scores, positions, output, num_tokens, ratio, topk, queue);
  }
  return cudaErrorInvalidValue;
}
