// tree_attention and merge_attention: checks, cutting the work into units, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <tuple>
#include <vector>

#include "cpu/empty.h"
#include "cpu/isa.h"
#include "cpu/kernels/attention_kernel.h"
#include "cpu/kv_args.h"

namespace branchwise {
namespace {

constexpr int64_t kMinSplit = 4 * kKeyTile;  // slots: less is not worth a merge

// A thread's buffer of at least so many floats. Kept between calls: fresh pages from the system can
// cost more than the attention of a decode step.
class Buffer {
 public:
  float* reserve(int64_t floats) {
    if (floats > size_) {
      data_.reset();
      data_.reset(new float[floats]);
      size_ = floats;
    }
    return data_.get();
  }
  // A long prompt's buffer is not worth keeping.
  void trim() {
    if (size_ <= kKept) return;
    data_.reset();
    size_ = 0;
  }

 private:
  static constexpr int64_t kKept = 4 << 20;
  std::unique_ptr<float[]> data_;
  int64_t size_ = 0;
};
thread_local Buffer workspace_buffer, scratch_buffer;

// Threads take runs of items, long ones first: what lies together in memory is mostly read by one
// thread, and a long row does not hold up the others.
template <typename F>
void run_guided(int64_t items, int64_t scratch, bool serial, const F& f) {
  const int64_t workers = serial ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), items);
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    float* buffer = scratch_buffer.reserve(scratch);
    int64_t begin = next.load();
    while (begin < items) {
      const int64_t end = begin + std::max<int64_t>(1, (items - begin) / (2 * workers));
      if (!next.compare_exchange_weak(begin, end)) continue;
      for (int64_t i = begin; i < end; ++i) f(i, buffer);
      begin = next.load();
    }
  };
  if (workers <= 1) return work();
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) work();
  });
}

// The depth of every node, from its ancestor bits; also refuses masks that the kernel must not see.
std::vector<int32_t> checked_depths(const int64_t* mask, int64_t B, int64_t N, int64_t W) {
  std::vector<int32_t> depths(B * N);
  for (int64_t i = 0; i < B * N; ++i) {
    const int64_t node = i % N;
    int32_t seen = 0;
    for (int64_t w = 0; w < W; ++w) {
      const uint64_t word = static_cast<uint64_t>(mask[i * W + w]);
      const int64_t valid = std::clamp<int64_t>(node + 1 - w * 64, 0, 64);
      const uint64_t allowed = valid == 64 ? ~uint64_t{0} : (uint64_t{1} << valid) - 1;
      BW_CHECK((word & ~allowed) == 0, "tree_attention: tree_mask[", i / N, ", ", node,
               "] has a bit above its own node; a node sees only itself and nodes before it");
      seen += __builtin_popcountll(word);
    }
    BW_CHECK(static_cast<uint64_t>(mask[i * W + node / 64]) >> (node % 64) & 1,
             "tree_attention: tree_mask[", i / N, ", ", node,
             "] lacks its own bit; a node must see itself");
    depths[i] = seen - 1;
  }
  return depths;
}

}  // namespace

