// Many rows: query rows in the lanes. Included by attention_kernel.cpp, once per ISA level.
//
// Per tile of 64 slots and group of up to three vectors of query rows:
//   scores^T[slot][row] = sum_d key[slot][d] * query^T[d][row]      key element broadcast
//   online softmax down the slots, one row per lane
//   out^T[d][row] = out^T[d][row] * alpha + sum_slot value[slot][d] * p^T[slot][row]
// With M::kPack = 2 the steps of both sums are pairs: of head dims, then of slots.
//
// Rows of one vector would leave lanes empty and use a broadcast once. There the second product is
// that of few rows, with the head dim in the lanes: out[row][d], which needs no values packed.
#pragma once

#include "cpu/kernels/few_rows-inl.h"
#include "cpu/kernels/half-inl.h"
#include "cpu/kernels/outer_product-inl.h"
#include "cpu/kernels/product-inl.h"
#include "cpu/kernels/tile-inl.h"
#include "cpu/kernels/vec-inl.h"

// What a row may see, one lane per row.
struct RowBounds {
  int32_t* node;  // the row's node
  int32_t* low;   // first visible position (window), 0 without one
  int32_t* word;  // 32 ancestor bits for the 32 new slots in hand
};

// Sets scores of invisible (place, row) pairs to -inf.
template <int NV>
void mask_tile(const AttentionArgs& a, const AttentionUnit& u, int64_t begin, int64_t count,
               const RowBounds& rows, int64_t row_count, bool window_cuts, float* scores) {
  constexpr int64_t ld = NV * kLanes;
  const Places& p = *u.places;
  for (int64_t s = 0; s < count; ++s) {
    const int64_t node = begin + s - p.prefix;
    float* line = scores + s * ld;
    if (node < 0) {  // prefix: position = slot, only the window can hide it
      const int64_t slot = window_cuts ? p.run(begin + s).slot : 0;
      if (!window_cuts || slot < p.kept) continue;
      for (int v = 0; v < NV; ++v) {
        const i32v hidden = load(rows.low + v * kLanes) > static_cast<int32_t>(slot);
        store(line + v * kLanes, hidden ? splat(-kInf) : load(line + v * kLanes));
      }
      continue;
    }
    if (a.tree_mask != nullptr && (node % 32 == 0 || s == 0 || node == 0)) {
      const int64_t* bits = a.tree_mask + u.batch * a.N * a.W + node / 64;
      for (int64_t r = 0; r < row_count; ++r)
        rows.word[r] = static_cast<int32_t>(static_cast<uint64_t>(bits[rows.node[r] * a.W]) >>
                                            (node / 32 % 2 * 32));
    }
    const int32_t position = p.new_slot + (a.depths != nullptr ? a.depths[u.batch * a.N + node]
                                                               : static_cast<int32_t>(node));
    for (int v = 0; v < NV; ++v) {
      i32v seen = a.tree_mask != nullptr
                      ? (load(rows.word + v * kLanes) >> static_cast<int>(node % 32) & 1) != 0
                      : load(rows.node + v * kLanes) >= static_cast<int32_t>(node);
      if (p.window > 0 && position >= p.kept) seen &= load(rows.low + v * kLanes) <= position;
      store(line + v * kLanes, seen ? load(line + v * kLanes) : splat(-kInf));
    }
  }
}

// In powers of two, how far scores may pass the maximum that they are compared with: with tile
// registers outputs are scaled row by row, where it changes, and probabilities above 1 are no less
// precise.
constexpr float kSlack = kTileRegisters ? 8.f : 0.f;

