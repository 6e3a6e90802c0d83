// The acceptance rules, a block per row of the batch: the walks of cpu/verify_rules.cpp, on
// block-wide passes over the rows of logits.
#pragma once

#include "cuda/kernels/likeliest-inl.cuh"
#include "cuda/kernels/residual-inl.cuh"
#include "cuda/kernels/verify.cuh"

namespace branchwise::cuda {

// A node of traversal's path.
template <typename Element>
struct Frame {
  int32_t node, child;  // child: to be tried next, or -1
  double accepted;      // probability that the path down to the node is kept
  BlockResidual<Element> law;
};

// Rules that share a kernel.
enum class Family { greedy, sample, draft, traversal, typical, policy };
inline Family family_of(Rule rule) {
  return rule == Rule::greedy        ? Family::greedy
         : rule == Rule::multi_draft ? Family::draft
         : rule == Rule::traversal   ? Family::traversal
         : rule == Rule::typical     ? Family::typical
         : rule == Rule::policy      ? Family::policy
                                     : Family::sample;
}

// One row: its tensors, what the block shares, and the verdict so far.
template <typename Element>
struct BlockRow {
  const VerifyLaunch& in;
  VerifyRow row;
  Scratch& s;
  Gone* gone;
  Frame<Element>* frames;
  int32_t* path;  // in global memory
  int32_t length = 0;

  __device__ bool ready(int32_t node) const { return row.ready == nullptr || row.ready[node]; }
  __device__ const Element* logits(int32_t node) const {
    return reinterpret_cast<const Element*>(row.logits + node * row.node_bytes);
  }
  __device__ int32_t link(int32_t from, int32_t to) const {
    return to > from && to < row.T ? to : -1;
  }
  __device__ int32_t first_child(int32_t node) const { return link(node, row.next_token[node]); }
  __device__ int32_t sibling(int32_t node) const { return link(node, row.next_sibling[node]); }
  __device__ bool in_vocabulary(int32_t node) const {
    return row.tokens[node] >= 0 && row.tokens[node] < row.V;
  }
  __device__ float accept_coin(int32_t node) const { return row.uniforms[2 * node]; }
  __device__ float draw_coin(int32_t node) const { return row.uniforms[2 * node + 1]; }
  // Where a node's children were drawn from: null, and they are not tried, if nowhere.
  __device__ const float* draft(int32_t node) const {
    const int64_t r = row.draft_index[node];
    return r >= 0 && r < row.draft_rows ? row.draft + r * row.V : nullptr;
  }

  __device__ void keep(int32_t node) {
    if (threadIdx.x == 0) path[length] = node;
    ++length;
  }
  __device__ void finish(int64_t bonus) const {
    if (threadIdx.x != 0) return;
    in.num_accepted[blockIdx.x] = length;
    in.bonus[blockIdx.x] = bonus;
  }
  // Takes the row's path back: a node is not ready, or (-1) its logits are no distribution.
  __device__ void give_up(int64_t node) {
    sync_block();  // the path is written by the first thread
    for (int32_t i = threadIdx.x; i < length; i += kBlockThreads) path[i] = -1;
    length = 0;
    finish(node);
  }

  // What a rule decides at a node: the child to go to, or -1 and the token that ends the text.
  struct Step {
    int32_t child;
    int64_t bonus;
  };
  __device__ Step step_to(int32_t node, int64_t token) const {
    int32_t c = first_child(node);
    while (c >= 0 && row.tokens[c] != token) c = sibling(c);
    return {c, token};
  }

  __device__ Step each_child(BlockResidual<Element>& law, int32_t node) {
    for (int32_t c = first_child(node); c >= 0; c = sibling(c)) {
      if (!in_vocabulary(c)) continue;
      if (accept_coin(c) < law.probability(row.tokens[c])) return {c, 0};
      law.remove(row.tokens[c], s);
    }
    return {-1, law.draw(draw_coin(node), s)};
  }

  __device__ Step one_coin(BlockResidual<Element>& law, int32_t node) {
    double cumulative = 0;
    for (int32_t c = first_child(node); c >= 0; c = sibling(c)) {
      if (!in_vocabulary(c) || seen_before(node, c)) continue;
      const double p = law.probability(row.tokens[c]);
      cumulative += p;
      if (accept_coin(node) * in.thresholds.accumulated < cumulative || p >= in.thresholds.single)
        return {c, 0};
    }
    for (int32_t c = first_child(node); c >= 0; c = sibling(c))
      if (in_vocabulary(c) && !seen_before(node, c)) law.remove(row.tokens[c], s);
    return {-1, law.draw(draw_coin(node), s)};
  }
  __device__ bool seen_before(int32_t node, int32_t child) const {
    int32_t c = first_child(node);
    while (c != child && row.tokens[c] != row.tokens[child]) c = sibling(c);
    return c != child;
  }

