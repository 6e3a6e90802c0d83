// Products of rows with a weight matrix, on any device. Torch-free.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace branchwise {

// out[m, n] = sum over k of x[m, k] weight[n, k], and bias[n].
struct LinearArgs {
  DType type;                     // of all four
  const void *x, *weight, *bias;  // [M, K] contiguous, [N, K], [N] or null
  void* out;                      // [M, N], contiguous
  int64_t M, N, K;
  int64_t weight_stride;  // elements from row to row
};

}  // namespace branchwise
