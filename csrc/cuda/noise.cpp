// CUDA binding of node_uniforms.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/check.h"
#include "cuda/kernels/merge_attention.cuh"
#include "cuda/kernels/node_uniforms.cuh"
#include "cuda/stream.h"

namespace branchwise {

Tensor node_uniforms_cuda(Tensor seeds, Tensor rows, Tensor rounds, Tensor nodes, int64_t purpose) {
  check_noise_args(seeds, rows, rounds, nodes);
  const int32_t device = rounds.get_device_index();
  for (const Tensor* t : {&seeds, &rows, &nodes})
    BW_CHECK(t->get_device_index() == device,
             "node_uniforms: all tensors must be on one device, got ", t->get_device_index(),
             " and ", device);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t B = rounds.size(0), N = rounds.size(1);
  Tensor uniforms = torch::stable::new_empty(rounds, {B, N, 2}, ScalarType::Float);
  const auto data = [](const Tensor& t) { return static_cast<const int64_t*>(t.const_data_ptr()); };
  const int code = cuda::node_uniforms(data(seeds), data(rows), data(rounds), data(nodes), purpose,
                                       static_cast<float*>(uniforms.mutable_data_ptr()), B, N,
                                       current_cuda_stream(device));
  BW_CHECK(code == 0, "node_uniforms: CUDA launch failed: ", cuda::error_string(code));
  return uniforms;
}

}  // namespace branchwise

STABLE_TORCH_LIBRARY_IMPL(branchwise, CUDA, m) {
  m.impl("node_uniforms", TORCH_BOX(&branchwise::node_uniforms_cuda));
}
