// Many rows in the tile registers of AMX: products of bf16, keys and values bf16 or e4m3. As with
// vectors, scores have the query rows in the lanes, and keys are read where they lie: 16 of them
// are a tile's rows. The second product has the head dim in the lanes, out[row][d]: probabilities
// are transposed, values of two slots interleaved.
#pragma once

#include "cpu/kernels/amx-inl.h"
#include "cpu/kernels/many_rows-inl.h"

// 16 keys, so many bytes apart.
struct KeyRows {
  const void* data;
  int64_t bytes_apart;
};

// A tile of slots as the products read it.
struct TileOperands {
  KeyRows keys[kKeyTile / kTileRows];
  const float* values;  // [slots / 32][D / 16] tiles of 16 pairs of slots
};

// Asks for the next tile's lines while this one is computed, at an even pace, as a core has few
// requests to memory under way at once, and what it does not ask for in time it waits for.
template <typename T>
class EvenAsks {
 public:
  // So many lines in so many steps.
  EvenAsks(const Prefetcher<T>& ahead, int64_t lines, int64_t steps)
      : ahead_(ahead), pace_(static_cast<int>((kLine * lines + steps - 1) / steps)) {}
  void line() { ahead_.step(); }
  void step() {
    for (due_ += pace_; due_ >= kLine; due_ -= kLine) ahead_.step();
  }

 private:
  static constexpr int kLine = 16;
  Prefetcher<T> ahead_;
  int pace_, due_ = 0;  // in parts of a line
};

// 16 keys where they lie at even distances, else copied to `copy`.
inline KeyRows key_rows(const Bf16* const* rows, int64_t D, Bf16* copy, EvenAsks<Bf16>&) {
  const int64_t apart = reinterpret_cast<int64_t>(rows[1]) - reinterpret_cast<int64_t>(rows[0]);
  int64_t off = 0;
  for (int64_t r = 2; r < kTileRows; ++r)
    off |= reinterpret_cast<int64_t>(rows[r]) - reinterpret_cast<int64_t>(rows[r - 1]) - apart;
  if (off == 0) return {rows[0], apart};
  for (int64_t r = 0; r < kTileRows; ++r)
    for (int64_t d = 0; d < D; d += 2 * kLanes)
      store(reinterpret_cast<float*>(copy + r * D + d), load_as<f32v>(rows[r] + d));
  return {copy, D * static_cast<int64_t>(sizeof(Bf16))};
}
// Of e4m3, as bf16; the next ones' lines are asked for meanwhile.
template <typename T>
KeyRows key_rows(const T* const* rows, int64_t D, Bf16* wide, EvenAsks<T>& ahead) {
  auto local = ahead;
  for (int64_t r = 0; r < kTileRows; ++r)
    for (int64_t d = 0; d < D; d += 2 * kLanes) {
      if (begins_line<T>(d)) local.line();
      const auto x = Bf16Product::row(rows[r] + d);
      __builtin_memcpy(wide + r * D + d, &x, sizeof x);
    }
  ahead = local;
  return {wide, D * static_cast<int64_t>(sizeof(Bf16))};
}

// Keys as key_rows has them, then values interleaved.
template <typename T>
TileOperands make_operands(const Tile<T>& tile, int64_t D, float* buffer, EvenAsks<T>& ahead) {
  TileOperands made;
  Bf16* copy = reinterpret_cast<Bf16*>(buffer);
  for (int64_t i = 0; i < tile.size; i += kTileRows)
    made.keys[i / kTileRows] = key_rows(tile.keys() + i, D, copy + i * D, ahead);
  float* values = buffer + kKeyTile * D / 2;
  auto local = ahead;
  for (int64_t i = 0; i < round_up(tile.count, 2 * kLanes); i += 2) {
    float* to = values + i / 2 / kTileRows * kTileRows * D + i / 2 % kTileRows * kLanes;
    for (int64_t d = 0; d < D; d += 2 * kLanes, to += 2 * kTileFloats) {
      if (begins_line<T>(d)) local.line();
      Bf16Product::Vec x[2];
      Bf16Product::columns(tile.values() + i, d, x);
      __builtin_memcpy(to, x, sizeof *x);
      __builtin_memcpy(to + kTileFloats, x + 1, sizeof *x);
    }
  }
  ahead = local;
  made.values = values;
  return made;
}

// scores^T[slot][row] of a whole tile, NV vectors of rows. As the second product not inlined: each
// needs the registers for its addresses.
template <int NV, typename T>
[[gnu::noinline]] void score_tiles(const float* query, const KeyRows* keys, int64_t count,
                                   int64_t D, float* scores, EvenAsks<T>& ahead) {
  auto local = ahead;
  constexpr int64_t ld = NV * kLanes, kApart = ld * sizeof(float);
  for (int64_t i = 0; i * kTileRows < count; ++i) {
    unrolled<NV>([](auto v) { clear_tile<decltype(v)::value>(); });
    for (int64_t d = 0; d < D; d += 2 * kLanes) {
      load_tile<2>(static_cast<const Bf16*>(keys[i].data) + d, keys[i].bytes_apart);
      unrolled<NV>([&](auto v) {
        constexpr int V = decltype(v)::value;
        load_tile<3>(query + d / 2 * ld + V * kLanes, kApart);
        multiply_tiles<V, 2, 3>();
        local.step();
      });
    }
    unrolled<NV>([&](auto v) {
      constexpr int V = decltype(v)::value;
      store_tile<V>(scores + i * kTileRows * ld + V * kLanes, kApart);
    });
  }
  ahead = local;
}

