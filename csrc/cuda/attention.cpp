// CUDA binding of the attention family: checks of shapes, workspace, launches. Values are not
// looked at: what they place outside a cache is not read and takes no part.
#include "cuda/kernels/attention.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "common/attention_call.h"
#include "cuda/kernels/merge_attention.cuh"
#include "cuda/kernels/segments.cuh"
#include "cuda/stream.h"

namespace branchwise {
namespace {

// Rows of 16-byte pieces, the last of which may reach beyond D in no row.
bool on_16_bytes(const Tensor& t) {
  const int64_t piece = 16 / static_cast<int64_t>(t.element_size());
  bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) aligned &= t.size(i) == 1 || t.stride(i) % piece == 0;
  return aligned && t.size(t.dim() - 1) % piece == 0;
}

// out and lse, which the call then names.
std::tuple<Tensor, Tensor> results_of(const char* op, AttentionCall& call, const Tensor& query) {
  AttentionArgs& a = call.args;
  BW_CHECK(call.B <= 65535, op, ": at most 65535 rows, got ", call.B);
  Tensor out = torch::stable::new_empty(query, {call.B, a.Hq, a.T, a.D});
  Tensor lse = torch::stable::new_empty(query, {call.B, a.Hq, a.T}, ScalarType::Float);
  a.out = out.mutable_data_ptr();
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  return {out, lse};
}

// Sets what is common to all launches, and plans one.
cuda::AttentionPlan lay_out(const char* op, cuda::AttentionLaunch& launch,
                            const AttentionCall& call, const AttentionInputs& in,
                            int64_t most_prefix, int64_t by_stretch = 0) {
  const AttentionArgs& a = launch.args = call.args;
  launch.seq_lens = call.lens.data;
  launch.lens_row_stride = call.lens.row_stride;
  launch.lens_head_stride = call.lens.head_stride;
  launch.B = call.B;
  launch.capacity = call.shape.capacity;
  launch.pages = call.shape.pages;
  launch.by_stretch = by_stretch > 0;

  cuda::AttentionShape shape{};
  shape.Hkv = a.Hkv;
  shape.G = a.Hq / a.Hkv;
  shape.T = a.T;
  shape.D = a.D;
  shape.most_places = std::min(most_prefix, call.shape.capacity) + a.N;
  shape.per_token = launch.lists.tokens > 1;
  shape.aligned = a.type != DType::f32 && on_16_bytes(in.query) && on_16_bytes(in.key_cache) &&
                  on_16_bytes(in.value_cache);
  shape.eight_bits = in.key_scale.has_value();
  if (shape.eight_bits && a.type != DType::bf16) shape.aligned = false;
  shape.by_stretch = by_stretch;
  const cuda::AttentionPlan plan = cuda::plan_attention(shape);
  launch.rows = plan.rows;
  launch.blocks = plan.blocks;
  launch.splits = plan.splits;
  launch.most_splits = plan.most_splits;
  launch.unit_floats = plan.unit_floats;
  BW_CHECK(a.Hkv * plan.blocks * plan.splits < (int64_t{1} << 31), op,
           ": too many query rows, got shape ", shape_of(in.query));
  return plan;
}

Tensor workspace_of(const AttentionInputs& in, int64_t floats, cuda::AttentionLaunch& launch) {
  Tensor workspace = torch::stable::new_empty(in.query, {floats}, ScalarType::Float);
  launch.partial = static_cast<float*>(workspace.mutable_data_ptr());
  return workspace;
}

// launch: but for what is common to all ops.
std::tuple<Tensor, Tensor> run(const char* op, cuda::AttentionLaunch launch, AttentionCall& call,
                               const AttentionInputs& in, const OnDevice& device,
                               int64_t most_prefix) {
  const auto results = results_of(op, call, in.query);
  if (call.empty()) return results;
  const cuda::AttentionPlan plan = lay_out(op, launch, call, in, most_prefix);
  const int64_t units = plan.splits > 1 ? call.B * call.args.Hkv * plan.blocks * plan.splits : 0;
  const Tensor workspace = workspace_of(in, units * plan.unit_floats, launch);
  check_launch(op, cuda::attend(launch, plan, device.stream()));
  return results;
}

int32_t window_of(int64_t window) {
  return static_cast<int32_t>(std::min<int64_t>(window, INT32_MAX));
}

}  // namespace

