// Rotary position embedding of a row. Torch-free.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace branchwise {

struct RopeArgs {
  DType type;        // of key and out
  DType angle_type;  // of cos and sin: f32, or that of key
  int64_t D, R;      // head dim; the first R of it are rotated, the rest is copied
};

}  // namespace branchwise
