// Philox noise, a thread per node: the same integers as on the CPU.
#include "common/philox.h"
#include "cuda/device.cuh"
#include "cuda/kernels/node_uniforms.cuh"

namespace branchwise::cuda {
namespace {

constexpr int kThreads = 128;

__global__ void node_uniforms_kernel(const int64_t* seeds, const int64_t* rows,
                                     const int64_t* rounds, const int64_t* nodes, int64_t purpose,
                                     float* out, int64_t total, int64_t N) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < total; i += step) {
    const NodeNoise noise = node_noise(seeds[i / N], rows[i / N], rounds[i], nodes[i], purpose);
    out[2 * i] = noise.accept;
    out[2 * i + 1] = noise.draw;
  }
}

}  // namespace

int node_uniforms(const int64_t* seeds, const int64_t* rows, const int64_t* rounds,
                  const int64_t* nodes, int64_t purpose, float* out, int64_t B, int64_t N,
                  void* stream) {
  const int64_t total = B * N;
  if (total == 0) return 0;
  return launch(node_uniforms_kernel, grid_for((total + kThreads - 1) / kThreads), kThreads, 0,
                stream, seeds, rows, rounds, nodes, purpose, out, total, N);
}

}  // namespace branchwise::cuda
