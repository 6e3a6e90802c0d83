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
    bool fixed;
    uint32_t sources = 0;              // bit d: draft d has it
    int32_t child = -1, sibling = -1;  // lists of children, for finding equal paths
  };
  const size_t D = drafts.size();
  std::vector<Node> nodes{{drafts.at(0).tokens[0], -1, true}};
  // [nodes][drafts]: a draft's chance of a node behind its parent, and all of what it says about
  // the node's children.
  std::vector<float> chance(D, 0.f), mass(D, 0.f);
  std::vector<std::vector<int32_t>> places(D);  // of every draft's nodes
  for (size_t d = 0; d < D; ++d) {
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
        nodes.push_back({draft.tokens[i], parent, false});
        nodes[at].sibling = nodes[parent].child;
        nodes[parent].child = at;
        chance.resize(chance.size() + D, 0.f);
        mass.resize(mass.size() + D, 0.f);
      }
      nodes[at].fixed |= i < draft.fixed;
      if (factors != nullptr) nodes[at].sources |= 1u << d;
      const float score = draft.scores[i], above = draft.scores[draft.parents[i]];
      // NaN, too, is no chance: the sorts below need an order.
      const float own = score > 0 && above > 0 ? std::min(1.f, score / above) : 0.f;
      chance[at * D + d] = std::max(chance[at * D + d], own);
      mass[parent * D + d] += own;
      places[d].push_back(at);
    }
  }

  MergedDraft merged;
  merged.fixed = 0;
  // What the drafts say about a node's children is averaged, each weighed by how sure it is that
  // one of its children follows; the truth lies between that and the surest, who may have seen
  // more. Of all children, no more can be right than one: those that are trusted most take their
  // share first. Scores are products of such shares.
  std::vector<float> share(nodes.size()), scores(nodes.size(), 1.f);
  std::vector<int32_t> children;
  for (const Node& node : nodes) merged.fixed += node.fixed;
  for (size_t i = 1; i < nodes.size(); ++i) {
    const float *weights = &mass[nodes[i].parent * D], *own = &chance[i * D];
    const float all = std::accumulate(weights, weights + D, 0.f);
    const float mean = all > 0 ? std::inner_product(weights, weights + D, own, 0.f) / all : 0.f;
    share[i] = (mean + *std::max_element(own, own + D)) / 2;
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
    scores[i] = scores[nodes[i].parent] * share[i];
  }
  // Parents, which come earlier and are never less likely, stay before their children.
  std::vector<int32_t> order(nodes.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    if (nodes[a].fixed != nodes[b].fixed) return nodes[a].fixed;
    return scores[a] > scores[b];
  });
  const int64_t kept = std::max(budget, merged.fixed);
  if (static_cast<int64_t>(order.size()) > kept) order.resize(kept);
  std::vector<int32_t> rank(nodes.size(), -1);
  for (size_t i = 0; i < order.size(); ++i) rank[order[i]] = static_cast<int32_t>(i);
  for (const int32_t node : order) {
    merged.draft.tokens.push_back(nodes[node].token);
    merged.draft.parents.push_back(nodes[node].parent < 0 ? -1 : rank[nodes[node].parent]);
    merged.draft.scores.push_back(scores[node]);
  }
  merged.names.assign(D * order.size(), kForeign);
  for (size_t d = 0; d < D; ++d)
    for (size_t i = 0; i < places[d].size(); ++i)
      if (rank[places[d][i]] >= 0)
        merged.names[d * order.size() + rank[places[d][i]]] =
            drafts[d].ids != nullptr ? drafts[d].ids[i] : static_cast<int32_t>(i);
  return merged;
}

}  // namespace branchwise
