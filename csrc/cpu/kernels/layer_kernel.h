// The small steps of a decoder layer: what rms_norm and apply_rope ask of a kernel level.
#pragma once
#include "common/layer_args.h"

namespace branchwise {

struct LayerKernels {
  void (*norm_rows)(const NormArgs&, int64_t begin, int64_t end);
  // All heads of queries and keys at token b * T + t, for tokens begin to end - 1.
  void (*rotate_tokens)(const RotateArgs&, int64_t begin, int64_t end);
};

namespace baseline {
extern const LayerKernels layer_kernels;
}
namespace avx2 {
extern const LayerKernels layer_kernels;
}
namespace avx512 {
extern const LayerKernels layer_kernels;
}
namespace avx512_bf16 {
extern const LayerKernels layer_kernels;
}

}  // namespace branchwise
