// rms_norm and apply_rope, one launch each.
#pragma once
#include "common/layer_args.h"

namespace branchwise::cuda {

// Return CUDA error codes.
int rms_norm(const NormArgs& args, void* stream);
int apply_rope(const RotateArgs& args, void* stream);

}  // namespace branchwise::cuda
