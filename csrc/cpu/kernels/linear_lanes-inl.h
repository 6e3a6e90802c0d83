// Linear layers of more rows than a few: rows of x in the lanes, elements of weights broadcast.
// Included by linear_kernel.cpp. An element is a float, or a pair of bf16 (product-inl.h).
//
// Dot products (linear_kernel.cpp) give every lane l a sum over elements l, l + kLanes, ..., and
// then add the lanes up. Here those kLanes sums are formed one after the other, so that the bits
// are the same:
//   sum[l][column][row] = sum over j of weight[column][j * kLanes + l] * x[row][j * kLanes + l]
// A block is kLanes rows, packed as [stretch][l][j][row]. K is cut into stretches; kTile columns of
// a stretch are made elements once, and all rows pass by a quarter or half of them at a time.
#pragma once

#include "cpu/kernels/half-inl.h"
#include "cpu/kernels/product-inl.h"
#include "cpu/kernels/vec-inl.h"

constexpr int kTile = kRegisters == 32 ? 16 : 24;  // columns
// Columns that so many blocks of rows pass by at once: two blocks, the last three of an odd number
// where there are registers for them, and a single one.
constexpr int columns_of(int blocks) { return kRegisters == 32 ? 8 : 12 / blocks; }
constexpr int kMostBlocks = kRegisters == 32 ? 3 : 2;
// Of a stretch: vectors along K. Each of a column is a line that is read kLanes times, so with wide
// vectors the columns at hand must fit the first cache level.
constexpr int64_t kMostSteps = kRegisters == 32 ? 48 : 96;

// Vectors of a packed row.
template <typename P>
int64_t steps(int64_t K) {
  constexpr int64_t kStep = kLanes * P::kPack;
  return (K + kStep - 1) / kStep;
}

constexpr int64_t kTileStride = kMostSteps * kLanes + kLanes;  // columns must not share cache sets
constexpr int64_t kResultStride = kTile + kLanes;

// Vectors along K as stretches of even length.
struct Stretches {
  explicit Stretches(int64_t vectors)
      : steps(vectors), count((steps + kMostSteps - 1) / kMostSteps) {}
  int64_t begin(int64_t s) const { return steps * s / count; }
  int64_t steps, count;
};

template <typename T, typename P>
void pack_lanes(const LinearArgs& a, int64_t block, float* to) {
  constexpr int64_t kStep = kLanes * P::kPack;
  const int64_t rows = a.M - block * kLanes < kLanes ? a.M - block * kLanes : kLanes;
  const T* x = static_cast<const T*>(a.x) + block * kLanes * a.K;
  const Stretches all(steps<P>(a.K));
  for (int64_t s = 0; s < all.count; ++s) {
    const int64_t begin = all.begin(s), length = all.begin(s + 1) - begin;
    for (int64_t j = 0; j < length; ++j, to += kLanes) {
      const int64_t k = (begin + j) * kStep, left = a.K - k < kStep ? a.K - k : kStep;
      f32v v[kLanes] = {};
      for (int64_t r = 0; r < rows; ++r)
        v[r] = reinterpret_cast<f32v>(P::row(x + r * a.K + k, left));
      transpose(v);
      for (int64_t l = 0; l < kLanes; ++l) store(to + l * length * kLanes, v[l]);
    }
    to += (kLanes - 1) * length * kLanes;
  }
}

// Asks for elements [k, end) of `rows` rows from `from` on, a share of their lines with every call.
template <typename T>
class RowsAhead {
 public:
  RowsAhead(const T* from, int64_t stride, int64_t rows, int64_t k, int64_t end, int64_t calls)
      : row_(from), stride_(stride), left_(rows), at_(k), k_(k), end_(end) {
    each_ = (rows * ((end - k + kLine - 1) / kLine) + calls - 1) / calls;
  }
  void step() {
    for (int64_t i = 0; i < each_ && left_ > 0; ++i) {
      __builtin_prefetch(row_ + at_, 0, 2);
      at_ += kLine;
      if (at_ < end_) continue;
      at_ = k_;
      row_ += stride_;
      --left_;
    }
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);
  const T* row_;
  int64_t stride_, left_, at_, k_, end_, each_;
};

