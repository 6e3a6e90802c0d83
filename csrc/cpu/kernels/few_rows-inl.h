// Few rows, at most half the lanes: the head dim in the lanes, dot products. Included by
// attention_kernel.cpp, once per ISA level.
//
// Scores of R rows and S = kSlots<R> slots share one vector: row r of slot s is in lane r * S + s
// of vector s / S. So the softmax of all rows runs at once, and R * S dot products end in one
// shuffle network instead of R * S horizontal sums.
#pragma once

#include "cpu/kernels/half-inl.h"
#include "cpu/kernels/product-inl.h"
#include "cpu/kernels/tile-inl.h"
#include "cpu/kernels/vec-inl.h"

constexpr int kFewRows = kLanes / 2;

constexpr int few_slots(int64_t rows) {
  return rows == 1 ? kLanes : rows == 2 ? kLanes / 2 : rows <= 4 ? kLanes / 4 : kLanes / 8;
}
template <int R>
constexpr int kSlots = few_slots(R);

// Beside every line the same one of the next tile is asked for: the memory's bandwidth is the limit
// here, and the hardware looks neither past the arithmetic of a tile nor past a page. Once per line
// and not per vector: narrow vectors would ask for all of it in a burst.

// Whether value d of a row is the first of a cache line, if the row begins with one.
template <typename T>
inline bool begins_line(int64_t d) {
  return d % static_cast<int64_t>(64 / sizeof(T)) == 0;
}

// A vector of a row, the first n values of it and zeros, in units of kUnit.
template <typename M, typename T>
inline typename M::Vec row_in_units(const T* p, int64_t n) {
  if constexpr (kReadsTwo<T, M>)
    return M::row(p, n) * (1.f / kUnit<T, M>);
  else
    return M::row(p, n);
}

// Scores of S slots, in units of kUnit. The query is packed as [D / chunk][R] vectors.
template <typename M, int R, typename T, typename P>
[[gnu::always_inline]] inline f32v score_slots(const T* const* keys, P& ahead, const float* query,
                                               int64_t D) {
  constexpr int S = kSlots<R>, kChunk = kLanes * M::kPack;
  f32v acc[kLanes] = {};
  typename M::Vec key[S];
  const auto add = [&](const float* q) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const auto x = load_as<typename M::Vec>(q + r * kLanes);
#pragma GCC unroll 16
      for (int s = 0; s < S; ++s) acc[r * S + s] = M::multiply_add(key[s], x, acc[r * S + s]);
    }
  };
  int64_t d = 0;
  if constexpr (kReadsTwo<T, M>) {
    constexpr int kGroup = S < 4 ? S : 4;  // slots whose vectors are in registers together
    for (; d + 2 * kChunk <= D; d += 2 * kChunk, query += 2 * R * kLanes)
#pragma GCC unroll 4
      for (int first = 0; first < S; first += kGroup) {
        typename M::Vec two[kGroup][2];
#pragma GCC unroll 4
        for (int s = 0; s < kGroup; ++s) {
          M::two_rows(keys[first + s] + d, two[s]);
          if (begins_line<T>(d)) ahead.step();
        }
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i)
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) {
            const auto x = load_as<typename M::Vec>(query + (i * R + r) * kLanes);
            f32v* sum = acc + r * S + first;
#pragma GCC unroll 4
            for (int s = 0; s < kGroup; ++s) sum[s] = M::multiply_add(two[s][i], x, sum[s]);
          }
      }
  } else {
    for (; d + kChunk <= D; d += kChunk, query += R * kLanes) {
#pragma GCC unroll 16
      for (int s = 0; s < S; ++s) {
        key[s] = M::row(keys[s] + d);
        if (begins_line<T>(d)) ahead.step();
      }
      add(query);
    }
  }
  for (; d < D; d += kChunk, query += R * kLanes) {
    const int64_t n = D - d < kChunk ? D - d : kChunk;
    for (int s = 0; s < S; ++s) key[s] = row_in_units<M>(keys[s] + d, n);
    add(query);
  }
  return folds<false>(acc);
}

