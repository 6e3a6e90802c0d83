// Many rows: query rows in the lanes. Included by attention_kernel.cpp, once per ISA level.
//
// Per tile of 64 slots and group of up to three vectors of query rows:
//   scores^T[slot][row] = sum_d key[slot][d] * query^T[d][row]      key element broadcast
//   online softmax down the slots, one row per lane
//   out^T[d][row] = out^T[d][row] * alpha + sum_slot value[slot][d] * p^T[slot][row]

// Accumulators kBroadcast x NV must fit the registers beside NV loaded vectors.
template <int NV>
constexpr int kBroadcast = NV == 1 || kRegisters == 32 ? 8 : 4;

// NB keys or value columns against NV vectors of rows, accumulators in registers.
template <int NV, int NB>
inline void scores_block(const float* query, const float* const* keys, int64_t D, float* scores,
                         int64_t ld) {
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
inline void values_block(const float* probs, const float* const* values, int64_t d, int64_t slots,
                         const f32v* alpha, float* out, int64_t ld) {
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

// Sets scores of invisible (slot, row) pairs to -inf. `prefix` = P; slots at and after it are
// nodes.
template <int NV>
void mask_tile(const AttentionArgs& a, int64_t batch, const Tile& tile, const RowBounds& rows,
               int64_t row_count, int64_t prefix, bool window_cuts, float* scores, int64_t ld) {
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
        rows.word[r] = static_cast<int32_t>(static_cast<uint64_t>(bits[rows.token[r] * a.W]) >>
                                            (node / 32 % 2 * 32));
    }
    const int32_t position =
        static_cast<int32_t>(prefix) +
        (a.depths != nullptr ? a.depths[batch * a.T + node] : static_cast<int32_t>(node));
    for (int v = 0; v < NV; ++v) {
      i32v seen = a.tree_mask != nullptr
                      ? (load(rows.word + v * kLanes) >> static_cast<int>(node % 32) & 1) != 0
                      : load(rows.token + v * kLanes) >= static_cast<int32_t>(node);
      if (a.window > 0) seen &= load(rows.low + v * kLanes) <= position;
      store(line + v * kLanes, seen ? load(line + v * kLanes) : splat(-kInf));
    }
  }
}

// One tile of slots for one group of NV vectors of rows.
template <int NV>
void attend_tile(const AttentionArgs& a, int64_t batch, const Tile& tile, const float* query,
                 const RowBounds& rows, int64_t row_count, int64_t prefix, int32_t highest_low,
                 float* scores, float* out, float* row_max, float* row_sum) {
  constexpr int64_t ld = NV * kLanes;
  constexpr int NB = kBroadcast<NV>;
  int64_t s = 0;
  for (; s + NB <= tile.count; s += NB)
    scores_block<NV, NB>(query, tile.keys + s, a.D, scores + s * ld, ld);
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
  for (; d + NB <= a.D; d += NB)
    values_block<NV, NB>(scores, tile.values, d, tile.count, alpha, out, ld);
  for (; d < a.D; ++d) values_block<NV, 1>(scores, tile.values, d, tile.count, alpha, out, ld);
}

template <typename T>
void load_tile(const AttentionArgs& a, const AttentionUnit& u, int64_t begin, int64_t count,
               float* converted, Tile* tile) {
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

// Asks for the rows of the next tile while this one is computed: the hardware does not look past
// the arithmetic of a tile.
template <typename T>
void prefetch_tile(const AttentionArgs& a, const AttentionUnit& u, int64_t begin) {
  const int64_t left = u.slot_end - begin, count = left < kKeyTile ? left : kKeyTile;
  const int64_t per_line = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t s = 0; s < count; ++s) {
    const T* key =
        static_cast<const T*>(a.key_cache) + a.key_layout.offset(u.batch, u.kv_head, begin + s);
    const T* value =
        static_cast<const T*>(a.value_cache) + a.value_layout.offset(u.batch, u.kv_head, begin + s);
    for (int64_t d = 0; d < a.D; d += per_line) {
      __builtin_prefetch(key + d, 0, 2);
      __builtin_prefetch(value + d, 0, 2);
    }
  }
}

template <typename T>
void run_many_rows(const AttentionArgs& a, const AttentionUnit& u, float* scratch) {
  const int64_t G = a.Hq / a.Hkv, rows = u.row_end - u.row_begin, padded = padded_rows(rows);
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
    const int32_t depth =
        a.depths != nullptr ? a.depths[u.batch * a.T + token] : static_cast<int32_t>(token);
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
  for (int64_t slot = first_visible_slot(u, lowest_low, prefix); slot < u.slot_end;
       slot += kKeyTile) {
    const int64_t left = u.slot_end - slot;
    load_tile<T>(a, u, slot, left < kKeyTile ? left : kKeyTile, converted, &tile);
    prefetch_tile<T>(a, u, slot + kKeyTile);
    for_each_group(rows, [&](int64_t first, int nv) {
      const RowBounds part{all.token + first, all.low + first, all.word + first};
      const int64_t ld = nv * kLanes, count = first + ld < padded ? ld : padded - first;
      const float* group_query = u.query + first * a.D;
      float* group_out = out + first * a.D;
      const auto call = nv == 3 ? attend_tile<3> : nv == 2 ? attend_tile<2> : attend_tile<1>;
      call(a, u.batch, tile, group_query, part, count, prefix, highest_low, scores, group_out,
           row_max + first, row_sum + first);
    });
  }
}
