// The arguments of append_kv and commit_kv, and their checks: on a CPU of shapes and values, on a
// GPU of shapes.
#pragma once
#include <optional>
#include <vector>

#include "common/kv_args.h"
#include "common/rope_args.h"

namespace branchwise {

struct AppendCall {
  RowLens lens;
  RopeArgs rope;  // R = 0 without angles
  CacheScales scales;
};
AppendCall check_append(const char* op, const Tensor& key, const Tensor& value,
                        const Tensor& key_cache, const Tensor& value_cache, const Tensor& seq_lens,
                        const std::optional<Tensor>& page_table, const std::optional<Tensor>& cos,
                        const std::optional<Tensor>& sin, const std::optional<Tensor>& key_scale,
                        const std::optional<Tensor>& value_scale);

struct CommitCall {
  RowLens lens;
  int64_t heads;  // of seq_lens
};
CommitCall check_commit(const char* op, const std::vector<Tensor>& caches, const Tensor& accepted,
                        const Tensor& num_accepted, const Tensor& seq_lens,
                        const std::optional<Tensor>& page_table);

}  // namespace branchwise