std::tuple<Tensor, Tensor> tree_attention_cuda(Tensor query, Tensor key_cache, Tensor value_cache,
                                               Tensor seq_lens, std::optional<Tensor> tree_mask,
                                               std::optional<Tensor> page_table,
                                               std::optional<double> scale, int64_t window,
                                               std::optional<Tensor> sinks, double softcap,
                                               std::optional<Tensor> key_scale,
                                               std::optional<Tensor> value_scale) {
  const char* op = "tree_attention";
  const OnDevice device(op, query,
                        {{"key_cache", &key_cache},
                         {"value_cache", &value_cache},
                         {"seq_lens", &seq_lens},
                         {"tree_mask", if_given(tree_mask)},
                         {"page_table", if_given(page_table)},
                         {"sinks", if_given(sinks)},
                         {"key_scale", if_given(key_scale)},
                         {"value_scale", if_given(value_scale)}});
  const AttentionInputs in{query, key_cache, value_cache, seq_lens,   tree_mask, page_table,
                           scale, sinks,     softcap,     window > 0, key_scale, value_scale};
  AttentionCall call = check_attention(op, in);
  check_window(op, call, window);
  cuda::AttentionLaunch launch{};
  launch.window = window_of(window);
  return run(op, launch, call, in, device, call.shape.capacity);
}

// Rows read what they share one by one, from the L2 cache if they are lucky: their results are the
// same as those of rows alone, as cascade_attention's must be.
std::tuple<Tensor, Tensor> cascade_attention_cuda(
    Tensor query, Tensor key_cache, Tensor value_cache, Tensor seq_lens, Tensor page_table,
    std::optional<Tensor> tree_mask, std::optional<double> scale, int64_t window,
    std::optional<Tensor> sinks, double softcap, std::optional<Tensor> key_scale,
    std::optional<Tensor> value_scale) {
  const char* op = "cascade_attention";
  const OnDevice device(op, query,
                        {{"key_cache", &key_cache},
                         {"value_cache", &value_cache},
                         {"seq_lens", &seq_lens},
                         {"page_table", &page_table},
                         {"tree_mask", if_given(tree_mask)},
                         {"sinks", if_given(sinks)},
                         {"key_scale", if_given(key_scale)},
                         {"value_scale", if_given(value_scale)}});
  const AttentionInputs in{query, key_cache, value_cache, seq_lens,   tree_mask, page_table,
                           scale, sinks,     softcap,     window > 0, key_scale, value_scale};
  AttentionCall call = check_cascade(op, in, window);
  cuda::AttentionLaunch launch{};
  launch.window = window_of(window);
  return run(op, launch, call, in, device, call.shape.capacity);
}

// Partial results of all rows can be large; then there are several launches.
constexpr int64_t kMostPartialFloats = 1 << 26;

