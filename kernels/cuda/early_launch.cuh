// Launches that begin while the one before them in their stream still runs (CUDA programming guide, "programmatic dependent
// launch"): what a kernel does before wait_for_previous_launch() overlaps with the end of the other. Until then it reads nothing that
// a launch writes, weights at most, and writes nothing.
#pragma once

#include <cuda_runtime.h>

namespace hopper {

// Until all launches that the stream had before this one have ended, and what they wrote can be read.
__device__ __forceinline__ void wait_for_previous_launch() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The next launch may begin, if it is an early one, once every CTA has called this or ended.
__device__ __forceinline__ void let_next_launch_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

inline cudaLaunchAttribute begins_early() {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

}  // namespace hopper
