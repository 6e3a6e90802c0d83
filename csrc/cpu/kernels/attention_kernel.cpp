// Attention units for one ISA level (BW_ISA); see attention_kernel.h for the plan.
//
// Many rows, per tile of 64 slots and group of up to three vectors of query rows:
//   scores^T[slot][row] = sum_d key[slot][d] * query^T[d][row]      key element broadcast
//   online softmax down the slots, one row per lane
//   out^T[d][row] = out^T[d][row] * alpha + sum_slot value[slot][d] * p^T[slot][row]
// Few rows, per tile: the same with the head dim in the lanes.
#include "cpu/kernels/attention_kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace branchwise::BW_ISA {
namespace {

#include "cpu/kernels/vec-inl.h"

// Accumulators kBroadcast x NV must fit the registers beside NV loaded vectors.
template <int NV>
constexpr int kBroadcast = NV == 1 || kRegisters == 32 ? 8 : 4;

// acc[j] += sum_k b[j][k * b_step] * a[k * a_step ...]: the one inner loop of both products.
// Score product: b[j] = key row j, k runs over D. Value product: b[j] = column j, k over slots.
template <int NV, int NB>
inline void scores_block(const float* query, const float* const* keys, int64_t D, float* scores, int64_t ld) {
  f32v acc[NB][NV] = {};
  for (int64_t d = 0; d < D; ++d) {
    f32v q[NV];
    for (int v = 0; v < NV; ++v) q[v] = load(query + d * ld + v * kLanes);
    for (int b = 0; b < NB; ++b)
      for (int v = 0; v < NV; ++v) acc[b][v] += keys[b][d] * q[v];
  }
  for (int b = 0; b < NB; ++b)
    for (int v = 0; v < NV; ++v) store(scores + b * ld + v * kLanes, acc[b][v]);
}

template <int NV, int NB>
inline void values_block(const float* probs, const float* const* values, int64_t d, int64_t slots, const f32v* alpha,
                         float* out, int64_t ld) {
  f32v acc[NB][NV];
  for (int b = 0; b < NB; ++b)
    for (int v = 0; v < NV; ++v) acc[b][v] = load(out + (d + b) * ld + v * kLanes) * alpha[v];
  for (int64_t s = 0; s < slots; ++s) {
    const float* value = values[s] + d;
    f32v p[NV];
    for (int v = 0; v < NV; ++v) p[v] = load(probs + s * ld + v * kLanes);
    for (int b = 0; b < NB; ++b)
      for (int v = 0; v < NV; ++v) acc[b][v] += value[b] * p[v];
  }
  for (int b = 0; b < NB; ++b)
    for (int v = 0; v < NV; ++v) store(out + (d + b) * ld + v * kLanes, acc[b][v]);
}

// What a row may see, one lane per row.
struct RowBounds {
  int32_t* token;  // index of the row's node among the T new ones
  int32_t* low;    // first visible position (window), 0 without one
  int32_t* word;   // 32 ancestor bits for the 32 new slots in hand
};

struct Tile {
  int64_t begin, count;  // slots [begin, begin + count)
  const float* keys[kKeyTile];
  const float* values[kKeyTile];
};

// Sets scores of invisible (slot, row) pairs to -inf. `prefix` = P; slots at and after it are nodes.
template <int NV>
void mask_tile(const AttentionArgs& a, int64_t batch, const Tile& tile, const RowBounds& rows, int64_t row_count,
               int64_t prefix, bool window_cuts, float* scores, int64_t ld) {
  for (int64_t s = 0; s < tile.count; ++s) {
    const int64_t slot = tile.begin + s, node = slot - prefix;
    float* line = scores + s * ld;
    if (node < 0) {  // prefix: position = slot, only the window can hide it
      if (!window_cuts) continue;
      for (int v = 0; v < NV; ++v) {
        const i32v hidden = load(rows.low + v * kLanes) > static_cast<int32_t>(slot);
        store(line + v * kLanes, hidden ? splat(-kInf) : load(line + v * kLanes));
      }
      continue;
    }
    if (a.tree_mask != nullptr && (node % 32 == 0 || s == 0 || slot == prefix)) {
      const int64_t* bits = a.tree_mask + batch * a.T * a.W + node / 64;
      for (int64_t r = 0; r < row_count; ++r)
        rows.word[r] = static_cast<int32_t>(static_cast<uint64_t>(bits[rows.token[r] * a.W]) >> (node / 32 % 2 * 32));
    }
    const int32_t position =
        static_cast<int32_t>(prefix) + (a.depths != nullptr ? a.depths[batch * a.T + node] : static_cast<int32_t>(node));
    for (int v = 0; v < NV; ++v) {
      i32v seen = a.tree_mask != nullptr ? (load(rows.word + v * kLanes) >> static_cast<int>(node % 32) & 1) != 0
                                         : load(rows.token + v * kLanes) >= static_cast<int32_t>(node);
      if (a.window > 0) seen &= load(rows.low + v * kLanes) <= position;
      store(line + v * kLanes, seen ? load(line + v * kLanes) : splat(-kInf));
    }
  }
}

// One tile of slots for one group of NV vectors of rows.
template <int NV>
void attend_tile(const AttentionArgs& a, int64_t batch, const Tile& tile, const float* query, const RowBounds& rows,
                 int64_t row_count, int64_t prefix, int32_t highest_low, float* scores, float* out, float* row_max,
                 float* row_sum) {
  constexpr int64_t ld = NV * kLanes;
  constexpr int NB = kBroadcast<NV>;
  int64_t s = 0;
  for (; s + NB <= tile.count; s += NB) scores_block<NV, NB>(query, tile.keys + s, a.D, scores + s * ld, ld);
  for (; s < tile.count; ++s) scores_block<NV, 1>(query, tile.keys + s, a.D, scores + s * ld, ld);

  if (a.softcap > 0.f) {
    for (int64_t i = 0; i < tile.count * ld; i += kLanes)
      store(scores + i, a.softcap * tanh(load(scores + i) / a.softcap));
  }
  const bool window_cuts = a.window > 0 && highest_low > tile.begin;
  if (window_cuts || tile.begin + tile.count > prefix)
    mask_tile<NV>(a, batch, tile, rows, row_count, prefix, window_cuts, scores, ld);

  f32v alpha[NV];
  for (int v = 0; v < NV; ++v) {
    f32v top = load(row_max + v * kLanes);
    const f32v before = top;
    for (s = 0; s < tile.count; ++s) top = max(top, load(scores + s * ld + v * kLanes));
    // A row that has seen nothing yet keeps max -inf; 0 instead keeps -inf minus -inf out.
    const f32v shift = top == -kInf ? f32v{} : top;
    alpha[v] = exp(before - shift);
    f32v sum = load(row_sum + v * kLanes) * alpha[v];
    for (s = 0; s < tile.count; ++s) {
      const f32v p = exp(load(scores + s * ld + v * kLanes) - shift);
      store(scores + s * ld + v * kLanes, p);
      sum += p;
    }
    store(row_max + v * kLanes, top);
    store(row_sum + v * kLanes, sum);
  }

  int64_t d = 0;
  for (; d + NB <= a.D; d += NB) values_block<NV, NB>(scores, tile.values, d, tile.count, alpha, out, ld);
  for (; d < a.D; ++d) values_block<NV, 1>(scores, tile.values, d, tile.count, alpha, out, ld);
}

template <typename T>
void load_tile(const AttentionArgs& a, const AttentionUnit& u, int64_t begin, int64_t count, float* converted,
               Tile* tile) {
  tile->begin = begin;
  tile->count = count;
  const T* keys = static_cast<const T*>(a.key_cache);
  const T* values = static_cast<const T*>(a.value_cache);
  for (int64_t s = 0; s < count; ++s) {
    const T* key = keys + a.key_layout.offset(u.batch, u.kv_head, begin + s);
    const T* value = values + a.value_layout.offset(u.batch, u.kv_head, begin + s);
    if constexpr (sizeof(T) == sizeof(float)) {
      tile->keys[s] = key;
      tile->values[s] = value;
    } else {
      float* key_to = converted + s * a.D;
      float* value_to = converted + (kKeyTile + s) * a.D;
      convert_row(key, key_to, a.D);
      convert_row(value, value_to, a.D);
      tile->keys[s] = key_to;
      tile->values[s] = value_to;
    }
  }
}

// Calls f(first_row, NV) for the groups of a row block: three vectors at a time, then the rest.
// A group's data (query^T, out^T) is contiguous and starts at first_row * D.
template <typename F>
void for_each_group(int64_t rows, F f) {
  const int64_t vectors = (rows + kLanes - 1) / kLanes;
  int64_t v = 0;
  for (; v + 3 <= vectors; v += 3) f(v * kLanes, 3);
  if (v < vectors) f(v * kLanes, static_cast<int>(vectors - v));
}

// Where a unit starts to read: nothing before the lowest row's window is visible to its block.
// Nodes are never skipped, since a node's position is not its slot.
inline int64_t first_visible_slot(const AttentionUnit& u, int64_t lowest_low, int64_t prefix) {
  const int64_t first = lowest_low < prefix ? lowest_low : prefix;
  return first > u.slot_begin ? first : u.slot_begin;
}

// out[r][d ..] += sum over the tile's slots of p[r][slot] * value[slot][d ..], NV vectors wide.
template <typename T, int R, int NV>
inline void add_values(const AttentionArgs& a, const AttentionUnit& u, const T* values, int64_t slot, int64_t count,
                       int64_t d, const float* scores, float* out) {
  f32v acc[R][NV];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) acc[r][v] = load(out + r * a.D + d + v * kLanes);
  for (int64_t s = 0; s < count; ++s) {
    const T* value = values + a.value_layout.offset(u.batch, u.kv_head, slot + s) + d;
    for (int v = 0; v < NV; ++v) {
      const f32v x = load_wide(value + v * kLanes);
      for (int r = 0; r < R; ++r) acc[r][v] += scores[r * kKeyTile + s] * x;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) store(out + r * a.D + d + v * kLanes, acc[r][v]);
}

constexpr int64_t kFewRows = kLanes / 4;

template <typename T>
void pack_query_typed(const AttentionArgs& a, const AttentionUnit& u, float* packed) {
  const int64_t G = a.Hq / a.Hkv, rows = u.row_end - u.row_begin;
  const auto row_of = [&](int64_t r) {
    // Padding lanes repeat the last row: finite numbers, never read.
    const int64_t row = u.row_begin + (r < rows ? r : rows - 1);
    return static_cast<const T*>(a.query) + u.batch * a.q_stride[0] + (u.kv_head * G + row % G) * a.q_stride[1] +
           row / G * a.q_stride[2];
  };
  if (rows <= kFewRows) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < a.D; ++d) packed[r * a.D + d] = to_float(row_of(r)[d]) * a.scale;
    return;
  }
  for_each_group(rows, [&](int64_t first, int nv) {
    const int64_t ld = nv * kLanes;
    for (int64_t i = 0; i < ld; ++i) {
      const T* from = row_of(first + i);
      float* to = packed + first * a.D + i;
      for (int64_t d = 0; d < a.D; ++d) to[d * ld] = to_float(from[d]) * a.scale;
    }
  });
}

