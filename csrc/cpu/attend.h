// What tree_attention, cascade_attention and sparse_attention share on the CPU: cutting the work
// into units, threads.
#pragma once
#include <tuple>
#include <vector>

#include "common/attention_call.h"
#include "cpu/kernels/attention_kernel.h"

namespace branchwise {

// places: one per (row, KV head), or with per_token per (row, token, KV head).
std::tuple<Tensor, Tensor> run_attention(AttentionCall& call, const std::vector<Places>& places,
                                         bool per_token);

}  // namespace branchwise
