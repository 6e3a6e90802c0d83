// What tree_attention, cascade_attention and sparse_attention share on the CPU: cutting the work
// into units, threads.
#pragma once
#include <tuple>
#include <vector>

#include "common/attention_call.h"
#include "cpu/isa.h"
#include "cpu/kernels/attention_kernel.h"

namespace branchwise {

// The kernels for more rows than the few-rows form takes.
inline const AttentionKernels& many_rows_kernels(const AttentionArgs& a) {
#if defined(__x86_64__)
  if (current_isa() == Isa::amx_bf16 && a.type == DType::bf16 && a.D % 32 == 0)
    return amx_bf16::attention_kernels;
#endif
  return BW_KERNELS(attention_kernels);
}

// places: one per (row, KV head), or with per_token per (row, token, KV head).
std::tuple<Tensor, Tensor> run_attention(AttentionCall& call, const std::vector<Places>& places,
                                         bool per_token);

}  // namespace branchwise