void pack_query(const AttentionArgs& a, const AttentionUnit& u, float* packed) {
  switch (a.type) {
    case KvType::f32: return pack_query_typed<float>(a, u, packed);
    case KvType::bf16: return pack_query_typed<Bf16>(a, u, packed);
    case KvType::f16: return pack_query_typed<F16>(a, u, packed);
  }
}

// Whether a row sees a slot; the scalar twin of mask_tile.
inline bool sees(const AttentionArgs& a, int64_t batch, int64_t token, int64_t low, int64_t prefix, int64_t slot) {
  const int64_t node = slot - prefix;
  if (node < 0) return slot >= low;
  const bool visible = a.tree_mask != nullptr
                           ? a.tree_mask[(batch * a.T + token) * a.W + node / 64] >> (node % 64) & 1
                           : node <= token;
  return visible && prefix + (a.depths != nullptr ? a.depths[batch * a.T + node] : node) >= low;
}

// At most kFewRows packed rows. Scores are [row][slot]; out is [row][D] until the end, when it takes
// the layout that merge_units reads.
template <typename T, int R>
void run_few_rows(const AttentionArgs& a, const AttentionUnit& u, float* scratch) {
  const int64_t G = a.Hq / a.Hkv, D = a.D, padded = padded_rows(R), prefix = a.seq_lens[u.batch];
  const int64_t vectors = D / kLanes, whole = vectors * kLanes;
  float* scores = scratch;                // [R][kKeyTile]
  float* out = scores + R * kKeyTile;     // [R][D]; R rows of at most 512 fit the tile of converted keys
  float top[R], sum[R];
  int64_t low[R], token[R], lowest = INT64_MAX, highest = 0;
  for (int r = 0; r < R; ++r) {
    token[r] = (u.row_begin + r) / G;
    const int64_t depth = a.depths != nullptr ? a.depths[u.batch * a.T + token[r]] : token[r];
    low[r] = a.window > 0 && prefix + depth - a.window + 1 > 0 ? prefix + depth - a.window + 1 : 0;
    lowest = low[r] < lowest ? low[r] : lowest;
    highest = low[r] > highest ? low[r] : highest;
    top[r] = -kInf;
    sum[r] = 0.f;
  }
  __builtin_memset(out, 0, sizeof(float) * R * D);
  const T* keys = static_cast<const T*>(a.key_cache);
  const T* values = static_cast<const T*>(a.value_cache);

  for (int64_t slot = first_visible_slot(u, lowest, prefix); slot < u.slot_end; slot += kKeyTile) {
    const int64_t count = u.slot_end - slot < kKeyTile ? u.slot_end - slot : kKeyTile;
    for (int64_t s = 0; s < count; ++s) {
      const T* key = keys + a.key_layout.offset(u.batch, u.kv_head, slot + s);
      f32v acc[R] = {};
      for (int64_t d = 0; d < whole; d += kLanes) {
        const f32v k = load_wide(key + d);
        for (int r = 0; r < R; ++r) acc[r] += k * load(u.query + r * D + d);
      }
      for (int r = 0; r < R; ++r) {
        float dot = horizontal_sum(acc[r]);
        for (int64_t d = whole; d < D; ++d) dot += to_float(key[d]) * u.query[r * D + d];
        scores[r * kKeyTile + s] = dot;
      }
    }
    for (int r = 0; r < R; ++r) {
      float* line = scores + r * kKeyTile;
      for (int64_t s = count; s < kKeyTile; ++s) line[s] = -kInf;
      if (a.softcap > 0.f)
        for (int64_t s = 0; s < count; s += kLanes) store(line + s, a.softcap * tanh(load(line + s) / a.softcap));
      if (slot + count > prefix || highest > slot)
        for (int64_t s = 0; s < count; ++s)
          if (!sees(a, u.batch, token[r], low[r], prefix, slot + s)) line[s] = -kInf;
      for (int64_t s = count; s < kKeyTile; ++s) line[s] = -kInf;
      f32v high = load(line);
      for (int64_t s = kLanes; s < kKeyTile; s += kLanes) high = max(high, load(line + s));
      float tile_top = top[r];
      for (int l = 0; l < kLanes; ++l) tile_top = high[l] > tile_top ? high[l] : tile_top;
      const float shift = tile_top == -kInf ? 0.f : tile_top;
      const float alpha = exp(splat(top[r] - shift))[0];
      f32v total = {};
      for (int64_t s = 0; s < kKeyTile; s += kLanes) {
        const f32v p = exp(load(line + s) - shift);
        store(line + s, p);
        total += p;
      }
      sum[r] = sum[r] * alpha + horizontal_sum(total);
      top[r] = tile_top;
      if (alpha != 1.f)
        for (int64_t d = 0; d < D; ++d) out[r * D + d] *= alpha;
    }
    // Four vectors of the head dim at a time stay in registers over all slots of the tile.
    constexpr int kChunk = 4;
    int64_t d = 0;
    for (; d + kChunk * kLanes <= D; d += kChunk * kLanes)
      add_values<T, R, kChunk>(a, u, values, slot, count, d, scores, out);
    for (; d + kLanes <= D; d += kLanes) add_values<T, R, 1>(a, u, values, slot, count, d, scores, out);
    for (; d < D; ++d)
      for (int64_t s = 0; s < count; ++s) {
        const float value = to_float(values[a.value_layout.offset(u.batch, u.kv_head, slot + s) + d]);
        for (int r = 0; r < R; ++r) out[r * D + d] += scores[r * kKeyTile + s] * value;
      }
  }
  for (int r = 0; r < R; ++r) {
    for (int64_t d = 0; d < D; ++d) u.partial[d * kLanes + r] = out[r * D + d];
    u.partial[D * padded + r] = top[r];
    u.partial[(D + 1) * padded + r] = sum[r];
  }
}

