// Where the keys and values of a tile of slots lie, and which of them a row may see.
#pragma once

#include "cpu/kernels/half-inl.h"
#include "cpu/kernels/product-inl.h"

// A tile's rows of both caches; rows behind `count` are zeros, so that loops need no tails.
template <typename T>
struct Tile {
  int64_t begin, count;         // places [begin, begin + count)
  int64_t size;                 // most that it can hold
  const T* rows[2 * kKeyTile];  // `size` keys, then as many values
  const T** keys() { return rows; }
  const T** values() { return rows + size; }
  const T* const* keys() const { return rows; }
  const T* const* values() const { return rows + size; }
};

// Slots of a tile of which each takes so many bytes and is read once: a tile and the one that is
// asked for meanwhile fit into the first cache level with room to spare. Measured; presumably loads
// from the second level wait in one queue with the lines that come from memory.
inline int64_t small_tile(int64_t bytes) {
  constexpr int64_t kLeast = 16, kBytes = 8 * 1024;
  int64_t size = kKeyTile;
  while (size > kLeast && size * bytes > kBytes) size /= 2;
  return size;
}

alignas(64) constexpr float kZeros[kMaxHeadDim] = {};

template <typename T>
inline const T* zeros() {
  return reinterpret_cast<const T*>(kZeros);
}

// Some slots of a tile.
template <typename T>
struct TilePart {
  int64_t begin, count;  // places [begin, begin + count)
  const T *const *key_rows, *const *value_rows;
  const T* const* keys() const { return key_rows; }
  const T* const* values() const { return value_rows; }
};
template <typename T>
inline TilePart<T> part(const Tile<T>& tile, int64_t first, int64_t size) {
  const int64_t left = tile.count - first;
  return {tile.begin + first, left < size ? left : size, tile.keys() + first,
          tile.values() + first};
}

// Slots [slot, slot + count) of a row and head, as rows of one cache.
template <typename T>
inline void find_run(const KvLayout& layout, const void* cache, int64_t batch, int64_t head,
                     int64_t slot, int64_t count, const T** rows) {
  const T* row = static_cast<const T*>(cache) + layout.offset(batch, head, slot);
  const int64_t apart = layout.stride_slot;
  for (int64_t i = 0; i < count; ++i) rows[i] = row + i * apart;
}

// Places::run of a unit's place.
inline Places::Run run_of(const AttentionUnit& u, int64_t place) {
  const Places& p = *u.places;
  if (u.path == nullptr || place < p.prefix) return p.run(place);
  return {p.new_slot + u.path[place - p.prefix], 1};
}

// Calls f(place, slot, count) for the runs of places [begin, begin + count) that lie one after
// another, none of them across a page; run_at(place) is Places::run.
template <typename R, typename F>
inline void for_each_run(const R& run_at, const KvLayout& layout, int64_t begin, int64_t count,
                         const F& f) {
  for (int64_t s = 0; s < count;) {
    const Places::Run run = run_at(begin + s);
    int64_t n = run.length < count - s ? run.length : count - s;
    if (layout.page_table != nullptr) {
      const int64_t rest = layout.page_size - static_cast<uint32_t>(run.slot) %
                                                  static_cast<uint32_t>(layout.page_size);
      n = rest < n ? rest : n;
    }
    f(s, run.slot, n);
    s += n;
  }
}

// The node of a packed row, counted along the unit's path if it has one.
inline int64_t node_of(const AttentionArgs& a, const AttentionUnit& u, int64_t row) {
  return (u.path == nullptr ? a.N - a.T : 0) + row / (a.Hq / a.Hkv);
}
// Its query token.
inline int64_t token_of(const AttentionArgs& a, const AttentionUnit& u, int64_t row) {
  const int64_t at = row / (a.Hq / a.Hkv);
  return u.path == nullptr ? at : u.path[at] - (a.N - a.T);
}

// Moves places behind a unit's last one to the following unit: not this unit's to compute, but
// likely this thread's next to read. Returns the unit whose places they are now.
inline const AttentionUnit* in_following(const AttentionUnit& u, int64_t& begin) {
  if (begin < u.slot_end || u.following == nullptr) return &u;
  begin += u.following->slot_begin - u.slot_end;
  return u.following;
}

