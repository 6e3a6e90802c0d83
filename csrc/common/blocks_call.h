// The arguments of draft_blocks and verify_blocks, and their checks.
#pragma once
#include <cstdint>

#include "common/blocks_args.h"
#include "common/check.h"

namespace branchwise {

// Of what both ops have in common; window, tokens and scores are yet to be filled in.
inline BlockSteps check_steps(const char* op, const Tensor& origins, const Tensor& counts,
                              int64_t B, int64_t W, int64_t K, int64_t mask_id, int64_t block_size,
                              int64_t rule, double level) {
  check_dim(op, "origins", origins, 1, "[B]");
  check_size(op, "origins", origins, 0, B, "B");
  check_dtype(op, "origins", origins, ScalarType::Int);
  check_contiguous(op, "origins", origins);
  check_dim(op, "counts", counts, 2, "[B, K + 1]");
  check_size(op, "counts", counts, 0, B, "B");
  check_size(op, "counts", counts, 1, K + 1, "K + 1");
  check_dtype(op, "counts", counts, ScalarType::Int);
  check_contiguous(op, "counts", counts);
  BW_CHECK(block_size >= 1, op, ": block_size must be at least 1, got ", block_size);
  BW_CHECK(rule >= 0 && rule <= 2, op, ": rule must be 0, 1 or 2, got ", rule);
  return {B,
          W,
          K,
          mask_id,
          block_size,
          static_cast<UnmaskRule>(rule),
          level,
          static_cast<const int32_t*>(origins.const_data_ptr()),
          static_cast<const int32_t*>(counts.const_data_ptr()),
          nullptr,
          nullptr};
}

inline BlockSteps check_draft_blocks(const char* op, const Tensor& window, const Tensor& tokens,
                                     const Tensor& scores, const Tensor& origins,
                                     const Tensor& counts, int64_t mask_id, int64_t block_size,
                                     int64_t rule, double level) {
  check_dim(op, "window", window, 2, "[B, W]");
  check_dim(op, "counts", counts, 2, "[B, K + 1]");
  const int64_t B = window.size(0), W = window.size(1), K = counts.size(1) - 1;
  check_dtype(op, "window", window, ScalarType::Long);
  check_contiguous(op, "window", window);
  check_nodes(op, "tokens", tokens, B, W, ScalarType::Long);
  check_nodes(op, "scores", scores, B, W, ScalarType::Float);
  BW_CHECK(K >= 1, op, ": counts must have K + 1 columns for at least one draft, got shape ",
           shape_of(counts));
  BlockSteps steps = check_steps(op, origins, counts, B, W, K, mask_id, block_size, rule, level);
  steps.tokens = static_cast<const int64_t*>(tokens.const_data_ptr());
  steps.scores = static_cast<const float*>(scores.const_data_ptr());
  return steps;
}

inline BlockSteps check_verify_blocks(const char* op, const Tensor& drafts,
                                      const Tensor& num_drafts, const Tensor& tokens,
                                      const Tensor& scores, const Tensor& origins,
                                      const Tensor& counts, int64_t mask_id, int64_t block_size,
                                      int64_t rule, double level) {
  check_dim(op, "drafts", drafts, 3, "[B, K, W]");
  check_dim(op, "tokens", tokens, 3, "[B, K, W]");
  check_dim(op, "scores", scores, 3, "[B, K, W]");
  const int64_t B = drafts.size(0), K = drafts.size(1), W = drafts.size(2);
  for (int i = 0; i < 3; ++i) {
    check_size(op, "tokens", tokens, i, drafts.size(i), "that of drafts");
    check_size(op, "scores", scores, i, drafts.size(i), "that of drafts");
  }
  check_dtype(op, "drafts", drafts, ScalarType::Long);
  check_dtype(op, "tokens", tokens, ScalarType::Long);
  check_dtype(op, "scores", scores, ScalarType::Float);
  check_contiguous(op, "drafts", drafts);
  check_contiguous(op, "tokens", tokens);
  check_contiguous(op, "scores", scores);
  check_dim(op, "num_drafts", num_drafts, 1, "[B]");
  check_size(op, "num_drafts", num_drafts, 0, B, "B");
  check_dtype(op, "num_drafts", num_drafts, ScalarType::Int);
  check_contiguous(op, "num_drafts", num_drafts);
  BlockSteps steps = check_steps(op, origins, counts, B, W, K, mask_id, block_size, rule, level);
  steps.tokens = static_cast<const int64_t*>(tokens.const_data_ptr());
  steps.scores = static_cast<const float*>(scores.const_data_ptr());
  if (kChecksValues) {
    const int32_t* num = static_cast<const int32_t*>(num_drafts.const_data_ptr());
    for (int64_t b = 0; b < B; ++b)
      BW_CHECK(num[b] >= 0 && num[b] <= K, op, ": num_drafts[", b, "] = ", num[b],
               " must lie between 0 and K = ", K);
  }
  return steps;
}

}  // namespace branchwise
