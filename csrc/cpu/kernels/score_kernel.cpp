// Scores and summaries for one ISA level (BW_ISA); the products are those of attention.
#include "cpu/kernels/score_kernel.h"

#include "cpu/kernels/memory.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace branchwise::BW_ISA {
namespace {

#include "cpu/kernels/pack-inl.h"
#if defined(__AMX_BF16__)
#include "cpu/kernels/many_rows_amx-inl.h"
#endif

// T is the type of queries here and below, K that of keys.
template <typename K>
struct KeyTile {
  int64_t begin, count;
  const K* keys[kKeyTile];
};

// Scores of a tile as vectors. Few rows: one column, a vector holds kSlots slots of all rows, row r
// of slot s in lane r * kSlots + s. Many rows: `columns` vectors per slot, a row in each lane.
struct TileScores {
  float* data;
  int64_t vectors;  // per column
  int columns;
  int64_t slots_per_vector;  // 1 with many rows
};

// The rows behind the lanes of one column.
struct [[gnu::may_alias]] LaneRows {
  f32v lse2, weight;  // lse in base 2; weight 0 in lanes without a row
  i32v last;          // the last key that the row sees
  i32v used;          // lanes with a row
};

int32_t clamp_slot(int64_t slot) {
  return slot < INT32_MAX ? static_cast<int32_t>(slot) : INT32_MAX;
}

// The scores of a tile for rows [first, first + 48) of a unit, packed at `query`.
template <typename K, typename M, int R = 1>
void few_scores(const KeyTile<K>& tile, Prefetcher<K>& ahead, const float* query, int64_t rows,
                int64_t D, TileScores* out) {
  if constexpr (R <= kFewRows) {
    if (rows != R) return few_scores<K, M, R + 1>(tile, ahead, query, rows, D, out);
    constexpr int S = kSlots<R>;
    out->vectors = (tile.count + S - 1) / S;
    out->columns = 1;
    out->slots_per_vector = S;
    for (int64_t g = 0; g < out->vectors; ++g)
      store(out->data + g * kLanes, score_slots<M, R>(tile.keys + g * S, ahead, query, D));
  }
}

template <typename M, int NV, typename P>
void many_scores(const Lines<M>& tile, P& ahead, const float* query, int64_t D, TileScores* out) {
  score_lines<M, NV>(query, tile.keys, tile.count, D / M::kPack, out->data, ahead);
  out->vectors = tile.count;
  out->columns = NV;
  out->slots_per_vector = 1;
}

#if defined(__AMX_BF16__)
// Keys of a tile: as bf16, 32 of 256 values leave the first cache level room.
constexpr int64_t kAmxKeys = 2 * kTileRows;

// Calls f(scores of a tile, number of its first row) for the groups of rows.
template <typename K, typename F>
void tile_scores(const KeyTile<K>& tile, const Prefetcher<K>& ahead, const float* query,
                 int64_t rows, int64_t D, float* converted, float* scores, const F& f) {
  constexpr bool kConverts = !__is_same(K, Bf16);
  const int64_t lines = kConverts ? 0 : kAmxKeys * D / Prefetcher<K>::kValues;
  EvenAsks<K> asks(ahead, lines, padded_rows(rows) * kAmxKeys * D / (2 * kTileRows * kTileFloats));
  KeyRows keys[kAmxKeys / kTileRows];
  Bf16* wide = reinterpret_cast<Bf16*>(converted);
  for (int64_t i = 0; i < kAmxKeys; i += kTileRows)
    keys[i / kTileRows] = key_rows(tile.keys + i, D, wide + i * D, asks);
  for_each_group(rows, [&](int64_t first, int nv) {
    const float* group = query + first * D;
    nv == 2 ? score_tiles<2>(group, keys, tile.count, D, scores, asks)
            : score_tiles<1>(group, keys, tile.count, D, scores, asks);
    f(TileScores{scores, tile.count, nv, 1}, first);
  });
}
#endif

LaneRows lane_rows(const ScoreArgs& a, const ScoreUnit& u, int64_t first, int64_t slots) {
  const int64_t rows = static_cast<int64_t>(u.tokens) * u.heads, G = a.Hq / a.Hkv;
  float lse2[kLanes], weight[kLanes];
  int32_t last[kLanes], used[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) {
    const int64_t r = first + l / slots;
    used[l] = r < rows ? -1 : 0;
    const int64_t row = r < rows ? r : rows - 1;
    const int64_t t = u.token_begin + row / u.heads;
    const int64_t head = u.kv_head * G + u.head_begin + row % u.heads;
    lse2[l] = a.lse != nullptr ? a.lse[(u.batch * a.Hq + head) * a.T + t] * kLog2e : 0.f;
    weight[l] = r >= rows ? 0.f : a.weights != nullptr ? a.weights[u.batch * a.T + t] : 1.f;
    last[l] = clamp_slot(u.new_slot + t);
  }
  return {load(lse2), load(weight), load(last), load(used)};
}

// Calls f(scores, column, rows of its lanes, first row, key of its first vector) for every column
// of every tile, in order of keys.
template <typename T, typename K, typename M, typename F>
void for_each_column(const ScoreArgs& a, const ScoreUnit& u, float* scratch, const F& f) {
  const int64_t rows = static_cast<int64_t>(u.tokens) * u.heads, D = a.D, G = a.Hq / a.Hkv;
  float* query = scratch;
  float* scores = query + query_floats(rows, D);
  float* converted = scores + kKeyTile * 3 * kRowPad;
  pack_query<T, M>(rows, D, query, [&](int64_t r) {
    const int64_t t = u.token_begin + r / u.heads, head = u.head_begin + r % u.heads;
    return static_cast<const T*>(a.query) + u.batch * a.q_stride[0] +
           (u.kv_head * G + head) * a.q_stride[1] + t * a.q_stride[2];
  });
  // In scratch, behind the maxima and sums that lse_typed keeps there.
  const bool few = !kTileRegisters && rows <= kFewRows;
  const int64_t padded = padded_rows(rows), slots = few ? few_slots(rows) : 1;
  auto* of = reinterpret_cast<LaneRows*>(converted + kKeyTile * D + 2 * padded);
  for (int64_t first = 0; first < rows; first += kLanes)
    of[first / kLanes] = lane_rows(a, u, first, slots);
#if defined(__AMX_BF16__)
  const TilesInUse in_use;
  constexpr int64_t size = kAmxKeys;
#else
  const int64_t size = few ? small_tile(D * static_cast<int64_t>(sizeof(K))) : kKeyTile;
#endif
  const auto find = [&](int64_t begin, KeyTile<K>* tile) {
    const int64_t left = u.end - begin;
    tile->begin = begin;
    tile->count = left < size ? (left > 0 ? left : 0) : size;
    const auto all = [](int64_t slot) { return Places::Run{slot, INT32_MAX}; };
    for_each_run(all, a.layout, begin, tile->count, [&](int64_t s, int64_t slot, int64_t n) {
      find_run(a.layout, a.keys, u.batch, u.kv_head, slot, n, tile->keys + s);
    });
    for (int64_t s = tile->count; s < size; ++s) tile->keys[s] = zeros<K>();
  };
  KeyTile<K> tiles[2];
  find(u.begin, tiles);
  for (int at = 0; tiles[at].count > 0; at ^= 1) {
    const KeyTile<K>* tile = tiles + at;
    KeyTile<K>* next = tiles + (at ^ 1);
    find(tile->begin + size, next);
    Prefetcher<K> ahead(next->keys, next->count, D);
    const auto columns = [&](const TileScores& found, int64_t first) {
      for (int v = 0; v < found.columns; ++v)
        f(found, v, of[first / kLanes + v], first + v * kLanes, tile->begin, tile->count);
    };
#if defined(__AMX_BF16__)
    tile_scores(*tile, ahead, query, rows, D, converted, scores, columns);
#else
    TileScores found{scores, 0, 0, 0};
    if (few) {
      few_scores<K, M>(*tile, ahead, query, rows, D, &found);
      columns(found, 0);
    } else {
      Lines<M> lines;
      lines.begin = tile->begin;
      lines.count = tile->count;
      make_key_lines(tile->keys, tile->count, D, converted, &lines);
      for_each_group(rows, [&](int64_t first, int nv) {
        const auto call = nv == 3   ? many_scores<M, 3, Prefetcher<K>>
                          : nv == 2 ? many_scores<M, 2, Prefetcher<K>>
                                    : many_scores<M, 1, Prefetcher<K>>;
        call(lines, ahead, query + first * D, D, &found);
        columns(found, first);
      });
    }
#endif
  }
}

// Logits of one vector in base 2, with -inf where a row does not see the key.
struct Logits {
  float factor, softcap;
  explicit Logits(const ScoreArgs& a)
      : factor(a.softcap > 0.f ? a.scale / a.softcap : a.scale * kLog2e), softcap(a.softcap) {}
  f32v operator()(f32v x) const {
    x = x * factor;
    return softcap > 0.f ? tanh(x) * (softcap * kLog2e) : x;
  }
};

i32v lane_numbers() {
  int32_t n[kLanes];
  for (int l = 0; l < kLanes; ++l) n[l] = l;
  return load(n);
}

// The sum, or the largest, of the lanes that lie S apart, in all of them.
template <bool Max, int H = 1>
f32v fold_rows(f32v v, int64_t S) {
  if constexpr (H < kLanes) {
    if (H >= S) {
      const f32v other = shuffle<Swapped<H>>(v, v);
      v = Max ? max(v, other) : v + other;
    }
    return fold_rows<Max, 2 * H>(v, S);
  }
  return v;
}

template <typename T, typename K, typename M, bool Max>
void reduce_typed(const ScoreArgs& a, const ScoreUnit& u, float* scratch) {
  const Logits logits(a);
  const bool probabilities = a.lse != nullptr;
  const f32v nothing = splat(Max ? -kInf : 0.f);
  const i32v lane = lane_numbers();
  for (int64_t i = 0; i < u.end - u.begin; ++i) u.out[i] = Max ? -kInf : 0.f;
  for_each_column<T, K, M>(
      a, u, scratch,
      [&](const TileScores& tile, int column, const LaneRows& rows, int64_t, int64_t begin,
          int64_t count) {
        float* out = u.out + (begin - u.begin);
        const int64_t S = tile.slots_per_vector;
        const bool causal = begin + count > u.new_slot;
        const i32v slot_of_lane = lane & static_cast<int32_t>(S - 1);
        const auto reduced = [&](int64_t i) {
          f32v x = logits(load(tile.data + (i * tile.columns + column) * kLanes));
          if (probabilities) {
            x = exp2(x - rows.lse2);
            if (causal)
              x = (slot_of_lane + static_cast<int32_t>(begin + i * S)) > rows.last ? f32v{} : x;
          } else {
            x *= kLn2;
          }
          x *= rows.weight;
          return Max ? (rows.used != 0 ? x : nothing) : x;
        };
        const auto join = [&](float* to, float x) { *to = Max ? (x > *to ? x : *to) : *to + x; };
        if (S > 1) {  // few rows: rows lie S lanes apart
          for (int64_t i = 0; i < tile.vectors; ++i) {
            float lanes[kLanes];
            store(lanes, fold_rows<Max>(reduced(i), S));
            for (int64_t s = i * S, l = 0; l < S && s < count; ++l, ++s) join(out + s, lanes[l]);
          }
          return;
        }
        for (int64_t i = 0; i < tile.vectors; i += kLanes) {
          const int64_t n = count - i < kLanes ? count - i : kLanes;
          f32v x[kLanes];
          for (int64_t j = 0; j < kLanes; ++j) x[j] = j < n ? reduced(i + j) : nothing;
          const f32v sum = folds<Max>(x);
          for (int64_t j = 0; j < n; ++j) join(out + i + j, sum[j]);
        }
      });
}

template <typename T, typename K, typename M>
void lse_typed(const ScoreArgs& a, const ScoreUnit& u, float* scratch) {
  const Logits logits(a);
  const int64_t rows = static_cast<int64_t>(u.tokens) * u.heads, padded = padded_rows(rows);
  // Maxima and sums per lane: of a row with many rows, of a part of one with few.
  float* top = scratch + query_floats(rows, a.D) + kKeyTile * 3 * kRowPad + kKeyTile * a.D;
  float* sum = top + padded;
  for (int64_t i = 0; i < padded; ++i) top[i] = -kInf, sum[i] = 0.f;
  int64_t slots = 1;
  const i32v lane = lane_numbers();
  for_each_column<T, K, M>(
      a, u, scratch,
      [&](const TileScores& tile, int column, const LaneRows& of, int64_t first, int64_t begin,
          int64_t count) {
        const int64_t S = slots = tile.slots_per_vector;
        const int32_t end = static_cast<int32_t>(begin + count);
        const i32v slot_of_lane = lane & static_cast<int32_t>(S - 1);
        const bool masked = begin + count > u.new_slot || count % S != 0;
        const f32v before = load(top + first);
        f32v high = before;
        for (int64_t i = 0; i < tile.vectors; ++i) {
          float* at = tile.data + (i * tile.columns + column) * kLanes;
          f32v x = logits(load(at));
          if (masked) {
            const i32v slot = slot_of_lane + static_cast<int32_t>(begin + i * S);
            x = (slot > of.last) | (slot >= end) ? splat(-kInf) : x;
          }
          store(at, x);
          high = max(high, x);
        }
        const f32v shift = high == -kInf ? f32v{} : high;
        f32v total = load(sum + first) * exp2(before - shift);
        for (int64_t i = 0; i < tile.vectors; ++i)
          total += exp2(load(tile.data + (i * tile.columns + column) * kLanes) - shift);
        store(top + first, high);
        store(sum + first, total);
      });
  for (int64_t r = 0; r < rows; ++r) {
    float high = -kInf, total = 0.f;
    for (int64_t s = 0; s < slots; ++s)
      high = top[r * slots + s] > high ? top[r * slots + s] : high;
    const float shift = high == -kInf ? 0.f : high;
    for (int64_t s = 0; s < slots; ++s)
      total += sum[r * slots + s] * exp2(top[r * slots + s] - shift);
    u.out[(u.head_begin + r % u.heads) * a.T + u.token_begin + r / u.heads] =
        total > 0.f ? (high + __builtin_log2f(total)) * kLn2 : -kInf;
  }
}

template <typename F>
void by_product(const ScoreArgs& a, F f) {
#if defined(__AMX_BF16__)
  a.e4m3_keys ? f(Bf16{}, CoarseE4m3{}, AmxProduct{}) : f(Bf16{}, Bf16{}, AmxProduct{});
#else
  by_type(a.type, [&](auto type) {
    with_product<decltype(type)>(a.D, [&](auto product) {
      a.e4m3_keys ? f(type, CoarseE4m3{}, product) : f(type, type, product);
    });
  });
#endif
}

void reduce_rows(const ScoreArgs& a, const ScoreUnit& u, float* scratch) {
  by_product(a, [&](auto type, auto key, auto product) {
    using T = decltype(type);
    using K = decltype(key);
    using M = decltype(product);
    if (a.take_max)
      reduce_typed<T, K, M, true>(a, u, scratch);
    else
      reduce_typed<T, K, M, false>(a, u, scratch);
  });
}

void row_lse(const ScoreArgs& a, const ScoreUnit& u, float* scratch) {
  by_product(a, [&](auto type, auto key, auto product) {
    lse_typed<decltype(type), decltype(key), decltype(product)>(a, u, scratch);
  });
}

template <typename T, typename U>
void summarise_typed(const T* const* rows, int64_t count, int64_t D, Summary kind, U* out) {
  for (int64_t d = 0; d < D; d += kLanes) {
    const int64_t n = D - d < kLanes ? D - d : kLanes;
    f32v low = load_wide(rows[0] + d, n), high = low, sum = low;
    for (int64_t i = 1; i < count; ++i) {
      const f32v x = load_wide(rows[i] + d, n);
      low = x < low ? x : low;
      high = max(high, x);
      sum += x;
    }
    if (kind == Summary::mean) {
      store_narrow(out + d, sum * (1.f / static_cast<float>(count)), n);
    } else {
      store_narrow(out + d, high, n);
      store_narrow(out + D + d, low, n);
    }
  }
}

void summarise(DType type, const void* const* rows, int64_t count, int64_t D, Summary kind,
               bool to_e4m3, void* out) {
  by_type(type, [&](auto element) {
    using T = decltype(element);
    const auto* typed = reinterpret_cast<const T* const*>(rows);
    if (to_e4m3)
      summarise_typed(typed, count, D, kind, static_cast<E4m3*>(out));
    else
      summarise_typed(typed, count, D, kind, static_cast<T*>(out));
  });
}

}  // namespace

extern const ScoreKernels score_kernels;
const ScoreKernels score_kernels = {reduce_rows, row_lse, summarise};

}  // namespace branchwise::BW_ISA