template <typename T>
void run_unit_typed(const AttentionArgs& a, const AttentionUnit& u, float* scratch) {
  const int64_t G = a.Hq / a.Hkv, rows = u.row_end - u.row_begin, padded = padded_rows(rows);
  if (rows <= kFewRows) {
    switch (rows) {
      case 1: return run_few_rows<T, 1>(a, u, scratch);
      case 2: return run_few_rows<T, 2>(a, u, scratch);
      case 3: return run_few_rows<T, 3>(a, u, scratch);
      default: return run_few_rows<T, 4>(a, u, scratch);
    }
  }
  const int64_t prefix = a.seq_lens[u.batch];
  float* scores = scratch;
  float* converted = scores + kKeyTile * 3 * kRowPad;
  int32_t* ints = reinterpret_cast<int32_t*>(converted + 2 * kKeyTile * a.D);
  const RowBounds all{ints, ints + padded, ints + 2 * padded};
  float* out = u.partial;
  float* row_max = out + a.D * padded;
  float* row_sum = row_max + padded;

  int32_t highest_low = 0, lowest_low = INT32_MAX;
  for (int64_t r = 0; r < padded; ++r) {
    // Padding lanes repeat the last row: finite numbers, never read.
    const int64_t row = u.row_begin + (r < rows ? r : rows - 1), token = row / G;
    const int32_t depth = a.depths != nullptr ? a.depths[u.batch * a.T + token] : static_cast<int32_t>(token);
    const int64_t low = a.window > 0 ? prefix + depth - a.window + 1 : 0;
    all.token[r] = static_cast<int32_t>(token);
    all.low[r] = static_cast<int32_t>(low > 0 ? low : 0);
    all.word[r] = 0;
    highest_low = all.low[r] > highest_low ? all.low[r] : highest_low;
    lowest_low = all.low[r] < lowest_low ? all.low[r] : lowest_low;
    row_max[r] = -kInf;
    row_sum[r] = 0.f;
  }
  __builtin_memset(out, 0, sizeof(float) * a.D * padded);

  Tile tile;
  for (int64_t slot = first_visible_slot(u, lowest_low, prefix); slot < u.slot_end; slot += kKeyTile) {
    const int64_t left = u.slot_end - slot;
    load_tile<T>(a, u, slot, left < kKeyTile ? left : kKeyTile, converted, &tile);
    for_each_group(rows, [&](int64_t first, int nv) {
      const RowBounds part{all.token + first, all.low + first, all.word + first};
      const int64_t ld = nv * kLanes, count = first + ld < padded ? ld : padded - first;
      const float* group_query = u.query + first * a.D;
      float* group_out = out + first * a.D;
      const auto call = nv == 3 ? attend_tile<3> : nv == 2 ? attend_tile<2> : attend_tile<1>;
      call(a, u.batch, tile, group_query, part, count, prefix, highest_low, scores, group_out, row_max + first,
           row_sum + first);
    });
  }
}