  __device__ Step multi_draft(BlockResidual<Element>& law, int32_t node) {
    for (int32_t c = first_child(node); c >= 0 && law.q != nullptr; c = sibling(c)) {
      if (!in_vocabulary(c)) continue;
      const double drawn = law.drafted(row.tokens[c]);
      if (drawn <= 0) continue;  // the draft cannot have drawn it: as if it were not there
      if (accept_coin(c) * drawn < law.probability(row.tokens[c])) return {c, 0};
      law.subtract(1, row.tokens[c], in.replacement, s);
    }
    return {-1, law.draw(draw_coin(node), s)};
  }

  // `trusted`: the first doubtful token was the target's own choice, of a policy that then asks no
  // more.
  __device__ Step by_policy(BlockResidual<Element>& law, int32_t node, bool* trusted) {
    const PolicyOptions& o = in.policy;
    PolicyShared& shared = *reinterpret_cast<PolicyShared*>(gone);
    const bool by_choice = o.policy == Policy::greedy_match || o.policy == Policy::surprisal;
    double floor = o.threshold;
    if (o.policy == Policy::surprisal) floor = exp(-o.threshold);
    if (o.policy == Policy::typical) {
      const double typical = o.alpha * exp(-law.entropy(s));
      floor = typical < o.threshold ? typical : o.threshold;
    }
    const int64_t choice = by_choice ? block_argmax(logits(node), row.V, s) : -1;
    for (int32_t c = first_child(node); c >= 0; c = sibling(c)) {
      if (!in_vocabulary(c)) continue;
      const int64_t token = row.tokens[c];
      const double p = law.probability(token);
      bool good = token == choice;
      switch (o.policy) {
        case Policy::greedy_match:
          break;
        case Policy::surprisal:
          if (*trusted || p >= floor)
            good = true;
          else if (good)
            *trusted = o.first_only;
          break;
        case Policy::probability_floor:
          good = p >= floor && rank_of(logits(node), row.V, token, shared) < o.top_k;
          break;
        case Policy::typical:
          good = p > floor;
      }
      if (good) return {c, 0};
    }
    if (by_choice) return {-1, choice};
    const float u = draw_coin(node);
    if (o.policy == Policy::typical) return {-1, law.draw(u, s)};
    return {-1, draw_likeliest(logits(node), row.V, drawn_tokens(o, row.V), row.scale, u, shared)};
  }

  template <Family family>
  __device__ void walk() {
    int32_t node = 0;
    bool trusted = false;
    keep(0);
    for (;;) {
      if (!ready(node)) return give_up(node);
      Step step;
      if constexpr (family == Family::greedy) {
        step = step_to(node, block_argmax(logits(node), row.V, s));
      } else {
        BlockResidual<Element> law;
        const bool drafts = family == Family::draft && first_child(node) >= 0;
        law.begin(logits(node), drafts ? draft(node) : nullptr, row.V, row.scale, gone, s);
        if (!law.valid()) return give_up(-1);
        if constexpr (family == Family::draft)
          step = multi_draft(law, node);
        else if constexpr (family == Family::policy)
          step = by_policy(law, node, &trusted);
        else
          step = in.rule == Rule::each_child ? each_child(law, node)
                 : in.rule == Rule::one_coin ? one_coin(law, node)
                                             : step_to(node, law.draw(draw_coin(node), s));
      }
      if (step.child < 0) return finish(step.bonus);
      node = step.child;
      keep(node);
    }
  }

  // Frames are in shared memory; threads read one, compute alike, and the first of them writes.
  __device__ void store(int32_t at, const Frame<Element>& frame) {
    sync_block();
    if (threadIdx.x == 0) frames[at] = frame;
    sync_block();
  }
  __device__ bool enter(Frame<Element>& frame, int32_t node, double accepted, Gone* arena) {
    frame.node = node;
    frame.child = first_child(node);
    frame.accepted = accepted;
    const float* q = frame.child >= 0 ? draft(node) : nullptr;
    if (q == nullptr) frame.child = -1;
    frame.law.begin(logits(node), q, row.V, row.scale, arena, s);
    return frame.law.valid();
  }
  __device__ void accept(int32_t depth, const BlockResidual<Element>& law, int32_t leaf) {
    for (int32_t i = 0; i < depth; ++i) keep(frames[i].node);
    if (frames[depth - 1].node != leaf) keep(leaf);
    finish(law.draw(draw_coin(leaf), s));
  }

