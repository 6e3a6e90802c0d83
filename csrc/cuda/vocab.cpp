// CUDA binding of the ops that read rows of logits one by one: top_tokens, confidence.
#include "cuda/kernels/vocab.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/vocab_call.h"
#include "cuda/plan.h"
#include "cuda/stream.h"

namespace branchwise {
namespace {

cuda::VocabLaunch launch_of(const VocabCall& call) {
  return {call.data, call.type, call.rows, call.V, call.row_bytes, call.exclude, call.E};
}

}  // namespace

std::tuple<Tensor, Tensor> top_tokens_cuda(Tensor logits, int64_t k,
                                           std::optional<Tensor> exclude) {
  const char* op = "top_tokens";
  const VocabCall call = check_top_tokens(op, logits, k, exclude);
  const OnDevice device(op, logits, {{"exclude", if_given(exclude)}});
  const int64_t bytes = cuda::top_tokens_bytes(std::min(k + call.E, call.V));
  BW_CHECK(bytes <= cuda::kMostSharedBytes, op, ": k = ", k, " needs ", bytes,
           " bytes of a block's shared memory on CUDA, and there are ", cuda::kMostSharedBytes);
  Tensor tokens = torch::stable::new_empty(logits, {call.rows, k}, ScalarType::Int);
  Tensor log_probs = torch::stable::new_empty(logits, {call.rows, k}, ScalarType::Float);
  check_launch(
      op, cuda::top_tokens({launch_of(call), k, static_cast<int32_t*>(tokens.mutable_data_ptr()),
                            static_cast<float*>(log_probs.mutable_data_ptr())},
                           device.stream()));
  return {tokens, log_probs};
}

std::tuple<Tensor, Tensor> confidence_cuda(Tensor logits, std::optional<Tensor> exclude,
                                           double temperature, std::optional<Tensor> keys,
                                           int64_t score) {
  const char* op = "confidence";
  const VocabCall call = check_vocab(op, "[R, V]", logits, exclude);
  const int64_t* key = check_confidence(op, call.rows, temperature, keys, score);
  const OnDevice device(op, logits, {{"exclude", if_given(exclude)}, {"keys", if_given(keys)}});
  Tensor tokens = torch::stable::new_empty(logits, {call.rows}, ScalarType::Long);
  Tensor scores = torch::stable::new_empty(logits, {call.rows}, ScalarType::Float);
  check_launch(op, cuda::confidence({launch_of(call), temperature, key, static_cast<int>(score),
                                     static_cast<int64_t*>(tokens.mutable_data_ptr()),
                                     static_cast<float*>(scores.mutable_data_ptr())},
                                    device.stream()));
  return {tokens, scores};
}

}  // namespace branchwise

BW_CUDA_LIBRARY(m) {
  m.impl("top_tokens", TORCH_BOX(&branchwise::top_tokens_cuda));
  m.impl("confidence", TORCH_BOX(&branchwise::confidence_cuda));
}
