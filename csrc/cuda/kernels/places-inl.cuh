// What a block of rows attends to: its unit of work, where the places of a tile lie, and which of
// them a row sees.
#pragma once

#include "cuda/device.cuh"
#include "cuda/kernels/attention.cuh"

namespace branchwise::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// How many of the ascending list are below x: all lanes of a warp look, at 32 places at a time.
__device__ inline int32_t lower_bound(const int32_t* list, int32_t count, int32_t x) {
  const int lane = threadIdx.x % kWarp;
  int32_t begin = 0, end = count;  // what is before begin is below x, what is from end on is not
  while (begin < end) {
    const int32_t step = (end - begin + kWarp - 1) / kWarp, at = begin + step * (lane + 1) - 1;
    const int32_t below = count_bits(ballot(at < end && list[at] < x));
    const int32_t next = begin + step * (below + 1) - 1;
    begin += step * below;
    end = next < end ? next : end;
  }
  return begin;
}

// What a thread block computes: a split of the places of a block of rows.
struct Unit {
  int b, h, block, split;
};
__device__ inline Unit unit_of_block(const AttentionLaunch& in) {
  const int blocks = static_cast<int>(in.blocks), heads = static_cast<int>(in.args.Hkv);
  const int x = static_cast<int>(blockIdx.x), rest = x / blocks;
  return {static_cast<int>(blockIdx.y + in.first_batch), rest % heads,
          x % blocks + static_cast<int>(in.first_block), rest / heads};
}

// Blocks of one batch row and KV head, in terms of packed rows.
struct RowBlock {
  int32_t first, end;
  int32_t first_token, last_token;
};
__device__ inline RowBlock row_block(const AttentionLaunch& in, int64_t block) {
  const int32_t G = static_cast<int32_t>(in.args.Hq / in.args.Hkv);
  const int32_t all = static_cast<int32_t>(in.args.T) * G;
  RowBlock rows;
  if (in.lists.tokens > 1) {  // lists per token: a block stays within one
    const int32_t of_token = (G + in.rows - 1) / in.rows;
    const int32_t token = static_cast<int32_t>(block) / of_token;
    rows.first = token * G + static_cast<int32_t>(block) % of_token * in.rows;
    rows.end = min(rows.first + in.rows, (token + 1) * G);
  } else {
    rows.first = static_cast<int32_t>(block) * in.rows;
    rows.end = min(rows.first + in.rows, all);
  }
  rows.first_token = rows.first / G;
  rows.last_token = (rows.end - 1) / G;
  return rows;
}

// Slots before the nodes, of which there are N; of a cache they fit into.
template <typename Launch>
__device__ int32_t row_length(const Launch& in, int64_t N, int64_t b, int64_t h) {
  const int32_t length = in.seq_lens[b * in.lens_row_stride + h * in.lens_head_stride];
  const int32_t most = static_cast<int32_t>(in.capacity - N);
  return length < 0 ? 0 : length < most ? length : most;
}

// Called by whole warps.
__device__ inline Places places_of(const AttentionLaunch& in, int64_t b, int64_t h, int64_t token) {
  const int32_t length = row_length(in, in.args.N, b, h);
  if (in.places_from == PlacesFrom::length) return dense_places(length, in.window);
  const Lists& lists = in.lists;
  const int32_t* list = nullptr;
  int32_t count = 0;
  if (lists.indices != nullptr) {
    const int64_t t = lists.tokens > 1 ? token : 0;
    const int64_t at = (b * lists.tokens + t) * lists.heads + (lists.heads > 1 ? h : 0);
    list = lists.indices + at * lists.width;
    count = min(max(lists.counts[at], 0), static_cast<int32_t>(lists.width));
  }
  if (in.places_from == PlacesFrom::paths) return path_places(length, list, count, in.window);
  return sparse_places(length, list, count, lists.unit,
                       in.ranges.sink != nullptr ? in.ranges.sink + h : nullptr,
                       in.ranges.recent != nullptr ? in.ranges.recent + h : nullptr, lower_bound);
}

