// Binding of the verification family: checks, and one row of the batch after another. The rules are
// in verify_rules.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "common/verify_call.h"
#include "cpu/empty.h"
#include "cpu/isa.h"
#include "cpu/verify_rules.h"

namespace branchwise {
namespace {

using Verdicts = std::tuple<Tensor, Tensor, Tensor>;

// A row that meets a node that is not ready returns a count of 0 and the node.
template <typename Rule>
Verdicts verify(const VerifyBatch& batch, Rule rule) {
  batch.check();
  const int64_t B = batch.tokens.size(0), T = batch.tokens.size(1);
  Tensor accepted = empty<2>({B, T}, ScalarType::Int);
  Tensor num_accepted = empty<1>({B}, ScalarType::Int);
  Tensor bonus = empty<1>({B}, ScalarType::Long);
  int32_t* const path = static_cast<int32_t*>(accepted.mutable_data_ptr());
  int32_t* const count = static_cast<int32_t*>(num_accepted.mutable_data_ptr());
  int64_t* const last = static_cast<int64_t*>(bonus.mutable_data_ptr());
  std::fill(path, path + B * T, -1);
  std::vector<std::string> errors(B);  // kept per row: the first row's is thrown, by this thread
  const VocabKernels& kernels = BW_KERNELS(vocab_kernels);
  torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      try {
        const Verdict verdict = rule(batch.row(b), kernels);
        std::copy(verdict.path.begin(), verdict.path.end(), path + b * T);
        count[b] = static_cast<int32_t>(verdict.path.size());
        last[b] = verdict.bonus;
      } catch (const NotReady& missing) {
        count[b] = 0;
        last[b] = missing.node;
      } catch (const std::exception& error) {
        errors[b] = error.what();
      }
    }
  });
  for (const std::string& error : errors) BW_CHECK(error.empty(), error);
  return {accepted, num_accepted, bonus};
}

}  // namespace

Verdicts verify_greedy(Tensor tokens, Tensor next_token, Tensor next_sibling, Tensor logits,
                       std::optional<Tensor> ready) {
  return verify({"verify_greedy", tokens, next_token, next_sibling, logits, ready},
                [](const VerifyRow& row, const VocabKernels& k) { return greedy(row, k); });
}

Verdicts verify_sample(Tensor tokens, Tensor next_token, Tensor next_sibling, Tensor logits,
                       Tensor uniforms, int64_t rule, double temperature, double threshold_single,
                       double threshold_accumulated, std::optional<Tensor> ready) {
  const char* op = "verify_sample";
  const Thresholds at{threshold_single, threshold_accumulated};
  check_sample(op, rule, at);
  return verify({op, tokens, next_token, next_sibling, logits, ready, temperature, &uniforms},
                [&](const VerifyRow& row, const VocabKernels& k) {
                  return sample(row, k, static_cast<SampleRule>(rule), at);
                });
}

namespace {

// The rules that weigh the target against the distribution that drafts were drawn from.
enum class Against { chain, multi_draft, block, traversal };

Verdicts verify_draft(const char* op, Against rule, const Tensor& tokens, const Tensor& next_token,
                      const Tensor& next_sibling, const Tensor& logits, const Tensor& draft,
                      const Tensor& draft_index, const Tensor& uniforms, bool replacement,
                      double temperature, const std::optional<Tensor>& ready) {
  return verify({op, tokens, next_token, next_sibling, logits, ready, temperature, &uniforms,
                 &draft, &draft_index},
                [&](const VerifyRow& row, const VocabKernels& k) {
                  if (rule == Against::chain || rule == Against::block) check_chain(row);
                  return rule == Against::chain || rule == Against::multi_draft
                             ? multi_draft(row, k, replacement)
                             : traversal(row, k, replacement);
                });
}

}  // namespace

Verdicts verify_chain(Tensor tokens, Tensor next_token, Tensor next_sibling, Tensor logits,
                      Tensor draft, Tensor draft_index, Tensor uniforms, double temperature,
                      std::optional<Tensor> ready) {
  return verify_draft("verify_chain", Against::chain, tokens, next_token, next_sibling, logits,
                      draft, draft_index, uniforms, true, temperature, ready);
}

Verdicts verify_multi_draft(Tensor tokens, Tensor next_token, Tensor next_sibling, Tensor logits,
                            Tensor draft, Tensor draft_index, Tensor uniforms, bool replacement,
                            double temperature, std::optional<Tensor> ready) {
  return verify_draft("verify_multi_draft", Against::multi_draft, tokens, next_token, next_sibling,
                      logits, draft, draft_index, uniforms, replacement, temperature, ready);
}

Verdicts verify_block(Tensor tokens, Tensor next_token, Tensor next_sibling, Tensor logits,
                      Tensor draft, Tensor draft_index, Tensor uniforms, double temperature,
                      std::optional<Tensor> ready) {
  return verify_draft("verify_block", Against::block, tokens, next_token, next_sibling, logits,
                      draft, draft_index, uniforms, true, temperature, ready);
}

Verdicts verify_traversal(Tensor tokens, Tensor next_token, Tensor next_sibling, Tensor logits,
                          Tensor draft, Tensor draft_index, Tensor uniforms, bool replacement,
                          double temperature, std::optional<Tensor> ready) {
  return verify_draft("verify_traversal", Against::traversal, tokens, next_token, next_sibling,
                      logits, draft, draft_index, uniforms, replacement, temperature, ready);
}

Verdicts verify_typical(Tensor tokens, Tensor next_token, Tensor next_sibling, Tensor logits,
                        Tensor uniforms, double epsilon, double alpha, double temperature,
                        std::optional<Tensor> ready) {
  const char* op = "verify_typical";
  check_typical(op, epsilon, alpha);
  return verify(
      {op, tokens, next_token, next_sibling, logits, ready, temperature, &uniforms},
      [&](const VerifyRow& row, const VocabKernels& k) { return typical(row, k, epsilon, alpha); });
}

Verdicts verify_policy(Tensor tokens, Tensor next_token, Tensor next_sibling, Tensor logits,
                       Tensor uniforms, int64_t policy_id, double threshold, double alpha,
                       int64_t top_k, bool first_only, double temperature,
                       std::optional<Tensor> ready) {
  const char* op = "verify_policy";
  const PolicyOptions options = check_policy(op, policy_id, threshold, alpha, top_k, first_only);
  return verify(
      {op, tokens, next_token, next_sibling, logits, ready, temperature, &uniforms},
      [&](const VerifyRow& row, const VocabKernels& k) { return policy(row, k, options); });
}

}  // namespace branchwise

STABLE_TORCH_LIBRARY_IMPL(branchwise, CPU, m) {
  m.impl("verify_greedy", TORCH_BOX(&branchwise::verify_greedy));
  m.impl("verify_sample", TORCH_BOX(&branchwise::verify_sample));
  m.impl("verify_chain", TORCH_BOX(&branchwise::verify_chain));
  m.impl("verify_multi_draft", TORCH_BOX(&branchwise::verify_multi_draft));
  m.impl("verify_block", TORCH_BOX(&branchwise::verify_block));
  m.impl("verify_traversal", TORCH_BOX(&branchwise::verify_traversal));
  m.impl("verify_typical", TORCH_BOX(&branchwise::verify_typical));
  m.impl("verify_policy", TORCH_BOX(&branchwise::verify_policy));
}
