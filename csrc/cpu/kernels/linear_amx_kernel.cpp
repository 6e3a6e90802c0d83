// Products of bf16 rows with a weight matrix in the tile registers of AMX. A tile of weights is 16
// of their rows as they lie in memory; rows of x are packed, 16 to a block, so that two neighbours
// along K are one element. Sums run along K, pair by pair.
#include <immintrin.h>

#include "cpu/kernels/linear_kernel.h"

namespace branchwise::amx_bf16 {
namespace {

#include "cpu/kernels/amx-inl.h"
#include "cpu/kernels/half-inl.h"

constexpr int64_t kTile = kTileRows, kStep = 32;  // and values along K in a tile
constexpr int64_t kColumns = 2 * kTile;

int64_t steps(int64_t K) { return (K + kStep - 1) / kStep; }

int64_t block_floats(DType, int64_t K) { return steps(K) * kTileFloats; }

// [steps][16 pairs along K][16 rows of x], zeros where there is nothing.
void pack(const LinearArgs& a, int64_t block, float* packed) {
  const int64_t left = a.M - block * kTile, rows = left < kTile ? left : kTile;
  const Bf16* x = static_cast<const Bf16*>(a.x) + block * kTile * a.K;
  float* to = packed + block * block_floats(a.type, a.K);
  for (int64_t k = 0; k < a.K; k += kStep, to += kTileFloats) {
    const int64_t n = a.K - k < kStep ? a.K - k : kStep;
    f32v pairs[kTile] = {};
    for (int64_t r = 0; r < rows; ++r) {
      if (n == kStep)
        __builtin_memcpy(&pairs[r], x + r * a.K + k, sizeof pairs[r]);
      else
        __builtin_memcpy(&pairs[r], x + r * a.K + k, n * sizeof(Bf16));
    }
    transpose(pairs);
    for (int64_t p = 0; p < kTile; ++p) store(to + p * kTile, pairs[p]);
  }
}

// 16 rows of the weights from `n` on, at `k`: where they lie, or a copy with zeros for what they
// lack.
struct WeightTile {
  alignas(64) Bf16 copy[kTile][kStep];
  const void* data;
  int64_t stride;

