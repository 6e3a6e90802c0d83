// Small kernels with a planted mistake each, and without it: what the emulator is to notice.
#include "cuda/device.cuh"
#include "cuda/emulate/faults.h"

namespace branchwise::cuda {
namespace {

// Each of two warps reads what the other one wrote, behind a barrier or not.
__global__ void exchange_kernel(bool planted, int* wrong) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (!planted) sync_block();
  const int other = static_cast<int>(threadIdx.x) ^ 32;
  if (shared[other] != other) wrong[threadIdx.x] += 1;
}

// Reads a copy after waiting for it, or before.
__global__ void copy_kernel(bool planted, int* wrong) {
  int* shared = reinterpret_cast<int*>(shared_memory()) + 4 * threadIdx.x;
  copy_async(shared, wrong, true);
  commit_copies();
  if (!planted) wait_copies<0>();
  if (shared[0] != wrong[0]) wrong[threadIdx.x] += 1;
}

// Half of a warp sums, the other half votes.
__global__ void part_kernel(bool planted, int* wrong) {
  if (planted && threadIdx.x % kWarp < 16)
    ballot(true);
  else
    wrong[threadIdx.x] = warp_sum(1) - kWarp;
}

// One warp leaves before a barrier.
__global__ void leave_kernel(bool planted, int*) {
  if (planted && threadIdx.x < kWarp) return;
  sync_block();
}

}  // namespace

int64_t run_fault(int64_t kind, bool planted) {
  alignas(16) int wrong[64] = {};
  for (int round = 0; round < 16; ++round)
    launch(kind == 0   ? exchange_kernel
           : kind == 1 ? copy_kernel
           : kind == 2 ? part_kernel
                       : leave_kernel,
           Grid(1), 64, 64 * 16, nullptr, planted, static_cast<int*>(wrong));
  int64_t all = 0;
  for (const int w : wrong) all += w;
  return all;
}

}  // namespace branchwise::cuda
