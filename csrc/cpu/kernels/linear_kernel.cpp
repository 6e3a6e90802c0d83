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

// Where there are few registers, dot products serve few rows only.
constexpr bool kRowsInLanes = kRegisters == 16;
constexpr int64_t kFewRows = 15;
inline bool rows_in_lanes(int64_t M) { return kRowsInLanes && M > kFewRows; }

constexpr int kRows = kRowsInLanes ? kLanes : 4;  // of a block; dot products are of up to 4
constexpr int kColumns = kRowsInLanes ? kTile : 16;
constexpr int64_t kStretch = 32;  // vectors along K whose weights stay in the innermost cache ...
constexpr int64_t kBlocks = 16;   // ... while so many blocks of rows pass by
constexpr int64_t kSums = kLanes * kLanes;  // of rows and columns that are computed at once

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
    if (rows_in_lanes(a.M)) return pack_lanes<T>(a, block, to);
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
  const int64_t row_floats = steps<Product>(a.K) * kLanes;
  const T *weight[C], *asked[C];
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) {
    weight[c] = static_cast<const T*>(a.weight) + (n + (c < count ? c : 0)) * a.weight_stride;
    // Each turn asks for its share of the next block's weights: memory has no pause then. Into the
    // second cache level, where requests do not hold up loads.
    const bool share = n + kColumns + c < a.N && c % part.turns == part.turn;
    asked[c] = weight[c] + (share ? kColumns * a.weight_stride : 0);
  }
  int64_t k = part.k;
  const int64_t end = part.end;
  f32v sums[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) sums[i] = k == 0 ? f32v{} : load(partial + i * kLanes);
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

// Few rows: all of them pass by two columns at a time, or by more if there are one or two.
template <typename T>
void run_few(const LinearArgs& a, const float* packed, int64_t row_floats, int64_t n_begin,
             int64_t n_end, float* scratch) {
  const int64_t groups = (a.M + 3) / 4, stretch = groups > 1 ? 2 * kStretch * kLanes : a.K;
  for (int64_t k = 0; k < a.K; k += stretch) {
    float* partial = scratch;
    const int64_t end = k + stretch < a.K ? k + stretch : a.K;
    const auto columns = [&](auto count, auto with_rows) {
      constexpr int C = decltype(count)::value;
      for (int64_t n = n_begin; n < n_end; n += C) {
        for (int64_t g = 0; g < groups; ++g, partial += kSums) {
          const int64_t m = a.M * g / groups;
          with_rows(a.M * (g + 1) / groups - m, [&](auto rows) {
            product<decltype(rows)::value, C, T>(a, packed + m * row_floats, m, n,
                                                 n_end - n < C ? n_end - n : int64_t{C},
                                                 {k, end, g, groups}, partial);
          });
        }
      }
    };
    if (a.M == 1) {
      columns(Int<kLanes>{}, [](int64_t, auto f) { f(Int<1>{}); });
    } else if (a.M == 2) {
      columns(Int<kLanes / 2>{}, [](int64_t, auto f) { f(Int<2>{}); });
    } else {
      columns(Int<kLanes / 4>{}, [](int64_t rows, auto f) {
        rows == 4 ? f(Int<4>{}) : rows == 3 ? f(Int<3>{}) : f(Int<2>{});
      });
    }
  }
}

void run(const LinearArgs& a, const float* packed, int64_t first, int64_t last, int64_t column,
         float* scratch) {
  by_type(a.type, [&](auto type) {
    using T = decltype(type);
    constexpr int64_t kStep = kLanes * ProductOf<T>::type::kPack;
    const int64_t floats = block_floats(a.type, a.K), row_floats = floats / kRows;
    const int64_t n_begin = column * kColumns;
    const int64_t n_end = n_begin + kColumns < a.N ? n_begin + kColumns : a.N;
    if constexpr (kRowsInLanes) {
      if (rows_in_lanes(a.M)) return run_lanes<T>(a, packed, floats, first, last, column, scratch);
      return run_few<T>(a, packed, row_floats, n_begin, n_end, scratch);
    }
    // R rows, the r-th of a block and the next ones; returns where other rows may keep their sums.
    const auto rows = [&](auto count, int64_t block, int64_t r, const Part& part, float* partial) {
      constexpr int R = decltype(count)::value, C = kLanes / R;
      for (int64_t n = n_begin; n < n_end; n += C, partial += kSums)
        product<R, C, T>(a, packed + block * floats + r * row_floats, block * kRows + r, n,
                         n_end - n < C ? n_end - n : int64_t{C}, part, partial);
      return partial;
    };
    for (; first < last; first += kBlocks) {
      const int64_t until = first + kBlocks < last ? first + kBlocks : last;
      const int64_t stretch = until - first > 1 ? kStretch * kStep : a.K;
      for (int64_t k = 0; k < a.K; k += stretch) {
        const int64_t end = k + stretch < a.K ? k + stretch : a.K;
        for (int64_t block = first; block < until; ++block) {
          const Part part{k, end, block - first, until - first};
          float* partial = scratch + (block - first) * (kRows * kColumns * kLanes);
          const int64_t left = a.M - block * kRows;
          if (left >= kRows) {
            rows(Int<kRows>{}, block, 0, part, partial);
            continue;
          }
          if (left >= 2) partial = rows(Int<2>{}, block, 0, part, partial);
          if (left % 2 == 1) rows(Int<1>{}, block, left - 1, part, partial);
        }
      }
    }
  });
}

}  // namespace

extern const LinearKernels linear_kernels;
const LinearKernels linear_kernels = {
    kRows,
    kColumns,
    kRowsInLanes ? lanes_scratch(kLinearChunk / kRows) : kBlocks * kRows * kColumns * kLanes,
    block_floats,
    pack,
    run};

}  // namespace branchwise::BW_ISA
