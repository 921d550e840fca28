// The K best-scored entries of every token, the same op as kernels/triton_top_entries.py: int32 [T, K], ascending, then -1; of
// equal scores the lowest entries.
//
// A CTA takes one token. A histogram over equal parts of the scores' span finds the bin that holds the K-th best; its few members
// are ranked against each other by every warp for itself. Should a bin hold more than a warp ranks, as with outliers or many equal
// scores, histograms over the members' bit patterns narrow it down. Counts depend on the scores alone, so the atomics that make
// them leave no trace in the result. A warp owns a contiguous part of the row, so that ballots and one exchange of counts give
// every chosen entry its place. Bound by latency at decode, by instructions at prefill.

#include <cuda_runtime.h>
#include <stdint.h>

namespace {

constexpr int kItems = 8;              // entries of a thread at a time
constexpr int kPiece = 32 * kItems;    // of a warp
constexpr int kLaneBins = 4;           // bins of a thread
constexpr uint32_t kAll = 0xFFFFFFFFu;

// An integer that orders as the score does; -0 equals 0.
__device__ __forceinline__ uint32_t key_of(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float score_of(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

template <int THREADS>
struct Shared {
  static constexpr int kWarps = THREADS / 32, kBins = kLaneBins * THREADS;
  alignas(16) int bins[kBins];
  uint32_t lowest[kWarps], highest[kWarps];
  int totals[kWarps], counts[kWarps];
  float listed[32];
  int num_listed;
};

// A row of scores as its warps share it: warp w has the entries from w * pieces * kPiece.
struct Row {
  const float* scores;
  int end;     // entries to be read
  int seen;    // entries that count
  int pieces;  // of every warp
  int first;   // the thread's first entry

  __device__ __forceinline__ int entry(int piece, int item) const {
    return first + piece * kPiece + item / 4 * 128 + item % 4;
  }
  // NaN stands for what does not count: it never compares, and minima and maxima pass over it. A score that is NaN counts as the
  // lowest, so that there are always `seen` of them.
  __device__ __forceinline__ void mask(int piece, float (&score)[kItems]) const {
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      score[i] = entry(piece, i) < seen ? fmaxf(score[i], __uint_as_float(0xFF800000u)) : __uint_as_float(0x7FFFFFFFu);
  }
  __device__ __forceinline__ void load(int piece, float (&score)[kItems]) const {
#pragma unroll
    for (int i = 0; i < kItems; i += 4) {
      float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (entry(piece, i) < end) four = *reinterpret_cast<const float4*>(scores + entry(piece, i));
      score[i] = four.x, score[i + 1] = four.y, score[i + 2] = four.z, score[i + 3] = four.w;
    }
  }
  // Runs `use(piece)` on every piece; a row of one piece a warp stays in `score`.
  template <class Use>
  __device__ __forceinline__ void each(float (&score)[kItems], Use use) const {
    if (pieces == 1) {
      use(0);
      return;
    }
    for (int piece = 0; piece < pieces && first - static_cast<int>(threadIdx.x % 32 * 4) + piece * kPiece < seen; ++piece) {
      load(piece, score);
      mask(piece, score);
      use(piece);
    }
  }
};

// Inclusive sum over the first LANES lanes.
template <int LANES>
__device__ __forceinline__ int running_sum(int value, int lane) {
#pragma unroll
  for (int step = 1; step < LANES; step *= 2) {
    const int other = __shfl_up_sync(kAll, value, step);
    if (lane >= step) value += other;
  }
  return value;
}

struct Bin {
  int number, above, inside;  // entries in higher bins, and in this one
};

// The bin in which the `wanted`-th entry from the top lies.
template <int THREADS>
__device__ __forceinline__ Bin find_bin(Shared<THREADS>& shared, int wanted) {
  using S = Shared<THREADS>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Thread 0 has the highest bins.
  const auto four_of = [&](int thread) {
    return *reinterpret_cast<const int4*>(shared.bins + S::kBins - kLaneBins * (thread + 1));
  };
  int4 four = four_of(threadIdx.x);
  const int total = __reduce_add_sync(kAll, four.x + four.y + four.z + four.w);
  if (lane == 0) shared.totals[warp] = total;
  __syncthreads();
  const int of_warp = lane < S::kWarps ? shared.totals[lane] : 0;
  int through = running_sum<S::kWarps>(of_warp, lane);
  const int owner = __ffs(__ballot_sync(kAll, lane < S::kWarps && through >= wanted)) - 1;
  const int before_owner = __shfl_sync(kAll, through - of_warp, owner);
  // Every warp looks into the owner's bins for itself.
  four = four_of(32 * owner + lane);
  const int sum = four.x + four.y + four.z + four.w;
  through = before_owner + running_sum<32>(sum, lane);
  const int finder = __ffs(__ballot_sync(kAll, through >= wanted)) - 1;
  const int count[kLaneBins] = {four.w, four.z, four.y, four.x};
  Bin bin{S::kBins - 1 - kLaneBins * (32 * owner + lane), through - sum, count[0]};
#pragma unroll
  for (int i = 1; i < kLaneBins; ++i) {
    if (bin.above + bin.inside < wanted) bin = {bin.number - 1, bin.above + bin.inside, count[i]};
  }
  return {__shfl_sync(kAll, bin.number, finder), __shfl_sync(kAll, bin.above, finder), __shfl_sync(kAll, bin.inside, finder)};
}

template <int THREADS>
__device__ __forceinline__ void clear_bins(Shared<THREADS>& shared) {
  *reinterpret_cast<int4*>(shared.bins + kLaneBins * threadIdx.x) = make_int4(0, 0, 0, 0);
}

// Chosen are all scores above `score` and the first `spare` that equal it.
struct Threshold {
  float score;
  int spare;
  bool all_equal;  // every score that equals it is chosen
};

// The `wanted`-th best of at most 32 listed scores; every warp ranks them.
template <int THREADS>
__device__ __forceinline__ Threshold rank(const Shared<THREADS>& shared, int count, int wanted) {
  const int lane = threadIdx.x % 32;
  const float mine = shared.listed[lane];
  int greater = 0, equal = 0;
  for (int i = 0; i < count; ++i) {
    const float other = __shfl_sync(kAll, mine, i);
    greater += other > mine, equal += other == mine;
  }
  const bool here = lane < count && greater < wanted && wanted <= greater + equal;
  const int finder = __ffs(__ballot_sync(kAll, here)) - 1;
  const int spare = wanted - __shfl_sync(kAll, greater, finder);
  return {__shfl_sync(kAll, mine, finder), spare, spare == __shfl_sync(kAll, equal, finder)};
}

// The smallest and the largest of the CTA's keys.
template <int THREADS>
__device__ __forceinline__ uint2 span_of(Shared<THREADS>& shared, uint32_t low, uint32_t high) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  low = __reduce_min_sync(kAll, low);
  high = __reduce_max_sync(kAll, high);
  if (lane == 0) shared.lowest[warp] = low, shared.highest[warp] = high;
  __syncthreads();
  const bool has = lane < Shared<THREADS>::kWarps;
  return make_uint2(__reduce_min_sync(kAll, has ? shared.lowest[lane] : kAll),
                    __reduce_max_sync(kAll, has ? shared.highest[lane] : 0));
}

// The `wanted`-th best among the scores for which member() holds, which are neighbours in order. Rare, so kept out of the way.
template <int THREADS, class Member>
__device__ __noinline__ Threshold refine(Shared<THREADS>& shared, const Row row, int wanted, Member member) {
  constexpr int kBits = THREADS == 256 ? 10 : THREADS == 512 ? 11 : 12;
  static_assert(1 << kBits == Shared<THREADS>::kBins);
  float score[kItems];
  row.load(0, score);
  row.mask(0, score);
  uint32_t low = kAll, high = 0;
  row.each(score, [&](int) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (member(score[i])) low = min(low, key_of(score[i])), high = max(high, key_of(score[i]));
    }
  });
  const uint2 span = span_of(shared, low, high);
  low = span.x, high = span.y;
  int shift = max(0, 32 - kBits - __clz(high - low));
  while (true) {
    __syncthreads();
    clear_bins(shared);
    __syncthreads();
    row.each(score, [&](int) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const uint32_t key = key_of(score[i]);
        if (score[i] == score[i] && key >= low && key <= high) atomicAdd(&shared.bins[(key - low) >> shift], 1);
      }
    });
    __syncthreads();
    const Bin bin = find_bin(shared, wanted);
    wanted -= bin.above;
    low += static_cast<uint32_t>(bin.number) << shift;
    high = min(high, low + ((1u << shift) - 1));  // beyond the members' highest lie scores that were counted as above
    if (shift == 0) return {score_of(low), wanted, wanted == bin.inside};
    if (bin.inside <= 32) {
      row.each(score, [&](int) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const uint32_t key = key_of(score[i]);
          if (score[i] == score[i] && key >= low && key <= high) shared.listed[atomicAdd(&shared.num_listed, 1)] = score[i];
        }
      });
      __syncthreads();
      return rank(shared, bin.inside, wanted);
    }
    shift = max(0, shift - kBits);
  }
}

