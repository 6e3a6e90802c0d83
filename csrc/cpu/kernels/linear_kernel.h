// Products of rows with a weight matrix: what invariant_linear asks of a kernel level.
#pragma once
#include <cstdint>

#include "common/linear_args.h"

namespace branchwise {

constexpr int64_t kLinearChunk = 256;  // most rows of x in a run, which stay in a core's cache

// Each sum is formed in an order that depends on K alone, so a row's bits are those it has among
// any other rows.
struct LinearKernels {
  // Rows are packed in blocks of row_block, block_floats(type, K) floats for each.
  int64_t row_block, column_block, scratch_floats;
  int64_t (*block_floats)(DType type, int64_t K);
  void (*pack)(const LinearArgs&, int64_t block, float* packed);
  // One block of columns for the rows of blocks begin to end - 1; `packed` holds all blocks.
  void (*run)(const LinearArgs&, const float* packed, int64_t begin, int64_t end, int64_t column,
              float* scratch);
};

namespace baseline {
extern const LinearKernels linear_kernels;
}
namespace avx2 {
extern const LinearKernels linear_kernels;
}
namespace avx512 {
extern const LinearKernels linear_kernels;
}
namespace avx512_bf16 {
extern const LinearKernels linear_kernels;
}
namespace amx_bf16 {
extern const LinearKernels linear_amx_kernels;  // of bf16 alone
}

}  // namespace branchwise
