// What the steps of a masked-diffusion decoder depend on, on any device; see the Python wrappers of
// draft_blocks and verify_blocks. Torch-free.
#pragma once
#include <cstdint>

#include "common/device.h"

namespace branchwise {

enum class UnmaskRule : int { count, threshold, budget };

struct BlockSteps {
  int64_t B, W, K, mask_id, block_size;
  UnmaskRule rule;
  double level;
  const int32_t* origins;  // [B]
  const int32_t* counts;   // [B, K + 1]
  const int64_t* tokens;   // [B, W] or [B, K, W]
  const float* scores;

  BW_HOST_DEVICE int64_t block_of(int64_t row, int64_t i) const {
    const int64_t offset = i - origins[row];
    return offset < 0 ? -1 : offset / block_size;
  }
  BW_HOST_DEVICE int32_t count(int64_t row, int64_t step) const {
    return counts[row * (K + 1) + step];
  }
};

}  // namespace branchwise
