#include "common/attention_call.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace branchwise {
namespace {

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
               softcap, window, key_scale, value_scale] = in;
  check_dim(op, "query", query, 4, "[B, Hq, T, D]");
  check_float_dtype(op, "query", query);
  check_last_contiguous(op, "query", query);
  const int64_t B = query.size(0), Hq = query.size(1), T = query.size(2), D = query.size(3);
  BW_CHECK(D >= 1 && D <= kMaxHeadDim, op, ": query.size(3) = ", D,
           " must be a head dim between 1 and ", kMaxHeadDim);
  AttentionCall call{};
  AttentionArgs& args = call.args;
  call.B = B;
  CacheShape& shape = call.shape = check_cache(op, "key_cache", key_cache, B, page_table);
  check_cache(op, "value_cache", value_cache, B, page_table);
  const CacheScales scales = check_scales(op, key_cache, value_cache, query.scalar_type(),
                                          shape.Hkv, key_scale, value_scale);
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
    if (kChecksValues) {
      check_mask(op, args.tree_mask, B, N, args.W, window, call.depths, call.reach);
      args.depths = call.depths.data();
    }
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
  args.key_scale = scales.key;
  args.value_scale = scales.value;
  args.Hq = Hq;
  args.Hkv = shape.Hkv;
  args.T = T;
  args.N = N;
  args.D = D;
  args.scale = static_cast<float>(scale ? *scale : 1.0 / std::sqrt(static_cast<double>(D)));
  args.softcap = static_cast<float>(softcap);
  return call;
}

void check_window(const char* op, const AttentionCall& call, int64_t window) {
  BW_CHECK(window >= 0, op, ": window must be 0 (none) or positive, got ", window);
  BW_CHECK(window == 0 || call.lens.head_stride == 0, op,
           ": window must be 0 where seq_lens differ between heads, as slots are no positions then,"
           " got ",
           window);
}

AttentionCall check_cascade(const char* op, const AttentionInputs& in, int64_t window) {
  BW_CHECK(window >= 0, op, ": window must be 0 (none) or positive, got ", window);
  check_dim(op, "page_table", *in.page_table, 2, "[B, N]");
  check_dim(op, "seq_lens", in.seq_lens, 1, "[B]");
  AttentionCall call = check_attention(op, in);
  BW_CHECK(kCascadeChunk % call.shape.page_size == 0, op,
           ": the page size, key_cache.size(2) = ", call.shape.page_size, ", must divide ",
           kCascadeChunk);
  return call;
}

Lists check_list_shapes(const char* op, const AttentionCall& call,
                        const std::optional<Tensor>& indices, const std::optional<Tensor>& counts,
                        int64_t unit, const std::optional<Tensor>& segments, bool has_ranges) {
  Lists lists;
  BW_CHECK(indices || has_ranges, op, ": indices or sink_sizes must be given");
  BW_CHECK(indices.has_value() == counts.has_value(), op,
           ": indices and counts must be given together");
  BW_CHECK(unit >= 1 && unit <= INT32_MAX, op, ": unit must be at least 1, got ", unit);
  BW_CHECK(!segments || indices, op, ": segment_offsets needs indices");
  BW_CHECK(!segments || unit == 1, op, ": unit must be 1 with segment_offsets, got ", unit);
  if (!indices) return lists;
  const int64_t dim = indices->dim();
  BW_CHECK(dim == 3 || dim == 4, op, ": indices must have shape [B, Hs, K] or [B, T, Hs, K], got ",
           shape_of(*indices));
  check_dtype(op, "indices", *indices, ScalarType::Int);
  check_contiguous(op, "indices", *indices);
  check_size(op, "indices", *indices, 0, call.B, "B");
  if (dim == 4) check_size(op, "indices", *indices, 1, call.args.T, "T");
  check_dtype(op, "counts", *counts, ScalarType::Int);
  check_contiguous(op, "counts", *counts);
  check_dim(op, "counts", *counts, dim - 1, "that of indices without K");
  for (int64_t i = 0; i + 1 < dim; ++i)
    check_size(op, "counts", *counts, i, indices->size(i), "that of indices");
  lists.tokens = dim == 4 ? call.args.T : 1;
  lists.heads = indices->size(dim - 2);
  lists.width = indices->size(dim - 1);
  BW_CHECK(lists.heads == 1 || lists.heads == call.shape.Hkv, op, ": indices.size(", dim - 2,
           ") must be 1 or Hkv = ", call.shape.Hkv, ", got shape ", shape_of(*indices));
  BW_CHECK(lists.heads == call.shape.Hkv || call.lens.head_stride == 0, op,
           ": indices must have lists per KV head where seq_lens differ between heads");
  if (segments) {
    check_dim(op, "segment_offsets", *segments, 3, "[B, Hs, S + 1]");
    check_dtype(op, "segment_offsets", *segments, ScalarType::Int);
    check_contiguous(op, "segment_offsets", *segments);
    check_size(op, "segment_offsets", *segments, 0, call.B, "B");
    check_size(op, "segment_offsets", *segments, 1, lists.heads, "that of the lists");
  }
  lists.indices = static_cast<const int32_t*>(indices->const_data_ptr());
  lists.counts = static_cast<const int32_t*>(counts->const_data_ptr());
  lists.unit = static_cast<int32_t>(unit);
  return lists;
}

Ranges check_ranges(const char* op, const AttentionCall& call, const std::optional<Tensor>& sink,
                    const std::optional<Tensor>& recent) {
  BW_CHECK(sink.has_value() == recent.has_value(), op,
           ": sink_sizes and recent_sizes must be given together");
  if (!sink) return {};
  const int32_t* data[2];
  int i = 0;
  for (const auto& [name, sizes] : {std::pair{"sink_sizes", &*sink}, {"recent_sizes", &*recent}}) {
    check_dim(op, name, *sizes, 1, "[Hkv]");
    check_size(op, name, *sizes, 0, call.shape.Hkv, "Hkv");
    check_dtype(op, name, *sizes, ScalarType::Int);
    check_contiguous(op, name, *sizes);
    data[i] = static_cast<const int32_t*>(sizes->const_data_ptr());
    for (int64_t h = 0; kChecksValues && h < call.shape.Hkv; ++h)
      BW_CHECK(data[i][h] >= 0, op, ": ", name, "[", h, "] = ", data[i][h],
               " must not be negative");
    ++i;
  }
  return {data[0], data[1]};
}

}  // namespace branchwise
