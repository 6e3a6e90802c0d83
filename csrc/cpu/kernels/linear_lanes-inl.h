// Linear layers of more rows than a few where a vector holds few lanes and there are 16 registers:
// rows of x in the lanes, elements of weights broadcast. Included by linear_kernel.cpp.
//
// Dot products (linear_kernel.cpp) give every lane l a sum over k = l, l + kLanes, ..., and then
// add the lanes up. Here those kLanes sums are formed one after the other, so that the bits are the
// same:
//   sum[l][column][row] = sum over j of weight[column][j * kLanes + l] * x[row][j * kLanes + l]
// A block is kLanes rows, packed as [stretch][l][j][row]. K is cut into stretches; kTile columns of
// a stretch are made floats once, and all rows pass by them, six or twelve columns at a time.
#pragma once

#include "cpu/kernels/half-inl.h"
#include "cpu/kernels/product-inl.h"
#include "cpu/kernels/vec-inl.h"

constexpr int kTile = 24;           // columns
constexpr int kInRegisters = 12;    // sums, of 6 columns and two blocks or of 12 and one
constexpr int64_t kMostSteps = 96;  // of a stretch: vectors along K
constexpr int64_t kTileStride = kMostSteps * kLanes + kLanes;  // columns must not share cache sets
constexpr int64_t kResultStride = kTile + kLanes;

// The vectors of K as stretches of even length.
struct Stretches {
  explicit Stretches(int64_t K)
      : steps((K + kLanes - 1) / kLanes), count((steps + kMostSteps - 1) / kMostSteps) {}
  int64_t begin(int64_t s) const { return steps * s / count; }
  int64_t steps, count;
};

template <typename T>
void pack_lanes(const LinearArgs& a, int64_t block, float* to) {
  const int64_t rows = a.M - block * kLanes < kLanes ? a.M - block * kLanes : kLanes;
  const T* x = static_cast<const T*>(a.x) + block * kLanes * a.K;
  const Stretches all(a.K);
  for (int64_t s = 0; s < all.count; ++s) {
    const int64_t begin = all.begin(s), length = all.begin(s + 1) - begin;
    for (int64_t j = 0; j < length; ++j, to += kLanes) {
      const int64_t k = (begin + j) * kLanes, left = a.K - k < kLanes ? a.K - k : kLanes;
      f32v v[kLanes] = {};
      for (int64_t r = 0; r < rows; ++r) v[r] = load_wide(x + r * a.K + k, left);
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

// Adds a stretch to the sums of NB columns and NV blocks of rows, vectors [l][NB][NV].
template <int NB, int NV, typename P>
[[gnu::noinline]] void add_stretch(const float* tile, const float* const* blocks, int64_t length,
                                   bool first, float* sums, P& ahead) {
  for (int64_t l = 0; l < kLanes; ++l, sums += NB * NV * kLanes) {
    f32v acc[NB][NV];
#pragma GCC unroll 16
    for (int b = 0; b < NB; ++b)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) acc[b][v] = first ? f32v{} : load(sums + (b * NV + v) * kLanes);
    const float *w = tile + l, *x[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) x[v] = blocks[v] + l * length * kLanes;
    for (int64_t j = 0; j < length;) {
      const int64_t until = j + kStepsPerCall < length ? j + kStepsPerCall : length;
      for (; j < until; ++j, w += kLanes) {
        f32v rows[NV];
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) rows[v] = load(x[v] + j * kLanes);
#pragma GCC unroll 16
        for (int b = 0; b < NB; ++b) {
          const f32v y = splat(w[b * kTileStride]);
#pragma GCC unroll 2
          for (int v = 0; v < NV; ++v) acc[b][v] = y * rows[v] + acc[b][v];
        }
      }
      ahead.step();
    }
#pragma GCC unroll 16
    for (int b = 0; b < NB; ++b)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) store(sums + (b * NV + v) * kLanes, acc[b][v]);
  }
}

// Adds the lanes of sums up, in the order of folds(): results [row][NB].
template <int NB, int NV>
void add_lanes(const float* sums, float* results) {
  for (int v = 0; v < NV; ++v, results += kLanes * kResultStride) {
    for (int first = 0; first < NB; first += kLanes) {
      f32v columns[kLanes] = {};
      for (int b = first; b < NB && b < first + kLanes; ++b) {
        f32v lanes[kLanes];
        for (int l = 0; l < kLanes; ++l) lanes[l] = load(sums + ((l * NB + b) * NV + v) * kLanes);
        for (int h = 1; h < kLanes; h *= 2)
          for (int l = 0; l < kLanes; l += 2 * h) lanes[l] += lanes[l + h];
        columns[b - first] = lanes[0];
      }
      transpose(columns);
      // Whole vectors: what is too much, the next columns overwrite.
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
constexpr int64_t kResults = 2 * kLanes * kResultStride;
constexpr int64_t lanes_scratch(int64_t blocks) {
  return kTile * kTileStride + kResults + blocks * kBlockSums;
}

// The columns of a tile for the rows of blocks first to last - 1.
template <typename T>
void run_lanes(const LinearArgs& a, const float* packed, int64_t block_floats, int64_t first,
               int64_t last, int64_t column, float* scratch) {
  float *tile = scratch, *results = tile + kTile * kTileStride, *sums = results + kResults;
  const int64_t n = column * kTile, left = a.N - n, count = left < kTile ? left : kTile;
  const int64_t asked = left - count < kTile ? left - count : kTile;  // columns behind them
  const T* weight = static_cast<const T*>(a.weight) + n * a.weight_stride;
  const Stretches all(a.K);
  for (int64_t s = 0; s < all.count; ++s) {
    const int64_t begin = all.begin(s), length = all.begin(s + 1) - begin, k = begin * kLanes;
    const int64_t end = k + length * kLanes < a.K ? k + length * kLanes : a.K;
    for (int64_t b = 0; b < kTile; ++b) {  // columns that N lacks repeat the first
      const T* from = weight + (b < count ? b : 0) * a.weight_stride;
      float* to = tile + b * kTileStride;
      for (int64_t i = k; i < end; i += kLanes, to += kLanes)
        store(to, end - i < kLanes ? load_wide(from + i, end - i) : load_wide(from + i));
    }
    const int64_t calls =
        (last - first) * kTile / kInRegisters * kLanes * ((length - 1) / kStepsPerCall + 1);
    RowsAhead<T> ahead(weight + count * a.weight_stride, a.weight_stride, asked, k, end, calls);
    for (int64_t block = first; block < last; block += 2) {
      const float* x[2] = {packed + block * block_floats + k * kLanes};
      float* to = all.count > 1 ? sums + (block - first) * kBlockSums : sums;
      const bool two = block + 1 < last;
      if (two) x[1] = x[0] + block_floats;
      const auto add = [&](auto blocks) {
        constexpr int NV = decltype(blocks)::value, NB = kInRegisters / NV;
        for (int b = 0; b < kTile; b += NB, to += kLanes * kInRegisters * kLanes) {
          add_stretch<NB, NV>(tile + b * kTileStride, x, length, s == 0, to, ahead);
          if (s + 1 == all.count) add_lanes<NB, NV>(to, results + b);
        }
      };
      two ? add(Int<2>{}) : add(Int<1>{});
      const int64_t row = block * kLanes, most = two ? 2 * kLanes : kLanes;
      if (s + 1 == all.count)
        store_results<T>(a, results, row, a.M - row < most ? a.M - row : most, n, count);
    }
  }
}
