// What tree_attention, cascade_attention and sparse_attention share on the CPU: cutting the work
// into units, threads.
#pragma once
#include <tuple>
#include <vector>

#include "common/attention_call.h"
#include "cpu/isa.h"
#include "cpu/kernels/attention_kernel.h"

namespace branchwise {

// The kernels for units of so many rows. Tile registers are mostly empty with four rows and fewer,
// which take 1.1 to 1.8 times as long in them. CPUs that have them take two cycles for a product of
// pairs of bf16: widening values and multiplying floats is faster from three rows on, of e4m3,
// which are widened either way, from two on. (Measured.)
inline const AttentionKernels& kernels_for(const AttentionArgs& a, int64_t rows) {
#if defined(__x86_64__)
  const int64_t in_pairs = a.key_scale != nullptr ? 1 : 2;  // rows at most
  if (current_isa() == Isa::amx_bf16 && a.type == DType::bf16 && rows > in_pairs)
    return rows > 4 && a.D % 32 == 0 ? amx_bf16::attention_kernels : avx512::attention_kernels;
#endif
  return BW_KERNELS(attention_kernels);
}

// For more rows than the few-rows form takes.
inline const AttentionKernels& many_rows_kernels(const AttentionArgs& a) {
  return kernels_for(a, kMaxRowBlock);
}

// places: one per (row, KV head), or with per_token per (row, token, KV head).
std::tuple<Tensor, Tensor> run_attention(AttentionCall& call, const std::vector<Places>& places,
                                         bool per_token);

}  // namespace branchwise
