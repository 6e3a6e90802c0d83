// RMS norms and rotary position embeddings for one ISA level (BW_ISA). Built without contraction of
// products and sums: results are rounded where the model's own code rounds them.
#include "cpu/kernels/layer_kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace branchwise::BW_ISA {
namespace {

#include "cpu/kernels/half-inl.h"

// As if stored as T and read again.
template <typename T>
f32v rounded(f32v v) {
  if constexpr (sizeof(T) == sizeof(float)) return v;
  T row[kLanes];
  store_narrow(row, v, kLanes);
  return load_wide(row);
}

template <typename T>
void norm_row(const NormArgs& a, const T* x, const T* weight, T* out) {
  constexpr int kSums = 4;  // chains of additions
  f32v sums[kSums] = {};
  for (int64_t i = 0; i < a.H; i += kSums * kLanes)
#pragma GCC unroll 4
    for (int s = 0; s < kSums; ++s) {
      const int64_t left = a.H - i - s * kLanes;
      if (left <= 0) break;
      const f32v v = load_wide(x + i + s * kLanes, left < kLanes ? left : kLanes);
      sums[s] += v * v;
    }
  const f32v sum = segment_sum<kLanes>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  const float scale = 1.f / __builtin_sqrtf(sum[0] / static_cast<float>(a.H) + a.eps);
  for (int64_t i = 0; i < a.H; i += kLanes) {
    const int64_t n = a.H - i < kLanes ? a.H - i : kLanes;
    f32v y = load_wide(x + i, n) * scale;
    if (!a.weight_first) y = rounded<T>(y);
    store_narrow(out + i, y * (a.offset + load_wide(weight + i, n)), n);
  }
}

void norm_rows(const NormArgs& a, int64_t begin, int64_t end) {
  by_type(a.type, [&](auto type) {
    using T = decltype(type);
    for (int64_t row = begin; row < end; ++row)
      norm_row(a, static_cast<const T*>(a.x) + row * a.H, static_cast<const T*>(a.weight),
               static_cast<T*>(a.out) + row * a.H);
  });
}

// Each value pairs with the one D/2 further on, as transformers' rotate_half does.
template <typename T>
void rotate_row(int64_t D, const T* x, const T* cos, const T* sin, T* out) {
  const int64_t half = D / 2;
  const auto sum = [&](f32v own, f32v other, int64_t i, int64_t n) {
    const f32v a = own * load_wide(cos + i, n), b = other * load_wide(sin + i, n);
    store_narrow(out + i, rounded<T>(a) + rounded<T>(b), n);
  };
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t n = half - i < kLanes ? half - i : kLanes;
    const f32v low = load_wide(x + i, n), high = load_wide(x + half + i, n);
    sum(low, -high, i, n);
    sum(high, low, half + i, n);
  }
}

void rotate_tokens(const RotateArgs& a, int64_t begin, int64_t end) {
  by_type(a.type, [&](auto type) {
    using T = decltype(type);
    for (int64_t token = begin; token < end; ++token) {
      const int64_t b = token / a.T, t = token % a.T;
      const T* cos = static_cast<const T*>(a.cos) + b * a.cos_stride[0] + t * a.cos_stride[1];
      const T* sin = static_cast<const T*>(a.sin) + b * a.sin_stride[0] + t * a.sin_stride[1];
      for (const RotateArgs::Rows& rows : a.rows)
        for (int64_t h = 0; h < rows.heads; ++h)
          rotate_row(a.D,
                     static_cast<const T*>(rows.from) + b * rows.stride[0] + h * rows.stride[1] +
                         t * rows.stride[2],
                     cos, sin, static_cast<T*>(rows.to) + (token * rows.heads + h) * a.D);
    }
  });
}

}  // namespace

extern const LayerKernels layer_kernels;
const LayerKernels layer_kernels = {norm_rows, rotate_tokens};

}  // namespace branchwise::BW_ISA