std::tuple<Tensor, Tensor> tree_attention(Tensor query, Tensor key_cache, Tensor value_cache,
                                          Tensor seq_lens, std::optional<Tensor> tree_mask,
                                          std::optional<Tensor> page_table,
                                          std::optional<double> scale, int64_t window,
                                          std::optional<Tensor> sinks, double softcap) {
  const char* op = "tree_attention";
  check_dim(op, "query", query, 4, "[B, Hq, T, D]");
  check_float_dtype(op, "query", query);
  check_last_contiguous(op, "query", query);
  check_dtype(op, "key_cache", key_cache, query.scalar_type());
  check_dtype(op, "value_cache", value_cache, query.scalar_type());
  const int64_t B = query.size(0), Hq = query.size(1), T = query.size(2), D = query.size(3);
  BW_CHECK(D >= 1 && D <= kMaxHeadDim, op, ": query.size(3) = ", D,
           " must be a head dim between 1 and ", kMaxHeadDim);
  const CacheShape shape = check_cache(op, "key_cache", key_cache, B, page_table);
  const CacheShape value_shape = check_cache(op, "value_cache", value_cache, B, page_table);
  check_size(op, "key_cache", key_cache, 3, D, "D of query");
  check_size(op, "value_cache", value_cache, 3, D, "D of query");
  BW_CHECK(shape.Hkv > 0 && Hq % shape.Hkv == 0, op, ": query heads Hq = ", Hq,
           " must be a multiple of the KV heads Hkv = ", shape.Hkv);
  check_size(op, "value_cache", value_cache, 1, shape.Hkv, "Hkv of key_cache");
  BW_CHECK(value_cache.size(0) == key_cache.size(0) && value_cache.size(2) == key_cache.size(2), op,
           ": value_cache must have the shape of key_cache, got ", shape_of(value_cache), " and ",
           shape_of(key_cache));
  BW_CHECK(window >= 0, op, ": window must be 0 (none) or positive, got ", window);
  BW_CHECK(softcap >= 0 && std::isfinite(softcap), op,
           ": softcap must be 0 (none) or positive, got ", softcap);
  int64_t N = T;
  if (tree_mask) {
    check_dim(op, "tree_mask", *tree_mask, 3, "[B, N, W]");
    N = tree_mask->size(1);
    BW_CHECK(N >= T, op, ": tree_mask.size(1) = ", N, " must be at least T = ", T,
             ": the T new tokens are the last of its nodes");
  }
  const int32_t* lens = check_seq_lens(
      op, seq_lens, B, N, {shape.Hkv, D, std::min(shape.capacity, value_shape.capacity)},
      key_cache.size(0), page_table);

  AttentionArgs args{};
  std::vector<int32_t> depths;
  if (tree_mask) {
    check_dtype(op, "tree_mask", *tree_mask, ScalarType::Long);
    check_contiguous(op, "tree_mask", *tree_mask);
    check_size(op, "tree_mask", *tree_mask, 0, B, "B");
    args.W = (N + 63) / 64;
    check_size(op, "tree_mask", *tree_mask, 2, args.W, "ceil(N / 64)");
    args.tree_mask = static_cast<const int64_t*>(tree_mask->const_data_ptr());
    depths = checked_depths(args.tree_mask, B, N, args.W);
    args.depths = depths.data();
  }
  if (sinks) {
    check_dim(op, "sinks", *sinks, 1, "[Hq]");
    check_size(op, "sinks", *sinks, 0, Hq, "Hq");
    check_dtype(op, "sinks", *sinks, ScalarType::Float);
    check_contiguous(op, "sinks", *sinks);
    args.sinks = static_cast<const float*>(sinks->const_data_ptr());
  }

  Tensor out = empty<4>({B, Hq, T, D}, query.scalar_type());
  Tensor lse = empty<3>({B, Hq, T}, ScalarType::Float);
  if (B * T == 0) return {out, lse};

  args.query = query.const_data_ptr();
  for (int i = 0; i < 3; ++i) args.q_stride[i] = query.stride(i);
  args.key_cache = key_cache.const_data_ptr();
  args.value_cache = value_cache.const_data_ptr();
  args.key_layout = layout_of(key_cache, page_table);
  args.value_layout = layout_of(value_cache, page_table);
  args.type = dtype_of(query.scalar_type());
  args.out = out.mutable_data_ptr();
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  args.seq_lens = lens;
  args.Hq = Hq;
  args.Hkv = shape.Hkv;
  args.T = T;
  args.N = N;
  args.D = D;
  args.scale = static_cast<float>(scale ? *scale : 1.0 / std::sqrt(static_cast<double>(D)));
  args.softcap = static_cast<float>(softcap);
  args.window = window;

  // Row blocks end on whole tokens, so that a causal block can stop at its last token's slot, and
  // begin at its first one's window. The split size depends on the row's own length and the shapes
  // only: about 64 units per row keep many threads busy, and a long prompt, with blocks enough, is
  // not split at all. A row too short to be split is cut into smaller blocks where its heads alone
  // would not keep threads busy.
  const int64_t G = Hq / shape.Hkv;
  const int64_t large_block = std::max<int64_t>(1, kMaxRowBlock / G);
  const int64_t quarter = (T * shape.Hkv + 3) / 4, least = (3 * kRowPad + G - 1) / G;
  const int64_t small_block = std::min(large_block, std::max(quarter, least));
  std::vector<AttentionUnit> units;
  std::vector<int64_t> first_unit;            // of each block; the last entry ends the list
  std::vector<int64_t> block_of, partial_at;  // of each unit
  int64_t floats = 0, slots_read = 0;
  for (int64_t b = 0; b < B; ++b) {
    const int64_t tokens_per_block = lens[b] + N <= kMinSplit ? small_block : large_block;
    const int64_t lanes_of_work = shape.Hkv * ((T + tokens_per_block - 1) / tokens_per_block);
    for (int64_t h = 0; h < shape.Hkv; ++h)
      for (int64_t t = 0; t < T; t += tokens_per_block) {
        const int64_t end_token = std::min(T, t + tokens_per_block);
        const int64_t slots = lens[b] + N - T + end_token;
        const int64_t low = window == 0 ? 0 : lens[b] + (tree_mask ? 0 : t) - window + 1;
        const int64_t first = std::max<int64_t>(0, low) / kKeyTile * kKeyTile;
        const int64_t even = (slots - first) * lanes_of_work / 64 / kKeyTile * kKeyTile;
        const int64_t split = std::max(even, kMinSplit);
        first_unit.push_back(static_cast<int64_t>(units.size()));
        slots_read += slots - first;
        for (int64_t s = first; s < slots; s += split) {
          units.push_back({static_cast<int32_t>(b), static_cast<int32_t>(h),
                           static_cast<int32_t>(t * G), static_cast<int32_t>(end_token * G), s,
                           std::min(slots, s + split), nullptr});
          block_of.push_back(static_cast<int64_t>(first_unit.size()) - 1);
          partial_at.push_back(floats);
          floats += partial_floats((end_token - t) * G, D);
        }
      }
  }
  first_unit.push_back(static_cast<int64_t>(units.size()));
  float* workspace = workspace_buffer.reserve(floats);
  for (size_t i = 0; i < units.size(); ++i) units[i].partial = workspace + partial_at[i];
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

// out = (out_a e^(lse_a - top) + out_b e^(lse_b - top)) / (e^(lse_a - top) + e^(lse_b - top))
std::tuple<Tensor, Tensor> merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) {
  check_merge_args(out_a, lse_a, out_b, lse_b);
  const std::array<int64_t, 4> sizes{out_a.size(0), out_a.size(1), out_a.size(2), out_a.size(3)};
  Tensor out = empty<4>(sizes, out_a.scalar_type());
  Tensor lse = empty<3>({sizes[0], sizes[1], sizes[2]}, ScalarType::Float);
  const MergeArgs args{out_a.const_data_ptr(),
                       out_b.const_data_ptr(),
                       static_cast<const float*>(lse_a.const_data_ptr()),
                       static_cast<const float*>(lse_b.const_data_ptr()),
                       out.mutable_data_ptr(),
                       static_cast<float*>(lse.mutable_data_ptr()),
                       dtype_of(out_a.scalar_type()),
                       out_a.size(3)};
  const AttentionKernels& k = BW_KERNELS(attention_kernels);
  torch::stable::parallel_for(0, lse.numel(), 256,
                              [&](int64_t begin, int64_t end) { k.merge_pair(args, begin, end); });
  return {out, lse};
}

}  // namespace branchwise

STABLE_TORCH_LIBRARY_IMPL(branchwise, CPU, m) {
  m.impl("tree_attention", TORCH_BOX(&branchwise::tree_attention));
  m.impl("merge_attention", TORCH_BOX(&branchwise::merge_attention));
}
