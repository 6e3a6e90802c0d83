// What attention over a KV cache is asked for, on any device. Torch-free.
#pragma once
#include <cstdint>

#include "common/device.h"
#include "common/dtype.h"
#include "common/kv_layout.h"

namespace branchwise {

constexpr int64_t kMaxHeadDim = 512;

// The tokens that a block of rows attends to, in order: its places. First come those of the prefix,
// which the cache holds in slots [0, sink), in listed units and in slots [recent, new_slot); then
// the nodes, in the slots from new_slot on. A dense prefix is all sink.
struct Places {
  int32_t prefix;    // places before the nodes
  int32_t new_slot;  // slot of node 0, and its position
  int32_t sink, recent;
  const int32_t* units;  // ascending, disjoint from both ranges but for `skip`
  int32_t unit;          // slots per listed unit
  int32_t skip;          // slots of the first listed unit that belong to [0, sink)
  int32_t listed;        // places in listed units
  int32_t window;        // a node sees positions > its own - window only; 0: all
  int32_t kept;          // and those below this one

  struct Run {
    int64_t slot, length;
  };
  // The slot of a place, and how many places from it on lie one after another.
  BW_INLINE Run run(int64_t place) const {
    if (place >= prefix) return {new_slot + place - prefix, INT32_MAX};
    if (place < sink) return {place, sink - place};
    const uint32_t at = static_cast<uint32_t>(place - sink);
    if (at >= static_cast<uint32_t>(listed)) return {recent + at - listed, prefix - place};
    if (unit == 1) return {units[at], 1};
    const uint32_t size = static_cast<uint32_t>(unit), from = at + static_cast<uint32_t>(skip);
    const int64_t rest = size - from % size, left = listed - static_cast<int64_t>(at);
    return {units[from / size] * static_cast<int64_t>(unit) + from % size,
            rest < left ? rest : left};
  }
};

// Attention to everything: the whole prefix is one run of slots.
BW_INLINE Places dense_places(int32_t length, int64_t window) {
  Places p{};
  p.prefix = p.new_slot = p.sink = p.recent = length;
  p.unit = 1;
  p.window = window < INT32_MAX ? static_cast<int32_t>(window) : INT32_MAX;
  return p;
}

// One node's own text: the prefix, then the nodes of its path, whose slots are listed.
BW_INLINE Places path_places(int32_t length, const int32_t* slots, int32_t count, int64_t window) {
  Places p = dense_places(length, window);
  p.units = slots;
  p.listed = count;
  p.prefix += count;
  return p;
}

// What the tokens of a row see through one KV head: a list, two ranges, or both; null: none.
// lower_bound(list, count, x): how many of the ascending list are below x.
template <typename LowerBound>
BW_INLINE Places sparse_places(int32_t length, const int32_t* list, int32_t count, int32_t unit,
                               const int32_t* sink, const int32_t* recent,
                               const LowerBound& lower_bound) {
  Places p{};
  p.new_slot = length;
  p.unit = unit;
  p.units = list;
  if (sink != nullptr) p.sink = *sink < length ? *sink : length;
  // The token after the prefix sees as many as `recent` with itself.
  int64_t begin = recent != nullptr ? int64_t{length} - *recent + 1 : int64_t{length};
  begin = begin < length ? begin : length;
  p.recent = begin > p.sink ? static_cast<int32_t>(begin) : p.sink;
  if (list == nullptr && recent != nullptr && *recent < INT32_MAX) {
    // A window of none still holds the token itself.
    p.window = *recent > 1 ? *recent : 1;
    p.kept = *sink;
  }
  if (p.recent == p.sink) {  // the ranges hold everything
    p.sink = p.recent = p.prefix = length;
    return p;
  }
  if (list != nullptr) {
    const int64_t size = unit;
    const int32_t end =
        lower_bound(list, count, static_cast<int32_t>((p.recent + size - 1) / size));
    const int32_t first =
        p.sink == 0 ? 0 : lower_bound(list, end, static_cast<int32_t>(p.sink / size));
    p.units = list + first;
    if (first < end) {
      const int64_t skip = p.sink - *p.units * size, over = (list[end - 1] + 1) * size - p.recent;
      p.skip = skip > 0 ? static_cast<int32_t>(skip) : 0;
      const int64_t listed = (end - first) * size - p.skip - (over > 0 ? over : 0);
      p.listed = listed > 0 ? static_cast<int32_t>(listed) : 0;  // below 0 if they do not ascend
    }
  }
  p.prefix = p.sink + p.listed + (length - p.recent);
  return p;
}

// Index lists of sparse_attention as slots or as units of slots.
struct Lists {
  int64_t tokens = 0, heads = 0, width = 0;  // of indices [B, tokens, heads, width]
  const int32_t* indices = nullptr;
  const int32_t* counts = nullptr;
  int32_t unit = 1;
};

// Slots that heads keep at both ends, [Hkv] each.
struct Ranges {
  const int32_t* sink = nullptr;
  const int32_t* recent = nullptr;
};

struct AttentionArgs {
  const void* query;    // [B, Hq, T, D], last dimension contiguous
  int64_t q_stride[3];  // elements, for B, Hq, T
  const void* key_cache;
  const void* value_cache;
  KvLayout key_layout, value_layout;
  DType type;  // of query and out, and of the caches but for those in e4m3
  const float *key_scale, *value_scale;  // [Hkv], what e4m3 values stand for; null: not in e4m3
  void* out;                             // [B, Hq, T, D] contiguous
  float* lse;                            // [B, Hq, T] contiguous
  const int64_t* tree_mask;              // [B, N, W] or nullptr for causal
  const int32_t* depths;                 // [B, N] depth of every node; given with tree_mask
  const float* sinks;                    // [Hq] or nullptr
  int64_t Hq, Hkv, T, W, D;
  int64_t N;             // nodes in the slots after P; the T queries are the last of them
  float scale, softcap;  // softcap 0: none
};

}  // namespace branchwise