std::tuple<Tensor, Tensor> path_attention_cuda(Tensor query, Tensor key_cache, Tensor value_cache,
                                               Tensor seq_lens, std::optional<Tensor> tree_mask,
                                               std::optional<Tensor> page_table,
                                               std::optional<double> scale, int64_t window,
                                               std::optional<Tensor> sinks, double softcap,
                                               std::optional<Tensor> key_scale,
                                               std::optional<Tensor> value_scale) {
  const char* op = "path_attention";
  const OnDevice device(op, query,
                        {{"key_cache", &key_cache},
                         {"value_cache", &value_cache},
                         {"seq_lens", &seq_lens},
                         {"tree_mask", if_given(tree_mask)},
                         {"page_table", if_given(page_table)},
                         {"sinks", if_given(sinks)},
                         {"key_scale", if_given(key_scale)},
                         {"value_scale", if_given(value_scale)}});
  const AttentionInputs in{query, key_cache, value_cache, seq_lens,   tree_mask, page_table,
                           scale, sinks,     softcap,     window > 0, key_scale, value_scale};
  AttentionCall call = check_attention(op, in);
  check_window(op, call, window);
  const auto results = results_of(op, call, query);
  if (call.empty()) return results;
  const AttentionArgs& a = call.args;
  cuda::AttentionLaunch dense{};
  dense.window = window_of(window);
  // A window reaches over so many places, and further for each of a causal block's tokens.
  const int64_t seen = window > 0 ? dense.window : call.shape.capacity;
  const int64_t together = tree_mask ? 0 : std::min<int64_t>(a.T, 64);
  const cuda::AttentionPlan plan =
      lay_out(op, dense, call, in, call.shape.capacity, cuda::most_stretches(seen + together));
  const int64_t block_floats = a.Hkv * plan.splits * plan.unit_floats;
  if (!tree_mask) {
    const int64_t blocks = std::clamp<int64_t>(kMostPartialFloats / block_floats, 1, plan.blocks);
    const int64_t rows =
        std::clamp<int64_t>(kMostPartialFloats / (block_floats * plan.blocks), 1, call.B);
    const Tensor workspace = workspace_of(in, rows * blocks * block_floats, dense);
    for (int64_t b = 0; b < call.B; b += rows)
      for (int64_t block = 0; block < plan.blocks; block += blocks) {
        dense.first_batch = b;
        dense.B = std::min(rows, call.B - b);
        dense.first_block = block;
        dense.blocks = std::min(blocks, plan.blocks - block);
        check_launch(op, cuda::attend(dense, plan, device.stream()));
      }
    return results;
  }
  cuda::AttentionLaunch own{};
  own.window = dense.window;
  own.places_from = cuda::PlacesFrom::paths;
  Lists& lists = own.lists;
  lists.tokens = a.T;
  lists.heads = call.lens.head_stride == 0 ? 1 : a.Hkv;
  lists.width = a.N;
  const int64_t all = call.B * lists.tokens * lists.heads;
  BW_CHECK(all < (int64_t{1} << 31), op, ": too many query rows, got shape ", shape_of(query));
  Tensor slots = torch::stable::new_empty(seq_lens, {all, a.N});
  Tensor counts = torch::stable::new_empty(seq_lens, {all});
  const cuda::PathsLaunch paths{a.tree_mask,
                                call.lens.data,
                                call.lens.row_stride,
                                call.lens.head_stride,
                                call.B,
                                a.T,
                                lists.heads,
                                a.N,
                                a.W,
                                call.shape.capacity,
                                static_cast<int32_t*>(slots.mutable_data_ptr()),
                                static_cast<int32_t*>(counts.mutable_data_ptr())};
  check_launch(op, cuda::list_paths(paths, device.stream()));
  lists.indices = paths.slots;
  lists.counts = paths.counts;
  const cuda::AttentionPlan own_plan =
      lay_out(op, own, call, in, call.shape.capacity, cuda::most_stretches(a.N));
  const int64_t shared_floats = plan.blocks * block_floats;
  const int64_t own_floats = a.Hkv * own_plan.blocks * own_plan.splits * own_plan.unit_floats;
  const int64_t rows =
      std::clamp<int64_t>(kMostPartialFloats / (shared_floats + own_floats), 1, call.B);
  const Tensor workspace = workspace_of(in, rows * shared_floats, dense);
  const Tensor own_workspace = workspace_of(in, rows * own_floats, own);
  for (int64_t b = 0; b < call.B; b += rows) {
    dense.first_batch = own.first_batch = b;
    dense.B = own.B = std::min(rows, call.B - b);
    check_launch(op, cuda::attend_paths(dense, plan, own, own_plan, device.stream()));
  }
  return results;
}

