// What append_kv asks of a kernel level: rotary position embedding of a row, and rounding to e4m3.
#pragma once
#include <cstdint>

#include "common/rope_args.h"

namespace branchwise {

struct RopeKernels {
  // out[D] = key[D] with the halves of its first R values rotated; cos and sin hold R values.
  void (*rotate_row)(const RopeArgs&, const void* key, const void* cos, const void* sin, void* out);
  // out[D] = row[D] / scale in e4m3; what exceeds its largest value becomes that.
  void (*quantise_row)(DType, const void* row, int64_t D, float scale, void* out);
};

namespace baseline {
extern const RopeKernels rope_kernels;
}
namespace avx2 {
extern const RopeKernels rope_kernels;
}
namespace avx512 {
extern const RopeKernels rope_kernels;
}
namespace avx512_bf16 {
extern const RopeKernels rope_kernels;
}

}  // namespace branchwise