// The places that a block of rows has to look at, in splits.
struct Span {
  int64_t first, end;
  int64_t count;          // of splits
  int64_t size;           // of each; 0: they are stretches, the first of which is
  int64_t first_stretch;  // this one
  __device__ int64_t begin_of(int64_t split) const {
    return size > 0 ? first + split * size : stretch_begin(first_stretch + split);
  }
  __device__ int64_t end_of(int64_t split) const { return min(end, begin_of(split + 1)); }
};
__device__ inline Span span_of(const AttentionLaunch& in, const Places& places,
                               const RowBlock& rows) {
  const AttentionArgs& a = in.args;
  // A causal block can stop at its last token's node. Only where places are slots does a window cut
  // off the front of them.
  const bool paths = in.places_from == PlacesFrom::paths, tree = a.tree_mask != nullptr;
  const int64_t nodes = paths ? 0 : tree ? a.N : a.N - a.T + rows.last_token + 1;
  const int64_t depth = paths ? -1 : tree ? 0 : a.N - a.T + rows.first_token;
  const bool skips =
      places.window > 0 && places.kept == 0 && (paths || places.sink == places.prefix);
  const int64_t low = max(skips ? places.prefix + depth - places.window + 1 : 0, int64_t{0});
  Span span{low / kTile * kTile, places.prefix + nodes, 0, 0, 0};
  if (!in.by_stretch) {
    const Splits splits = cut_places(span.first, span.end, in.most_splits);
    span.count = splits.count;
    span.size = splits.size;
    return span;
  }
  const int64_t last = stretch_of(places.new_slot);  // of the prefix, not a whole one
  if (tree && !paths) span.end = stretch_begin(last);
  span.first_stretch = stretch_of(span.first);
  if (paths) span.first_stretch = max(span.first_stretch, last);
  span.first = stretch_begin(span.first_stretch);
  if (span.first < span.end) span.count = stretch_of(span.end - 1) + 1 - span.first_stretch;
  return span;
}

// Offsets of a place's key and value, in elements.
struct Address {
  int64_t key, value;
  bool exists;
};
__device__ inline Address address_of(const AttentionLaunch& in, const Places& places, int64_t b,
                                     int64_t h, int64_t place, int64_t end) {
  Address nowhere{0, 0, false};
  if (place >= end) return nowhere;
  const int64_t slot = places.run(place).slot;
  if (slot < 0 || slot >= in.capacity) return nowhere;
  const KvLayout &key = in.args.key_layout, &value = in.args.value_layout;
  int64_t outer = b, inner = slot;
  if (key.page_table != nullptr) {
    const uint32_t size = static_cast<uint32_t>(key.page_size), at = static_cast<uint32_t>(slot);
    outer = key.page_table[b * key.table_stride + h * key.table_head_stride + at / size];
    inner = at % size;
    if (outer < 0 || outer >= in.pages) return nowhere;
  }
  return {outer * key.stride_outer + h * key.stride_head + inner * key.stride_slot,
          outer * value.stride_outer + h * value.stride_head + inner * value.stride_slot, true};
}

__device__ inline uint64_t low_bits(int64_t n) {
  return n <= 0 ? 0 : n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
}

// One packed row's view: its node's ancestors, and the first position that its window shows.
struct RowView {
  const int64_t* words;  // null: causal
  int32_t node;
  int64_t low;  // positions from kept to before it are hidden
};
__device__ inline uint64_t path_word(const AttentionArgs& a, const RowView& row, int64_t k) {
  if (row.words == nullptr) return low_bits(row.node + 1 - 64 * k);
  return k < a.W ? static_cast<uint64_t>(row.words[k]) : 0;
}
__device__ inline RowView view_of(const AttentionArgs& a, const Places& places, int64_t b,
                                  int64_t token) {
  RowView row{nullptr, static_cast<int32_t>(a.N - a.T + token), 0};
  if (a.tree_mask != nullptr) row.words = a.tree_mask + (b * a.N + row.node) * a.W;
  if (places.window > 0) {
    int64_t depth = -1;
    for (int64_t k = 0; k * 64 < a.N; ++k) depth += count_bits(path_word(a, row, k));
    row.low = places.new_slot + depth - places.window + 1;
  }
  return row;
}

