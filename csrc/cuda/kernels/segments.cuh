// Lists of segments as lists of slots, on device pointers. Returns the CUDA error code of the
// launch.
#pragma once
#include <cstdint>

namespace branchwise::cuda {

struct SegmentsLaunch {
  const int32_t* indices;  // [B, tokens, heads, width], segments
  const int32_t* counts;   // [B, tokens, heads]
  const int32_t* offsets;  // [B, heads, S + 1]
  int64_t B, tokens, heads, width, S;
  int64_t most;        // slots that a list has room for
  int32_t* slots;      // [B, tokens, heads, most]
  int32_t* num_slots;  // [B, tokens, heads]
};
int expand_segments(const SegmentsLaunch& launch, void* stream);

}  // namespace branchwise::cuda
