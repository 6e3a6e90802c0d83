// The element types that kernels read and write. Torch-free.
#pragma once

namespace branchwise {

enum class DType : int { f32, bf16, f16 };

}  // namespace branchwise