// Probabilities of one tile for one group of NV vectors of rows, before they are divided by their
// sum; `alpha` takes what is there already down to the new maximum. Calls beside() once per vector
// of elements.
template <typename M, int NV, typename F>
inline void weigh_tile(const AttentionArgs& a, const AttentionUnit& u, int64_t begin, int64_t count,
                       const RowBounds& rows, int64_t row_count, int64_t hidden, float* scores,
                       f32v (&alpha)[NV], float* row_max, float* row_sum, const F& beside) {
  constexpr int64_t ld = NV * kLanes;
  constexpr int kPack = M::kPack;
  // The scale waits for the subtraction of the maximum, where it is part of a multiply-add; that
  // needs a positive one and nothing in between.
  float scale = a.scale * kLog2e;
  if (a.softcap > 0.f) {
    for (int64_t i = 0; i < count * ld; i += kLanes)
      store(scores + i, tanh(load(scores + i) * (a.scale / a.softcap)));
    scale = a.softcap * kLog2e;
  } else if (scale <= 0.f) {
    for (int64_t i = 0; i < count * ld; i += kLanes) store(scores + i, load(scores + i) * scale);
    scale = 1.f;
  }
  const bool window_cuts = hidden > begin;
  if (window_cuts || begin + count > u.places->prefix)
    mask_tile<NV>(a, u, begin, count, rows, row_count, window_cuts, scores);

  for (int v = 0; v < NV; ++v) {
    float* column = scores + v * kLanes;
    f32v highs[4];  // as one, each would wait for the one before
    for (int i = 0; i < 4; ++i) highs[i] = load(column);
    int64_t next = 1;
    for (; next + 4 <= count; next += 4)
      for (int i = 0; i < 4; ++i) highs[i] = max(highs[i], load(column + (next + i) * ld));
    for (; next < count; ++next) highs[0] = max(highs[0], load(column + next * ld));
    const f32v high = max(max(highs[0], highs[1]), max(highs[2], highs[3]));
    const f32v before = load(row_max + v * kLanes), fresh = high * scale;
    const f32v top = fresh > before + kSlack ? fresh : before;
    // A row that has seen nothing yet keeps max -inf; 0 instead keeps -inf minus -inf out.
    const f32v shift = top == -kInf ? f32v{} : top;
    alpha[v] = exp2(before - shift);
    f32v sum = load(row_sum + v * kLanes) * alpha[v];
    for (int64_t s = 0; s < count; s += kPack) {
      f32v p[kPack], both = {};
      for (int i = 0; i < kPack; ++i) {
        p[i] = s + i < count ? exp2(load(column + (s + i) * ld) * scale - shift) : f32v{};
        both += p[i];
      }
      sum += both;
      beside();
      const typename M::Vec x = M::combine(p);
      __builtin_memcpy(column + s / kPack * ld, &x, sizeof x);  // never ahead of what is still read
    }
    store(row_max + v * kLanes, top);
    store(row_sum + v * kLanes, sum);
  }
}

template <typename M, int NV, typename P>
void attend_tile(const AttentionArgs& a, const AttentionUnit& u, const Lines<M>& tile, P& ahead,
                 const float* query, const RowBounds& rows, int64_t row_count, int64_t hidden,
                 float* scores, float* out, float* row_max, float* row_sum) {
  f32v alpha[NV];
  score_lines<M, NV>(query, tile.keys, tile.count, a.D / M::kPack, scores, ahead);
  weigh_tile<M, NV>(a, u, tile.begin, tile.count, rows, row_count, hidden, scores, alpha, row_max,
                    row_sum, [] {});
  const int64_t steps = (tile.count + M::kPack - 1) / M::kPack;
  int64_t d = 0;
  const auto add_columns = [&](auto columns) {
    constexpr int NB = decltype(columns)::value;
    for (; d + NB <= a.D; d += NB)
      values_block<M, NV, NB>(scores, tile.values, d, steps, alpha, out, ahead);
  };
  add_columns(Int<kBroadcast<NV>>{});
  add_columns(Int<1>{});
}

// Probabilities of one vector of rows: row r of a slot, or of kPack slots, in lane r.
template <typename M>
struct RowLanes {
  static constexpr bool kInUnits = false;
  static constexpr int kSlots = M::kPack, kRow = 1;
  static constexpr int64_t kElements = kLanes;
  static constexpr int element(int r, int) { return r; }
};

// out[row][d] of at most a vector of rows: three quarters of a vector in one go, more in halves.
template <typename M, typename T, typename P>
void add_row_lanes(const TilePart<T>& tile, P& ahead, int64_t rows, int64_t D, const float* probs,
                   const float* alpha, float* out, int64_t ld) {
  constexpr int kChunk = kLanes * M::kPack, kMost = kLanes * 3 / 4, kHalf = kLanes / 2;
  const auto add = [&](auto count, int first) {
    constexpr int R = decltype(count)::value;
    int64_t d = 0;
    const auto add_chunks = [&](auto chunks) {
      constexpr int NC = decltype(chunks)::value;
      for (; d + NC * kChunk <= D; d += NC * kChunk)
        add_block<M, RowLanes<M>, R, NC>(tile, ahead, d, 0, probs + first, alpha + first,
                                         out + first * ld, ld);
    };
    add_chunks(Int<2 / M::kPack>{});
    add_chunks(Int<1>{});
    if (d < D)
      add_block<M, RowLanes<M>, R, 0>(tile, ahead, d, D - d, probs + first, alpha + first,
                                      out + first * ld, ld);
  };
  if (rows <= kMost) return add(Int<kMost>{}, 0);
  add(Int<kHalf>{}, 0);
  add(Int<kHalf>{}, kHalf);
}

// Calls f(first_row, NV) for the groups of a row block: up to three vectors each, as even as can
// be. A group's data (query^T, out^T) is contiguous and starts at first_row * D.
template <typename F>
inline void for_each_group(int64_t rows, F f) {
  constexpr int64_t kMost = kTileRegisters ? 2 : 3;
  const int64_t vectors = (rows + kLanes - 1) / kLanes, groups = (vectors + kMost - 1) / kMost;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = vectors * g / groups, end = vectors * (g + 1) / groups;
    f(first * kLanes, static_cast<int>(end - first));
  }
}