template <int THREADS>
__device__ __forceinline__ Threshold find_threshold(Shared<THREADS>& shared, const Row& row, float (&score)[kItems], int topk) {
  float least = __uint_as_float(0x7F800000u), most = __uint_as_float(0xFF800000u);
  row.each(score, [&](int) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) least = fminf(least, score[i]), most = fmaxf(most, score[i]);
  });
  clear_bins(shared);
  if (threadIdx.x == 0) shared.num_listed = 0;
  const uint2 span = span_of(shared, key_of(least), key_of(most));
  const float low = score_of(span.x), high = score_of(span.y);
  // Four times the number of the bin, from the bits of a float whose last place is a quarter. Rising in the score whatever the
  // span: where it is no finite number, all finite scores share a bin, and NaNs are the last bin.
  const float slope = fminf((Shared<THREADS>::kBins - 1) / (high - low), 1e30f);
  const auto place = [=](float value) {
    return __float_as_uint(fmaf(value - low, slope, 2097152.0f)) & (4 * Shared<THREADS>::kBins - 4);
  };
  row.each(score, [&](int) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (score[i] == score[i]) atomicAdd(reinterpret_cast<int*>(reinterpret_cast<char*>(shared.bins) + place(score[i])), 1);
    }
  });
  __syncthreads();
  const Bin bin = find_bin(shared, topk);
  const auto member = [=](float value) { return value == value && place(value) == 4u * bin.number; };
  if (bin.inside > 32) return refine(shared, row, topk - bin.above, member);
  row.each(score, [&](int) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (member(score[i])) shared.listed[atomicAdd(&shared.num_listed, 1)] = score[i];
    }
  });
  __syncthreads();
  return rank(shared, bin.inside, topk - bin.above);
}

