// The small steps of a decoder layer, on any device: what rms_norm and apply_rope are asked for.
// Torch-free.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace branchwise {

// out = x / sqrt(mean(x^2) + eps) * (offset + weight), each row of H. Quotients are rounded to the
// type before the product, or, weight_first, only the product is.
struct NormArgs {
  DType type;              // of all three
  const void *x, *weight;  // [M, H] contiguous, [H]
  void* out;               // as x
  int64_t M, H;
  float eps, offset;
  bool weight_first;
};

// Rows of D whose halves are rotated, each product and each sum rounded to the type.
struct RotateArgs {
  DType type;
  int64_t B, T, D;
  struct Rows {
    const void* from;  // [B, heads, T, D]
    int64_t heads;
    int64_t stride[3];                   // elements, for B, heads, T
    void* to;                            // the same shape, in memory [B, T, heads, D]
  } rows[2];                             // of queries and keys
  const void *cos, *sin;                 // [B or 1, T, D]
  int64_t cos_stride[2], sin_stride[2];  // for B (0: one for all), T
};

}  // namespace branchwise
