// CUDA binding of the attention family: checks and launches.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/check.h"
#include "cuda/kernels/merge_attention.cuh"
#include "cuda/stream.h"

namespace branchwise {

std::tuple<Tensor, Tensor> merge_attention_cuda(Tensor out_a, Tensor lse_a, Tensor out_b,
                                                Tensor lse_b) {
  check_merge_args(out_a, lse_a, out_b, lse_b);
  for (const Tensor* t : {&lse_a, &out_b, &lse_b})
    BW_CHECK(t->get_device_index() == out_a.get_device_index(),
             "merge_attention: all tensors must be on one device, got ", t->get_device_index(),
             " and ", out_a.get_device_index());
  const torch::stable::accelerator::DeviceGuard guard(out_a.get_device_index());
  Tensor out = torch::stable::new_empty(out_a, out_a.sizes());
  Tensor lse = torch::stable::new_empty(lse_a, lse_a.sizes());
  const int code = cuda::merge_attention(
      dtype_of(out_a.scalar_type()), out_a.const_data_ptr(),
      static_cast<const float*>(lse_a.const_data_ptr()), out_b.const_data_ptr(),
      static_cast<const float*>(lse_b.const_data_ptr()), out.mutable_data_ptr(),
      static_cast<float*>(lse.mutable_data_ptr()), lse.numel(), out_a.size(3),
      current_cuda_stream(out_a.get_device_index()));
  BW_CHECK(code == 0, "merge_attention: CUDA launch failed: ", cuda::error_string(code));
  return {out, lse};
}

}  // namespace branchwise

STABLE_TORCH_LIBRARY_IMPL(branchwise, CUDA, m) {
  m.impl("merge_attention", TORCH_BOX(&branchwise::merge_attention_cuda));
}