template <int THREADS>
__global__ void __launch_bounds__(THREADS) top_kernel(const float* scores, int64_t stride_scores, int num_scores,
                                                      const int64_t* positions, int* output, int ratio, int topk) {
  using S = Shared<THREADS>;
  __shared__ S shared;
  const int64_t token = blockIdx.x;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  Row row{scores + token * stride_scores, num_scores, 0, 1, warp * kPiece + 4 * lane};
  float score[kItems];
  // Rows that fit are read before it is known how much of them counts.
  const bool whole = num_scores <= THREADS * kItems;
  if (whole) row.load(0, score);
  const int seen = (static_cast<int>(positions[token]) + 1) / ratio;
  int* chosen = output + token * topk;
  if (seen <= topk) {
    for (int i = thread; i < topk; i += THREADS) chosen[i] = i < seen ? i : -1;
    return;
  }
  row.seen = seen;
  row.pieces = (seen + THREADS * kItems - 1) / (THREADS * kItems);
  row.first = warp * row.pieces * kPiece + 4 * lane;
  if (!whole && row.pieces == 1) row.load(0, score);
  if (row.pieces == 1) row.mask(0, score);
  const Threshold threshold = find_threshold(shared, row, score, topk);

  // Scores above the threshold count in the low half, those at it, where only some are chosen, from bit 11.
  const float limit = threshold.score;
  const bool some = !threshold.all_equal;
  int mine = 0;
  row.each(score, [&](int) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (some) mine += (score[i] > limit ? 1 : 0) + (score[i] == limit ? 1 << 11 : 0);
      else mine += score[i] >= limit ? 1 : 0;
    }
  });
  mine = __reduce_add_sync(kAll, mine);
  if (lane == 0) shared.counts[warp] = mine;
  __syncthreads();
  const int before = __reduce_add_sync(kAll, lane < warp ? shared.counts[lane % S::kWarps] : 0);
  int above = before & 0x7FF, level = before >> 11;
  const uint32_t lower = (1u << lane) - 1;
  row.each(score, [&](int piece) {
#pragma unroll
    for (int i = 0; i < kItems; i += 4) {
      uint32_t over[4], at[4] = {0, 0, 0, 0};
#pragma unroll
      for (int k = 0; k < 4; ++k) over[k] = __ballot_sync(kAll, some ? score[i + k] > limit : score[i + k] >= limit);
      if (some) {
#pragma unroll
        for (int k = 0; k < 4; ++k) at[k] = __ballot_sync(kAll, score[i + k] == limit);
      }
      int my_above = above, my_level = level;
#pragma unroll
      for (int k = 0; k < 4; ++k) my_above += __popc(over[k] & lower), above += __popc(over[k]);
      if (some) {
#pragma unroll
        for (int k = 0; k < 4; ++k) my_level += __popc(at[k] & lower), level += __popc(at[k]);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const bool is_over = over[k] >> lane & 1, is_at = at[k] >> lane & 1;
        const int place = some ? my_above + min(my_level, threshold.spare) : my_above;
        if (is_over || (is_at && my_level < threshold.spare)) chosen[place] = row.entry(piece, i + k);
        my_above += is_over, my_level += is_at;
      }
    }
  });
}

