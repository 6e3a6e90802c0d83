// The arguments that tree_attention, cascade_attention and sparse_attention share, and their
// checks: on a CPU of shapes and values, on a GPU of shapes.
#pragma once
#include <optional>
#include <vector>

#include "common/attention_args.h"
#include "common/check.h"
#include "common/kv_args.h"

namespace branchwise {

struct AttentionInputs {
  Tensor query, key_cache, value_cache, seq_lens;
  std::optional<Tensor> tree_mask, page_table;
  std::optional<double> scale;
  std::optional<Tensor> sinks;
  double softcap;
  bool window;  // positions matter
  std::optional<Tensor> key_scale = std::nullopt, value_scale = std::nullopt;
};

// A checked call, all but for what each row attends to.
struct AttentionCall {
  AttentionArgs args;
  CacheShape shape;
  RowLens lens;
  int64_t B;
  std::vector<int32_t> depths, reach;  // of every node, with a tree mask; on the CPU only
  bool empty() const { return B * args.T == 0; }
};

AttentionCall check_attention(const char* op, const AttentionInputs& in);
// Of cascade_attention: pages that rows have in common.
constexpr int64_t kCascadeChunk = 256;  // slots that are shared or not together
AttentionCall check_cascade(const char* op, const AttentionInputs& in, int64_t window);
void check_window(const char* op, const AttentionCall& call, int64_t window);

// Those of sparse_attention; the lists' values, and the segments that they may be of, are still to
// be checked.
Lists check_list_shapes(const char* op, const AttentionCall& call,
                        const std::optional<Tensor>& indices, const std::optional<Tensor>& counts,
                        int64_t unit, const std::optional<Tensor>& segments, bool has_ranges);

Ranges check_ranges(const char* op, const AttentionCall& call, const std::optional<Tensor>& sink,
                    const std::optional<Tensor>& recent);

}  // namespace branchwise
