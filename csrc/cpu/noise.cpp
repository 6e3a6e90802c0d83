// Binding of node_uniforms.
#include <torch/csrc/stable/library.h>

#include "common/check.h"
#include "common/philox.h"
#include "cpu/empty.h"

namespace branchwise {

Tensor node_uniforms(Tensor seeds, Tensor rows, Tensor rounds, Tensor nodes, int64_t purpose) {
  check_noise_args(seeds, rows, rounds, nodes);
  const int64_t B = rounds.size(0), N = rounds.size(1);
  Tensor uniforms = empty<3>({B, N, 2}, ScalarType::Float);
  const auto data = [](const Tensor& t) { return static_cast<const int64_t*>(t.const_data_ptr()); };
  float* out = static_cast<float*>(uniforms.mutable_data_ptr());
  for (int64_t i = 0; i < B * N; ++i) {
    const NodeNoise noise =
        node_noise(data(seeds)[i / N], data(rows)[i / N], data(rounds)[i], data(nodes)[i], purpose);
    out[2 * i] = noise.accept;
    out[2 * i + 1] = noise.draw;
  }
  return uniforms;
}

}  // namespace branchwise

STABLE_TORCH_LIBRARY_IMPL(branchwise, CPU, m) {
  m.impl("node_uniforms", TORCH_BOX(&branchwise::node_uniforms));
}
