// CUDA binding of the verification family: checks of shapes, one launch.
#include "cuda/kernels/verify.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "common/verify_call.h"
#include "cuda/plan.h"
#include "cuda/stream.h"

namespace branchwise {
namespace {

using Verdicts = std::tuple<Tensor, Tensor, Tensor>;
using cuda::Rule;

// options: but for what is common to all rules.
Verdicts run(const VerifyBatch& batch, Rule rule, cuda::VerifyLaunch launch = {}) {
  batch.check();
  const OnDevice device(batch.op, batch.logits,
                        {{"tokens", &batch.tokens},
                         {"next_token", &batch.next_token},
                         {"next_sibling", &batch.next_sibling},
                         {"uniforms", batch.uniforms},
                         {"draft", batch.draft},
                         {"draft_index", batch.draft_index},
                         {"ready", if_given(batch.ready)}});
  const int64_t B = batch.tokens.size(0), T = batch.tokens.size(1);
  const int64_t drawn = cuda::drawn_tokens(launch.policy, batch.logits.size(2));
  const int64_t bytes = cuda::verify_shared_bytes(rule, T, drawn);
  BW_CHECK(bytes <= cuda::kMostSharedBytes, batch.op, ": T = ", T, " nodes",
           drawn > 0 ? " and top_k = " + std::to_string(drawn) : std::string(), " need ", bytes,
           " bytes of a block's shared memory on CUDA, and there are ", cuda::kMostSharedBytes);
  Tensor accepted = torch::stable::new_empty(batch.logits, {B, T}, ScalarType::Int);
  Tensor num_accepted = torch::stable::new_empty(batch.logits, {B}, ScalarType::Int);
  Tensor bonus = torch::stable::new_empty(batch.logits, {B}, ScalarType::Long);
  launch.first = batch.row(0);
  launch.B = B;
  launch.row_bytes = batch.logits.stride(0) * static_cast<int64_t>(batch.logits.element_size());
  launch.rule = rule;
  launch.accepted = static_cast<int32_t*>(accepted.mutable_data_ptr());
  launch.num_accepted = static_cast<int32_t*>(num_accepted.mutable_data_ptr());
  launch.bonus = static_cast<int64_t*>(bonus.mutable_data_ptr());
  check_launch(batch.op, cuda::verify(launch, device.stream()));
  return {accepted, num_accepted, bonus};
}

Verdicts against_draft(const char* op, Rule rule, bool replacement, const Tensor& tokens,
                       const Tensor& next_token, const Tensor& next_sibling, const Tensor& logits,
                       const Tensor& draft, const Tensor& draft_index, const Tensor& uniforms,
                       double temperature, const std::optional<Tensor>& ready) {
  cuda::VerifyLaunch launch{};
  launch.replacement = replacement;
  return run({op, tokens, next_token, next_sibling, logits, ready, temperature, &uniforms, &draft,
              &draft_index},
             rule, launch);
}

}  // namespace

Verdicts verify_greedy_cuda(Tensor tokens, Tensor next_token, Tensor next_sibling, Tensor logits,
                            std::optional<Tensor> ready) {
  return run({"verify_greedy", tokens, next_token, next_sibling, logits, ready}, Rule::greedy);
}

Verdicts verify_sample_cuda(Tensor tokens, Tensor next_token, Tensor next_sibling, Tensor logits,
                            Tensor uniforms, int64_t rule, double temperature,
                            double threshold_single, double threshold_accumulated,
                            std::optional<Tensor> ready) {
  const char* op = "verify_sample";
  cuda::VerifyLaunch launch{};
  launch.thresholds = {threshold_single, threshold_accumulated};
  check_sample(op, rule, launch.thresholds);
  const Rule rules[] = {Rule::each_child, Rule::one_coin, Rule::match};
  return run({op, tokens, next_token, next_sibling, logits, ready, temperature, &uniforms},
             rules[rule], launch);
}

// A tree in place of a chain is not noticed here: its siblings then count as drawn with
// replacement.
Verdicts verify_chain_cuda(Tensor tokens, Tensor next_token, Tensor next_sibling, Tensor logits,
                           Tensor draft, Tensor draft_index, Tensor uniforms, double temperature,
                           std::optional<Tensor> ready) {
  return against_draft("verify_chain", Rule::multi_draft, true, tokens, next_token, next_sibling,
                       logits, draft, draft_index, uniforms, temperature, ready);
}

Verdicts verify_multi_draft_cuda(Tensor tokens, Tensor next_token, Tensor next_sibling,
                                 Tensor logits, Tensor draft, Tensor draft_index, Tensor uniforms,
                                 bool replacement, double temperature,
                                 std::optional<Tensor> ready) {
  return against_draft("verify_multi_draft", Rule::multi_draft, replacement, tokens, next_token,
                       next_sibling, logits, draft, draft_index, uniforms, temperature, ready);
}

Verdicts verify_block_cuda(Tensor tokens, Tensor next_token, Tensor next_sibling, Tensor logits,
                           Tensor draft, Tensor draft_index, Tensor uniforms, double temperature,
                           std::optional<Tensor> ready) {
  return against_draft("verify_block", Rule::traversal, true, tokens, next_token, next_sibling,
                       logits, draft, draft_index, uniforms, temperature, ready);
}

Verdicts verify_traversal_cuda(Tensor tokens, Tensor next_token, Tensor next_sibling, Tensor logits,
                               Tensor draft, Tensor draft_index, Tensor uniforms, bool replacement,
                               double temperature, std::optional<Tensor> ready) {
  return against_draft("verify_traversal", Rule::traversal, replacement, tokens, next_token,
                       next_sibling, logits, draft, draft_index, uniforms, temperature, ready);
}

Verdicts verify_typical_cuda(Tensor tokens, Tensor next_token, Tensor next_sibling, Tensor logits,
                             Tensor uniforms, double epsilon, double alpha, double temperature,
                             std::optional<Tensor> ready) {
  const char* op = "verify_typical";
  check_typical(op, epsilon, alpha);
  cuda::VerifyLaunch launch{};
  launch.epsilon = epsilon;
  launch.alpha = alpha;
  return run({op, tokens, next_token, next_sibling, logits, ready, temperature, &uniforms},
             Rule::typical, launch);
}

Verdicts verify_policy_cuda(Tensor tokens, Tensor next_token, Tensor next_sibling, Tensor logits,
                            Tensor uniforms, int64_t policy, double threshold, double alpha,
                            int64_t top_k, bool first_only, double temperature,
                            std::optional<Tensor> ready) {
  const char* op = "verify_policy";
  cuda::VerifyLaunch launch{};
  launch.policy = check_policy(op, policy, threshold, alpha, top_k, first_only);
  return run({op, tokens, next_token, next_sibling, logits, ready, temperature, &uniforms},
             Rule::policy, launch);
}

}  // namespace branchwise

BW_CUDA_LIBRARY(m) {
  m.impl("verify_greedy", TORCH_BOX(&branchwise::verify_greedy_cuda));
  m.impl("verify_sample", TORCH_BOX(&branchwise::verify_sample_cuda));
  m.impl("verify_chain", TORCH_BOX(&branchwise::verify_chain_cuda));
  m.impl("verify_multi_draft", TORCH_BOX(&branchwise::verify_multi_draft_cuda));
  m.impl("verify_block", TORCH_BOX(&branchwise::verify_block_cuda));
  m.impl("verify_traversal", TORCH_BOX(&branchwise::verify_traversal_cuda));
  m.impl("verify_typical", TORCH_BOX(&branchwise::verify_typical_cuda));
  m.impl("verify_policy", TORCH_BOX(&branchwise::verify_policy_cuda));
}
