// Several drafts of one row made one.
#pragma once
#include <cstdint>
#include <vector>

#include "host/draft.h"

namespace branchwise {

// A draft as it is handed in: pointers to its own arrays.
struct DraftView {
  const int32_t* tokens;
  const int32_t* parents;
  const float* scores;
  const int32_t* ids;  // the drafter's own names for the nodes; null: their numbers
  int64_t size;        // nodes, at least the root
  int64_t fixed;       // leading nodes that must stay
};

constexpr int32_t kForeign = -2;  // the node is another drafter's

struct MergedDraft {
  Draft draft;
  int64_t fixed;
  std::vector<int32_t> names;  // [drafts][nodes]: what each drafter calls the node, or kForeign
};

// The union of the drafts' paths, equal ones once. A node's chance behind its parent lies halfway
// between the weighted mean of what the drafts say and the largest, cut where siblings together
// would be likelier than their parent. Fixed nodes come first, then the likeliest; at most `budget`
// nodes, or the fixed ones if they are more. All drafts have the same root. `factors`, [2^drafts]
// or null: what a node's chance behind its parent is multiplied by, by the set of drafts that have
// it (bit d: draft d). Throws std::invalid_argument on a parent that is not an earlier node.
MergedDraft merge_drafts(const std::vector<DraftView>& drafts, int64_t budget,
                         const float* factors = nullptr);

}  // namespace branchwise