void run_unit(const AttentionArgs& a, const AttentionUnit& u, float* scratch) {
  switch (a.type) {
    case KvType::f32: return run_unit_typed<float>(a, u, scratch);
    case KvType::bf16: return run_unit_typed<Bf16>(a, u, scratch);
    case KvType::f16: return run_unit_typed<F16>(a, u, scratch);
  }
}

template <typename T>
void merge_units_typed(const AttentionArgs& a, const AttentionUnit* units, int64_t count) {
  const AttentionUnit& u = units[0];
  const int64_t G = a.Hq / a.Hkv, rows = u.row_end - u.row_begin, padded = padded_rows(rows);
  for_each_group(rows, [&](int64_t first, int nv) {
    const int64_t ld = nv * kLanes;
    for (int64_t i = 0; i < ld && first + i < rows; i += kLanes) {
      const int64_t at = first + i, lanes = rows - at < kLanes ? rows - at : kLanes;
      f32v top = splat(-kInf);
      for (int64_t s = 0; s < count; ++s) top = max(top, load(units[s].partial + a.D * padded + at));
      float sink[kLanes];
      for (int l = 0; l < kLanes; ++l) {
        const int64_t head = u.kv_head * G + (u.row_begin + at + (l < lanes ? l : 0)) % G;
        sink[l] = a.sinks != nullptr ? a.sinks[head] : -kInf;
      }
      top = max(top, load(sink));
      const f32v shift = top == -kInf ? f32v{} : top;
      f32v sum = exp(load(sink) - shift);
      for (int64_t s = 0; s < count; ++s) {
        float* max_s = units[s].partial + a.D * padded + at;
        const f32v weight = exp(load(max_s) - shift);
        sum += load(max_s + padded) * weight;
        store(max_s, weight);  // the maxima are not needed again
      }
      float total[kLanes], high[kLanes];
      store(total, sum);
      store(high, top);
      const f32v inverse = sum > 0.f ? 1.f / sum : f32v{};
      for (int64_t l = 0; l < lanes; ++l) {
        const int64_t row = u.row_begin + at + l;
        a.lse[(u.batch * a.Hq + u.kv_head * G + row % G) * a.T + row / G] =
            total[l] > 0.f ? high[l] + __builtin_logf(total[l]) : -kInf;
      }
      for (int64_t d = 0; d < a.D; ++d) {
        f32v acc = {};
        for (int64_t s = 0; s < count; ++s)
          acc += load(units[s].partial + first * a.D + d * ld + i) * load(units[s].partial + a.D * padded + at);
        float lane[kLanes];
        store(lane, acc * inverse);
        for (int64_t l = 0; l < lanes; ++l) {
          const int64_t row = u.row_begin + at + l;
          T* to = static_cast<T*>(a.out) + ((u.batch * a.Hq + u.kv_head * G + row % G) * a.T + row / G) * a.D + d;
          from_float(lane[l], to);
        }
      }
    }
  });
}

