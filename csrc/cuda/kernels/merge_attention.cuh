// merge_attention on device pointers; returns the CUDA error code of the launch.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace branchwise::cuda {

// out_a, out_b, out: [n, D]; lse_a, lse_b, lse: [n].
int merge_attention(DType type, const void* out_a, const float* lse_a, const void* out_b,
                    const float* lse_b, void* out, float* lse, int64_t n, int64_t D, void* stream);

}  // namespace branchwise::cuda
