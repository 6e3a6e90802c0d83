// out = (out_a e^lse_a + out_b e^lse_b) / (e^lse_a + e^lse_b), shifted by the larger lse.
// One warp per row; rows are independent, so any grid gives the same bits.
#include "cuda/device.cuh"
#include "cuda/kernels/merge_attention.cuh"

namespace branchwise::cuda {
namespace {

constexpr int kWarpsPerBlock = 4;

template <typename T>
__global__ void merge_pair_kernel(const T* out_a, const float* lse_a, const T* out_b,
                                  const float* lse_b, T* out, float* lse, int64_t n, int64_t D) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = int64_t{gridDim.x} * kWarpsPerBlock;
  for (int64_t r = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / kWarp; r < n; r += warps) {
    const float la = lse_a[r], lb = lse_b[r], top = fmaxf(la, lb);
    const float shift = top == -INFINITY ? 0.f : top;
    const float wa = expf(la - shift), wb = expf(lb - shift), sum = wa + wb;
    const float inverse = sum > 0.f ? 1.f / sum : 0.f;
    if (lane == 0) lse[r] = sum > 0.f ? top + logf(sum) : -INFINITY;
    for (int64_t d = r * D + lane; d < (r + 1) * D; d += kWarp) {
      // An empty side may hold anything; it must not turn into 0 * NaN.
      const float from_a = wa > 0.f ? to_float(out_a[d]) * wa : 0.f;
      const float from_b = wb > 0.f ? to_float(out_b[d]) * wb : 0.f;
      from_float((from_a + from_b) * inverse, out + d);
    }
  }
}

}  // namespace

int merge_attention(DType type, const void* out_a, const float* lse_a, const void* out_b,
                    const float* lse_b, void* out, float* lse, int64_t n, int64_t D, void* stream) {
  if (n == 0) return 0;
  const Grid grid = grid_for((n + kWarpsPerBlock - 1) / kWarpsPerBlock);
  return dispatch(type, [&](auto element) {
    using T = decltype(element);
    return launch(merge_pair_kernel<T>, grid, kWarpsPerBlock * kWarp, 0, stream,
                  static_cast<const T*>(out_a), lse_a, static_cast<const T*>(out_b), lse_b,
                  static_cast<T*>(out), lse, n, D);
  });
}

}  // namespace branchwise::cuda
