// The path of every query node, as a list of slots.
#include "cuda/device.cuh"
#include "cuda/kernels/attention.cuh"
#include "cuda/kernels/places-inl.cuh"

namespace branchwise::cuda {
namespace {

// A warp per list: lanes take a word's bits, and count those below their own.
__global__ void __launch_bounds__(kWarp) paths_kernel(const __grid_constant__ PathsLaunch in) {
  const int64_t list = blockIdx.x, h = list % in.heads, token = list / in.heads % in.T;
  const int64_t b = list / in.heads / in.T, node = in.N - in.T + token;
  const int lane = threadIdx.x;
  const int32_t length = row_length(in, in.N, b, h);
  int32_t* slots = in.slots + list * in.N;
  int32_t count = 0;
  for (int64_t w = 0; w < in.W && w * 64 < in.N; ++w) {
    const auto word = static_cast<uint64_t>(in.tree_mask[(b * in.N + node) * in.W + w]);
    const uint64_t bits = word & low_bits(in.N - w * 64);
    for (int bit = lane; bit < 64; bit += kWarp)
      if ((bits >> bit & 1) != 0)
        slots[count + count_bits(bits & low_bits(bit))] =
            length + static_cast<int32_t>(w * 64 + bit);
    count += count_bits(bits);
  }
  if (lane == 0) in.counts[list] = count;
}

}  // namespace

int list_paths(const PathsLaunch& in, void* stream) {
  return launch(paths_kernel, Grid(static_cast<unsigned>(in.B * in.T * in.heads)), kWarp, 0, stream,
                in);
}

}  // namespace branchwise::cuda
