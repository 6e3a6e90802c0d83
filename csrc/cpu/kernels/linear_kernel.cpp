// Products of rows with a weight matrix for one ISA level (BW_ISA): vectors along K, weights read
// as they lie.
#include "cpu/kernels/linear_kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace branchwise::BW_ISA {
namespace {

#include "cpu/kernels/product-inl.h"

constexpr int kRows = kLanes == 16 ? 4 : 2;  // at once; as many sums as a vector has lanes
constexpr int kColumns = 16;

template <typename T>
struct ProductOf {
  using type = Fp32Product;
};
#if defined(__AVX512BF16__)
template <>
struct ProductOf<Bf16> {
  using type = Bf16Product;
};
#endif

// Vectors of a packed row.
template <typename Product>
int64_t steps(int64_t K) {
  constexpr int64_t kStep = kLanes * Product::kPack;
  return (K + kStep - 1) / kStep;
}

int64_t block_floats(DType type, int64_t K) {
  int64_t vectors = 0;
  by_type(type, [&](auto t) { vectors = steps<typename ProductOf<decltype(t)>::type>(K); });
  return kRows * vectors * kLanes;
}

// Rows that a block lacks are not written.
void pack(const LinearArgs& a, int64_t block, float* packed) {
  by_type(a.type, [&](auto type) {
    using T = decltype(type);
    using Product = typename ProductOf<T>::type;
    constexpr int64_t kStep = kLanes * Product::kPack;
    float* to = packed + block * block_floats(a.type, a.K);
    const int64_t end = (block + 1) * kRows < a.M ? (block + 1) * kRows : a.M;
    for (int64_t m = block * kRows; m < end; ++m) {
      const T* from = static_cast<const T*>(a.x) + m * a.K;
      for (int64_t k = 0; k < a.K; k += kStep, to += kLanes) {
        const auto v = k + kStep <= a.K ? Product::row(from + k) : Product::row(from + k, a.K - k);
        __builtin_memcpy(to, &v, sizeof v);
      }
    }
  });
}

// R rows from `m` on and kLanes / R columns from `n` on, of which N has the first `count`.
template <int R, typename T>
[[gnu::always_inline]] inline void product(const LinearArgs& a, const float* packed, int64_t m,
                                           int64_t n, int64_t count) {
  using Product = typename ProductOf<T>::type;
  using Vec = typename Product::Vec;
  constexpr int C = kLanes / R;
  constexpr int64_t kStep = kLanes * Product::kPack;
  const int64_t row_floats = steps<Product>(a.K) * kLanes;
  const T* weight[C];
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c)
    weight[c] = static_cast<const T*>(a.weight) + (n + (c < count ? c : 0)) * a.weight_stride;
  f32v sums[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) sums[i] = f32v{};
  const auto add = [&](int64_t k, auto load_weight) {
    Vec x[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) x[r] = load_as<Vec>(packed + r * row_floats + k / Product::kPack);
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      const Vec w = load_weight(weight[c] + k);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sums[r * C + c] = Product::multiply_add(x[r], w, sums[r * C + c]);
    }
  };
  int64_t k = 0;
  for (; k + kStep <= a.K; k += kStep) add(k, [](const T* p) { return Product::row(p); });
  if (k < a.K) add(k, [&](const T* p) { return Product::row(p, a.K - k); });

  float all[2 * kLanes] = {};
  store(all, folds<false>(sums));
  f32v bias = {};
  if (a.bias != nullptr) bias = load_wide(static_cast<const T*>(a.bias) + n, count);
  for (int r = 0; r < R; ++r)
    store_narrow(static_cast<T*>(a.out) + (m + r) * a.N + n, load(all + r * C) + bias, count);
}

// R rows from `m` on and all columns of the block.
template <int R, typename T>
void rows(const LinearArgs& a, const float* packed, int64_t m, int64_t begin, int64_t end) {
  constexpr int C = kLanes / R;
  for (int64_t n = begin; n < end; n += C)
    product<R, T>(a, packed, m, n, end - n < C ? end - n : int64_t{C});
}

void run(const LinearArgs& a, const float* packed, int64_t first, int64_t last, int64_t column) {
  by_type(a.type, [&](auto type) {
    using T = decltype(type);
    const int64_t floats = block_floats(a.type, a.K), row_floats = floats / kRows;
    const int64_t begin = column * kColumns, end = begin + kColumns < a.N ? begin + kColumns : a.N;
    for (int64_t block = first; block < last; ++block) {
      const float* x = packed + block * floats;
      int64_t m = block * kRows, left = a.M - m < kRows ? a.M - m : int64_t{kRows};
      if (left == kRows) {
        rows<kRows, T>(a, x, m, begin, end);
        continue;
      }
      if (kRows > 2 && left >= 2) {
        rows<2, T>(a, x, m, begin, end);
        x += 2 * row_floats, m += 2, left -= 2;
      }
      if (left > 0) rows<1, T>(a, x, m, begin, end);
    }
  });
}

}  // namespace

extern const LinearKernels linear_kernels;
const LinearKernels linear_kernels = {kRows, kColumns, block_floats, pack, run};

}  // namespace branchwise::BW_ISA
