// draft_blocks and verify_blocks: the steps of a masked-diffusion decoder, guessed and checked.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/blocks_call.h"
#include "cpu/empty.h"

namespace branchwise {
namespace {

struct Stepper {
  const BlockSteps& in;
  std::vector<int32_t> order;

  // One step in place: in the first block that has masks, unmasks what the rule says, surest first
  // and of equals the lower position. False, and nothing done, where masks lack a prediction.
  bool step(int64_t row, int64_t* window, const int64_t* tokens, const float* scores, int64_t count,
            bool single) {
    int64_t first = 0;
    while (first < in.W && window[first] != in.mask_id) ++first;
    if (first == in.W) return false;
    const int64_t block = in.block_of(row, first);
    order.clear();
    for (int64_t i = first; i < in.W && in.block_of(row, i) == block; ++i) {
      if (window[i] != in.mask_id) continue;
      if (!(scores[i] > -INFINITY)) return false;
      order.push_back(static_cast<int32_t>(i));
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
    size_t n = 1;
    if (!single) switch (in.rule) {
        case UnmaskRule::count:
          n = std::clamp<int64_t>(count, 1, order.size());
          break;
        case UnmaskRule::threshold:
          while (n < order.size() && scores[order[n]] >= in.level) ++n;
          break;
        case UnmaskRule::budget: {
          double sum = -double{scores[order[0]]};
          while (n < order.size() && (sum -= scores[order[n]]) <= in.level) ++n;
          break;
        }
      }
    for (size_t i = 0; i < n; ++i) window[order[i]] = tokens[order[i]];
    return true;
  }
};

template <typename T>
const T* data_of(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

}  // namespace

std::tuple<Tensor, Tensor> draft_blocks(Tensor window, Tensor tokens, Tensor scores, Tensor origins,
                                        Tensor counts, int64_t mask_id, int64_t block_size,
                                        int64_t rule, double level) {
  const BlockSteps steps = check_draft_blocks("draft_blocks", window, tokens, scores, origins,
                                              counts, mask_id, block_size, rule, level);
  const auto [B, W, K] = std::tuple{steps.B, steps.W, steps.K};
  Tensor drafts = empty<3>({B, K, W}, ScalarType::Long);
  Tensor num_drafts = empty<1>({B}, ScalarType::Int);
  int64_t* out = static_cast<int64_t*>(drafts.mutable_data_ptr());
  int32_t* num = static_cast<int32_t*>(num_drafts.mutable_data_ptr());
  Stepper stepper{steps, {}};
  for (int64_t b = 0; b < B; ++b) {
    const int64_t* before = data_of<int64_t>(window) + b * W;
    num[b] = 0;
    bool going = true;
    for (int64_t k = 0; k < K; ++k) {
      int64_t* draft = out + (b * K + k) * W;
      std::copy(before, before + W, draft);
      // Behind the first step of a rule that looks at scores, one position after the other.
      const bool single = k > 0 && steps.rule != UnmaskRule::count;
      going = going && stepper.step(b, draft, steps.tokens + b * W, steps.scores + b * W,
                                    steps.count(b, k), single);
      num[b] += going;
      before = draft;
    }
  }
  return {drafts, num_drafts};
}

Tensor verify_blocks(Tensor drafts, Tensor num_drafts, Tensor tokens, Tensor scores, Tensor origins,
                     Tensor counts, int64_t mask_id, int64_t block_size, int64_t rule,
                     double level) {
  const BlockSteps steps = check_verify_blocks("verify_blocks", drafts, num_drafts, tokens, scores,
                                               origins, counts, mask_id, block_size, rule, level);
  const auto [B, W, K] = std::tuple{steps.B, steps.W, steps.K};
  const int32_t* num = data_of<int32_t>(num_drafts);
  Tensor accepted = empty<1>({B}, ScalarType::Int);
  int32_t* out = static_cast<int32_t*>(accepted.mutable_data_ptr());
  std::vector<int64_t> next(W);
  Stepper stepper{steps, {}};
  for (int64_t b = 0; b < B; ++b) {
    const int64_t* rows = data_of<int64_t>(drafts) + b * K * W;
    int64_t best = num[b] > 0 ? 0 : -1;
    for (bool found = best == 0; found;) {
      found = false;
      std::copy_n(rows + best * W, W, next.begin());
      const int64_t at = (b * K + best) * W;
      if (!stepper.step(b, next.data(), steps.tokens + at, steps.scores + at,
                        steps.count(b, best + 1), false))
        break;
      for (int64_t j = num[b] - 1; j > best && !found; --j)
        if (std::equal(next.begin(), next.end(), rows + j * W)) best = j, found = true;
    }
    out[b] = static_cast<int32_t>(best);
  }
  return accepted;
}

}  // namespace branchwise

STABLE_TORCH_LIBRARY_IMPL(branchwise, CPU, m) {
  m.impl("draft_blocks", TORCH_BOX(&branchwise::draft_blocks));
  m.impl("verify_blocks", TORCH_BOX(&branchwise::verify_blocks));
}
