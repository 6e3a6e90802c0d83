// Many rows of bf16 in the tile registers of AMX. As with vectors, scores have the query rows in
// the lanes, and keys are read where they lie: 16 of them are a tile's rows. The second product has
// the head dim in the lanes, out[row][d]: probabilities are transposed, values of two slots
// interleaved.
#pragma once

#include "cpu/kernels/amx-inl.h"
#include "cpu/kernels/many_rows-inl.h"

// 16 keys, so many bytes apart.
struct KeyTile {
  const void* data;
  int64_t bytes_apart;
};

// A tile of slots as the products read it.
struct TileOperands {
  KeyTile keys[kMostSlots / kTileRows];
  const float* values;  // [D / 16][kPairs] lines of 16 pairs of slots
};

// Keys at even distances are used where they lie, others copied to `buffer`, then values
// interleaved; as make_key_lines and make_value_lines.
inline TileOperands make_operands(const Tile<Bf16>& tile, int64_t D, float* buffer) {
  TileOperands made;
  Bf16* copy = reinterpret_cast<Bf16*>(buffer);
  for (int64_t i = 0; i < tile.size; i += kTileRows, copy += kTileRows * D) {
    const Bf16* const* rows = tile.keys() + i;
    const int64_t apart = reinterpret_cast<int64_t>(rows[1]) - reinterpret_cast<int64_t>(rows[0]);
    int64_t off = 0;
    for (int64_t r = 2; r < kTileRows; ++r)
      off |= reinterpret_cast<int64_t>(rows[r]) - reinterpret_cast<int64_t>(rows[r - 1]) - apart;
    made.keys[i / kTileRows] = {rows[0], apart};
    if (off == 0) continue;
    for (int64_t r = 0; r < kTileRows; ++r)
      for (int64_t d = 0; d < D; d += 2 * kLanes)
        store(reinterpret_cast<float*>(copy + r * D + d), load_as<f32v>(rows[r] + d));
    made.keys[i / kTileRows] = {copy, D * static_cast<int64_t>(sizeof(Bf16))};
  }
  float* values = buffer + kMostSlots * D / 2;
  Lines<Bf16Product> lines;
  make_value_lines<Bf16>(tile.values(), round_up(tile.count, 2 * kLanes), D, values, &lines);
  made.values = values;
  return made;
}

