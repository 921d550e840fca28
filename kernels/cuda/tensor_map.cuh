// Host side of the copy engine: two-dimensional tensor maps through the driver's encoder.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace hopper {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                                 const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// A matrix of `height` rows of `width` elements, rows `stride` bytes apart (a multiple of 16), in boxes. What a box reads outside
// the matrix is zero. Returns a cudaError_t.
inline int encode_map(CUtensorMap* map, CUtensorMapDataType type, const void* base, uint64_t width, uint64_t height,
                      uint64_t stride, uint32_t box_width, uint32_t box_height, CUtensorMapSwizzle swizzle) {
  static EncodeTiled encode_tiled = nullptr;
  if (encode_tiled == nullptr) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult status;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status);
    if (error != cudaSuccess) return error;
    if (status != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    encode_tiled = reinterpret_cast<EncodeTiled>(function);
  }
  const cuuint64_t sizes[2] = {width, height}, strides[1] = {stride};
  const cuuint32_t box[2] = {box_width, box_height}, steps[2] = {1, 1};
  const CUresult result =
      encode_tiled(map, type, 2, const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace hopper
