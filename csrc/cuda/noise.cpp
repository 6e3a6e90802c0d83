// CUDA binding of node_uniforms.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/check.h"
#include "cuda/kernels/node_uniforms.cuh"
#include "cuda/stream.h"

namespace branchwise {

Tensor node_uniforms_cuda(Tensor seeds, Tensor rows, Tensor rounds, Tensor nodes, int64_t purpose) {
  const char* op = "node_uniforms";
  check_noise_args(seeds, rows, rounds, nodes);
  const OnDevice device(op, rounds, {{"seeds", &seeds}, {"rows", &rows}, {"nodes", &nodes}});
  const int64_t B = rounds.size(0), N = rounds.size(1);
  Tensor uniforms = torch::stable::new_empty(rounds, {B, N, 2}, ScalarType::Float);
  const auto data = [](const Tensor& t) { return static_cast<const int64_t*>(t.const_data_ptr()); };
  check_launch(op, cuda::node_uniforms(data(seeds), data(rows), data(rounds), data(nodes), purpose,
                                       static_cast<float*>(uniforms.mutable_data_ptr()), B, N,
                                       device.stream()));
  return uniforms;
}

}  // namespace branchwise

BW_CUDA_LIBRARY(m) { m.impl("node_uniforms", TORCH_BOX(&branchwise::node_uniforms_cuda)); }
