// Attention over a KV cache: common checks, units of work, threads.
#include "cpu/attend.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>

#include "cpu/empty.h"
#include "cpu/isa.h"
#include "cpu/workers.h"

namespace branchwise {
namespace {

constexpr int64_t kMinSplit = 4 * kKeyTile;  // slots: less is not worth a merge

// The depth of every node, from its ancestor bits, and how many nodes it and those before it see:
// reach[b, i] is one more than the highest bit of the rows up to i. Refuses masks that the kernel
// must not see.
void check_mask(const char* op, const int64_t* mask, int64_t B, int64_t N, int64_t W, bool window,
                std::vector<int32_t>& depths, std::vector<int32_t>& reach) {
  depths.resize(B * N);
  reach.resize(B * N);
  for (int64_t i = 0; i < B * N; ++i) {
    const int64_t node = i % N;
    int32_t seen = 0;
    int64_t end = 0;
    for (int64_t w = 0; w < W; ++w) {
      const uint64_t word = static_cast<uint64_t>(mask[i * W + w]);
      if (word != 0) end = w * 64 + 64 - __builtin_clzll(word);
      seen += __builtin_popcountll(word);
    }
    BW_CHECK(end <= N, op, ": tree_mask[", i / N, ", ", node, "] has bit ", end - 1,
             " set, and there are ", N, " nodes");
    BW_CHECK(!window || end <= node + 1, op, ": tree_mask[", i / N, ", ", node,
             "] has a bit above its own node, which goes with no window: depths are positions");
    BW_CHECK(static_cast<uint64_t>(mask[i * W + node / 64]) >> (node % 64) & 1, op, ": tree_mask[",
             i / N, ", ", node, "] lacks its own bit; a node must see itself");
    depths[i] = seen - 1;
    reach[i] = static_cast<int32_t>(std::max<int64_t>(end, node == 0 ? 0 : reach[i - 1]));
  }
}

}  // namespace

AttentionCall check_attention(const char* op, const AttentionInputs& in) {
  const auto& [query, key_cache, value_cache, seq_lens, tree_mask, page_table, scale, sinks,
               softcap, window] = in;
  check_dim(op, "query", query, 4, "[B, Hq, T, D]");
  check_float_dtype(op, "query", query);
  check_last_contiguous(op, "query", query);
  check_dtype(op, "key_cache", key_cache, query.scalar_type());
  check_dtype(op, "value_cache", value_cache, query.scalar_type());
  const int64_t B = query.size(0), Hq = query.size(1), T = query.size(2), D = query.size(3);
  BW_CHECK(D >= 1 && D <= kMaxHeadDim, op, ": query.size(3) = ", D,
           " must be a head dim between 1 and ", kMaxHeadDim);
  AttentionCall call{};
  AttentionArgs& args = call.args;
  call.B = B;
  CacheShape& shape = call.shape = check_cache(op, "key_cache", key_cache, B, page_table);
  check_cache(op, "value_cache", value_cache, B, page_table);
  check_size(op, "key_cache", key_cache, 3, D, "D of query");
  check_size(op, "value_cache", value_cache, 3, D, "D of query");
  BW_CHECK(shape.Hkv > 0 && Hq % shape.Hkv == 0, op, ": query heads Hq = ", Hq,
           " must be a multiple of the KV heads Hkv = ", shape.Hkv);
  check_size(op, "value_cache", value_cache, 1, key_cache.size(1), "that of key_cache");
  BW_CHECK(value_cache.size(0) == key_cache.size(0) && value_cache.size(2) == key_cache.size(2), op,
           ": value_cache must have the shape of key_cache, got ", shape_of(value_cache), " and ",
           shape_of(key_cache));
  BW_CHECK(softcap >= 0 && std::isfinite(softcap), op,
           ": softcap must be 0 (none) or positive, got ", softcap);
  int64_t N = T;
  if (tree_mask) {
    check_dim(op, "tree_mask", *tree_mask, 3, "[B, N, W]");
    N = tree_mask->size(1);
    BW_CHECK(N >= T, op, ": tree_mask.size(1) = ", N, " must be at least T = ", T,
             ": the T new tokens are the last of its nodes");
  }
  call.lens = check_seq_lens(op, seq_lens, B, N, shape);
  if (tree_mask) {
    check_dtype(op, "tree_mask", *tree_mask, ScalarType::Long);
    check_contiguous(op, "tree_mask", *tree_mask);
    check_size(op, "tree_mask", *tree_mask, 0, B, "B");
    args.W = (N + 63) / 64;
    check_size(op, "tree_mask", *tree_mask, 2, args.W, "ceil(N / 64)");
    args.tree_mask = static_cast<const int64_t*>(tree_mask->const_data_ptr());
    check_mask(op, args.tree_mask, B, N, args.W, window, call.depths, call.reach);
    args.depths = call.depths.data();
  }
  if (sinks) {
    check_dim(op, "sinks", *sinks, 1, "[Hq]");
    check_size(op, "sinks", *sinks, 0, Hq, "Hq");
    check_dtype(op, "sinks", *sinks, ScalarType::Float);
    check_contiguous(op, "sinks", *sinks);
    args.sinks = static_cast<const float*>(sinks->const_data_ptr());
  }

  args.query = query.const_data_ptr();
  for (int i = 0; i < 3; ++i) args.q_stride[i] = query.stride(i);
  args.key_cache = key_cache.const_data_ptr();
  args.value_cache = value_cache.const_data_ptr();
  args.key_layout = layout_of(key_cache, page_table);
  args.value_layout = layout_of(value_cache, page_table);
  args.type = dtype_of(query.scalar_type());
  args.Hq = Hq;
  args.Hkv = shape.Hkv;
  args.T = T;
  args.N = N;
  args.D = D;
  args.scale = static_cast<float>(scale ? *scale : 1.0 / std::sqrt(static_cast<double>(D)));
  args.softcap = static_cast<float>(softcap);
  return call;
}

std::tuple<Tensor, Tensor> run_attention(AttentionCall& call, const std::vector<Places>& places,
                                         bool per_token) {
  AttentionArgs& args = call.args;
  const int64_t B = call.B, Hq = args.Hq, Hkv = args.Hkv, T = args.T, N = args.N, D = args.D;
  const ScalarType type = args.type == DType::f32    ? ScalarType::Float
                          : args.type == DType::bf16 ? ScalarType::BFloat16
                                                     : ScalarType::Half;
  Tensor out = empty<4>({B, Hq, T, D}, type);
  Tensor lse = empty<3>({B, Hq, T}, ScalarType::Float);
  args.out = out.mutable_data_ptr();
  args.lse = static_cast<float*>(lse.mutable_data_ptr());

  // Row blocks end on whole tokens, so that a causal block can stop at its last token's slot (one
  // of a tree, at the last that it or an earlier node sees), and begin at its first one's window.
  // The split size depends on the row's own length and the shapes only: about 64 units per row keep
  // many threads busy, and a long prompt, with blocks enough, is not split at all. A row too short
  // to be split is cut into smaller blocks where its heads alone would not keep threads busy.
  const int64_t G = Hq / Hkv;
  const int64_t large_block = per_token ? 1 : std::max<int64_t>(1, kMaxRowBlock / G);
  const int64_t quarter = (T * Hkv + 3) / 4, least = (3 * kRowPad + G - 1) / G;
  const int64_t small_block = std::min(large_block, std::max(quarter, least));
  std::vector<AttentionUnit> units;
  std::vector<int64_t> first_unit;            // of each block; the last entry ends the list
  std::vector<int64_t> block_of, partial_at;  // of each unit
  int64_t floats = 0, slots_read = 0;
  const auto cut = [&](int64_t b, int64_t h, int64_t t, int64_t end_token, const Places& p,
                       int64_t lanes_of_work) {
    const int64_t last = N - T + end_token;  // nodes up to the block's end
    const int64_t slots = p.prefix + (args.tree_mask ? call.reach[b * N + last - 1] : last);
    // Only where places are slots does a window cut off the front of them.
    const bool skips = p.window > 0 && p.kept == 0 && p.sink == p.prefix;
    const int64_t low = skips ? p.prefix + (args.tree_mask ? 0 : t) - p.window + 1 : 0;
    const int64_t first = std::max<int64_t>(0, low) / kKeyTile * kKeyTile;
    const int64_t even = (slots - first) * lanes_of_work / 64 / kKeyTile * kKeyTile;
    const int64_t split = std::max(even, kMinSplit);
    first_unit.push_back(static_cast<int64_t>(units.size()));
    slots_read += slots - first;
    for (int64_t s = first; s < slots; s += split) {
      units.push_back({static_cast<int32_t>(b), static_cast<int32_t>(h),
                       static_cast<int32_t>(t * G), static_cast<int32_t>(end_token * G), s,
                       std::min(slots, s + split), nullptr, &p, nullptr, nullptr, 1});
      block_of.push_back(static_cast<int64_t>(first_unit.size()) - 1);
      partial_at.push_back(floats);
      floats += partial_floats((end_token - t) * G, D);
    }
  };
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < Hkv; ++h) {
      const Places* of_row = places.data() + b * Hkv * (per_token ? T : 1) + h;
      const int64_t block = of_row->prefix + N <= kMinSplit ? small_block : large_block;
      const int64_t lanes_of_work = Hkv * ((T + block - 1) / block);
      for (int64_t t = 0; t < T; t += block)
        cut(b, h, t, std::min(T, t + block), of_row[per_token ? t * Hkv : 0], lanes_of_work);
    }
  first_unit.push_back(static_cast<int64_t>(units.size()));
  float* workspace = workspace_buffer.reserve(floats);
  for (size_t i = 0; i < units.size(); ++i) {
    units[i].partial = workspace + partial_at[i];
    if (i + 1 < units.size()) units[i].following = &units[i + 1];
  }
  std::unique_ptr<std::atomic<int64_t>[]> unfinished(
      new std::atomic<int64_t>[first_unit.size() - 1]);
  for (size_t i = 0; i + 1 < first_unit.size(); ++i)
    unfinished[i] = first_unit[i + 1] - first_unit[i];

  const AttentionKernels& k = BW_KERNELS(attention_kernels);
  const int64_t block_rows = std::min(T, large_block) * G;
  // A short prefix is less work than waking the threads.
  const bool serial = slots_read * D * (block_rows + 4) < (1 << 18);
  const int64_t scratch = scratch_floats(block_rows, D);
  run_guided(static_cast<int64_t>(units.size()), scratch, serial, [&](int64_t i, float* buffer) {
    k.run_unit(args, units[i], buffer);
    const int64_t block = block_of[i], first = first_unit[block];
    if (unfinished[block].fetch_sub(1) == 1)
      k.merge_units(args, units.data() + first, first_unit[block + 1] - first);
  });
  workspace_buffer.trim();
  return {out, lse};
}

}  // namespace branchwise
