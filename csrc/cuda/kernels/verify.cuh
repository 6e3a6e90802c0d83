// The acceptance rules on device pointers, a block per row of the batch and one launch for all.
#pragma once
#include <cstdint>

#include "common/device.h"
#include "common/verify_row.h"

namespace branchwise::cuda {

enum class Rule : int {
  greedy,
  each_child,
  one_coin,
  match,
  multi_draft,
  traversal,
  typical,
  policy
};

struct VerifyLaunch {
  VerifyRow first;       // that of row 0: the others follow
  int64_t B, row_bytes;  // between the logits of rows
  Rule rule;
  Thresholds thresholds;  // one_coin
  double epsilon, alpha;  // typical
  PolicyOptions policy;
  bool replacement;       // multi_draft, traversal
  int32_t* accepted;      // [B, T]
  int32_t* num_accepted;  // [B]
  int64_t* bonus;         // [B]
};

// Of how many tokens a policy draws one, but for those that draw from all.
BW_HOST_DEVICE inline int64_t drawn_tokens(const PolicyOptions& policy, int64_t V) {
  if (policy.policy != Policy::probability_floor) return 0;
  return policy.top_k < V ? policy.top_k : V;
}

// Bytes of shared memory that trees of T nodes need, and a policy that draws from `top_k` tokens.
int64_t verify_shared_bytes(Rule rule, int64_t T, int64_t top_k = 0);

// Links that lead nowhere end a walk, tokens outside the vocabulary are never accepted. A row whose
// logits are no distribution (NaN, +inf, nothing above -inf) accepts nothing and has the bonus -1.
// Returns the CUDA error code of the launch.
int verify(const VerifyLaunch& launch, void* stream);

}  // namespace branchwise::cuda