// Where the probabilities of S slots and several rows lie, one vector after the other: row r of
// slot s in lane r * S + s, as elements of M.
template <typename M, int S>
struct SlotLanes {
  static constexpr bool kInUnits = true;  // values are to be read in units of kUnit
  static constexpr int kSlots = S, kRow = S;
  static constexpr int64_t kElements = kLanes / M::kPack;  // of kSlots slots
  static constexpr int element(int r, int s) { return (r * S + s) / M::kPack; }
};

// out[r][d ..] = out[r][d ..] * alpha[r] + sum over the tile's slots of p[r][slot] *
// value[slot][d ..], for R rows and NC whole chunks of the head dim, or with NC = 0 for the n
// values left. Rows are ld floats apart in out, and At::kRow lanes in alpha.
template <typename M, typename At, int R, int NC, typename T, typename P>
inline void add_block(const TilePart<T>& tile, P& ahead, int64_t d, int64_t n, const float* probs,
                      const float* alpha, float* out, int64_t ld) {
  constexpr int kPack = M::kPack, NV = (NC > 0 ? NC : 1) * kPack;
  f32v acc[R][NV];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v)
      acc[r][v] = load(out + r * ld + d + v * kLanes) * alpha[r * At::kRow];
  const auto* p = reinterpret_cast<const typename M::Element*>(probs);
  P local = ahead;  // in registers
  for (int64_t begin = 0; begin < tile.count; begin += At::kSlots, p += At::kElements) {
#pragma GCC unroll 2
    for (int s = 0; s < At::kSlots; s += kPack) {
      typename M::Vec x[NV];
      if constexpr (At::kInUnits && kReadsTwo<T, M> && NC % 2 == 0 && NC > 0) {
#pragma GCC unroll 16
        for (int c = 0; c < NC; c += 2) {
          M::two_rows(tile.values()[begin + s] + d + c * kLanes, x + c);
          if (begins_line<T>(d + c * kLanes)) local.step();
        }
      } else if constexpr (At::kInUnits && kReadsTwo<T, M>) {
        static_assert(NC <= 1);
        x[0] = row_in_units<M>(tile.values()[begin + s] + d, NC > 0 ? kLanes : n);
      } else if constexpr (NC > 0) {
#pragma GCC unroll 16
        for (int c = 0; c < NC; ++c) {
          const int64_t at = d + c * kLanes * kPack;
          M::columns(tile.values() + begin + s, at, x + c * kPack);
          if (begins_line<T>(at))
            for (int i = 0; i < kPack; ++i) local.step();
        }
      } else {
        M::columns(tile.values() + begin + s, d, n, x);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const typename M::Vec weight = M::broadcast(p + At::element(r, s));
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) acc[r][v] = M::multiply_add(x[v], weight, acc[r][v]);
      }
    }
  }
  ahead = local;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) store(out + r * ld + d + v * kLanes, acc[r][v]);
}

// Chunks of the head dim to add at once. Wide ones read memory in longer runs; but the more rows,
// the more it is worth to load, widen or interleave values once for all of them.
template <typename M, int R>
constexpr int wide_chunks() {
  if (M::kPack == 1) return kRegisters / (R <= 2 ? 4 : R <= 4 ? 8 : 16);
  return R * M::kPack <= 2 ? 4 : R * M::kPack <= 8 ? 2 : 1;
}

// The same for all R rows, as many at a time as half the registers hold.
template <typename M, int S, int R, int NC, typename T, typename P>
inline void add_values(const TilePart<T>& tile, P& ahead, int64_t d, int64_t n, const float* probs,
                       const float* alpha, float* out, int64_t ld) {
  constexpr int kFit = kRegisters / 2 / ((NC > 0 ? NC : 1) * M::kPack);
  constexpr int kRows = kFit < 1 ? 1 : kFit < R ? kFit : R;
  int r = 0;
  for (; r + kRows <= R; r += kRows)
    add_block<M, SlotLanes<M, S>, kRows, NC>(tile, ahead, d, n, probs + r * S / M::kPack,
                                             alpha + r * S, out + r * ld, ld);
  if constexpr (R % kRows != 0)
    add_block<M, SlotLanes<M, S>, R % kRows, NC>(tile, ahead, d, n, probs + r * S / M::kPack,
                                                 alpha + r * S, out + r * ld, ld);
}

