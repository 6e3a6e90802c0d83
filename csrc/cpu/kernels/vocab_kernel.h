// Passes over a row of logits, one value per token of the vocabulary: what the verification rules
// and the drafters ask of a kernel level. Results are per block of kVocabBlock tokens, so that
// whoever adds them up does it in a fixed order, and can find a token by its share of the mass with
// one more block.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace branchwise {

constexpr int64_t kVocabBlock = 1024;

struct LogitsRow {
  const void* data;
  DType type;
  int64_t size;  // V
  float scale;   // log2(e) / temperature
};

// Weight of token i: max(target * 2^((x[i] - top) * scale) - draft * q[i], 0); without q, the first
// term.
struct TokenWeights {
  LogitsRow row;
  float top;
  const float* q;  // draft probabilities, or null
  float target, draft;
};

struct VocabKernels {
  // Per stretch of `length` tokens: the largest logit.
  void (*maxima)(const LogitsRow&, int64_t length, float* largest);
  // Per block: the largest logit, and the sum of 2^((x - largest) * scale); NaN for a NaN or +inf.
  void (*softmax)(const LogitsRow&, float* largest, float* sum);
  // Per block: the sum of the weights, and of q.
  void (*sums)(const TokenWeights&, float* sum, float* q_sum);
  // The weights of tokens [begin, begin + count).
  void (*weights)(const TokenWeights&, int64_t begin, int64_t count, float* out);
  // Per block: the sum of w * (x - top) * scale, w the weights without q.
  void (*moments)(const TokenWeights&, float* sum);
  // How many of the logits [begin, end) are above a value, or not below it.
  int64_t (*count_above)(const LogitsRow&, int64_t begin, int64_t end, float value, bool or_equal);
  // Tokens of [begin, begin + count) whose logit is not below a value, in order; returns how many.
  // `tokens` and `logits` have room for `count`.
  int64_t (*find)(const LogitsRow&, int64_t begin, int64_t count, float value, int32_t* tokens,
                  float* logits);
};

namespace baseline {
extern const VocabKernels vocab_kernels;
}
namespace avx2 {
extern const VocabKernels vocab_kernels;
}
namespace avx512 {
extern const VocabKernels vocab_kernels;
}
namespace avx512_bf16 {
extern const VocabKernels vocab_kernels;
}

}  // namespace branchwise
