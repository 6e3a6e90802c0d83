// draft_blocks and verify_blocks: the steps of a masked-diffusion decoder, guessed and checked.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/check.h"
#include "cpu/empty.h"

namespace branchwise {
namespace {

enum class Rule { kCount, kThreshold, kBudget };

// What both ops are given, checked.
struct Steps {
  int64_t B, W, K, mask_id, block_size;
  Rule rule;
  double level;
  const int32_t* origins;  // [B]
  const int32_t* counts;   // [B, counts_width]
  int64_t counts_width;
  mutable std::vector<int32_t> order;

  int64_t block_of(int64_t row, int64_t i) const {
    const int64_t offset = i - origins[row];
    return offset < 0 ? -1 : offset / block_size;
  }

  // One step in place: in the first block that has masks, unmasks what the rule says, surest first
  // and of equals the lower position. False, and nothing done, where masks lack a prediction.
  bool step(int64_t row, int64_t* window, const int64_t* tokens, const float* scores, int64_t count,
            bool single) const {
    int64_t first = 0;
    while (first < W && window[first] != mask_id) ++first;
    if (first == W) return false;
    const int64_t block = block_of(row, first);
    order.clear();
    for (int64_t i = first; i < W && block_of(row, i) == block; ++i) {
      if (window[i] != mask_id) continue;
      if (!(scores[i] > -INFINITY)) return false;
      order.push_back(static_cast<int32_t>(i));
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
    size_t n = 1;
    if (!single) switch (rule) {
        case Rule::kCount:
          n = std::clamp<int64_t>(count, 1, order.size());
          break;
        case Rule::kThreshold:
          while (n < order.size() && scores[order[n]] >= level) ++n;
          break;
        case Rule::kBudget: {
          double sum = -double{scores[order[0]]};
          while (n < order.size() && (sum -= scores[order[n]]) <= level) ++n;
          break;
        }
      }
    for (size_t i = 0; i < n; ++i) window[order[i]] = tokens[order[i]];
    return true;
  }
};

Steps check_steps(const char* op, const Tensor& origins, const Tensor& counts, int64_t B, int64_t W,
                  int64_t K, int64_t mask_id, int64_t block_size, int64_t rule, double level) {
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
          static_cast<Rule>(rule),
          level,
          static_cast<const int32_t*>(origins.const_data_ptr()),
          static_cast<const int32_t*>(counts.const_data_ptr()),
          K + 1,
          {}};
}

template <typename T>
const T* data_of(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

}  // namespace

std::tuple<Tensor, Tensor> draft_blocks(Tensor window, Tensor tokens, Tensor scores, Tensor origins,
                                        Tensor counts, int64_t mask_id, int64_t block_size,
                                        int64_t rule, double level) {
  const char* op = "draft_blocks";
  check_dim(op, "window", window, 2, "[B, W]");
  check_dim(op, "counts", counts, 2, "[B, K + 1]");
  const int64_t B = window.size(0), W = window.size(1), K = counts.size(1) - 1;
  check_dtype(op, "window", window, ScalarType::Long);
  check_contiguous(op, "window", window);
  check_nodes(op, "tokens", tokens, B, W, ScalarType::Long);
  check_nodes(op, "scores", scores, B, W, ScalarType::Float);
  BW_CHECK(K >= 1, op, ": counts must have K + 1 columns for at least one draft, got shape ",
           shape_of(counts));
  const Steps steps = check_steps(op, origins, counts, B, W, K, mask_id, block_size, rule, level);
  Tensor drafts = empty<3>({B, K, W}, ScalarType::Long);
  Tensor num_drafts = empty<1>({B}, ScalarType::Int);
  int64_t* out = static_cast<int64_t*>(drafts.mutable_data_ptr());
  int32_t* num = static_cast<int32_t*>(num_drafts.mutable_data_ptr());
  for (int64_t b = 0; b < B; ++b) {
    const int64_t* before = data_of<int64_t>(window) + b * W;
    num[b] = 0;
    bool going = true;
    for (int64_t k = 0; k < K; ++k) {
      int64_t* draft = out + (b * K + k) * W;
      std::copy(before, before + W, draft);
      // Behind the first step of a rule that looks at scores, one position after the other.
      const bool single = k > 0 && steps.rule != Rule::kCount;
      going = going &&
              steps.step(b, draft, data_of<int64_t>(tokens) + b * W, data_of<float>(scores) + b * W,
                         steps.counts[b * steps.counts_width + k], single);
      num[b] += going;
      before = draft;
    }
  }
  return {drafts, num_drafts};
}

Tensor verify_blocks(Tensor drafts, Tensor num_drafts, Tensor tokens, Tensor scores, Tensor origins,
                     Tensor counts, int64_t mask_id, int64_t block_size, int64_t rule,
                     double level) {
  const char* op = "verify_blocks";
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
  const Steps steps = check_steps(op, origins, counts, B, W, K, mask_id, block_size, rule, level);
  const int32_t* num = data_of<int32_t>(num_drafts);
  for (int64_t b = 0; b < B; ++b)
    BW_CHECK(num[b] >= 0 && num[b] <= K, op, ": num_drafts[", b, "] = ", num[b],
             " must lie between 0 and K = ", K);
  Tensor accepted = empty<1>({B}, ScalarType::Int);
  int32_t* out = static_cast<int32_t*>(accepted.mutable_data_ptr());
  std::vector<int64_t> next(W);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t* rows = data_of<int64_t>(drafts) + b * K * W;
    int64_t best = num[b] > 0 ? 0 : -1;
    for (bool found = best == 0; found;) {
      found = false;
      std::copy_n(rows + best * W, W, next.begin());
      if (!steps.step(b, next.data(), data_of<int64_t>(tokens) + (b * K + best) * W,
                      data_of<float>(scores) + (b * K + best) * W,
                      steps.counts[b * steps.counts_width + best + 1], false))
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