// Whether a query node sees a place; the scalar twin of mask_tile.
inline bool sees(const AttentionArgs& a, const AttentionUnit& u, int64_t query, int64_t low,
                 int64_t place) {
  const Places& p = *u.places;
  const int64_t node = place - p.prefix;
  if (node < 0) return p.window == 0 || !hidden_by_window(p, place, low);
  const bool visible =
      a.tree_mask != nullptr
          ? a.tree_mask[(u.batch * a.N + query) * a.W + node / 64] >> (node % 64) & 1
          : node <= query;
  const int64_t position =
      p.new_slot + (a.depths != nullptr ? a.depths[u.batch * a.N + node] : node);
  return visible && (position >= low || position < p.kept);
}

// At most kFewRows packed rows; keys and values of type T. Partial result: out [R][ld] | max [R] |
// sum [R].
template <typename T, typename M, int R>
void run_few_rows(const AttentionArgs& a, const AttentionUnit& u, const float* query,
                  float* scratch) {
  constexpr int S = kSlots<R>, kChunk = kLanes * M::kPack;
  const int64_t D = a.D, ld = few_rows_stride(D), prefix = u.places->prefix;
  float* scores = scratch;                        // [kKeyTile / S][kLanes]
  float* probs = scores + kKeyTile / S * kLanes;  // the same, as elements of M
  float* out = u.partial;
  __builtin_memset(out, 0, sizeof(float) * R * ld);
  int64_t low[R], node[R], lowest = INT64_MAX, highest = 0;
  for (int r = 0; r < R; ++r) {
    node[r] = node_of(a, u, u.row_begin + r);
    low[r] = first_position(a, u, u.batch, node[r]);
    lowest = low[r] < lowest ? low[r] : lowest;
    highest = low[r] > highest ? low[r] : highest;
  }
  constexpr float unit = kUnit<T, M>;
  const float scale = unit * (a.softcap > 0.f ? a.scale / a.softcap : a.scale * kLog2e);

  f32v top = splat(-kInf), sum = {};
  // Few keys are in a cache already; what counts is how often the softmax waits for itself.
  const bool few_keys = prefix + a.N <= 4 * kKeyTile;
  const int64_t size = few_keys ? kKeyTile : small_tile(2 * D * static_cast<int64_t>(sizeof(T)));
  const WindowCut cut = cut_window(a, u, lowest, highest);
  const auto attend = [&](const TilePart<T>& tile, Prefetcher<T>& ahead) {
    const int64_t count = tile.count, groups = (count + S - 1) / S;
    for (int64_t g = 0; g < groups; ++g) {
      f32v x = score_slots<M, R>(tile.keys() + g * S, ahead, query, D) * scale;
      if (a.softcap > 0.f) x = tanh(x) * (a.softcap * kLog2e);
      store(scores + g * kLanes, x);
    }
    // New tokens, places of the prefix that a window may hide, and the padding of the last group.
    const int64_t from = cut.hidden > tile.begin ? 0
                         : prefix > tile.begin   ? prefix - tile.begin
                                                 : 0;
    for (int64_t s = from; s < groups * S; ++s)
      for (int r = 0; r < R; ++r)
        if (s >= count || !sees(a, u, node[r], low[r], tile.begin + s))
          scores[s / S * kLanes + r * S + s % S] = -kInf;

    f32v high = top;
    for (int64_t g = 0; g < groups; ++g) high = max(high, load(scores + g * kLanes));
    high = segment_max<S>(high);
    // A row that has seen nothing yet keeps max -inf; 0 instead keeps -inf minus -inf out.
    const f32v shift = high == -kInf ? f32v{} : high;
    const f32v alpha = exp2(top - shift);
    sum *= alpha;
    for (int64_t g = 0; g < groups; ++g) {
      const f32v p = exp2(load(scores + g * kLanes) - shift);
      M::store_lanes(reinterpret_cast<typename M::Element*>(probs) + g * (kLanes / M::kPack),
                     p * unit);
      sum += p;
    }
    top = high;

    float alphas[kLanes];
    store(alphas, alpha);
    int64_t d = 0;
    const auto add_chunks = [&](auto chunks) {
      constexpr int NC = decltype(chunks)::value;
      for (; d + NC * kChunk <= D; d += NC * kChunk)
        add_values<M, S, R, NC>(tile, ahead, d, 0, probs, alphas, out, ld);
    };
    add_chunks(Int<wide_chunks<M, R>()>{});
    add_chunks(Int<1>{});
    if (d < D) add_values<M, S, R, 0>(tile, ahead, d, D - d, probs, alphas, out, ld);
  };

  // Pages are asked for several at once, so for several tiles.
  const int64_t run = rows_together(a, *u.places, kKeyTile), span = run > 1 ? kKeyTile : size;
  const T* in_turn[2 * kKeyTile];
  Tile<T> tiles[2];
  int64_t slot = cut.first;
  find_tile(a, u, slot, span, tiles);
  for (int at = 0; slot < u.slot_end; slot += span, at ^= 1) {
    Tile<T>* next = tiles + (at ^ 1);
    find_tile(a, u, slot + span, span, next);
    touch_ahead<T>(a, u, slot, span);
    auto ahead = ask_for(*next, run, D, in_turn);
    for (int64_t first = 0; first < tiles[at].count; first += size)
      attend(part(tiles[at], first, size), ahead);
  }
  sum = segment_sum<S>(sum);
  for (int r = 0; r < R; ++r) {
    out[R * ld + r] = top[r * S];
    out[R * ld + R + r] = sum[r * S];
  }
}