// scores^T[slot][row] of a whole tile, NV vectors of rows. Four sums at once where there are rows
// for no more, as each waits long for its last product.
template <int NV, typename F>
void score_tiles(const float* query, const TileOperands& tile, int64_t count, int64_t D,
                 float* scores, const F& ahead) {
  constexpr int64_t ld = NV * kLanes, kApart = ld * sizeof(float);
  constexpr int NS = 4 / NV, kKey = 4;
  for (int64_t i = 0; i * kTileRows < count; i += NS) {
    unrolled<NS * NV>([](auto c) { clear_tile<decltype(c)::value>(); });
    for (int64_t d = 0; d < D; d += 2 * kLanes) {
      unrolled<NV>([&](auto v) {
        constexpr int V = decltype(v)::value;
        load_tile<kKey + 1 + V>(query + d / 2 * ld + V * kLanes, kApart);
      });
      unrolled<NS>([&](auto s) {
        constexpr int S = decltype(s)::value;
        const KeyTile& keys = tile.keys[i + S];
        load_tile<kKey>(static_cast<const Bf16*>(keys.data) + d, keys.bytes_apart);
        unrolled<NV>([&](auto v) {
          constexpr int V = decltype(v)::value;
          multiply_tiles<S * NV + V, kKey, kKey + 1 + V>();
          ahead();
        });
      });
    }
    unrolled<NS>([&](auto s) {
      unrolled<NV>([&](auto v) {
        constexpr int S = decltype(s)::value, V = decltype(v)::value;
        store_tile<S * NV + V>(scores + (i + S) * kTileRows * ld + V * kLanes, kApart);
      });
    });
  }
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

// out[row][d ..] += sum over the tile's slots, NB times 16 values of the head dim.
template <int NV, int NB, typename F>
void add_tiles(const float* probs, const float* values, int64_t pairs, int64_t d, float* out,
               int64_t ld, const F& ahead) {
  constexpr int kProbs = NV * NB, kValue = kProbs + NV;
  const int64_t apart = ld * static_cast<int64_t>(sizeof(float));
  const auto place = [&](int v, int b) { return out + v * kTileRows * ld + d + b * kLanes; };
  unrolled<NV>([&](auto v) {
    unrolled<NB>([&](auto b) {
      constexpr int V = decltype(v)::value, B = decltype(b)::value;
      load_tile<V * NB + B>(place(V, B), apart);
    });
  });
  for (int64_t first = 0; first < pairs; first += kLanes) {
    unrolled<NV>([&](auto v) {
      constexpr int V = decltype(v)::value;
      load_tile<kProbs + V>(probs + V * kTileRows * kPairs + first, kPairs * sizeof(float));
    });
    unrolled<NB>([&](auto b) {
      constexpr int B = decltype(b)::value;
      load_tile<kValue>(values + ((d / kLanes + B) * kPairs + first) * kLanes, kTileBytes);
      unrolled<NV>([&](auto v) {
        constexpr int V = decltype(v)::value;
        multiply_tiles<V * NB + B, kProbs + V, kValue>();
        ahead();
      });
    });
  }
  unrolled<NV>([&](auto v) {
    unrolled<NB>([&](auto b) {
      constexpr int V = decltype(v)::value, B = decltype(b)::value;
      store_tile<V * NB + B>(place(V, B), apart);
    });
  });
}

// A tile of slots for a group of NV vectors of rows, whose partial results lie row after row.
template <int NV, typename P>
void attend_tiles(const AttentionArgs& a, const AttentionUnit& u, const Tile<Bf16>& tile,
                  const TileOperands& operands, P& ahead, const float* query, const RowBounds& rows,
                  int64_t hidden, float* scores, float* out, int64_t ld, float* row_max,
                  float* row_sum) {
  f32v alpha[NV];
  const int64_t pairs = (tile.count + 1) / 2;
  // No oftener: products take longer with more asks (measured), presumably as tiles wait with them.
  const auto ask = [&] { ahead.step(); };
  score_tiles<NV>(query, operands, tile.count, a.D, scores, ask);
  weigh_tile<Bf16Product, NV>(a, u, tile.begin, tile.count, rows, NV * kLanes, hidden, scores,
                              alpha, row_max, row_sum, ask);
  float* probs = scores + kPairs * NV * kLanes;  // behind the pairs
  transpose_probs<NV>(scores, pairs, probs);
  for (int64_t v = 0; v < NV; ++v) {
    float factors[kLanes];
    store(factors, alpha[v]);
    uint32_t changed = _mm512_cmp_ps_mask(reinterpret_cast<__m512>(alpha[v]),
                                          reinterpret_cast<__m512>(splat(1.f)), _CMP_NEQ_UQ);
    for (; changed != 0; changed &= changed - 1) {
      const int r = __builtin_ctz(changed);
      float* row = out + (v * kLanes + r) * ld;
      for (int64_t d = 0; d < a.D; d += kLanes) store(row + d, load(row + d) * factors[r]);
    }
  }
  constexpr int NB = 4 / NV;
  int64_t d = 0;
  for (; d + NB * kLanes <= a.D; d += NB * kLanes)
    add_tiles<NV, NB>(probs, operands.values, pairs, d, out, ld, ask);
  if constexpr (NB == 4)
    if (d < a.D) add_tiles<NV, 2>(probs, operands.values, pairs, d, out, ld, ask);
}

// The product of this form: of bf16, and a head dim of 32, 64, 96, ...
struct AmxProduct : Bf16Product {
  using InUse = TilesInUse;
  static TileOperands operands(const Tile<Bf16>& tile, int64_t D, float* buffer) {
    return make_operands(tile, D, buffer);
  }
  template <int NV, typename... Args>
  static void attend(Args&&... args) {
    attend_tiles<NV>(args...);
  }
};
