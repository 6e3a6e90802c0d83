// build_tree: small integer work on token trees.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "common/tree_call.h"

namespace branchwise {
namespace {

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> build_tree(Tensor parents, Tensor seq_lens) {
  const char* op = "build_tree";
  check_tree(op, parents, seq_lens);
  const int64_t B = parents.size(0), T = parents.size(1), W = (T + 63) / 64;

  Tensor mask = torch::stable::new_empty(parents, {B, T, W}, ScalarType::Long);
  Tensor positions = torch::stable::new_empty(parents, {B, T}, ScalarType::Long);
  Tensor next_token = torch::stable::new_empty(parents, {B, T});
  Tensor next_sibling = torch::stable::new_empty(parents, {B, T});
  for (int64_t b = 0; b < B; ++b) {
    const int32_t* parent = data<const int32_t>(parents) + b * T;
    const int64_t P = data<const int32_t>(seq_lens)[b];
    int64_t* bits = data<int64_t>(mask) + b * T * W;
    int64_t* position = data<int64_t>(positions) + b * T;
    int32_t* child = data<int32_t>(next_token) + b * T;
    int32_t* sibling = data<int32_t>(next_sibling) + b * T;
    std::fill(bits, bits + T * W, 0);
    std::fill(child, child + T, -1);
    std::fill(sibling, sibling + T, -1);
    for (int64_t i = 0; i < T; ++i) {
      BW_CHECK(parent[i] >= -1 && parent[i] < i, op, ": parents[", b, ", ", i, "] = ", parent[i],
               " must be -1 (root or padding) or a node before ", i);
      position[i] = P;
      if (parent[i] >= 0) {
        std::copy_n(bits + parent[i] * W, W, bits + i * W);
        position[i] = position[parent[i]] + 1;
      }
      bits[i * W + i / 64] |= static_cast<int64_t>(uint64_t{1} << (i % 64));
    }
    // Linking from the back leaves siblings in ascending order.
    for (int64_t i = T - 1; i > 0; --i) {
      if (parent[i] < 0) continue;
      sibling[i] = child[parent[i]];
      child[parent[i]] = static_cast<int32_t>(i);
    }
  }
  return {mask, positions, next_token, next_sibling};
}

}  // namespace branchwise

STABLE_TORCH_LIBRARY_IMPL(branchwise, CPU, m) {
  m.impl("build_tree", TORCH_BOX(&branchwise::build_tree));
}