// Which of the 64 places from `begin` on a row sees; those behind `end` are not there.
__device__ inline uint64_t visible(const AttentionArgs& a, const Places& places, const RowView& row,
                                   int64_t begin, int64_t end) {
  uint64_t bits = low_bits(places.prefix - begin);
  if (places.window > 0 && row.low > places.kept && begin < places.prefix) {
    // Slots [kept, low) are hidden; places are slots up to the sink, and shifted behind it.
    const int64_t kept = places.kept, shift = places.recent - places.sink;
    bits &= ~(low_bits(min(row.low, int64_t{places.sink}) - begin) & ~low_bits(kept - begin));
    const int64_t from = max(kept - shift, int64_t{places.sink});
    bits &= ~(low_bits(row.low - shift - begin) & ~low_bits(from - begin));
  }
  const int64_t node = begin - places.prefix;  // of the first place, if it is one
  if (node > -64) {
    const int64_t from = node > 0 ? node : 0, word = from / 64, offset = from % 64;
    uint64_t nodes = path_word(a, row, word) >> offset;
    if (offset > 0) nodes |= path_word(a, row, word + 1) << (64 - offset);
    if (places.window > 0 && row.low > places.new_slot) {
      // A node's position is its rank among the ancestors.
      int64_t position = places.new_slot;
      for (int64_t k = 0; k < word; ++k) position += count_bits(path_word(a, row, k));
      position += count_bits(path_word(a, row, word) & low_bits(offset));
      for (uint64_t rest = nodes; rest != 0; rest &= rest - 1, ++position)
        if (position >= places.kept && position < row.low) nodes &= ~(rest & (~rest + 1));
    }
    bits |= node > 0 ? nodes : nodes << -node;
  }
  return bits & low_bits(end - begin);
}

// Where a block's partial result lives: rows [rows, D], then maxima and sums [rows] each.
__device__ inline float* partial_of(const AttentionLaunch& in, int64_t b, int64_t h, int64_t block,
                                    int64_t split) {
  const int64_t row = (b - in.first_batch) * in.args.Hkv + h;
  const int64_t at = (row * in.blocks + block - in.first_block) * in.splits + split;
  return in.partial + at * in.unit_floats;
}

// A packed row's final result: the factor of its unnormalised values, after the sink has had its
// share, and the address of the row. One of the row's threads writes the lse. Maxima are of
// logits * log2(e).
struct Finish {
  float factor;
  int64_t at;  // of out
};
__device__ inline Finish finish_row(const AttentionArgs& a, int64_t b, int64_t h, int32_t packed,
                                    float top, float sum, bool writes_lse) {
  const int32_t G = static_cast<int32_t>(a.Hq / a.Hkv);
  const int64_t head = h * G + packed % G, row = (b * a.Hq + head) * a.T + packed / G;
  float factor = 1.f;
  if (a.sinks != nullptr) {
    const float sink = a.sinks[head] * kLog2e, both = fmaxf(top, sink);
    const float shift = both == -INFINITY ? 0.f : both;
    factor = exp2_approx(top - shift);
    sum = sum * factor + exp2_approx(sink - shift);
    top = both;
  }
  if (writes_lse) a.lse[row] = sum > 0.f ? (top + log2f(sum)) * kLn2 : -INFINITY;
  return {sum > 0.f ? factor / sum : 0.f, row * a.D};
}

}  // namespace branchwise::cuda
