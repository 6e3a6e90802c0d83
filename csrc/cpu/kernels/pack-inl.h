// Query rows as the two forms of the inner kernel read them. Included once per ISA level.
#pragma once

#include "cpu/kernels/few_rows-inl.h"
#include "cpu/kernels/many_rows-inl.h"

// The values of a row from d on, zeros behind its end.
template <typename T, typename M>
inline typename M::Vec chunk_of(const T* row, int64_t d, int64_t D) {
  constexpr int64_t kChunk = kLanes * M::kPack;
  return D - d >= kChunk ? M::row(row + d) : M::row(row + d, D - d);
}

// Writes rows row_of(0 .. rows - 1) of D values as elements, [D / kPack] vectors with the rows of a
// group in the lanes.
template <typename T, typename M, typename F>
void pack_many_rows(int64_t rows, int64_t D, float* packed, const F& row_of) {
  for_each_group(rows, [&](int64_t first, int nv) {
    const int64_t ld = nv * kLanes, steps = D / M::kPack;
    for (int64_t i = 0; i < ld; i += kLanes) {
      const T* from[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) {
        // Padding lanes repeat the last row: finite numbers, never read.
        const int64_t r = first + i + l;
        from[l] = row_of(r < rows ? r : rows - 1);
      }
      for (int64_t step = 0; step < steps; step += kLanes) {
        f32v block[kLanes];
        for (int64_t l = 0; l < kLanes; ++l)
          block[l] = reinterpret_cast<f32v>(chunk_of<T, M>(from[l], step * M::kPack, D));
        transpose(block);
        for (int64_t j = 0; j < kLanes && step + j < steps; ++j)
          store(packed + first * D + (step + j) * ld + i, block[j]);
      }
    }
  });
}

// The same in the form that the number of rows asks for: few rows are [D / chunk][row] vectors
// along the head dim.
template <typename T, typename M, typename F>
void pack_query(int64_t rows, int64_t D, float* packed, const F& row_of) {
  constexpr int64_t kChunk = kLanes * M::kPack;
  if (kTileRegisters || rows > kFewRows) return pack_many_rows<T, M>(rows, D, packed, row_of);
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = row_of(r);
    for (int64_t d = 0; d < D; d += kChunk) {
      const auto x = chunk_of<T, M>(row, d, D);
      __builtin_memcpy(packed + (d / kChunk * rows + r) * kLanes, &x, sizeof x);
    }
  }
}
