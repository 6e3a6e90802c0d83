// Products of rows with a weight matrix for one ISA level (BW_ISA): vectors along K, weights read
// as they lie.
#include "cpu/kernels/linear_kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace branchwise::BW_ISA {
namespace {

#include "cpu/kernels/linear_lanes-inl.h"
#include "cpu/kernels/product-inl.h"

// From so many rows on they are the lanes, which takes whole vectors of them: two with AVX-512.
constexpr int64_t kLeastInLanes = kRegisters == 32 ? 32 : 16;
inline bool rows_in_lanes(int64_t M) { return M >= kLeastInLanes; }

constexpr int64_t kStretch = 32;  // vectors along K whose weights stay in the innermost cache
constexpr int64_t kSums = kLanes * kLanes;  // of rows and columns that are computed at once
// Columns that R rows pass by at once: as many as give kLanes sums.
constexpr int few_columns(int R) { return R == 3 ? kLanes / 4 : kLanes / R; }

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

// Floats of a packed row.
template <typename Product>
int64_t row_floats(int64_t K) {
  return steps<Product>(K) * kLanes;
}

int64_t block_floats(DType type, int64_t K) {
  int64_t row = 0;
  by_type(type, [&](auto t) { row = row_floats<typename ProductOf<decltype(t)>::type>(K); });
  return kLanes * row;
}

// Rows that a block lacks are not written.
void pack(const LinearArgs& a, int64_t block, float* packed) {
  by_type(a.type, [&](auto type) {
    using T = decltype(type);
    using Product = typename ProductOf<T>::type;
    constexpr int64_t kStep = kLanes * Product::kPack;
    packed += block * block_floats(a.type, a.K);
    if (rows_in_lanes(a.M)) return pack_lanes<T, Product>(a, block, packed);
    const int64_t end = (block + 1) * kLanes < a.M ? (block + 1) * kLanes : a.M;
    for (int64_t m = block * kLanes; m < end; ++m, packed += row_floats<Product>(a.K)) {
      const T* from = static_cast<const T*>(a.x) + m * a.K;
      float* to = packed;
      for (int64_t k = 0; k < a.K; k += kStep, to += kLanes) {
        const auto v = k + kStep <= a.K ? Product::row(from + k) : Product::row(from + k, a.K - k);
        __builtin_memcpy(to, &v, sizeof v);
      }
    }
  });
}

// Terms [k, end) of sums, for one of so many blocks of rows that pass by the same weights in turn.
struct Part {
  int64_t k, end, turn, turns;
};

// R rows from `m` on and C columns from `n` on, of which N has the first `count`. `partial` keeps
// sums that are not yet complete.
template <int R, int C, typename T>
void product(const LinearArgs& a, const float* packed, int64_t m, int64_t n, int64_t count,
             const Part& part, float* partial) {
  using Product = typename ProductOf<T>::type;
  using Vec = typename Product::Vec;
  constexpr int64_t kStep = kLanes * Product::kPack;
  constexpr int64_t kLine = kStep * sizeof(T) < 64 ? 64 / sizeof(T) : kStep;
  const int64_t row = row_floats<Product>(a.K);
  const T *weight[C], *asked[C];
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) {
    weight[c] = static_cast<const T*>(a.weight) + (n + (c < count ? c : 0)) * a.weight_stride;
    // Each turn asks for its share of the next block's weights: memory has no pause then. Into the
    // second cache level, where requests do not hold up loads.
    const bool share = n + kTile + c < a.N && c % part.turns == part.turn;
    asked[c] = weight[c] + (share ? kTile * a.weight_stride : 0);
  }
  int64_t k = part.k;
  const int64_t end = part.end;
  f32v sums[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) sums[i] = k == 0 ? f32v{} : load(partial + i * kLanes);
  const auto add = [&](int64_t k, auto load_weight) {
    Vec x[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) x[r] = load_as<Vec>(packed + r * row + k / Product::kPack);
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      const Vec w = load_weight(weight[c] + k);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sums[r * C + c] = Product::multiply_add(x[r], w, sums[r * C + c]);
    }
  };
  const auto whole = [](const T* p) { return Product::row(p); };
  for (; k + kLine <= end; k += kLine) {
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) __builtin_prefetch(asked[c] + k, 0, 2);
#pragma GCC unroll 4
    for (int64_t i = 0; i < kLine; i += kStep) add(k + i, whole);
  }
  for (; k + kStep <= end; k += kStep) add(k, whole);
  if (end < a.K) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(partial + i * kLanes, sums[i]);
    return;
  }
  if (k < end) add(k, [&](const T* p) { return Product::row(p, end - k); });

  float all[2 * kLanes] = {};
  store(all, folds<false>(sums));
  f32v bias = {};
  if (a.bias != nullptr) bias = load_wide(static_cast<const T*>(a.bias) + n, count);
  for (int r = 0; r < R; ++r)
    store_narrow(static_cast<T*>(a.out) + (m + r) * a.N + n, load(all + r * C) + bias, count);
}

// Few rows: up to four at a time pass by as many columns as give kLanes sums.
template <typename T>
void run_few(const LinearArgs& a, const float* packed, int64_t n_begin, int64_t n_end,
             float* scratch) {
  using Product = typename ProductOf<T>::type;
  const int64_t groups = (a.M + 3) / 4, least = a.M / groups, larger = a.M % groups;
  const int64_t row = row_floats<Product>(a.K);
  const int64_t stretch = groups > 1 ? kStretch * kLanes * Product::kPack : a.K;
  for (int64_t k = 0; k < a.K; k += stretch) {
    float* partial = scratch;
    const int64_t end = k + stretch < a.K ? k + stretch : a.K;
    const auto add = [&](auto rows, int64_t m, int64_t turn) {
      constexpr int R = decltype(rows)::value, C = few_columns(R);
      for (int64_t n = n_begin; n < n_end; n += C, partial += kSums)
        product<R, C, T>(a, packed + m * row, m, n, n_end - n < C ? n_end - n : int64_t{C},
                         {k, end, turn, groups}, partial);
    };
    for (int64_t g = 0, m = 0, rows = 0; g < groups; ++g, m += rows) {
      rows = least + (g < larger ? 1 : 0);
      rows == 4   ? add(Int<4>{}, m, g)
      : rows == 3 ? add(Int<3>{}, m, g)
      : rows == 2 ? add(Int<2>{}, m, g)
                  : add(Int<1>{}, m, g);
    }
  }
}

void run(const LinearArgs& a, const float* packed, int64_t first, int64_t last, int64_t column,
         float* scratch) {
  by_type(a.type, [&](auto type) {
    using T = decltype(type);
    using Product = typename ProductOf<T>::type;
    if (rows_in_lanes(a.M))
      return run_lanes<T, Product>(a, packed, block_floats(a.type, a.K), first, last, column,
                                   scratch);
    const int64_t n = column * kTile;
    run_few<T>(a, packed, n, n + kTile < a.N ? n + kTile : a.N, scratch);
  });
}

}  // namespace

extern const LinearKernels linear_kernels;
const LinearKernels linear_kernels = {kLanes,       kTile, lanes_scratch(kLinearChunk / kLanes),
                                      block_floats, pack,  run};

}  // namespace branchwise::BW_ISA
