// What the kernels of routed experts share (experts_few.cu, experts_many.cu): MXFP4 weights in packed order becoming e4m3, the
// gate of the up product, and the persistent walk over tiles.
//
// Weights: a tile is 256 weight rows, a stage of it 128 input channels: four units of 64 rows in the register order of wgmma's
// m64k32 operand, then the units' shifts (kernels/packed_experts.py). 4-bit codes become e4m3 by byte permutation of an
// eight-entry table that depends on the 32-group's exponent relative to its row, so no multiplication touches a weight; a row's
// own power of two is applied once, to the finished sum. Of the up product, 8 gate rows are followed by the 8 linear rows of the
// same columns: they meet in one thread's accumulators.
#pragma once

#include "number_formats.cuh"
#include "wgmma_fp8.cuh"

namespace experts {

using namespace hopper;

constexpr int kStageK = 128;
constexpr int kUnitRows = 64;
constexpr int kUnitCodes = kUnitRows * kStageK / 2;    // bytes of a unit's codes in a stage
constexpr int kUnitShifts = kUnitRows * kStageK / 32;  // a byte per row and 32-group: 8 * (row exponent - group exponent)
constexpr int kUnits = 4;                              // of a tile
constexpr int kTileRows = kUnits * kUnitRows;
constexpr int kStageCodes = kUnits * kUnitCodes, kStagePacked = kUnits * (kUnitCodes + kUnitShifts);
constexpr int kTableBytes = 128;
constexpr int kMaxExperts = 512;
constexpr int kSharedLimit = 227 * 1024;  // of one CTA, static arrays included

struct Arguments {
  const uint8_t* weights;     // [experts, tiles, k / 128, kStagePacked]
  const float* row_scales;    // [k / 128, scale_stride]
  const float* weight_scale;  // [experts, 256 * tiles] in the order of the packed rows
  const int* offsets;         // [experts + 1]: rows of expert e are offsets[e] .. offsets[e + 1], multiples of 4
  const float* route_weight;  // [rows]
  void* output;               // up: e4m3 [rows, 128 * tiles]; down: bf16 [rows, 256 * tiles]
  float* output_scale;        // up: [tiles, scale_stride]
  int experts, tiles, k_blocks, scale_stride;
  float limit;
};

// Eight codes -> two registers of four e4m3. Magnitudes are table indices in the low three bits of each nibble; the sign of
// code i of the first four sits in bit 8i + 7, of the second four in bit 8i + 3.
__device__ __forceinline__ void decode_word(uint32_t word, uint2 table, uint32_t& first, uint32_t& second) {
  const uint32_t index = word & 0x77777777u;
  first = permute_bytes(table.x, table.y, index) | (word & 0x80808080u);
  second = permute_bytes(table.x, table.y, index >> 16) | ((word << 4) & 0x80808080u);
}

// e4m3 codes of {0, .5, 1, 1.5, 2, 3, 4, 6} * 2^(6 - shift), exact for shift <= 14; shift 15 is zero.
__device__ inline uint2 decode_table(int shift) {
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

// decode_table without the look-up, for shifts that leave all values normal; of a byte 8 * shift.
__device__ __forceinline__ uint2 normal_table(uint32_t shift_byte) {
  return make_uint2(0x6C686000u - shift_byte * 0x01010100u, 0x7C787470u - shift_byte * 0x01010101u);
}

// Whether a shift byte of the four exceeds 8 * 11, from where on the smallest value is subnormal.
__device__ __forceinline__ uint32_t any_subnormal(uint32_t shifts) { return shifts & (shifts << 1) & 0x40404040u; }

// The shifts of a thread's two rows in a stage, a byte per 32-group, and what they make of its codes. By whole warps.
struct RowShifts {
  uint32_t upper, lower;  // of rows `row` and `row + 8`
  bool subnormal;         // in any lane

  __device__ __forceinline__ RowShifts(uint32_t upper_bytes, uint32_t lower_bytes) : upper(upper_bytes), lower(lower_bytes) {
    subnormal = __any_sync(0xFFFFFFFFu, any_subnormal(upper) | any_subnormal(lower));
  }

  // Codes of half of the channels into wgmma's register operand: a[step] of channels 64 HALF + 32 step and on.
  template <int HALF>
  __device__ __forceinline__ void decode(uint32_t (&a)[2][4], const uint4& codes, const uint8_t* table) const {
    if (subnormal) {
      decode_by<HALF>(a, codes, [&](uint32_t shift_byte) { return *reinterpret_cast<const uint2*>(table + shift_byte); });
    } else {
      decode_by<HALF>(a, codes, normal_table);
    }
  }

  // The same with a table from a byte of shift.
  template <int HALF, typename TableOf>
  __device__ __forceinline__ void decode_by(uint32_t (&a)[2][4], const uint4& codes, TableOf table_of) const {
    const uint32_t word[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      constexpr uint32_t kFirstByte = 0x4440 + 2 * HALF;
      decode_word(word[2 * step], table_of(permute_bytes(upper, 0, kFirstByte + step)), a[step][0], a[step][2]);
      decode_word(word[2 * step + 1], table_of(permute_bytes(lower, 0, kFirstByte + step)), a[step][1], a[step][3]);
    }
  }
};

// 1 / scale of a power of two, on exponent bits.
__device__ __forceinline__ float inverse_of(float scale) { return __uint_as_float(0x7F000000u - __float_as_uint(scale)); }

// Where in a packed unit the shifts of a thread's upper row lie, `thread` of 128; those of the lower one kLowerShifts further on.
__device__ __forceinline__ int shifts_place(int thread) { return 4 * (16 * (thread / 32) + thread % 32 / 4); }
constexpr int kLowerShifts = 4 * 8;

// Swish with the upper clamp on the gate, both clamps on the linear part, times the routing weight; two, rounded to bf16.
__device__ __forceinline__ float2 gated(float2 gate, float2 linear, float limit, float2 route_weight) {
  const auto value = [limit](float gate, float linear, float route_weight) {
    gate = fminf(gate, limit);
    linear = fminf(fmaxf(linear, -limit), limit);
    return __fdividef(gate, 1.0f + __expf(-gate)) * linear * route_weight;
  };
  return unpack_bf16(pack_bf16(value(gate.x, linear.x, route_weight.x), value(gate.y, linear.y, route_weight.y)));
}

// The same value in every lane, as the compiler then knows: what follows from it is computed once a warp. By whole warps.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xFFFFFFFFu, value, 0); }

struct Tile {
  int expert, tile, first_row, num_rows;

  __device__ __forceinline__ Tile in_uniform() const {
    return {uniform(expert), uniform(tile), uniform(first_row), uniform(num_rows)};
  }
};

// The persistent walk: all weight tiles of a block of at most ROWS rows of one expert, then the next block. In shared memory.
template <int ROWS>
struct Walk {
  int offsets[kMaxExperts + 1], first_block[kMaxExperts + 1];

  // By the whole CTA.
  __device__ __forceinline__ void prepare(const Arguments& arguments) {
    const int experts = arguments.experts;
    for (int e = threadIdx.x; e <= experts; e += blockDim.x) offsets[e] = arguments.offsets[e];
    __syncthreads();
    if (threadIdx.x < 32) {  // exclusive sum of every expert's blocks, a warp over chunks of 32 experts
      int before = 0;
      for (int base = 0; base <= experts; base += 32) {
        const int e = base + threadIdx.x;
        const int blocks = e < experts ? (offsets[e + 1] - offsets[e] + ROWS - 1) / ROWS : 0;
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
  }

  __device__ __forceinline__ int num_blocks(int expert) const { return first_block[expert + 1] - first_block[expert]; }

  // Of a walk over `tiles` tiles a block.
  __device__ __forceinline__ Tile locate(int index, int experts, int tiles) const {
    const int block = index / tiles;
    int low = 0, high = experts - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_block[middle] <= block) low = middle; else high = middle - 1;
    }
    const int first_row = offsets[low] + (block - first_block[low]) * ROWS;
    return {low, index % tiles, first_row, min(ROWS, offsets[low + 1] - first_row)};
  }
};

}  // namespace experts
