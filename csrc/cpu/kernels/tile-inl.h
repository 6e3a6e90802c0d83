// Where the keys and values of a tile of slots lie, and which of them a row may see.
#pragma once

#include "cpu/kernels/half-inl.h"

// A tile's rows of one cache; rows behind `count` are zeros, so that loops need no tails.
template <typename T>
struct Tile {
  int64_t begin, count;  // slots [begin, begin + count)
  const T* keys[kKeyTile];
  const T* values[kKeyTile];
};

alignas(64) constexpr float kZeros[kMaxHeadDim] = {};

template <typename T>
inline const T* zeros() {
  return reinterpret_cast<const T*>(kZeros);
}

template <typename T>
inline void find_rows(const KvLayout& layout, const void* cache, const AttentionUnit& u,
                      int64_t begin, int64_t count, const T** rows) {
  const T* base = static_cast<const T*>(cache);
  for (int64_t s = 0; s < count;) {
    const T* row = base + layout.offset(u.batch, u.kv_head, begin + s);
    int64_t end = count;
    if (layout.page_table != nullptr) {
      const int64_t rest_of_page = layout.page_size - (begin + s) % layout.page_size;
      end = s + rest_of_page < count ? s + rest_of_page : count;
    }
    for (; s < end; ++s, row += layout.stride_slot) rows[s] = row;
  }
  for (int64_t s = count; s < kKeyTile; ++s) rows[s] = zeros<T>();
}

// The node of a packed row, and that of a unit's last one.
inline int64_t node_of(const AttentionArgs& a, int64_t row) {
  return a.N - a.T + row / (a.Hq / a.Hkv);
}
inline int64_t last_node(const AttentionArgs& a, const AttentionUnit& u) {
  return node_of(a, u.row_end - 1);
}

// The tile at `begin`, which ends where the unit ends. Behind the unit's last tile it is the one
// that follows in the row, if any: not this unit's to compute, but likely this thread's next to
// read.
template <typename T>
inline void find_tile(const AttentionArgs& a, const AttentionUnit& u, int64_t begin,
                      Tile<T>* tile) {
  if (begin > u.slot_end) begin = u.slot_end;
  const int64_t row_end = a.seq_lens[u.batch] + last_node(a, u) + 1;
  const int64_t left = (begin < u.slot_end ? u.slot_end : row_end) - begin;
  tile->begin = begin;
  tile->count = left < kKeyTile ? left : kKeyTile;
  find_rows(a.key_layout, a.key_cache, u, begin, tile->count, tile->keys);
  find_rows(a.value_layout, a.value_cache, u, begin, tile->count, tile->values);
}

template <typename T>
inline void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

// Asks for all of a unit's first tile at once, which no tile before it has done.
template <typename T>
inline void prefetch_all(const Tile<T>& tile, int64_t D) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t s = 0; s < tile.count; ++s)
    for (int64_t d = 0; d < D; d += kLine) prefetch(tile.keys[s] + d);
  for (int64_t s = 0; s < tile.count; ++s)
    for (int64_t d = 0; d < D; d += kLine) prefetch(tile.values[s] + d);
}

// Asks for a tile's rows line by line, one line per step: evenly spread over the arithmetic of the
// tile before, since a burst of prefetches stalls like the loads it is meant to spare.
template <typename T>
class Prefetcher {
 public:
  Prefetcher(const Tile<T>& tile, int64_t D)
      : tile_(&tile), bytes_(D * static_cast<int64_t>(sizeof(T))), row_(-1) {
    next_row();
  }
  void step() {
    if (line_ >= end_) return;
    prefetch(line_);
    line_ += 64;
    if (line_ >= end_) next_row();
  }

 private:
  void next_row() {  // all keys, then all values
    if (++row_ >= 2 * tile_->count) return;
    const T* row = row_ < tile_->count ? tile_->keys[row_] : tile_->values[row_ - tile_->count];
    line_ = reinterpret_cast<const char*>(row);
    end_ = line_ + bytes_;
  }
  const Tile<T>* tile_;
  int64_t bytes_, row_;
  const char *line_ = nullptr, *end_ = nullptr;
};

// Where a unit starts to read: nothing before the lowest row's window is visible to its block. In a
// tree, nodes are never skipped, since a node's position is not its slot.
inline int64_t first_visible_slot(const AttentionArgs& a, const AttentionUnit& u,
                                  int64_t lowest_low, int64_t prefix) {
  const bool skip_nodes = a.tree_mask == nullptr;
  const int64_t first = skip_nodes || lowest_low < prefix ? lowest_low : prefix;
  return first > u.slot_begin ? first : u.slot_begin;
}

// The first position that a node sees under a window.
inline int32_t first_position(const AttentionArgs& a, int64_t batch, int64_t node, int64_t prefix) {
  if (a.window == 0) return 0;
  const int64_t depth = a.depths != nullptr ? a.depths[batch * a.N + node] : node;
  const int64_t low = prefix + depth - a.window + 1;
  return low > 0 ? static_cast<int32_t>(low) : 0;
}