  WeightTile(const LinearArgs& a, int64_t n, int64_t k) {
    const Bf16* from = static_cast<const Bf16*>(a.weight) + n * a.weight_stride + k;
    data = from, stride = a.weight_stride * static_cast<int64_t>(sizeof(Bf16));
    if (n + kTile <= a.N && k + kStep <= a.K) return;
    const int64_t rows = a.N - n < kTile ? a.N - n : kTile,
                  size = a.K - k < kStep ? a.K - k : kStep;
    __builtin_memset(copy, 0, sizeof copy);
    for (int64_t r = 0; r < rows; ++r)
      __builtin_memcpy(copy[r], from + r * a.weight_stride, size * sizeof(Bf16));
    data = copy, stride = sizeof copy[0];
  }
};

// Writes sums [32 columns][16 rows of x]. Sums of columns that there are none of hold anything.
void write(const LinearArgs& a, const float* sums, int64_t m, int64_t n) {
  const int64_t rows = a.M - m < kTile ? a.M - m : kTile;
  const int64_t count = a.N - n < kColumns ? a.N - n : kColumns;
  const __mmask32 mask = count < kColumns ? (__mmask32{1} << count) - 1 : ~__mmask32{0};
  const auto column = [&](int64_t c) {
    f32v sum = load(sums + c * kTile);
    if (a.bias != nullptr && c < count) sum += to_float(static_cast<const Bf16*>(a.bias)[n + c]);
    return reinterpret_cast<__m512>(sum);
  };
  alignas(64) static constexpr uint16_t kInterleave[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = _mm512_load_si512(kInterleave);
  f32v pairs[kTile];  // neighbouring columns, row by row
#pragma GCC unroll 16
  for (int64_t p = 0; p < kTile; ++p) {
    const __m512bh both = _mm512_cvtne2ps_pbh(column(2 * p + 1), column(2 * p));
    pairs[p] =
        reinterpret_cast<f32v>(_mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(both)));
  }
  transpose(pairs);
  Bf16* out = static_cast<Bf16*>(a.out) + m * a.N + n;
  for (int64_t r = 0; r < rows; ++r)
    _mm512_mask_storeu_epi16(out + r * a.N, mask, reinterpret_cast<__m512i>(pairs[r]));
}

// Asks for the weights of a step that is still to come, a line of each row, into the innermost
// cache: a tile is not loaded before the products with the one in its register are done, so loads
// keep few lines under way. Behind the last step come columns `following` further on.
[[gnu::always_inline]] inline void ask(const LinearArgs& a, int64_t n, int64_t step,
                                       int64_t following) {
  const int64_t all = steps(a.K);
  if (step >= all) step -= all, n += following;
  if (step >= all || n + kTile > a.N) return;
  const int64_t stride = a.weight_stride * static_cast<int64_t>(sizeof(Bf16));
  const auto* line = reinterpret_cast<const char*>(static_cast<const Bf16*>(a.weight) +
                                                   n * a.weight_stride + step * kStep);
#pragma GCC unroll 16
  for (int64_t r = 0; r < kTile; ++r) __builtin_prefetch(line + r * stride, 0, 3);
}

constexpr int64_t kAhead = 4;  // steps

// 16 columns, one or two blocks of rows of x, and the steps [first, last) along K; `sums` holds
// what earlier steps gave, and takes what later ones go on from. Asks for nothing without
// `following` columns.
template <int Blocks>
void product(const LinearArgs& a, const float* x, int64_t n, int64_t first, int64_t last,
             float* sums, int64_t following) {
  const int64_t floats = block_floats(a.type, a.K);
  const auto place = [&](int b) { return sums + b * 2 * kTileFloats; };
  unrolled<Blocks>([&](auto b) {
    constexpr int B = decltype(b)::value;
    first == 0 ? clear_tile<B>() : load_tile<B>(place(B), kTileBytes);
  });
  for (int64_t step = first; step < last; ++step) {
    if (following > 0) ask(a, n, step + kAhead, following);
    const WeightTile weights(a, n, step * kStep);
    load_tile<2>(weights.data, weights.stride);
    unrolled<Blocks>([&](auto b) {
      constexpr int B = decltype(b)::value;
      load_tile<3>(x + B * floats + step * kTileFloats, kTileBytes);
      multiply_tiles<B, 2, 3>();
    });
  }
  unrolled<Blocks>([&](auto b) {
    constexpr int B = decltype(b)::value;
    store_tile<B>(place(B), kTileBytes);
  });
}

constexpr int64_t kPairs = 8;    // of blocks of rows, at most, that pass by a stretch of weights
constexpr int64_t kStretch = 8;  // steps

void run(const LinearArgs& a, const float* packed, int64_t begin, int64_t end, int64_t column,
         float* scratch) {
  const int64_t floats = block_floats(a.type, a.K), all = steps(a.K);
  const TilesInUse in_use;
  for (; begin < end; begin += 2 * kPairs) {
    const int64_t until = begin + 2 * kPairs < end ? begin + 2 * kPairs : end;
    // Weights of a stretch stay in the innermost cache while rows of x pass by.
    const int64_t stretch = until - begin > 2 ? kStretch : all;
    const int64_t following = stretch < all ? kColumns : kTile;
    for (int64_t first = 0; first < all; first += stretch)
      for (int64_t block = begin; block < until; block += 2) {
        const bool two = block + 1 < until;
        const int64_t last = first + stretch < all ? first + stretch : all, n = column * kColumns;
        float* sums = scratch + (block - begin) * 2 * kTileFloats;
        for (int64_t half = 0; half < 2 && n + half * kTile < a.N; ++half)
          (two ? product<2> : product<1>)(a, packed + block * floats, n + half * kTile, first, last,
                                          sums + half * kTileFloats,
                                          block == begin ? following : 0);
        if (last < all) continue;
        for (int64_t b = 0; b <= two; ++b)
          write(a, sums + b * 2 * kTileFloats, (block + b) * kTile, n);
      }
  }
}

}  // namespace

extern const LinearKernels linear_amx_kernels;
const LinearKernels linear_amx_kernels = {kTile,        kColumns, kPairs * 4 * kTileFloats,
                                          block_floats, pack,     run};

}  // namespace branchwise::amx_bf16