// The tile of `size` slots at `begin`, which ends where the unit ends.
template <typename T>
inline void find_tile(const AttentionArgs& a, const AttentionUnit& unit, int64_t begin,
                      int64_t size, Tile<T>* tile) {
  const AttentionUnit* u = in_following(unit, begin);
  const int64_t left = begin < u->slot_end ? u->slot_end - begin : 0;
  tile->begin = begin;
  tile->count = left < size ? left : size;
  tile->size = size;
  const auto run_at = [u](int64_t place) { return run_of(*u, place); };
  for_each_run(
      run_at, a.key_layout, begin, tile->count, [&](int64_t s, int64_t slot, int64_t count) {
        find_run(a.key_layout, a.key_cache, u->batch, u->kv_head, slot, count, tile->keys() + s);
        find_run(a.value_layout, a.value_cache, u->batch, u->kv_head, slot, count,
                 tile->values() + s);
      });
  for (int64_t s = tile->count; s < size; ++s) tile->keys()[s] = tile->values()[s] = zeros<T>();
}

template <typename T>
inline void prefetch(const T* p) {
  // See memory.h. Requests for the first cache level can hold up the loads beside them.
  if (amd_memory)
    __builtin_prefetch(p, 0, 3);
  else
    __builtin_prefetch(p, 0, 2);
  // gcc takes a function that only prefetches for one without effect, and drops calls to it.
  asm volatile("" : : "r"(p));
}

// Asks for the first line of each run of a tile to come, behind the one at `begin`. Presumably its
// pages are in the TLB then when its lines are asked for; else scattered ones wait for memory
// twice, one after the other. Four tiles ahead is best; for listed units shorter than a tile, of
// which there are many, one (128 slots in tile registers); and for slots in a row two on Intel's
// CPUs: further ahead costs a machine with AMX a fifth of its bandwidth (measured; presumably its
// own prefetchers are led astray), and where small tiles ask for every line in time, or on AMD's
// CPUs, any of it costs. Of single listed slots all lines are asked for on Intel's, two tiles
// ahead.
template <typename T>
inline void touch_ahead(const AttentionArgs& a, const AttentionUnit& unit, int64_t begin,
                        int64_t size) {
  const Places& p = *unit.places;
  const bool in_a_row = p.listed == 0 && a.key_layout.page_table == nullptr;
  if (in_a_row && (amd_memory || (kTileRegisters && size < kKeyTile))) return;
  const bool whole_rows = !amd_memory && p.listed > 0 && p.unit == 1;
  const int64_t one = kTileRegisters ? 2 * kKeyTile : size;
  begin += in_a_row || whole_rows ? 2 * size : p.listed > 0 && p.unit < size ? one : 4 * size;
  const AttentionUnit* u = in_following(unit, begin);
  const int64_t left = u->slot_end - begin;
  const auto run_at = [u](int64_t place) { return run_of(*u, place); };
  const int64_t values = whole_rows ? a.D : 1, line = 64 / sizeof(T);
  const auto touch = [&](const void* cache, int64_t offset) {
    const T* row = static_cast<const T*>(cache) + offset;
    for (int64_t d = 0; d < values; d += line) prefetch(row + d);
  };
  for_each_run(run_at, a.key_layout, begin, left < size ? left : size,
               [&](int64_t, int64_t slot, int64_t) {
                 touch(a.key_cache, a.key_layout.offset(u->batch, u->kv_head, slot));
                 touch(a.value_cache, a.value_layout.offset(u->batch, u->kv_head, slot));
               });
}

// Asks for rows line by line, one line per step: evenly spread over the arithmetic of a tile
// before, since a burst of prefetches stalls like the loads it is meant to spare.
template <typename T>
class Prefetcher {
 public:
  static constexpr int kValues = 64 / sizeof(T);  // of a line
  Prefetcher(const T* const* rows, int64_t count, int64_t D)
      : row_(rows), last_(rows + count), bytes_(D * static_cast<int64_t>(sizeof(T))) {
    next_row();
  }
  void step() {
    if (line_ >= end_) return;
    prefetch(line_);
    line_ += 64;
    if (line_ >= end_) next_row();
  }

