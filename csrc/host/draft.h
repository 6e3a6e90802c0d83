// What a drafter of this folder proposes.
#pragma once
#include <cstdint>
#include <vector>

namespace branchwise {

struct Draft {
  std::vector<int32_t> tokens;   // [0] is the root: the last context token
  std::vector<int32_t> parents;  // parents[0] = -1, else an earlier node
  std::vector<float> scores;  // estimated probability that the node's path is right; scores[0] = 1
};

}  // namespace branchwise
