// CUDA binding of draft_blocks and verify_blocks.
#include "cuda/kernels/blocks.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/blocks_call.h"
#include "cuda/plan.h"
#include "cuda/stream.h"

namespace branchwise {
namespace {

void check_window(const char* op, int64_t W) {
  BW_CHECK(cuda::blocks_bytes(W) <= cuda::kMostSharedBytes, op, ": windows of W = ", W,
           " tokens need ", cuda::blocks_bytes(W),
           " bytes of a block's shared memory on CUDA, and there are ", cuda::kMostSharedBytes);
}

}  // namespace

std::tuple<Tensor, Tensor> draft_blocks_cuda(Tensor window, Tensor tokens, Tensor scores,
                                             Tensor origins, Tensor counts, int64_t mask_id,
                                             int64_t block_size, int64_t rule, double level) {
  const char* op = "draft_blocks";
  const BlockSteps steps = check_draft_blocks(op, window, tokens, scores, origins, counts, mask_id,
                                              block_size, rule, level);
  const OnDevice device(
      op, window,
      {{"tokens", &tokens}, {"scores", &scores}, {"origins", &origins}, {"counts", &counts}});
  check_window(op, steps.W);
  Tensor drafts = torch::stable::new_empty(window, {steps.B, steps.K, steps.W}, ScalarType::Long);
  Tensor num_drafts = torch::stable::new_empty(window, {steps.B}, ScalarType::Int);
  check_launch(op, cuda::draft_blocks({steps, static_cast<const int64_t*>(window.const_data_ptr()),
                                       static_cast<int64_t*>(drafts.mutable_data_ptr()),
                                       static_cast<int32_t*>(num_drafts.mutable_data_ptr())},
                                      device.stream()));
  return {drafts, num_drafts};
}

Tensor verify_blocks_cuda(Tensor drafts, Tensor num_drafts, Tensor tokens, Tensor scores,
                          Tensor origins, Tensor counts, int64_t mask_id, int64_t block_size,
                          int64_t rule, double level) {
  const char* op = "verify_blocks";
  const BlockSteps steps = check_verify_blocks(op, drafts, num_drafts, tokens, scores, origins,
                                               counts, mask_id, block_size, rule, level);
  const OnDevice device(op, drafts,
                        {{"num_drafts", &num_drafts},
                         {"tokens", &tokens},
                         {"scores", &scores},
                         {"origins", &origins},
                         {"counts", &counts}});
  check_window(op, steps.W);
  Tensor accepted = torch::stable::new_empty(drafts, {steps.B}, ScalarType::Int);
  check_launch(op, cuda::verify_blocks({steps, static_cast<const int64_t*>(drafts.const_data_ptr()),
                                        static_cast<const int32_t*>(num_drafts.const_data_ptr()),
                                        static_cast<int32_t*>(accepted.mutable_data_ptr())},
                                       device.stream()));
  return accepted;
}

}  // namespace branchwise

BW_CUDA_LIBRARY(m) {
  m.impl("draft_blocks", TORCH_BOX(&branchwise::draft_blocks_cuda));
  m.impl("verify_blocks", TORCH_BOX(&branchwise::verify_blocks_cuda));
}