 private:
  void next_row() {
    if (row_ == last_) return;
    line_ = reinterpret_cast<const char*>(*row_++);
    end_ = line_ + bytes_;
  }
  const T *const *row_, *const *last_;
  int64_t bytes_;
  const char *line_ = nullptr, *end_ = nullptr;
};

// How many rows of a tile of scattered slots lie one after another; 1 where all do, too, and where
// they are not asked for in turn.
inline int64_t rows_together(const AttentionArgs& a, const Places& p, int64_t size) {
  if (amd_memory) return 1;
  int64_t run = size;
  if (p.listed > 0 && p.unit < run) run = p.unit;
  if (a.key_layout.page_table != nullptr && a.key_layout.page_size < run)
    run = a.key_layout.page_size;
  return run < size ? run : 1;
}

// The order in which a tile's rows are asked for. Of runs of several, in pages, one row of each in
// turn: several pages at once come faster than one after another (measured).
template <typename T>
inline Prefetcher<T> ask_for(const Tile<T>& tile, int64_t run, int64_t D, const T** in_turn) {
  const int64_t count = 2 * tile.size;
  if (run == 1) {
    const auto in_a_row = [&](const T* const* rows) {
      return reinterpret_cast<int64_t>(rows[tile.size - 1]) - reinterpret_cast<int64_t>(rows[0]) ==
             (tile.size - 1) * D * static_cast<int64_t>(sizeof(T));
    };
    if (!in_a_row(tile.keys()) || !in_a_row(tile.values())) return {tile.rows, count, D};
    in_turn[0] = tile.keys()[0];  // as two long rows: less to do at every step
    in_turn[1] = tile.values()[0];
    return {in_turn, 2, tile.size * D};
  }
  for (int64_t first = 0, i = 0; first < run; ++first)
    for (int64_t at = first; at < count; at += run) in_turn[i++] = tile.rows[at];
  return {in_turn, count, D};
}

// A row of a unit: the batch row that it belongs to, and which of its packed rows it is.
struct UnitRow {
  int64_t batch, packed;
};
inline UnitRow unit_row(const AttentionUnit& u, int64_t r) {
  const int64_t each = u.row_end - u.row_begin;
  if (u.batches == nullptr) return {u.batch, u.row_begin + r};
  return {u.batches[r / each], u.row_begin + r % each};
}

// The first position that a node of a unit's batch row sees under a window.
inline int32_t first_position(const AttentionArgs& a, const AttentionUnit& u, int64_t batch,
                              int64_t node) {
  const Places& p = u.places[batch - u.batch];
  if (p.window == 0) return 0;
  const int64_t depth = a.depths != nullptr ? a.depths[batch * a.N + node] : node;
  const int64_t low = p.new_slot + depth - p.window + 1;
  return low > 0 ? static_cast<int32_t>(low) : 0;
}

// What a window leaves of a unit's places, given the lowest and the highest of its rows' first
// positions.
struct WindowCut {
  int64_t first;   // nothing before this place is visible
  int64_t hidden;  // places before this one may be hidden from some row
};
inline WindowCut cut_window(const AttentionArgs& a, const AttentionUnit& u, int64_t lowest,
                            int64_t highest) {
  const Places& p = *u.places;
  if (p.window == 0) return {u.slot_begin, 0};
  if (u.batches != nullptr) return {u.slot_begin, highest};  // tiles must not depend on other rows
  if (p.sink < p.prefix)  // ranges: cut already to what the lowest row sees
    return {u.slot_begin, highest > lowest ? p.prefix : 0};
  // In a tree, nodes are never skipped, since a node's position is not its slot.
  const bool skip_nodes = a.tree_mask == nullptr && p.kept == 0;
  int64_t first = skip_nodes || lowest < p.prefix ? lowest : p.prefix;
  if (p.kept > 0) first = 0;
  return {first > u.slot_begin ? first : u.slot_begin, highest};
}

// Whether a window hides a place of the prefix from a row whose first position is `low`.
inline bool hidden_by_window(const Places& p, int64_t place, int64_t low) {
  const int64_t slot = p.run(place).slot;
  return slot < low && slot >= p.kept;
}