constexpr int64_t kStepsPerCall = 8;  // of RowsAhead

// Adds a stretch to the sums of NB columns and NV blocks of rows, vectors [l][NB][NV]. The last
// stretch adds the lanes up as well, in the order of folds(): pairs of neighbours, pairs of these
// and so on, of which no more than one is open at each level. Returns the sums of all lanes, in
// `open`: vectors [level][NB][NV].
template <typename P, int NB, int NV, typename A>
[[gnu::noinline]] const float* add_stretch(const float* tile, const float* const* blocks,
                                           int64_t length, bool first, bool last, float* sums,
                                           float* open, A& ahead) {
  using Vec = typename P::Vec;
  using Element = typename P::Element;
  constexpr int64_t kFloats = NB * NV * kLanes;
  float* to = sums;
  for (int64_t l = 0; l < kLanes; ++l, sums += kFloats) {
    f32v acc[NB][NV];
    const auto each = [&](auto f) {
#pragma GCC unroll 12
      for (int b = 0; b < NB; ++b)
#pragma GCC unroll 3
        for (int v = 0; v < NV; ++v) f(acc[b][v], (b * NV + v) * kLanes);
    };
    if (first)
      each([](f32v& sum, int64_t) { sum = f32v{}; });
    else
      each([&](f32v& sum, int64_t at) { sum = load(sums + at); });
    const float *w = tile + l, *x[NV];
#pragma GCC unroll 3
    for (int v = 0; v < NV; ++v) x[v] = blocks[v] + l * length * kLanes;
    for (int64_t j = 0; j < length;) {
      const int64_t until = j + kStepsPerCall < length ? j + kStepsPerCall : length;
      for (; j < until; ++j, w += kLanes) {
        Vec rows[NV];
#pragma GCC unroll 3
        for (int v = 0; v < NV; ++v) rows[v] = load_as<Vec>(x[v] + j * kLanes);
#pragma GCC unroll 12
        for (int b = 0; b < NB; ++b) {
          const Vec y = P::broadcast(reinterpret_cast<const Element*>(w + b * kTileStride));
#pragma GCC unroll 3
          for (int v = 0; v < NV; ++v) acc[b][v] = P::multiply_add(y, rows[v], acc[b][v]);
        }
      }
      ahead.step();
    }
    to = sums;
    if (last) {
      to = open;
      for (int64_t h = 1; (l & h) != 0; h *= 2, to += kFloats)
        each([&](f32v& sum, int64_t at) { sum += load(to + at); });
    }
    each([&](f32v& sum, int64_t at) { store(to + at, sum); });
  }
  return to;
}

// Sums of NB columns, vectors [NB][NV], as results [row][NB].
template <int NB, int NV>
void transpose_sums(const float* sums, float* results) {
  for (int v = 0; v < NV; ++v, results += kLanes * kResultStride) {
    for (int first = 0; first < NB; first += kLanes) {
      f32v columns[kLanes] = {};
      for (int b = first; b < NB && b < first + kLanes; ++b)
        columns[b - first] = load(sums + (b * NV + v) * kLanes);
      transpose(columns);
      // Whole vectors: what is too much is not read.
      for (int r = 0; r < kLanes; ++r) store(results + r * kResultStride + first, columns[r]);
    }
  }
}

template <typename T>
void store_results(const LinearArgs& a, const float* results, int64_t row, int64_t rows, int64_t n,
                   int64_t count) {
  for (int64_t c = 0; c < count; c += kLanes) {
    const int64_t lanes = count - c < kLanes ? count - c : kLanes;
    f32v bias = {};
    if (a.bias != nullptr) bias = load_wide(static_cast<const T*>(a.bias) + n + c, lanes);
    for (int64_t r = 0; r < rows; ++r)
      store_narrow(static_cast<T*>(a.out) + (row + r) * a.N + n + c,
                   load(results + r * kResultStride + c) + bias, lanes);
  }
}

