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

// launch: but for what is common to both ops.
std::tuple<Tensor, Tensor> run(const char* op, cuda::AttentionLaunch launch,
                               const AttentionCall& call, const AttentionInputs& in,
                               const OnDevice& device, int64_t most_prefix) {
  AttentionArgs& a = launch.args = call.args;
  Tensor out = torch::stable::new_empty(in.query, {call.B, a.Hq, a.T, a.D});
  Tensor lse = torch::stable::new_empty(in.query, {call.B, a.Hq, a.T}, ScalarType::Float);
  if (call.empty()) return {out, lse};
  BW_CHECK(call.B <= 65535, op, ": at most 65535 rows, got ", call.B);
  a.out = out.mutable_data_ptr();
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  launch.seq_lens = call.lens.data;
  launch.lens_row_stride = call.lens.row_stride;
  launch.lens_head_stride = call.lens.head_stride;
  launch.B = call.B;
  launch.capacity = call.shape.capacity;
  launch.pages = call.shape.pages;

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
  const cuda::AttentionPlan plan = cuda::plan_attention(shape);
  launch.rows = plan.rows;
  launch.blocks = plan.blocks;
  launch.splits = plan.splits;
  launch.most_splits = plan.most_splits;
  launch.unit_floats = plan.unit_floats;
  const int64_t units = call.B * a.Hkv * plan.blocks * plan.splits;
  BW_CHECK(units / call.B < (int64_t{1} << 31), op, ": too many query rows, got shape ",
           shape_of(in.query));
  Tensor workspace = torch::stable::new_empty(
      in.query, {plan.splits > 1 ? units * plan.unit_floats : 0}, ScalarType::Float);
  launch.partial = static_cast<float*>(workspace.mutable_data_ptr());
  check_launch(op, cuda::attend(launch, plan, device.stream()));
  return {out, lse};
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
  const AttentionCall call = check_attention(op, in);
  check_window(op, call, window);
  cuda::AttentionLaunch launch{};
  launch.window = static_cast<int32_t>(std::min<int64_t>(window, INT32_MAX));
  return run(op, launch, call, in, device, call.shape.capacity);
}

// Rows read what they share one by one, from the L2 cache if they are lucky: their results are the
// same as those of rows alone, as cascade_attention's must be.
std::tuple<Tensor, Tensor> cascade_attention_cuda(Tensor query, Tensor key_cache,
                                                  Tensor value_cache, Tensor seq_lens,
                                                  Tensor page_table,
                                                  std::optional<Tensor> tree_mask,
                                                  std::optional<double> scale, int64_t window,
                                                  std::optional<Tensor> sinks, double softcap) {
  const char* op = "cascade_attention";
  const OnDevice device(op, query,
                        {{"key_cache", &key_cache},
                         {"value_cache", &value_cache},
                         {"seq_lens", &seq_lens},
                         {"page_table", &page_table},
                         {"tree_mask", if_given(tree_mask)},
                         {"sinks", if_given(sinks)}});
  const AttentionInputs in{query,      key_cache, value_cache, seq_lens, tree_mask,
                           page_table, scale,     sinks,       softcap,  window > 0};
  const AttentionCall call = check_cascade(op, in, window);
  cuda::AttentionLaunch launch{};
  launch.window = static_cast<int32_t>(std::min<int64_t>(window, INT32_MAX));
  return run(op, launch, call, in, device, call.shape.capacity);
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
  const AttentionCall call = check_attention(op, in);
  cuda::AttentionLaunch launch{};
  launch.sparse = true;
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
  m.impl("sparse_attention", TORCH_BOX(&branchwise::sparse_attention_cuda));
  m.impl("merge_attention", TORCH_BOX(&branchwise::merge_attention_cuda));
}
