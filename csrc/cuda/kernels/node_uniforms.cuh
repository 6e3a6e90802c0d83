// node_uniforms on device pointers; returns the CUDA error code of the launch.
#pragma once
#include <cstdint>

namespace branchwise::cuda {

// seeds, rows: [B]; rounds, nodes: [B, N]; out: [B, N, 2].
int node_uniforms(const int64_t* seeds, const int64_t* rows, const int64_t* rounds,
                  const int64_t* nodes, int64_t purpose, float* out, int64_t B, int64_t N,
                  void* stream);

}  // namespace branchwise::cuda
