// Attention over a KV cache: tree_attention and sparse_attention are one core that differs in the
// places of a row (common/attention_args.h), which the device works out from lengths and lists.
//
// A block takes packed rows of one KV head (row r: query head r % G of token r / G) and one split
// of their places, and leaves its unnormalised result in the workspace; a second launch merges the
// splits in ascending order. Rows with one split are finished at once.
//
// path_attention computes a node from the keys of its text in order, cut at fixed places. Whole
// stretches of the prefix are the same for all nodes: one launch. A second one goes through what is
// left of the prefix and each node's path, a block per token; the merge takes both.
#pragma once
#include <cstdint>

#include "common/attention_args.h"
#include "cuda/plan.h"

namespace branchwise::cuda {

enum class PlacesFrom : uint8_t {
  length,  // dense
  lists,   // and ranges
  paths,   // path_attention: lists per token are the slots of its path; from the stretch on that
           // the prefix ends in, as those before it are all nodes' and another launch's
};

struct AttentionLaunch {
  AttentionArgs args;  // but for depths
  Lists lists;         // indices null: none
  Ranges ranges;
  PlacesFrom places_from;
  bool by_stretch;  // splits are stretches, their results always merged
  int32_t window;
  const int32_t* seq_lens;
  int64_t lens_row_stride, lens_head_stride;
  int64_t B, capacity, pages;  // what lies outside capacity and pages is not read
  float* partial;              // [B, Hkv, blocks, splits, unit_floats]
  int64_t blocks, splits, most_splits, unit_floats;
  int64_t first_batch, first_block;  // of a launch that computes a part
  int32_t rows;                      // packed rows of a block
};

// The matrix kernel of one element type, of one in the caches (the same, or E4m3) and one head dim,
// each instantiated in a source of its own.
template <typename Element, typename Stored, int HeadDim>
int launch_attention(const AttentionLaunch& launch, const AttentionPlan& plan, void* stream);

// The plan's kernel, and the merge if there can be several splits. Returns a CUDA error code.
int attend(const AttentionLaunch& launch, const AttentionPlan& plan, void* stream);
// Both launches of path_attention, and their merge.
int attend_paths(const AttentionLaunch& shared, const AttentionPlan& shared_plan,
                 const AttentionLaunch& own, const AttentionPlan& own_plan, void* stream);

// The lists that such launches read: slots of the ancestors of each of the last T nodes.
struct PathsLaunch {
  const int64_t* tree_mask;  // [B, N, W]
  const int32_t* seq_lens;
  int64_t lens_row_stride, lens_head_stride;
  int64_t B, T, heads, N, W, capacity;
  int32_t* slots;   // [B, T, heads, N]
  int32_t* counts;  // [B, T, heads]
};
int list_paths(const PathsLaunch& launch, void* stream);

}  // namespace branchwise::cuda