// Whether partial results of so many rows lie row after row, as those of few rows.
inline bool row_after_row(int64_t rows) { return kTileRegisters || rows <= kLanes; }

// Partial result: out^T [D][rows of a group], group after group | max [rows] | sum [rows], rows
// padded; or that of few rows. Where rows have begun, `out` holds what they have.
template <typename T, typename M>
void run_many_rows(const AttentionArgs& a, const AttentionUnit& u, const float* query,
                   float* scratch) {
  const int64_t rows = u.rows(), padded = padded_rows(rows), width = round_up(a.D, kRowPad);
  float* scores = scratch;
  float* converted = scores + kScoreFloats;
  int32_t* ints = reinterpret_cast<int32_t*>(converted + 2 * kKeyTile * width);
  const RowBounds all{ints, ints + padded, ints + 2 * padded};
  [[maybe_unused]] typename M::InUse in_use{};
  const bool one_vector = rows <= kLanes, by_row = row_after_row(rows);
  const int64_t ld_out = few_rows_stride(a.D);
  float* out = u.partial;
  float* row_max = out + (by_row ? ld_out : a.D) * padded;
  float* row_sum = row_max + padded;

  int32_t highest_low = 0, lowest_low = INT32_MAX;
  for (int64_t r = 0; r < padded; ++r) {
    // Padding lanes repeat the last row: finite numbers, never read.
    const UnitRow row = unit_row(u, r < rows ? r : rows - 1);
    const int64_t node = node_of(a, u, row.packed);
    all.node[r] = static_cast<int32_t>(node);
    all.low[r] = first_position(a, u, row.batch, node);
    all.word[r] = 0;
    highest_low = all.low[r] > highest_low ? all.low[r] : highest_low;
    lowest_low = all.low[r] < lowest_low ? all.low[r] : lowest_low;
    const int64_t real = r < rows ? r : rows - 1;
    row_max[r] = u.begun != nullptr ? u.begun[real].top(ld_out) : -kInf;
    row_sum[r] = u.begun != nullptr ? u.begun[real].sum(ld_out) : 0.f;
  }
  if (u.begun == nullptr) __builtin_memset(out, 0, sizeof(float) * (row_max - out));

  Tile<T> tiles[2];
  Tile<T>*tile = tiles, *next = tiles + 1;
  Lines<M> lines;
  const WindowCut cut = cut_window(a, u, lowest_low, highest_low);
  int64_t slot = cut.first;
  // Tiles of shared units must not depend on how many rows there are. Others are small where
  // vectors read values twice, which the first cache level should bear.
  int64_t size = kKeyTile;
  if (u.batches == nullptr) {
    if constexpr (kTileRegisters)
      size = M::slots(rows, a.D);
    else if (one_vector)
      size = small_tile(2 * a.D * static_cast<int64_t>(sizeof(T)));
  }
  const int64_t run = rows_together(a, *u.places, size);
  const T* in_turn[2 * kKeyTile];
  find_tile(a, u, slot, size, tile);
  for (; slot < u.slot_end; slot += size) {
    find_tile(a, u, slot + size, size, next);
    touch_ahead<T>(a, u, slot, size);
    lines.begin = tile->begin;
    lines.count = tile->count;
    auto ahead = ask_for(*next, run, a.D, in_turn);
    const auto bounds = [&](int64_t first) {
      return RowBounds{all.node + first, all.low + first, all.word + first};
    };
    if constexpr (kTileRegisters) {
      auto evenly = M::asks(ahead, size, a.D, rows);
      const auto operands = M::operands(*tile, a.D, converted, evenly);
      for_each_group(rows, [&](int64_t first, int nv) {
        const auto attend = [&](auto vectors) {
          M::template attend<decltype(vectors)::value>(
              a, u, *tile, operands, evenly, query + first * a.D, bounds(first), cut.hidden, scores,
              out + first * ld_out, ld_out, row_max + first, row_sum + first);
        };
        nv == 2 ? attend(Int<2>{}) : attend(Int<1>{});
      });
    } else if (one_vector) {
      make_key_lines(tile->keys(), tile->count, a.D, converted, &lines);
      f32v alpha[1];
      score_lines<M, 1>(query, lines.keys, lines.count, a.D / M::kPack, scores, ahead);
      weigh_tile<M, 1>(a, u, lines.begin, lines.count, all, kLanes, cut.hidden, scores, alpha,
                       row_max, row_sum, [] {});
      float alphas[kLanes];
      store(alphas, alpha[0]);
      add_row_lanes<M>(part(*tile, 0, size), ahead, rows, a.D, scores, alphas, out, ld_out);
    } else {
      make_key_lines(tile->keys(), tile->count, a.D, converted, &lines);
      make_value_lines(tile->values(), tile->count, a.D, converted + kKeyTile * width, &lines);
      for_each_group(rows, [&](int64_t first, int nv) {
        const int64_t ld = nv * kLanes, count = first + ld < padded ? ld : padded - first;
        const auto call =
            nv == 3 ? attend_tile<M, 3, Prefetcher<T>> : attend_tile<M, 2, Prefetcher<T>>;
        call(a, u, lines, ahead, query + first * a.D, bounds(first), count, cut.hidden, scores,
             out + first * a.D, row_max + first, row_sum + first);
      });
    }
    Tile<T>* done = tile;
    tile = next;
    next = done;
  }
  if (by_row) {
    __builtin_memmove(out + rows * ld_out, row_max, sizeof(float) * rows);
    __builtin_memmove(out + rows * ld_out + rows, row_sum, sizeof(float) * rows);
  }
}

