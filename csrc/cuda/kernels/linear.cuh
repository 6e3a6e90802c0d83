// invariant_linear: a row's sums run over K in ascending order, whatever other rows there are and
// however large the blocks that compute them.
#pragma once
#include "common/linear_args.h"

namespace branchwise::cuda {

// aligned: 16-bit elements in rows of 16-byte pieces, for tensor cores. It decides over bits, so it
// must not depend on the rows of x. Returns a CUDA error code.
int linear(const LinearArgs& args, bool aligned, void* stream);

}  // namespace branchwise::cuda