void merge_units(const AttentionArgs& a, const AttentionUnit* units, int64_t count) {
  switch (a.type) {
    case KvType::f32: return merge_units_typed<float>(a, units, count);
    case KvType::bf16: return merge_units_typed<Bf16>(a, units, count);
    case KvType::f16: return merge_units_typed<F16>(a, units, count);
  }
}

template <typename T>
void merge_pair_typed(const MergeArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const float la = a.lse_a[r], lb = a.lse_b[r], top = la > lb ? la : lb;
    const float shift = top == -kInf ? 0.f : top;
    const float wa = __builtin_expf(la - shift), wb = __builtin_expf(lb - shift), sum = wa + wb;
    a.lse[r] = sum > 0.f ? top + __builtin_logf(sum) : -kInf;
    const float inverse = sum > 0.f ? 1.f / sum : 0.f;
    const T *out_a = static_cast<const T*>(a.out_a) + r * a.D, *out_b = static_cast<const T*>(a.out_b) + r * a.D;
    T* out = static_cast<T*>(a.out) + r * a.D;
    for (int64_t d = 0; d < a.D; ++d) {
      // An empty side may hold anything; it must not turn into 0 * NaN.
      const float from_a = wa > 0.f ? to_float(out_a[d]) * wa : 0.f;
      const float from_b = wb > 0.f ? to_float(out_b[d]) * wb : 0.f;
      from_float((from_a + from_b) * inverse, out + d);
    }
  }
}

void merge_pair(const MergeArgs& a, int64_t begin, int64_t end) {
  switch (a.type) {
    case KvType::f32: return merge_pair_typed<float>(a, begin, end);
    case KvType::bf16: return merge_pair_typed<Bf16>(a, begin, end);
    case KvType::f16: return merge_pair_typed<F16>(a, begin, end);
  }
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {pack_query, run_unit, merge_units, merge_pair};

}  // namespace branchwise::BW_ISA
