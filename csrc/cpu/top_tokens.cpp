// top_tokens: the likeliest tokens of rows of logits, one read of each row.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <optional>
#include <vector>

#include "common/vocab_call.h"
#include "cpu/empty.h"
#include "cpu/isa.h"
#include "cpu/kernels/vocab_kernel.h"

namespace branchwise {
namespace {

struct Candidate {
  float logit;
  int32_t token;
};

// Likelier first; of equals, the lower token.
bool before(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
}

struct Workspace {
  std::vector<float> largest, sums, found_logits, of_stretches;
  std::vector<int32_t> found_tokens, order;
  std::vector<Candidate> best;
};

// A value that at least `count` logits of a block reach: the count-th of the largest of its
// stretches. Without it, the first block that is searched would all be candidates.
float reached(const VocabKernels& kernels, const LogitsRow& block, int64_t count, Workspace& w) {
  constexpr int64_t kStretch = 64;
  const int64_t stretches = (block.size + kStretch - 1) / kStretch;
  if (stretches < count) return std::numeric_limits<float>::lowest();
  w.of_stretches.resize(stretches);
  kernels.maxima(block, kStretch, w.of_stretches.data());
  const auto nth = w.of_stretches.begin() + (count - 1);
  std::nth_element(w.of_stretches.begin(), nth, w.of_stretches.end(), std::greater<>());
  return std::max(*nth, std::numeric_limits<float>::lowest());
}

// The `count` likeliest tokens, in w.best, and the log of the row's sum of exponentials. Blocks are
// searched from the one with the largest logit on, until none can hold a token that counts.
double search(const VocabKernels& kernels, const LogitsRow& row, int64_t count, Workspace& w) {
  const int64_t blocks = (row.size + kVocabBlock - 1) / kVocabBlock;
  w.largest.resize(blocks);
  w.sums.resize(blocks);
  w.order.resize(blocks);
  w.found_logits.resize(kVocabBlock);
  w.found_tokens.resize(kVocabBlock);
  kernels.softmax(row, w.largest.data(), w.sums.data());
  std::iota(w.order.begin(), w.order.end(), 0);
  std::sort(w.order.begin(), w.order.end(), [&](int32_t a, int32_t b) {
    return w.largest[a] != w.largest[b] ? w.largest[a] > w.largest[b] : a < b;
  });
  w.best.clear();
  float least = std::numeric_limits<float>::lowest();  // -inf is no candidate
  for (const int32_t b : w.order) {
    if (w.largest[b] < least) break;
    const int64_t begin = b * kVocabBlock, size = std::min(kVocabBlock, row.size - begin);
    if (w.best.empty()) {
      const auto* data = static_cast<const char*>(row.data) + begin * bytes_of(row.type);
      least = reached(kernels, {data, row.type, size, row.scale}, count, w);
    }
    const int64_t found =
        kernels.find(row, begin, size, least, w.found_tokens.data(), w.found_logits.data());
    for (int64_t i = 0; i < found; ++i) w.best.push_back({w.found_logits[i], w.found_tokens[i]});
    if (static_cast<int64_t>(w.best.size()) < count) continue;
    std::nth_element(w.best.begin(), w.best.begin() + (count - 1), w.best.end(), before);
    w.best.resize(count);
    least = w.best.back().logit;
  }
  std::sort(w.best.begin(), w.best.end(), before);
  const float top = w.largest[w.order[0]];
  double sum = 0;
  for (int64_t b = 0; b < blocks; ++b)
    sum += w.sums[b] * std::exp2((static_cast<double>(w.largest[b]) - top) * row.scale);
  return top + std::log(sum);
}

}  // namespace

std::tuple<Tensor, Tensor> top_tokens(Tensor logits, int64_t k, std::optional<Tensor> exclude) {
  const char* op = "top_tokens";
  const VocabCall call = check_top_tokens(op, logits, k, exclude);
  const int64_t N = call.rows, V = call.V;
  Tensor tokens = empty<2>({N, k}, ScalarType::Int);
  Tensor log_probs = empty<2>({N, k}, ScalarType::Float);
  int32_t* out_tokens = static_cast<int32_t*>(tokens.mutable_data_ptr());
  float* out_log_probs = static_cast<float*>(log_probs.mutable_data_ptr());
  std::fill(out_tokens, out_tokens + N * k, -1);
  std::fill(out_log_probs, out_log_probs + N * k, -INFINITY);
  if (V == 0) return {tokens, log_probs};

  const VocabKernels& kernels = BW_KERNELS(vocab_kernels);
  const int64_t count = k + call.E;
  constexpr float kLog2e = 1.44269504f;
  torch::stable::parallel_for(
      0, N, std::max<int64_t>(1, 32768 / V), [&](int64_t begin, int64_t end) {
        Workspace w;
        for (int64_t row = begin; row < end; ++row) {
          const double log_sum =
              search(kernels, {call.data + row * call.row_bytes, call.type, V, kLog2e}, count, w);
          int64_t j = 0;
          for (const Candidate& c : w.best) {
            if (std::find(call.exclude, call.exclude + call.E, c.token) != call.exclude + call.E)
              continue;
            if (j == k) break;
            out_tokens[row * k + j] = c.token;
            out_log_probs[row * k + j++] = static_cast<float>(c.logit - log_sum);
          }
        }
      });
  return {tokens, log_probs};
}

}  // namespace branchwise

STABLE_TORCH_LIBRARY_IMPL(branchwise, CPU, m) {
  m.impl("top_tokens", TORCH_BOX(&branchwise::top_tokens));
}