constexpr int64_t kBlockSums = kLanes * kTile * kLanes;  // floats
constexpr int64_t kResults = kMostBlocks * kLanes * kResultStride;
constexpr int64_t kLevels = 5;  // of pairs of lanes, of which there are 16 or fewer
constexpr int64_t kOpen = kLevels * kMostBlocks * columns_of(kMostBlocks) * kLanes;
constexpr int64_t lanes_scratch(int64_t blocks) {
  return kTile * kTileStride + kResults + kOpen + blocks * kBlockSums;
}

// The columns of a tile for the rows of blocks first to last - 1.
template <typename T, typename P>
void run_lanes(const LinearArgs& a, const float* packed, int64_t block_floats, int64_t first,
               int64_t last, int64_t column, float* scratch) {
  float *tile = scratch, *results = tile + kTile * kTileStride, *open = results + kResults,
        *sums = open + kOpen;
  const int64_t n = column * kTile, left = a.N - n, count = left < kTile ? left : kTile;
  const int64_t asked = left - count < kTile ? left - count : kTile;  // columns behind them
  const T* weight = static_cast<const T*>(a.weight) + n * a.weight_stride;
  constexpr int64_t kStep = kLanes * P::kPack;
  const Stretches all(steps<P>(a.K));
  for (int64_t s = 0; s < all.count; ++s) {
    const bool last_one = s + 1 == all.count;
    const int64_t begin = all.begin(s), length = all.begin(s + 1) - begin, k = begin * kStep;
    const int64_t end = k + length * kStep < a.K ? k + length * kStep : a.K;
    for (int64_t b = 0; b < kTile; ++b) {  // columns that N lacks repeat the first
      const T* from = weight + (b < count ? b : 0) * a.weight_stride;
      float* to = tile + b * kTileStride;
      for (int64_t i = k; i < end; i += kStep, to += kLanes) {
        const auto v = end - i < kStep ? P::row(from + i, end - i) : P::row(from + i);
        __builtin_memcpy(to, &v, sizeof v);
      }
    }
    const int64_t pairs = last - first < 2 ? 1 : (last - first) / 2;
    const int64_t calls =
        pairs * (kTile / columns_of(2)) * kLanes * ((length - 1) / kStepsPerCall + 1);
    RowsAhead<T> ahead(weight + count * a.weight_stride, a.weight_stride, asked, k, end, calls);
    const auto add = [&](auto blocks, int64_t block, int64_t b) {
      constexpr int NV = decltype(blocks)::value, NB = columns_of(NV);
      const float* x[NV];
      for (int64_t v = 0; v < NV; ++v)
        x[v] = packed + (block + v) * block_floats + begin * kLanes * kLanes;
      float* to = all.count > 1 ? sums + (block - first) * kBlockSums : sums;
      const float* added =
          add_stretch<P, NB, NV>(tile + b * kTileStride, x, length, s == 0, last_one,
                                 to + b * NV * kLanes * kLanes, open, ahead);
      if (!last_one || b >= count) return;
      transpose_sums<NB, NV>(added, results);
      const int64_t row = block * kLanes, most = NV * kLanes;
      store_results<T>(a, results, row, a.M - row < most ? a.M - row : most, n + b,
                       count - b < NB ? count - b : NB);
    };
    // Few columns stay in the innermost cache while all blocks pass by.
    const int64_t odd = (last - first) % 2 == 0 ? 0 : kMostBlocks == 3 && last - first >= 3 ? 3 : 1;
    for (int64_t b = 0; b < kTile; b += columns_of(2))
      for (int64_t block = first; block < last - odd; block += 2) add(Int<2>{}, block, b);
    if (odd == 1)
      for (int64_t b = 0; b < kTile; b += columns_of(1)) add(Int<1>{}, last - 1, b);
    if constexpr (kMostBlocks == 3)
      if (odd == 3)
        for (int64_t b = 0; b < kTile; b += columns_of(3)) add(Int<3>{}, last - 3, b);
  }
}
