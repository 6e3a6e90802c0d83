#include "cpu/verify_rules.h"

#include <algorithm>
#include <cmath>

#include "common/check.h"

namespace branchwise {
namespace {

thread_local BlockSums block_sums;

// Links only ever lead to later nodes, so that every walk ends whatever the tensors hold.
int32_t checked_link(const VerifyRow& row, const char* name, int32_t from, int32_t to) {
  BW_CHECK(to < 0 || (to > from && to < row.T), row.op, ": ", name, "[", row.batch, ", ", from,
           "] = ", to, " must be -1 or a later node below T = ", row.T);
  return to;
}
int32_t first_child(const VerifyRow& row, int32_t node) {
  return checked_link(row, "next_token", node, row.next_token[node]);
}
int32_t sibling(const VerifyRow& row, int32_t node) {
  return checked_link(row, "next_sibling", node, row.next_sibling[node]);
}

int64_t token_of(const VerifyRow& row, int32_t node) {
  const int64_t token = row.tokens[node];
  BW_CHECK(token >= 0 && token < row.V, row.op, ": tokens[", row.batch, ", ", node, "] = ", token,
           " must lie between 0 and V - 1 = ", row.V - 1);
  return token;
}
float accept_coin(const VerifyRow& row, int32_t node) { return row.uniforms[2 * node]; }
float draw_coin(const VerifyRow& row, int32_t node) { return row.uniforms[2 * node + 1]; }

LogitsRow logits_at(const VerifyRow& row, int32_t node) {
  if (row.ready != nullptr && !row.ready[node]) throw NotReady{node};
  return {row.logits + node * row.node_bytes, row.type, row.V, row.scale};
}

const float* draft_at(const VerifyRow& row, int32_t node) {
  const int64_t r = row.draft_index[node];
  BW_CHECK(r >= 0 && r < row.draft_rows, row.op, ": draft_index[", row.batch, ", ", node, "] = ", r,
           " must name a row of draft, below R = ", row.draft_rows, ", as the node has children");
  return row.draft + r * row.V;
}

Residual law_of(const VerifyRow& row, const VocabKernels& k, int32_t node, const float* q) {
  Residual law(k, logits_at(row, node), q, block_sums);
  BW_CHECK(law.valid(), row.op, ": logits[", row.batch, ", ", node,
           "] must hold something above -inf, and neither NaN nor +inf");
  return law;
}
Residual law_against_draft(const VerifyRow& row, const VocabKernels& k, int32_t node) {
  const bool leaf = first_child(row, node) < 0;
  return law_of(row, k, node, leaf ? nullptr : draft_at(row, node));
}

// Subtracts the draft after a rejection, and notices a draft that is no distribution.
double reject(const VerifyRow& row, Residual& law, double accepted, int32_t node, int32_t child,
              bool replacement) {
  const double left = law.subtract(accepted, token_of(row, child), replacement);
  const double mass = law.draft_mass();
  BW_CHECK(std::abs(mass - 1) < 1e-2, row.op, ": draft[", row.draft_index[node],
           "] must be probabilities that sum to 1, got a sum of ", mass);
  return left;
}

// What a rule decides at a node: the child to go to, or -1 and the token that ends the text.
struct Step {
  int32_t child;
  int64_t bonus;
};

template <typename Decide>
Verdict walk(Decide decide) {
  Verdict verdict{{0}, 0};
  for (;;) {
    const Step step = decide(verdict.path.back());
    if (step.child < 0) {
      verdict.bonus = step.bonus;
      return verdict;
    }
    verdict.path.push_back(step.child);
  }
}

template <typename F>
int32_t find_child(const VerifyRow& row, int32_t node, F accept) {
  for (int32_t c = first_child(row, node); c >= 0; c = sibling(row, c))
    if (accept(c)) return c;
  return -1;
}

Step step_to(const VerifyRow& row, int32_t node, int64_t token) {
  return {find_child(row, node, [&](int32_t c) { return row.tokens[c] == token; }), token};
}

Step each_child(const VerifyRow& row, const VocabKernels& k, int32_t node) {
  Residual law = law_of(row, k, node, nullptr);
  const int32_t child = find_child(row, node, [&](int32_t c) {
    if (accept_coin(row, c) < law.probability(token_of(row, c))) return true;
    law.remove(token_of(row, c));
    return false;
  });
  return {child, child < 0 ? law.draw(draw_coin(row, node)) : 0};
}

Step one_coin(const VerifyRow& row, const VocabKernels& k, int32_t node, Thresholds at) {
  Residual law = law_of(row, k, node, nullptr);
  std::vector<int64_t> seen;
  double cumulative = 0;
  const int32_t child = find_child(row, node, [&](int32_t c) {
    const int64_t token = token_of(row, c);
    if (std::find(seen.begin(), seen.end(), token) != seen.end()) return false;
    seen.push_back(token);
    const double p = law.probability(token);
    cumulative += p;
    return accept_coin(row, node) * at.accumulated < cumulative || p >= at.single;
  });
  if (child >= 0) return {child, 0};
  for (const int64_t token : seen) law.remove(token);
  return {-1, law.draw(draw_coin(row, node))};
}

// min(epsilon, alpha e^-H): what typical acceptance asks of a token's probability.
double typical_floor(const Residual& law, double epsilon, double alpha) {
  return std::min(epsilon, alpha * std::exp(-law.entropy()));
}

// A token among the `top_k` largest logits (lower ids win ties), by their probabilities.
int64_t draw_top_k(const LogitsRow& logits, int64_t top_k, float u) {
  struct Candidate {
    float value;
    int64_t token;
  };
  std::vector<Candidate> all(logits.size);
  for (int64_t i = 0; i < logits.size; ++i) all[i] = {logit(logits, i), i};
  const int64_t count = std::min(top_k, logits.size);
  std::nth_element(all.begin(), all.begin() + (count - 1), all.end(),
                   [](const Candidate& a, const Candidate& b) {
                     return a.value != b.value ? a.value > b.value : a.token < b.token;
                   });
  all.resize(count);
  float top = all[0].value;
  for (const Candidate& c : all) top = std::max(top, c.value);
  std::sort(all.begin(), all.end(),
            [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
  double mass = 0;
  for (const Candidate& c : all) mass += std::exp2((c.value - top) * logits.scale);
  double rest = u * mass;
  int64_t last = all[0].token;
  for (const Candidate& c : all) {
    const double weight = std::exp2((c.value - top) * logits.scale);
    if (weight == 0) continue;
    last = c.token;
    if ((rest -= weight) < 0) break;
  }
  return last;
}

int64_t rank(const VocabKernels& k, const LogitsRow& logits, int64_t token) {
  const float value = logit(logits, token);
  return k.count_above(logits, 0, token, value, true) +
         k.count_above(logits, token + 1, logits.size, value, false);
}

}  // namespace

void check_chain(const VerifyRow& row) {
  for (int32_t node = 0; node >= 0; node = first_child(row, node))
    BW_CHECK(row.next_sibling[node] < 0, row.op, ": next_sibling[", row.batch, ", ", node,
             "] = ", row.next_sibling[node], " must be -1: this rule takes chains only");
}

Verdict greedy(const VerifyRow& row, const VocabKernels& k) {
  return walk([&](int32_t node) {
    return step_to(row, node, argmax(k, logits_at(row, node), block_sums));
  });
}

Verdict sample(const VerifyRow& row, const VocabKernels& k, SampleRule rule, Thresholds at) {
  return walk([&](int32_t node) {
    switch (rule) {
      case SampleRule::each_child:
        return each_child(row, k, node);
      case SampleRule::one_coin:
        return one_coin(row, k, node, at);
      case SampleRule::match:
        break;
    }
    return step_to(row, node, law_of(row, k, node, nullptr).draw(draw_coin(row, node)));
  });
}

Verdict multi_draft(const VerifyRow& row, const VocabKernels& k, bool replacement) {
  return walk([&](int32_t node) {
    Residual law = law_against_draft(row, k, node);
    const int32_t child = find_child(row, node, [&](int32_t c) {
      const int64_t token = token_of(row, c);
      const double drawn = law.draft(token);
      if (drawn <= 0) return false;  // the draft cannot have drawn it: as if it were not there
      if (accept_coin(row, c) * drawn < law.probability(token)) return true;
      reject(row, law, 1, node, c, replacement);
      return false;
    });
    return Step{child, child < 0 ? law.draw(draw_coin(row, node)) : 0};
  });
}

Verdict traversal(const VerifyRow& row, const VocabKernels& k, bool replacement) {
  struct Frame {
    int32_t node;
    int32_t child;    // to be tried next, or -1
    double accepted;  // probability that the path down to the node is kept
    Residual law;
  };
  std::vector<Frame> stack;
  stack.push_back({0, first_child(row, 0), 1, law_against_draft(row, k, 0)});
  const auto accept = [&](const Residual& law, int32_t leaf) {
    Verdict verdict{{}, law.draw(draw_coin(row, leaf))};
    for (const Frame& frame : stack) verdict.path.push_back(frame.node);
    if (stack.back().node != leaf) verdict.path.push_back(leaf);
    return verdict;
  };
  for (;;) {
    Frame& at = stack.back();
    if (at.child < 0) {
      if (stack.size() == 1 || accept_coin(row, at.node) < at.accepted)
        return accept(at.law, at.node);
      stack.pop_back();
    } else {
      const int32_t child = at.child;
      const int64_t token = token_of(row, child);
      const double drawn = at.law.draft(token);
      if (drawn <= 0) {
        at.child = sibling(row, child);
        continue;
      }
      const double kept = std::min(1.0, at.accepted * at.law.probability(token) / drawn);
      const int32_t grandchild = first_child(row, child);
      if (grandchild >= 0 && kept > 0) {
        stack.push_back({child, grandchild, kept, law_against_draft(row, k, child)});
        continue;
      }
      // A leaf is tested before its logits are read.
      if (accept_coin(row, child) < kept) return accept(law_of(row, k, child, nullptr), child);
    }
    // The child in turn is rejected; where it kept nothing, so is what hangs below it.
    Frame& parent = stack.back();
    const int32_t rejected = parent.child;
    parent.child = sibling(row, rejected);
    // Rejections only lower what is kept: a coin that fails now fails without the pass, too.
    const bool decided =
        parent.child < 0 && stack.size() > 1 && accept_coin(row, parent.node) >= parent.accepted;
    if (decided) continue;
    const double left =
        reject(row, parent.law, parent.accepted, parent.node, rejected, replacement);
    if (left > 0)
      parent.accepted = left / (left + 1 - parent.accepted);
    else if (parent.accepted < 1)
      parent.accepted = 0;
    // Nothing below a node that keeps nothing can be accepted.
    if (parent.accepted <= 0) parent.child = -1;
  }
}

Verdict typical(const VerifyRow& row, const VocabKernels& k, double epsilon, double alpha) {
  struct Reached {
    int32_t node;
    size_t from;
    int64_t depth;
    double log_likelihood;
  };
  std::vector<Reached> reached{{0, 0, 0, 0}};
  size_t best = 0;
  for (size_t i = 0; i < reached.size(); ++i) {
    const Reached at = reached[i];
    const Reached& top = reached[best];
    if (at.depth > top.depth || (at.depth == top.depth && at.log_likelihood > top.log_likelihood))
      best = i;
    if (first_child(row, at.node) < 0) continue;
    const Residual law = law_of(row, k, at.node, nullptr);
    const double floor = typical_floor(law, epsilon, alpha);
    for (int32_t c = first_child(row, at.node); c >= 0; c = sibling(row, c)) {
      const double p = law.probability(token_of(row, c));
      if (p > floor) reached.push_back({c, i, at.depth + 1, at.log_likelihood + std::log(p)});
    }
  }
  const int32_t end = reached[best].node;
  Verdict verdict{{}, law_of(row, k, end, nullptr).draw(draw_coin(row, end))};
  for (size_t i = best; i != 0; i = reached[i].from) verdict.path.push_back(reached[i].node);
  verdict.path.push_back(0);
  std::reverse(verdict.path.begin(), verdict.path.end());
  return verdict;
}

Verdict policy(const VerifyRow& row, const VocabKernels& k, const PolicyOptions& o) {
  bool trusted = false;  // first_only: the first doubtful token was the target's own choice
  return walk([&](int32_t node) {
    const LogitsRow logits = logits_at(row, node);
    const Residual law = law_of(row, k, node, nullptr);
    const bool by_choice = o.policy == Policy::greedy_match || o.policy == Policy::surprisal;
    const double floor = o.policy == Policy::typical     ? typical_floor(law, o.threshold, o.alpha)
                         : o.policy == Policy::surprisal ? std::exp(-o.threshold)
                                                         : o.threshold;
    const int64_t choice = by_choice ? argmax(k, logits, block_sums) : -1;
    const int32_t child = find_child(row, node, [&](int32_t c) {
      const int64_t token = token_of(row, c);
      const double p = law.probability(token);
      switch (o.policy) {
        case Policy::greedy_match:
          return token == choice;
        case Policy::surprisal:
          if (trusted || p >= floor) return true;
          trusted = o.first_only && token == choice;
          return token == choice;
        case Policy::probability_floor:
          return p >= floor && rank(k, logits, token) < o.top_k;
        case Policy::typical:
          return p > floor;
      }
      return false;
    });
    if (child >= 0) return Step{child, 0};
    if (by_choice) return Step{-1, choice};
    const float u = draw_coin(row, node);
    return Step{-1, o.policy == Policy::typical ? law.draw(u) : draw_top_k(logits, o.top_k, u)};
  });
}

}  // namespace branchwise