// By what a head's results are multiplied in the end: values in e4m3 are read without their factor.
inline float value_factor(const AttentionArgs& a, const AttentionUnit& u) {
  return a.value_scale != nullptr ? a.value_scale[u.kv_head] : 1.f;
}

// Merges `count` partial results parts_of(r)(s) of packed rows row_begin + r to row_end - 1, in
// order.
template <typename T, typename F>
void merge_rows(const AttentionArgs& a, int64_t batch, const AttentionUnit& u, int64_t count,
                const F& parts_of) {
  const int64_t G = a.Hq / a.Hkv, ld = few_rows_stride(a.D);
  for (int64_t r = 0; r < u.row_end - u.row_begin; ++r) {
    const int64_t row = u.row_begin + r, head = u.kv_head * G + row % G;
    const float sink = a.sinks != nullptr ? a.sinks[head] * kLog2e : -kInf;
    const auto part = parts_of(r);
    float top = sink;
    for (int64_t s = 0; s < count; ++s) top = part(s).top(ld) > top ? part(s).top(ld) : top;
    const float shift = top == -kInf ? 0.f : top;
    float sum = a.sinks != nullptr ? exp2(sink - shift) : 0.f;
    for (int64_t s = 0; s < count; ++s) {
      const float below = part(s).top(ld) - shift;  // 0 for one at least: mostly the only one
      const float weight = below == 0.f ? 1.f : exp2(below);
      sum += part(s).sum(ld) * weight;
      part(s).top(ld) = weight;  // the maxima are not needed again
    }
    const int64_t at = (batch * a.Hq + head) * a.T + token_of(a, u, row);
    a.lse[at] = sum > 0.f ? (top + __builtin_log2f(sum)) * kLn2 : -kInf;
    const float inverse = sum > 0.f ? value_factor(a, u) / sum : 0.f;
    for (int64_t d = 0; d < a.D; d += kLanes) {
      f32v acc = {};
      for (int64_t s = 0; s < count; ++s) acc += load(part(s).out(ld) + d) * part(s).top(ld);
      const int64_t left = a.D - d;
      store_narrow(static_cast<T*>(a.out) + at * a.D + d, acc * inverse,
                   left < kLanes ? left : kLanes);
    }
  }
}

// Merges the splits of one block, in order.
template <typename T>
void merge_few_rows(const AttentionArgs& a, const AttentionUnit* units, int64_t count) {
  const int64_t rows = units->row_end - units->row_begin;
  merge_rows<T>(a, units->batch, *units, count, [&](int64_t r) {
    return [=](int64_t s) { return RowPartial{units[s].partial, rows, r}; };
  });
}
