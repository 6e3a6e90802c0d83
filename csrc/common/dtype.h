// The element types that kernels read and write. Torch-free.
#pragma once
#include <cstdint>

namespace branchwise {

enum class DType : int { f32, bf16, f16 };

inline int64_t bytes_of(DType type) { return type == DType::f32 ? 4 : 2; }

}  // namespace branchwise
