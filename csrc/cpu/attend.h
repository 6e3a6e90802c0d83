// What tree_attention, cascade_attention and sparse_attention share: checks of their common
// arguments, cutting the work into units, threads.
#pragma once
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "cpu/kernels/attention_kernel.h"
#include "cpu/kv_args.h"

namespace branchwise {

struct AttentionInputs {
  Tensor query, key_cache, value_cache, seq_lens;
  std::optional<Tensor> tree_mask, page_table;
  std::optional<double> scale;
  std::optional<Tensor> sinks;
  double softcap;
  bool window;  // positions matter
};

// A checked call, all but for what each row attends to.
struct AttentionCall {
  AttentionArgs args;
  CacheShape shape;
  RowLens lens;
  int64_t B;
  std::vector<int32_t> depths, reach;  // of every node, with a tree mask
  bool empty() const { return B * args.T == 0; }
};

// Attention to everything: the whole prefix is one run of slots.
inline Places dense_places(int32_t length, int64_t window) {
  Places p{};
  p.prefix = p.new_slot = p.sink = p.recent = length;
  p.unit = 1;
  p.window = static_cast<int32_t>(std::min<int64_t>(window, INT32_MAX));
  return p;
}

AttentionCall check_attention(const char* op, const AttentionInputs& in);

// places: one per (row, KV head), or with per_token per (row, token, KV head).
std::tuple<Tensor, Tensor> run_attention(AttentionCall& call, const std::vector<Places>& places,
                                         bool per_token);

}  // namespace branchwise
