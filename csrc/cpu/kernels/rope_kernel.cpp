// Rotary position embedding, and rounding to e4m3, for one ISA level (BW_ISA).
#include "cpu/kernels/rope_kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace branchwise::BW_ISA {
namespace {

#include "cpu/kernels/half-inl.h"

// Each value pairs with the one R/2 further on, as transformers' rotate_half does:
// out[i] = x[i] cos[i] - x[i + R/2] sin[i],  out[i + R/2] = x[i + R/2] cos[i + R/2] + x[i] sin[..].
template <typename T, typename A>
void rotate(const RopeArgs& a, const T* key, const A* cos, const A* sin, T* out) {
  const int64_t half = a.R / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t n = half - i < kLanes ? half - i : kLanes;
    const f32v low = load_wide(key + i, n), high = load_wide(key + half + i, n);
    const f32v new_low = low * load_wide(cos + i, n) - high * load_wide(sin + i, n);
    const f32v new_high = high * load_wide(cos + half + i, n) + low * load_wide(sin + half + i, n);
    store_narrow(out + i, new_low, n);
    store_narrow(out + half + i, new_high, n);
  }
  __builtin_memcpy(out + a.R, key + a.R, (a.D - a.R) * sizeof(T));
}

void rotate_row(const RopeArgs& a, const void* key, const void* cos, const void* sin, void* out) {
  by_type(a.type, [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(key);
    if (a.angle_type == DType::f32)
      rotate(a, from, static_cast<const float*>(cos), static_cast<const float*>(sin),
             static_cast<T*>(out));
    else
      rotate(a, from, static_cast<const T*>(cos), static_cast<const T*>(sin), static_cast<T*>(out));
  });
}

void quantise_row(DType type, const void* row, int64_t D, float scale, void* out) {
  by_type(type, [&](auto value) {
    const auto* from = static_cast<const decltype(value)*>(row);
    for (int64_t d = 0; d < D; d += kLanes) {
      const int64_t n = D - d < kLanes ? D - d : kLanes;
      store_narrow(static_cast<E4m3*>(out) + d, load_wide(from + d, n) / scale, n);
    }
  });
}

}  // namespace

extern const RopeKernels rope_kernels;
const RopeKernels rope_kernels = {rotate_row, quantise_row};

}  // namespace branchwise::BW_ISA
