#include "cpu/residual.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "cpu/elements.h"

namespace branchwise {
namespace {

int64_t blocks_of(int64_t size) { return (size + kVocabBlock - 1) / kVocabBlock; }

double total(const std::vector<float>& blocks) {
  double sum = 0;
  for (const float x : blocks) sum += x;
  return sum;
}

}  // namespace

Residual::Residual(const VocabKernels& kernels, const LogitsRow& row, const float* q,
                   BlockSums& sums)
    : kernels_(&kernels), weights_{row, 0, q, 1, 0}, sums_(&sums) {
  const int64_t blocks = blocks_of(row.size);
  sums.mass.resize(blocks);
  sums.q_mass.resize(blocks);
  sums.largest.resize(blocks);
  kernels.softmax(row, sums.largest.data(), sums.mass.data());
  weights_.top = *std::max_element(sums.largest.begin(), sums.largest.end());
  for (int64_t b = 0; b < blocks; ++b)
    sums.mass[b] *= std::exp2((sums.largest[b] - weights_.top) * row.scale);
  mass_ = total(sums.mass);
}

bool Residual::valid() const { return std::isfinite(mass_) && mass_ > 0; }

double Residual::weight(int64_t token) const {
  for (const Gone& g : gone_)
    if (g.token == token) return g.weight;
  float w;
  kernels_->weights(weights_, token, 1, &w);
  return w;
}

double Residual::draft(int64_t token) const {
  for (const Gone& g : gone_)
    if (g.token == token && g.from_draft) return 0;
  return q_mass_ > 0 ? weights_.q[token] / q_mass_ : 0;
}

// H(p) = ln(mass) - sum_i w_i ln(w_i) / mass, with w_i relative to the largest one.
double Residual::entropy() const {
  std::vector<float> moments(blocks_of(weights_.row.size));
  kernels_->moments(weights_, moments.data());
  return std::log(mass_) - std::log(2.0) * total(moments) / mass_;
}

double Residual::block_mass(int64_t block) const {
  const int64_t begin = block * kVocabBlock;
  const int64_t count = std::min(kVocabBlock, weights_.row.size - begin);
  kernels_->weights(weights_, begin, count, sums_->block);
  for (const Gone& g : gone_)
    if (g.token / kVocabBlock == block)
      sums_->block[g.token - begin] = static_cast<float>(g.weight);
  return std::accumulate(sums_->block, sums_->block + count, 0.0);
}

// Of the tokens that are still there, rather than of all minus those that left, which would cancel.
double Residual::block_q_mass(int64_t block) const {
  const int64_t begin = block * kVocabBlock;
  const int64_t count = std::min(kVocabBlock, weights_.row.size - begin);
  std::copy_n(weights_.q + begin, count, sums_->block);
  for (const Gone& g : gone_)
    if (g.token / kVocabBlock == block) sums_->block[g.token - begin] = 0;
  return std::accumulate(sums_->block, sums_->block + count, 0.0);
}

void Residual::recompute() {
  kernels_->sums(weights_, sums_->mass.data(), sums_->q_mass.data());
  for (const Gone& g : gone_) {
    const int64_t block = g.token / kVocabBlock;
    sums_->mass[block] = static_cast<float>(block_mass(block));
    if (g.from_draft) sums_->q_mass[block] = static_cast<float>(block_q_mass(block));
  }
  mass_ = total(sums_->mass);
}

void Residual::remove(int64_t token) {
  const int64_t block = token / kVocabBlock;
  const double before = mass_;
  gone_.push_back({token, 0, false});
  sums_->mass[block] = static_cast<float>(block_mass(block));
  mass_ = total(sums_->mass);
  if (mass_ > kNoMass * before) return;
  gone_.pop_back();
  recompute();
}

double Residual::subtract(double accepted, int64_t token, bool replacement) {
  const Residual old = *this;
  const double shrink = accepted / mass_;
  if (!replacement) {
    gone_.push_back({token, std::max(0.0, old.weight(token) - draft(token) / shrink), true});
    q_gone_ += weights_.q[token];
  }
  for (Gone& g : gone_) g.weight *= shrink;
  weights_.draft = static_cast<float>(weights_.draft * shrink + 1 / q_mass_);
  weights_.target = static_cast<float>(weights_.target * shrink);
  recompute();
  const double left = mass_, q_left = total(sums_->q_mass), q_gone = q_gone_;
  if (left > kNoMass && std::isfinite(left)) {
    q_mass_ = q_left;
    return left;
  }
  *this = old;
  if (!replacement) gone_.push_back({token, old.weight(token), true});
  q_mass_ = q_left;
  q_gone_ = q_gone;
  recompute();
  return 0;
}

int64_t Residual::draw(float u) const {
  const double goal = u * mass_;
  int64_t block = 0;
  double before = 0, share = 0;
  for (size_t b = 0; b < sums_->mass.size(); ++b) {
    if (!(sums_->mass[b] > 0)) continue;
    before += share;
    share = sums_->mass[b];
    block = static_cast<int64_t>(b);
    if (before + share > goal) break;
  }
  const double in_block = block_mass(block) * (goal - before) / share;
  const int64_t begin = block * kVocabBlock;
  const int64_t count = std::min(kVocabBlock, weights_.row.size - begin);
  double cumulative = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (!(sums_->block[i] > 0)) continue;
    last = i;
    cumulative += sums_->block[i];
    if (cumulative > in_block) break;
  }
  return begin + last;
}

float logit(const LogitsRow& row, int64_t token) { return read_element(row.type, row.data, token); }

int64_t argmax(const VocabKernels& kernels, const LogitsRow& row, BlockSums& sums) {
  sums.largest.resize(blocks_of(row.size));
  kernels.maxima(row, kVocabBlock, sums.largest.data());
  const int64_t block =
      std::max_element(sums.largest.begin(), sums.largest.end()) - sums.largest.begin();
  const int64_t begin = block * kVocabBlock;
  const int64_t end = std::min(begin + kVocabBlock, row.size);
  for (int64_t i = begin; i < end; ++i)
    if (logit(row, i) == sums.largest[block]) return i;
  return begin;  // nothing but NaN
}

}  // namespace branchwise