// Merges the splits of one block, in order.
template <typename T>
void merge_many_rows(const AttentionArgs& a, const AttentionUnit* units, int64_t count) {
  const AttentionUnit& u = units[0];
  const int64_t G = a.Hq / a.Hkv, rows = u.row_end - u.row_begin, padded = padded_rows(rows);
  for_each_group(rows, [&](int64_t first, int nv) {
    const int64_t ld = nv * kLanes;
    for (int64_t i = 0; i < ld && first + i < rows; i += kLanes) {
      const int64_t at = first + i, lanes = rows - at < kLanes ? rows - at : kLanes;
      const auto max_of = [&](int64_t s) { return units[s].partial + a.D * padded + at; };
      int64_t to[kLanes];  // index of each row of [B, Hq, T]
      float sink[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) {
        const int64_t row = u.row_begin + at + (l < lanes ? l : 0);
        const int64_t head = u.kv_head * G + row % G;
        sink[l] = a.sinks != nullptr ? a.sinks[head] * kLog2e : -kInf;
        to[l] = (u.batch * a.Hq + head) * a.T + row / G;
      }
      f32v top = load(sink);
      for (int64_t s = 0; s < count; ++s) top = max(top, load(max_of(s)));
      const f32v shift = top == -kInf ? f32v{} : top;
      f32v sum = exp2(load(sink) - shift);
      for (int64_t s = 0; s < count; ++s) {
        const f32v weight = exp2(load(max_of(s)) - shift);
        sum += load(max_of(s) + padded) * weight;
        store(max_of(s), weight);  // the maxima are not needed again
      }
      for (int64_t l = 0; l < lanes; ++l)
        a.lse[to[l]] = sum[l] > 0.f ? (top[l] + __builtin_log2f(sum[l])) * kLn2 : -kInf;
      const f32v inverse = sum > 0.f ? value_factor(a, u) / sum : f32v{};
      for (int64_t d = 0; d < a.D; d += kLanes) {
        const int64_t n = a.D - d < kLanes ? a.D - d : kLanes;
        f32v block[kLanes] = {};  // kLanes of the head dim, rows in the lanes; then transposed
        for (int64_t j = 0; j < n; ++j) {
          for (int64_t s = 0; s < count; ++s)
            block[j] += load(units[s].partial + first * a.D + (d + j) * ld + i) * load(max_of(s));
          block[j] *= inverse;
        }
        transpose(block);
        for (int64_t l = 0; l < lanes; ++l)
          store_narrow(static_cast<T*>(a.out) + to[l] * a.D + d, block[l], n);
      }
    }
  });
}

// Partial results of many rows, as run_many_rows leaves them, to where they lie row after row.
inline void transpose_partial(const float* partial, int64_t rows, int64_t D, float* to) {
  const int64_t padded = padded_rows(rows), ld_to = few_rows_stride(D);
  for_each_group(rows, [&](int64_t first, int nv) {
    const int64_t ld = nv * kLanes;
    for (int64_t i = 0; i < ld && first + i < rows; i += kLanes) {
      const int64_t lanes = rows - first - i < kLanes ? rows - first - i : kLanes;
      for (int64_t d = 0; d < D; d += kLanes) {
        f32v block[kLanes] = {};
        for (int64_t j = 0; j < kLanes && d + j < D; ++j)
          block[j] = load(partial + first * D + (d + j) * ld + i);
        transpose(block);
        for (int64_t l = 0; l < lanes; ++l) store(to + (first + i + l) * ld_to + d, block[l]);
      }
    }
  });
  __builtin_memcpy(to + rows * ld_to, partial + D * padded, sizeof(float) * rows);
  __builtin_memcpy(to + rows * ld_to + rows, partial + (D + 1) * padded, sizeof(float) * rows);
}