std::tuple<Tensor, Tensor> sparse_attention_cuda(
    Tensor query, Tensor key_cache, Tensor value_cache, Tensor seq_lens,
    std::optional<Tensor> indices, std::optional<Tensor> counts, int64_t unit,
    std::optional<Tensor> segment_offsets, std::optional<Tensor> sink_sizes,
    std::optional<Tensor> recent_sizes, std::optional<Tensor> tree_mask,
    std::optional<Tensor> page_table, std::optional<double> scale, std::optional<Tensor> sinks,
    double softcap, std::optional<Tensor> key_scale, std::optional<Tensor> value_scale) {
  const char* op = "sparse_attention";
  const OnDevice device(op, query,
                        {{"key_cache", &key_cache},
                         {"value_cache", &value_cache},
                         {"seq_lens", &seq_lens},
                         {"indices", if_given(indices)},
                         {"counts", if_given(counts)},
                         {"segment_offsets", if_given(segment_offsets)},
                         {"sink_sizes", if_given(sink_sizes)},
                         {"recent_sizes", if_given(recent_sizes)},
                         {"tree_mask", if_given(tree_mask)},
                         {"page_table", if_given(page_table)},
                         {"sinks", if_given(sinks)},
                         {"key_scale", if_given(key_scale)},
                         {"value_scale", if_given(value_scale)}});
  const AttentionInputs in{query,      key_cache,  value_cache, seq_lens, tree_mask,
                           page_table, scale,      sinks,       softcap,  recent_sizes.has_value(),
                           key_scale,  value_scale};
  AttentionCall call = check_attention(op, in);
  cuda::AttentionLaunch launch{};
  launch.places_from = cuda::PlacesFrom::lists;
  launch.ranges = check_ranges(op, call, sink_sizes, recent_sizes);
  launch.lists =
      check_list_shapes(op, call, indices, counts, unit, segment_offsets, sink_sizes.has_value());
  const int64_t most =
      sink_sizes || segment_offsets ? call.shape.capacity : launch.lists.width * unit;
  if (!segment_offsets || call.empty()) return run(op, launch, call, in, device, most);
  Lists& lists = launch.lists;
  const int64_t all = call.B * lists.tokens * lists.heads;
  Tensor slots = torch::stable::new_empty(*indices, {all, most});
  Tensor num_slots = torch::stable::new_empty(*indices, {all});
  const cuda::SegmentsLaunch segments{
      lists.indices,
      lists.counts,
      static_cast<const int32_t*>(segment_offsets->const_data_ptr()),
      call.B,
      lists.tokens,
      lists.heads,
      lists.width,
      segment_offsets->size(2) - 1,
      most,
      static_cast<int32_t*>(slots.mutable_data_ptr()),
      static_cast<int32_t*>(num_slots.mutable_data_ptr())};
  check_launch(op, cuda::expand_segments(segments, device.stream()));
  lists.indices = segments.slots;
  lists.counts = segments.num_slots;
  lists.width = most;
  return run(op, launch, call, in, device, most);
}

std::tuple<Tensor, Tensor> merge_attention_cuda(Tensor out_a, Tensor lse_a, Tensor out_b,
                                                Tensor lse_b) {
  const char* op = "merge_attention";
  check_merge_args(out_a, lse_a, out_b, lse_b);
  const OnDevice device(op, out_a, {{"lse_a", &lse_a}, {"out_b", &out_b}, {"lse_b", &lse_b}});
  Tensor out = torch::stable::new_empty(out_a, out_a.sizes());
  Tensor lse = torch::stable::new_empty(lse_a, lse_a.sizes());
  check_launch(op, cuda::merge_attention(
                       dtype_of(out_a.scalar_type()), out_a.const_data_ptr(),
                       static_cast<const float*>(lse_a.const_data_ptr()), out_b.const_data_ptr(),
                       static_cast<const float*>(lse_b.const_data_ptr()), out.mutable_data_ptr(),
                       static_cast<float*>(lse.mutable_data_ptr()), lse.numel(), out_a.size(3),
                       device.stream()));
  return {out, lse};
}

}  // namespace branchwise

BW_CUDA_LIBRARY(m) {
  m.impl("tree_attention", TORCH_BOX(&branchwise::tree_attention_cuda));
  m.impl("cascade_attention", TORCH_BOX(&branchwise::cascade_attention_cuda));
  m.impl("path_attention", TORCH_BOX(&branchwise::path_attention_cuda));
  m.impl("sparse_attention", TORCH_BOX(&branchwise::sparse_attention_cuda));
  m.impl("merge_attention", TORCH_BOX(&branchwise::merge_attention_cuda));
}
