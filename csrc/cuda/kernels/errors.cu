// The text of a launch's error code, for bindings, which know no CUDA.
#include "cuda/device.cuh"

namespace branchwise::cuda {

const char* error_string(int code) { return describe_error(code); }

}  // namespace branchwise::cuda
