// Checks of build_tree's arguments.
#pragma once
#include "common/check.h"

namespace branchwise {

inline void check_tree(const char* op, const Tensor& parents, const Tensor& seq_lens) {
  check_dim(op, "parents", parents, 2, "[B, T]");
  const int64_t B = parents.size(0), T = parents.size(1);
  check_nodes(op, "parents", parents, B, T, ScalarType::Int);
  check_dim(op, "seq_lens", seq_lens, 1, "[B]");
  check_size(op, "seq_lens", seq_lens, 0, B, "B");
  check_dtype(op, "seq_lens", seq_lens, ScalarType::Int);
  check_contiguous(op, "seq_lens", seq_lens);
}

}  // namespace branchwise