template <int THREADS>
int launch(const float* scores, int64_t stride_scores, int num_scores, const int64_t* positions, int* output, int num_tokens,
           int ratio, int topk, cudaStream_t stream) {
  top_kernel<THREADS><<<num_tokens, THREADS, 0, stream>>>(scores, stride_scores, num_scores, positions, output, ratio, topk);
  return cudaGetLastError();
}

}  // namespace

// scores: float32 [num_tokens, num_scores], a stride, rows on 16 bytes, num_scores a multiple of 4 and below 2^20; positions int64;
// output int32 [num_tokens, topk], topk < 2048. `threads` of a CTA: 256, 512 or 1024. Returns a cudaError_t.
extern "C" int top_entries(const float* scores, int64_t stride_scores, int num_scores, const int64_t* positions, int* output,
                           int num_tokens, int ratio, int topk, int threads, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (threads) {
    case 256: return launch<256>(scores, stride_scores, num_scores, positions, output, num_tokens, ratio, topk, queue);
    case 512: return launch<512>(scores, stride_scores, num_scores, positions, output, num_tokens, ratio, topk, queue);
    case 1024: return launch<1024>(scores, stride_scores, num_scores, positions, output, num_tokens, ratio, topk, queue);
  }
  return cudaErrorInvalidValue;
}
