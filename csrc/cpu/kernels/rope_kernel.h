// Rotary position embedding of one row: what append_kv asks of a kernel level.
#pragma once
#include <cstdint>

#include "common/rope_args.h"

namespace branchwise {

struct RopeKernels {
  // out[D] = key[D] with the halves of its first R values rotated; cos and sin hold R values.
  void (*rotate_row)(const RopeArgs&, const void* key, const void* cos, const void* sin, void* out);
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
