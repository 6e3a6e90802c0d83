#include "cuda/device.cuh"
#include "cuda/kernels/layer.cuh"

namespace branchwise::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

// As if stored as Element and read again.
template <typename Element>
__device__ float rounded(float x) {
  Element e;
  from_float(x, &e);
  return to_float(e);
}

// A block per row, whose sums are added in one order always.
template <typename Element>
__global__ void __launch_bounds__(kThreads) norm_kernel(const __grid_constant__ NormArgs a) {
  float* const sums = reinterpret_cast<float*>(shared_memory());
  const Element* const x = static_cast<const Element*>(a.x) + blockIdx.x * a.H;
  Element* const out = static_cast<Element*>(a.out) + blockIdx.x * a.H;
  const int tid = threadIdx.x;
  float sum = 0.f;
  for (int64_t i = tid; i < a.H; i += kThreads) {
    const float v = to_float(x[i]);
    sum += v * v;
  }
  sum = warp_sum(sum);
  if (tid % kWarp == 0) sums[tid / kWarp] = sum;
  sync_block();
  sum = 0.f;
  for (int w = 0; w < kWarps; ++w) sum += sums[w];
  const float scale = 1.f / sqrtf(sum / static_cast<float>(a.H) + a.eps);
  for (int64_t i = tid; i < a.H; i += kThreads) {
    const float factor = a.offset + to_float(static_cast<const Element*>(a.weight)[i]);
    const float y = to_float(x[i]) * scale;
    from_float((a.weight_first ? y : rounded<Element>(y)) * factor, out + i);
  }
}

// A warp per row of D, of queries and then of keys.
template <typename Element>
__global__ void __launch_bounds__(kThreads) rotate_kernel(const __grid_constant__ RotateArgs a) {
  const int64_t heads = a.rows[0].heads + a.rows[1].heads, half = a.D / 2;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (row >= a.B * a.T * heads) return;
  const int64_t token = row / heads, b = token / a.T, t = token % a.T;
  const bool key = row % heads >= a.rows[0].heads;
  const RotateArgs::Rows& rows = a.rows[key ? 1 : 0];
  const int64_t h = row % heads - (key ? a.rows[0].heads : 0);
  const Element* const x = static_cast<const Element*>(rows.from) + b * rows.stride[0] +
                           h * rows.stride[1] + t * rows.stride[2];
  Element* const out = static_cast<Element*>(rows.to) + (token * rows.heads + h) * a.D;
  const Element* const cos =
      static_cast<const Element*>(a.cos) + b * a.cos_stride[0] + t * a.cos_stride[1];
  const Element* const sin =
      static_cast<const Element*>(a.sin) + b * a.sin_stride[0] + t * a.sin_stride[1];
  const auto sum = [&](float own, float other, int64_t i) {
    from_float(rounded<Element>(rounded_product(own, to_float(cos[i]))) +
                   rounded<Element>(rounded_product(other, to_float(sin[i]))),
               out + i);
  };
  for (int64_t i = threadIdx.x % kWarp; i < half; i += kWarp) {
    const float low = to_float(x[i]), high = to_float(x[half + i]);
    sum(low, -high, i);
    sum(high, low, half + i);
  }
}

}  // namespace

int rms_norm(const NormArgs& a, void* stream) {
  if (a.M == 0) return 0;
  return dispatch(a.type, [&](auto element) {
    return launch(norm_kernel<decltype(element)>, Grid(static_cast<unsigned>(a.M)), kThreads,
                  kWarps * 4, stream, a);
  });
}

int apply_rope(const RotateArgs& a, void* stream) {
  const int64_t rows = a.B * a.T * (a.rows[0].heads + a.rows[1].heads);
  if (rows == 0) return 0;
  return dispatch(a.type, [&](auto element) {
    return launch(rotate_kernel<decltype(element)>,
                  Grid(static_cast<unsigned>((rows + kWarps - 1) / kWarps)), kThreads, 0, stream,
                  a);
  });
}

}  // namespace branchwise::cuda
