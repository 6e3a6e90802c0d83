// Few rows, at most a quarter of the lanes: the head dim in the lanes, dot products. Included by
// attention_kernel.cpp, once per ISA level.

// out[r][d ..] += sum over the tile's slots of p[r][slot] * value[slot][d ..], NV vectors wide.
template <typename T, int R, int NV>
inline void add_values(const AttentionArgs& a, const AttentionUnit& u, const T* values,
                       int64_t slot, int64_t count, int64_t d, const float* scores, float* out) {
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

// Whether a row sees a slot; the scalar twin of mask_tile.
inline bool sees(const AttentionArgs& a, int64_t batch, int64_t token, int64_t low, int64_t prefix,
                 int64_t slot) {
  const int64_t node = slot - prefix;
  if (node < 0) return slot >= low;
  const bool visible = a.tree_mask != nullptr
                           ? a.tree_mask[(batch * a.T + token) * a.W + node / 64] >> (node % 64) & 1
                           : node <= token;
  return visible && prefix + (a.depths != nullptr ? a.depths[batch * a.T + node] : node) >= low;
}

// At most kFewRows packed rows. Scores are [row][slot]; out is [row][D] until the end, when it
// takes the layout that merge_units reads.
template <typename T, int R>
void run_few_rows(const AttentionArgs& a, const AttentionUnit& u, float* scratch) {
  const int64_t G = a.Hq / a.Hkv, D = a.D, padded = padded_rows(R), prefix = a.seq_lens[u.batch];
  const int64_t vectors = D / kLanes, whole = vectors * kLanes;
  float* scores = scratch;             // [R][kKeyTile]
  float* out = scores + R * kKeyTile;  // [R][D], within the space for converted keys
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
      if (a.softcap > 0.f)
        for (int64_t s = 0; s < count; s += kLanes)
          store(line + s, a.softcap * tanh(load(line + s) / a.softcap));
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
    for (; d + kLanes <= D; d += kLanes)
      add_values<T, R, 1>(a, u, values, slot, count, d, scores, out);
    for (; d < D; ++d)
      for (int64_t s = 0; s < count; ++s) {
        const float value =
            to_float(values[a.value_layout.offset(u.batch, u.kv_head, slot + s) + d]);
        for (int r = 0; r < R; ++r) out[r * D + d] += scores[r * kKeyTile + s] * value;
      }
  }
  for (int r = 0; r < R; ++r) {
    for (int64_t d = 0; d < D; ++d) u.partial[d * kLanes + r] = out[r * D + d];
    u.partial[D * padded + r] = top[r];
    u.partial[(D + 1) * padded + r] = sum[r];
  }
}
