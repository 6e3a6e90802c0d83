#include "host/merge_drafts.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace branchwise {

MergedDraft merge_drafts(const std::vector<DraftView>& drafts, int64_t budget,
                         const float* factors) {
  struct Node {
    int32_t token, parent;
    float score;
    bool fixed;
    uint32_t sources = 0;              // bit d: draft d has it
    int32_t child = -1, sibling = -1;  // lists of children, for finding equal paths
  };
  std::vector<Node> nodes{{drafts.at(0).tokens[0], -1, 1.f, true}};
  std::vector<std::vector<int32_t>> places(drafts.size());  // of every draft's nodes
  for (size_t d = 0; d < drafts.size(); ++d) {
    const DraftView& draft = drafts[d];
    places[d].assign(1, 0);
    for (int64_t i = 1; i < draft.size; ++i) {
      if (draft.parents[i] < 0 || draft.parents[i] >= i)
        throw std::invalid_argument("parents[" + std::to_string(i) + "] of draft " +
                                    std::to_string(d) + " must be an earlier node, got " +
                                    std::to_string(draft.parents[i]));
      const int32_t parent = places[d][draft.parents[i]];
      int32_t at = nodes[parent].child;
      while (at >= 0 && nodes[at].token != draft.tokens[i]) at = nodes[at].sibling;
      if (at < 0) {
        at = static_cast<int32_t>(nodes.size());
        nodes.push_back({draft.tokens[i], parent, draft.scores[i], i < draft.fixed});
        nodes[at].sibling = nodes[parent].child;
        nodes[parent].child = at;
      } else {
        nodes[at].score = std::max(nodes[at].score, draft.scores[i]);
        nodes[at].fixed |= i < draft.fixed;
      }
      if (factors != nullptr) nodes[at].sources |= 1u << d;
      places[d].push_back(at);
    }
  }

  MergedDraft merged;
  merged.fixed = 0;
  // Of a node's children, together, no more can be right than one: those that are trusted most take
  // their share first. Scores become products of such shares.
  std::vector<float> share(nodes.size());
  std::vector<int32_t> children;
  for (const Node& node : nodes) merged.fixed += node.fixed;
  for (size_t i = 1; i < nodes.size(); ++i) {
    const float above = nodes[nodes[i].parent].score;
    share[i] = above > 0 ? std::min(nodes[i].score / above, 1.f) : 0.f;
  }
  for (size_t i = 0; i < nodes.size(); ++i) {
    children.clear();
    for (int32_t c = nodes[i].child; c >= 0; c = nodes[c].sibling) children.push_back(c);
    std::sort(children.begin(), children.end(), [&](int32_t a, int32_t b) {
      return share[a] != share[b] ? share[a] > share[b] : a < b;
    });
    float left = 1;
    for (const int32_t c : children) {
      share[c] = std::min(share[c], left);
      left -= share[c];
    }
  }
  for (size_t i = 1; i < nodes.size(); ++i) {
    if (factors != nullptr) share[i] = std::min(share[i] * factors[nodes[i].sources], 1.f);
    nodes[i].score = nodes[nodes[i].parent].score * share[i];
  }
  // Parents, which come earlier and are never less likely, stay before their children.
  std::vector<int32_t> order(nodes.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    if (nodes[a].fixed != nodes[b].fixed) return nodes[a].fixed;
    return nodes[a].score > nodes[b].score;
  });
  const int64_t kept = std::max(budget, merged.fixed);
  if (static_cast<int64_t>(order.size()) > kept) order.resize(kept);
  std::vector<int32_t> rank(nodes.size(), -1);
  for (size_t i = 0; i < order.size(); ++i) rank[order[i]] = static_cast<int32_t>(i);
  for (const int32_t node : order) {
    merged.draft.tokens.push_back(nodes[node].token);
    merged.draft.parents.push_back(nodes[node].parent < 0 ? -1 : rank[nodes[node].parent]);
    merged.draft.scores.push_back(nodes[node].score);
  }
  merged.names.assign(drafts.size() * order.size(), kForeign);
  for (size_t d = 0; d < drafts.size(); ++d)
    for (size_t i = 0; i < places[d].size(); ++i)
      if (rank[places[d][i]] >= 0)
        merged.names[d * order.size() + rank[places[d][i]]] =
            drafts[d].ids != nullptr ? drafts[d].ids[i] : static_cast<int32_t>(i);
  return merged;
}

}  // namespace branchwise
