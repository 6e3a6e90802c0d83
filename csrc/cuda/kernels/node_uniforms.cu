// Philox noise, a thread per node: the same integers as on the CPU.
#include <cuda_runtime.h>

#include "common/philox.h"
#include "cuda/kernels/node_uniforms.cuh"

namespace branchwise::cuda {
namespace {

__global__ void node_uniforms_kernel(const int64_t* seeds, const int64_t* rows,
                                     const int64_t* rounds, const int64_t* nodes, int64_t purpose,
                                     float2* out, int64_t total, int64_t N) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total;
       i += step) {
    const NodeNoise noise = node_noise(seeds[i / N], rows[i / N], rounds[i], nodes[i], purpose);
    out[i] = make_float2(noise.accept, noise.draw);
  }
}

}  // namespace

int node_uniforms(const int64_t* seeds, const int64_t* rows, const int64_t* rounds,
                  const int64_t* nodes, int64_t purpose, float* out, int64_t B, int64_t N,
                  void* stream) {
  const int64_t total = B * N;
  if (total == 0) return 0;
  const int64_t blocks = (total + 127) / 128;
  node_uniforms_kernel<<<static_cast<unsigned>(blocks < 65535 ? blocks : 65535), 128, 0,
                         static_cast<cudaStream_t>(stream)>>>(
      seeds, rows, rounds, nodes, purpose, reinterpret_cast<float2*>(out), total, N);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace branchwise::cuda
