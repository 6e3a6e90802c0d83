// Attention over a KV cache: tree_attention and sparse_attention are one core that differs in the
// places of a row (common/attention_args.h), which the device works out from lengths and lists.
//
// A block takes packed rows of one KV head (row r: query head r % G of token r / G) and one split
// of their places, and leaves its unnormalised result in the workspace; a second launch merges the
// splits in ascending order. Rows with one split are finished at once.
#pragma once
#include <cstdint>

#include "common/attention_args.h"
#include "cuda/plan.h"

namespace branchwise::cuda {

struct AttentionLaunch {
  AttentionArgs args;  // but for depths
  Lists lists;         // indices null: none
  Ranges ranges;
  bool sparse;  // places from lists and ranges; otherwise dense
  int32_t window;
  const int32_t* seq_lens;
  int64_t lens_row_stride, lens_head_stride;
  int64_t B, capacity, pages;  // what lies outside capacity and pages is not read
  float* partial;              // [B, Hkv, blocks, splits, unit_floats]
  int64_t blocks, splits, most_splits, unit_floats;
  int32_t rows;  // packed rows of a block
};

// The matrix kernel of one element type, of one in the caches (the same, or E4m3) and one head dim,
// each instantiated in a source of its own.
template <typename Element, typename Stored, int HeadDim>
int launch_attention(const AttentionLaunch& launch, const AttentionPlan& plan, void* stream);

// The plan's kernel, and the merge if there can be several splits. Returns a CUDA error code.
int attend(const AttentionLaunch& launch, const AttentionPlan& plan, void* stream);

}  // namespace branchwise::cuda
