// confidence: the token of every row of logits and how sure the model is of it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "common/gumbel.h"
#include "common/vocab_call.h"
#include "cpu/empty.h"
#include "cpu/isa.h"
#include "cpu/kernels/vocab_kernel.h"

namespace branchwise {
namespace {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// A stretch of the vocabulary between excluded tokens.
struct Stretch {
  int64_t begin, size;
};

struct Row {
  const char* data;
  DType type;
  int64_t bytes;  // of one logit
  LogitsRow stretch(const Stretch& s) const {
    return {data + s.begin * bytes, type, s.size, static_cast<float>(kLog2e)};
  }
};

class Reader {
 public:
  Reader(const VocabKernels& kernels, const std::vector<Stretch>& stretches)
      : kernels_(kernels), stretches_(stretches), tokens_(kVocabBlock), logits_(kVocabBlock) {}

  // The token, and its score.
  std::pair<int64_t, float> read(const Row& row, double temperature, int64_t key, Score kind) {
    largest_.clear();
    sums_.clear();
    for (const Stretch& s : stretches_) {
      const int64_t blocks = (s.size + kVocabBlock - 1) / kVocabBlock, at = largest_.size();
      largest_.resize(at + blocks);
      sums_.resize(at + blocks);
      kernels_.softmax(row.stretch(s), largest_.data() + at, sums_.data() + at);
    }
    float top = -std::numeric_limits<float>::infinity();
    for (const float x : largest_) top = std::max(top, x);
    double sum = 0;
    for (size_t b = 0; b < largest_.size(); ++b)
      if (sums_[b] != 0)
        sum += sums_[b] * std::exp2((static_cast<double>(largest_[b]) - top) * kLog2e);
    // Logits with NaN or infinities, or nothing to choose from: no token, which is never chosen.
    if (!(sum > 0) || !std::isfinite(sum)) return {-1, -std::numeric_limits<float>::infinity()};

    int64_t token = -1;
    float logit = top, second = -std::numeric_limits<float>::infinity();
    double best = -std::numeric_limits<double>::infinity();
    const double least = temperature > 0 ? top - (kGumbelHigh - kGumbelLow) * temperature : top;
    for_each_above(row, kind == Score::margin ? -INFINITY : static_cast<float>(least),
                   [&](int64_t t, float x) {
                     if (x >= least) {
                       const double drawn =
                           temperature > 0 ? x / temperature + gumbel(key, t) : double{x};
                       if (drawn > best) best = drawn, token = t, logit = x;
                     }
                   });
    switch (kind) {
      case Score::probability:
        return {token, static_cast<float>(std::exp2((double{logit} - top) * kLog2e) / sum)};
      case Score::margin: {
        int64_t first = -1;
        for_each_above(row, -INFINITY, [&](int64_t t, float x) {
          if (x == top && first < 0)
            first = t;
          else
            second = std::max(second, x);
        });
        const double rest = second == -INFINITY ? 0 : std::exp2((double{second} - top) * kLog2e);
        return {token, static_cast<float>((1 - rest) / sum)};
      }
      default: {  // -H = sum p log p = (moment / sum - log2 sum) ln 2
        double moment = 0;
        for (const Stretch& s : stretches_) {
          moments_.resize((s.size + kVocabBlock - 1) / kVocabBlock);
          kernels_.moments({row.stretch(s), top, nullptr, 1.f, 0.f}, moments_.data());
          for (const float m : moments_) moment += m;
        }
        return {token, static_cast<float>((moment / sum - std::log2(sum)) * kLn2)};
      }
    }
  }

 private:
  // Calls f(token, logit) for the tokens whose logit is not below `least`, ascending.
  template <typename F>
  void for_each_above(const Row& row, float least, const F& f) {
    size_t b = 0;
    for (const Stretch& s : stretches_)
      for (int64_t begin = 0; begin < s.size; begin += kVocabBlock, ++b) {
        if (largest_[b] < least) continue;
        const int64_t found =
            kernels_.find(row.stretch(s), begin, std::min(kVocabBlock, s.size - begin), least,
                          tokens_.data(), logits_.data());
        for (int64_t i = 0; i < found; ++i) f(s.begin + tokens_[i], logits_[i]);
      }
  }

  const VocabKernels& kernels_;
  const std::vector<Stretch>& stretches_;
  std::vector<float> largest_, sums_, moments_;
  std::vector<int32_t> tokens_;
  std::vector<float> logits_;
};

}  // namespace

std::tuple<Tensor, Tensor> confidence(Tensor logits, std::optional<Tensor> exclude,
                                      double temperature, std::optional<Tensor> keys,
                                      int64_t score) {
  const char* op = "confidence";
  const VocabCall call = check_vocab(op, "[R, V]", logits, exclude);
  const int64_t R = call.rows, V = call.V;
  const int64_t* key = check_confidence(op, R, temperature, keys, score);
  std::vector<int64_t> cuts(call.exclude, call.exclude + call.E);
  std::sort(cuts.begin(), cuts.end());
  std::vector<Stretch> stretches;
  int64_t begin = 0;
  for (const int64_t cut : cuts) {
    if (cut < begin || cut >= V) continue;
    if (cut > begin) stretches.push_back({begin, cut - begin});
    begin = cut + 1;
  }
  if (begin < V) stretches.push_back({begin, V - begin});

  Tensor tokens = empty<1>({R}, ScalarType::Long);
  Tensor scores = empty<1>({R}, ScalarType::Float);
  int64_t* out_tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  float* out_scores = static_cast<float*>(scores.mutable_data_ptr());
  const VocabKernels& kernels = BW_KERNELS(vocab_kernels);
  torch::stable::parallel_for(
      0, R, std::max<int64_t>(1, 32768 / std::max<int64_t>(V, 1)), [&](int64_t from, int64_t to) {
        Reader reader(kernels, stretches);
        for (int64_t r = from; r < to; ++r) {
          const Row row{call.data + r * call.row_bytes, call.type,
                        static_cast<int64_t>(logits.element_size())};
          std::tie(out_tokens[r], out_scores[r]) =
              reader.read(row, temperature, key ? key[r] : 0, static_cast<Score>(score));
        }
      });
  return {tokens, scores};
}

}  // namespace branchwise

STABLE_TORCH_LIBRARY_IMPL(branchwise, CPU, m) {
  m.impl("confidence", TORCH_BOX(&branchwise::confidence));
}