  __device__ void traversal() {
    int32_t depth = 1;
    Frame<Element> at;
    if (!ready(0)) return give_up(0);
    if (!enter(at, 0, 1, gone)) return give_up(-1);
    store(0, at);
    for (;;) {
      at = frames[depth - 1];
      if (at.child < 0) {
        if (depth == 1 || accept_coin(at.node) < at.accepted) {
          at.law.recompute(s);  // the workspace is that of the node that was left last
          return accept(depth, at.law, at.node);
        }
        --depth;
      } else {
        const int32_t child = at.child;
        const double drawn = in_vocabulary(child) ? at.law.drafted(row.tokens[child]) : 0;
        if (drawn <= 0) {
          at.child = sibling(child);
          store(depth - 1, at);
          continue;
        }
        const double p = at.accepted * at.law.probability(row.tokens[child]) / drawn;
        const double kept = p < 1 ? p : 1;
        if (first_child(child) >= 0 && kept > 0) {
          if (!ready(child)) return give_up(child);
          Frame<Element> below;
          if (!enter(below, child, kept, at.law.gone + at.law.num_gone)) return give_up(-1);
          store(depth, below);
          ++depth;
          continue;
        }
        // A leaf is tested before its logits are read.
        if (accept_coin(child) < kept) {
          if (!ready(child)) return give_up(child);
          BlockResidual<Element> law;
          law.begin(logits(child), nullptr, row.V, row.scale, at.law.gone + at.law.num_gone, s);
          if (!law.valid()) return give_up(-1);
          return accept(depth, law, child);
        }
      }
      // The child in turn is rejected; where it kept nothing, so is what hangs below it.
      at = frames[depth - 1];
      const int32_t rejected = at.child;
      at.child = sibling(rejected);
      // Rejections only lower what is kept: a coin that fails now fails without the pass, too.
      if (at.child >= 0 || depth == 1 || accept_coin(at.node) < at.accepted) {
        const double left = at.law.subtract(at.accepted, row.tokens[rejected], in.replacement, s);
        if (left > 0)
          at.accepted = left / (left + 1 - at.accepted);
        else if (at.accepted < 1)
          at.accepted = 0;
        // Nothing below a node that keeps nothing can be accepted.
        if (at.accepted <= 0) at.child = -1;
      }
      store(depth - 1, at);
    }
  }

  // The longest path of tokens that are typical, the likelier of two. Reached nodes are marked by
  // their likelihood, which takes the place of frames: parents come before children.
  __device__ void typical() {
    double* likelihood = reinterpret_cast<double*>(frames);  // -inf: not reached
    int32_t* parent = reinterpret_cast<int32_t*>(likelihood + row.T);
    int32_t* depth = parent + row.T;
    for (int64_t i = threadIdx.x; i < row.T; i += kBlockThreads) {
      likelihood[i] = i == 0 ? 0 : -INFINITY;
      depth[i] = 0;
    }
    sync_block();
    int32_t best = 0;
    BlockResidual<Element> law;
    for (int32_t node = 0; node < row.T; ++node) {
      if (likelihood[node] == -INFINITY) continue;
      if (depth[node] > depth[best] ||
          (depth[node] == depth[best] && likelihood[node] > likelihood[best]))
        best = node;
      if (first_child(node) < 0) continue;
      if (!ready(node)) return give_up(node);
      law.begin(logits(node), nullptr, row.V, row.scale, gone, s);
      if (!law.valid()) return give_up(-1);
      const double typical = in.alpha * exp(-law.entropy(s));
      const double floor = in.epsilon < typical ? in.epsilon : typical;
      for (int32_t c = first_child(node); c >= 0; c = sibling(c)) {
        const double p = in_vocabulary(c) ? law.probability(row.tokens[c]) : 0;
        if (p > floor && threadIdx.x == 0) {
          likelihood[c] = likelihood[node] + log(p);
          depth[c] = depth[node] + 1;
          parent[c] = node;
        }
      }
      sync_block();
    }
    if (!ready(best)) return give_up(best);
    length = depth[best] + 1;
    if (threadIdx.x == 0) {
      int32_t node = best;
      for (int32_t i = length - 1; i > 0; node = parent[node]) path[i--] = node;
      path[0] = 0;
    }
    law.begin(logits(best), nullptr, row.V, row.scale, gone, s);
    if (!law.valid()) return give_up(-1);
    finish(law.draw(draw_coin(best), s));
  }
};

// Shared memory: Scratch, gone tokens, frames.
template <typename Element, Family family>
__global__ void __launch_bounds__(kBlockThreads, 1)
    verify_kernel(const __grid_constant__ VerifyLaunch in) {
  const int64_t b = blockIdx.x, T = in.first.T;
  VerifyRow row = in.first;
  row.tokens += b * T;
  row.next_token += b * T;
  row.next_sibling += b * T;
  row.logits += b * in.row_bytes;
  if (row.uniforms != nullptr) row.uniforms += 2 * b * T;
  if (row.draft_index != nullptr) row.draft_index += b * T;
  if (row.ready != nullptr) row.ready += b * T;
  char* shared = shared_memory();
  Gone* gone = reinterpret_cast<Gone*>(shared + sizeof(Scratch));
  auto* frames = reinterpret_cast<Frame<Element>*>(gone + T);
  int32_t* path = in.accepted + b * T;
  for (int64_t i = threadIdx.x; i < T; i += kBlockThreads) path[i] = -1;
  sync_block();
  BlockRow<Element> block{in, row, *reinterpret_cast<Scratch*>(shared), gone, frames, path};
  if constexpr (family == Family::traversal)
    block.traversal();
  else if constexpr (family == Family::typical)
    block.typical();
  else
    block.template walk<family>();
}

}  // namespace branchwise::cuda
