// What an acceptance rule has left of the target's distribution at one node.
//
// Every exact rule starts with R = p and, when it rejects a drafted token, replaces R by
// norm(max(a R - D, 0)), where D is what is left of the draft distribution q. As p and q are not
// negative, the maxima collapse: after any number of rejections R is proportional to
// max(target * p - draft * q, 0), two numbers, except at tokens that have left D, which keep a
// weight of their own. So no probability is ever stored: a rejection is one pass over the two rows.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/kernels/vocab_kernel.h"

namespace branchwise {

// Workspace of a thread: sums per block of the residual that was changed last, and one block.
struct BlockSums {
  std::vector<float> mass, q_mass, largest;
  float block[kVocabBlock];
};

// Mass below which a residual is rounding noise; the rule then keeps what it had.
constexpr double kNoMass = 1e-12;

class Residual {
 public:
  // R = softmax of the row. q may be null for rules that do not read it.
  Residual(const VocabKernels& kernels, const LogitsRow& row, const float* q, BlockSums& sums);

  // False if the row holds NaN or +inf, or nothing above -inf.
  bool valid() const;
  double probability(int64_t token) const { return weight(token) / mass_; }
  double draft(int64_t token) const;  // D(token); 0 once it has left
  // Of q, as far as it is known: 1 until something was subtracted.
  double draft_mass() const { return q_mass_ + q_gone_; }
  double entropy() const;  // of the untouched row, in nats

  // R(token) = 0, unless nothing would be left.
  void remove(int64_t token);
  // R = norm(max(accepted R - D, 0)), and token leaves D if draws are not replaced. Returns the
  // mass before normalising; 0 leaves R as it is.
  double subtract(double accepted, int64_t token, bool replacement);
  // The first token whose cumulative share exceeds u. Only valid while no other residual has used
  // the workspace since the last change of this one.
  int64_t draw(float u) const;

 private:
  struct Gone {
    int64_t token;
    double weight;  // in units of mass_
    bool from_draft;
  };
  double weight(int64_t token) const;
  void recompute();
  double block_mass(int64_t block) const;  // leaves the weights in sums_->block
  double block_q_mass(int64_t block) const;

  const VocabKernels* kernels_;
  TokenWeights weights_;
  BlockSums* sums_;
  double mass_, q_mass_ = 1, q_gone_ = 0;
  std::vector<Gone> gone_;
};

// Lowest index of the largest logit.
int64_t argmax(const VocabKernels& kernels, const LogitsRow& row, BlockSums& sums);
float logit(const LogitsRow& row, int64_t token);

}  // namespace branchwise
