// out = (out_a e^lse_a + out_b e^lse_b) / (e^lse_a + e^lse_b), shifted by the larger lse.
// One warp per row; rows are independent, so any grid gives the same bits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/kernels/merge_attention.cuh"

namespace branchwise::cuda {
namespace {

constexpr int kWarpsPerBlock = 4;

__device__ float to_float(float x) { return x; }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ void from_float(float x, float* out) { *out = x; }
__device__ void from_float(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }
__device__ void from_float(float x, __half* out) { *out = __float2half_rn(x); }

template <typename T>
__global__ void merge_kernel(const T* out_a, const float* lse_a, const T* out_b, const float* lse_b,
                             T* out, float* lse, int64_t n, int64_t D) {
  const int lane = threadIdx.x % 32;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  for (int64_t r = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / 32; r < n;
       r += warps) {
    const float la = lse_a[r], lb = lse_b[r], top = fmaxf(la, lb);
    const float shift = top == -INFINITY ? 0.f : top;
    const float wa = expf(la - shift), wb = expf(lb - shift), sum = wa + wb;
    const float inverse = sum > 0.f ? 1.f / sum : 0.f;
    if (lane == 0) lse[r] = sum > 0.f ? top + logf(sum) : -INFINITY;
    for (int64_t d = r * D + lane; d < (r + 1) * D; d += 32) {
      // An empty side may hold anything; it must not turn into 0 * NaN.
      const float from_a = wa > 0.f ? to_float(out_a[d]) * wa : 0.f;
      const float from_b = wb > 0.f ? to_float(out_b[d]) * wb : 0.f;
      from_float((from_a + from_b) * inverse, out + d);
    }
  }
}

template <typename T>
int launch(const void* out_a, const float* lse_a, const void* out_b, const float* lse_b, void* out,
           float* lse, int64_t n, int64_t D, void* stream) {
  if (n == 0) return 0;
  const int64_t needed = (n + kWarpsPerBlock - 1) / kWarpsPerBlock;
  const unsigned grid = needed < 65535 ? static_cast<unsigned>(needed) : 65535u;
  const auto* a = static_cast<const T*>(out_a);
  const auto* b = static_cast<const T*>(out_b);
  // clang-format off
  merge_kernel<T><<<grid, kWarpsPerBlock * 32, 0, static_cast<cudaStream_t>(stream)>>>(
      a, lse_a, b, lse_b, static_cast<T*>(out), lse, n, D);
  // clang-format on
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int merge_attention(DType type, const void* out_a, const float* lse_a, const void* out_b,
                    const float* lse_b, void* out, float* lse, int64_t n, int64_t D, void* stream) {
  switch (type) {
    case DType::f32:
      return launch<float>(out_a, lse_a, out_b, lse_b, out, lse, n, D, stream);
    case DType::bf16:
      return launch<__nv_bfloat16>(out_a, lse_a, out_b, lse_b, out, lse, n, D, stream);
    case DType::f16:
      return launch<__half>(out_a, lse_a, out_b, lse_b, out, lse, n, D, stream);
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

const char* error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace branchwise::cuda