// Probabilities [pair of slots][row], of `pairs` pairs, to [row][pair]; zeros up to a
// multiple of 16 pairs.
template <int NV>
void transpose_probs(const float* scores, int64_t pairs, float* probs) {
  for (int64_t v = 0; v < NV; ++v)
    for (int64_t first = 0; first < pairs; first += kLanes) {
      f32v block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i)
        block[i] = first + i < pairs ? load(scores + ((first + i) * NV + v) * kLanes) : f32v{};
      transpose(block);
      for (int64_t r = 0; r < kLanes; ++r)
        store(probs + (v * kLanes + r) * kPairs + first, block[r]);
    }
}

// out[row][d ..] += sum over the tile's slots, 16 values of the head dim.
template <int NV, typename T>
[[gnu::noinline]] void add_tiles(const float* probs, const float* values, int64_t pairs, int64_t D,
                                 float* out, int64_t ld, EvenAsks<T>& ahead) {
  const int64_t apart = ld * static_cast<int64_t>(sizeof(float));
  auto local = ahead;
  for (int64_t d = 0; d < D; d += kLanes) {
    unrolled<NV>([&](auto v) {
      constexpr int V = decltype(v)::value;
      load_tile<V>(out + V * kTileRows * ld + d, apart);
    });
    for (int64_t first = 0; first < pairs; first += kLanes) {
      load_tile<2>(values + first * D + d / kLanes * kTileFloats, kTileBytes);
      unrolled<NV>([&](auto v) {
        constexpr int V = decltype(v)::value;
        load_tile<3>(probs + V * kTileRows * kPairs + first, kPairs * sizeof(float));
        multiply_tiles<V, 3, 2>();
        local.step();
      });
    }
    unrolled<NV>([&](auto v) {
      constexpr int V = decltype(v)::value;
      store_tile<V>(out + V * kTileRows * ld + d, apart);
    });
  }
  ahead = local;
}

// A tile of slots for a group of NV vectors of rows, whose partial results lie row after row.
template <int NV, typename T>
void attend_tiles(const AttentionArgs& a, const AttentionUnit& u, const Tile<T>& tile,
                  const TileOperands& operands, EvenAsks<T>& ahead, const float* query,
                  const RowBounds& rows, int64_t hidden, float* scores, float* out, int64_t ld,
                  float* row_max, float* row_sum) {
  f32v alpha[NV];
  const int64_t pairs = (tile.count + 1) / 2;
  score_tiles<NV>(query, operands.keys, tile.count, a.D, scores, ahead);
  auto local = ahead;  // in registers
  weigh_tile<Bf16Product, NV>(a, u, tile.begin, tile.count, rows, NV * kLanes, hidden, scores,
                              alpha, row_max, row_sum, [&] { local.step(); });
  ahead = local;
  float* probs = scores + kPairs * NV * kLanes;  // behind the pairs
  transpose_probs<NV>(scores, pairs, probs);
  for (int64_t v = 0; v < NV; ++v) {
    uint32_t changed = _mm512_cmp_ps_mask(reinterpret_cast<__m512>(alpha[v]),
                                          reinterpret_cast<__m512>(splat(1.f)), _CMP_NEQ_UQ);
    if (changed == 0) continue;
    float factors[kLanes];
    store(factors, alpha[v]);
    for (; changed != 0; changed &= changed - 1) {
      const int r = __builtin_ctz(changed);
      float* row = out + (v * kLanes + r) * ld;
      for (int64_t d = 0; d < a.D; d += kLanes) store(row + d, load(row + d) * factors[r]);
    }
  }
  add_tiles<NV>(probs, operands.values, pairs, a.D, out, ld, ahead);
}

// The product of this form: of bf16, and a head dim of 32, 64, 96, ...
struct AmxProduct : Bf16Product {
  using InUse = TilesInUse;
  // Slots of a tile. Its keys and values, the values interleaved, what it is multiplied with and
  // the outputs of a group should fit into the first cache level: requests to the second wait with
  // those to memory, for which a core has few places. Where they don't fit, larger tiles load and
  // store outputs less often.
  static int64_t slots(int64_t rows, int64_t D) {
    return rows <= 2 * kTileRows && D > 64 && D <= 128 ? kKeyTile / 2 : kKeyTile;
  }
  // One line beside each two that are interleaved, and each of keys that is widened; the others
  // shared out over the products and the softmax.
  template <typename T>
  static EvenAsks<T> asks(const Prefetcher<T>& ahead, int64_t slots, int64_t D, int64_t rows) {
    constexpr int64_t kAsked = __is_same(T, Bf16) ? 1 : 3;  // quarters of the lines, beside those
    const int64_t vectors = padded_rows(rows) / kLanes;
    const int64_t lines = 2 * slots * D / Prefetcher<T>::kValues;
    const int64_t products = vectors * slots / 8 * (D / (2 * kLanes));
    return {ahead, lines - kAsked * lines / 4, products + vectors * slots / 2};
  }
  template <typename T>
  static TileOperands operands(const Tile<T>& tile, int64_t D, float* buffer, EvenAsks<T>& ahead) {
    return make_operands(tile, D, buffer, ahead);
  }
  template <int NV, typename... Args>
  static void attend(Args&&... args) {
    attend_tiles<NV>(args...);
  }
};
