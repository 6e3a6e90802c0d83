// tree_attention, sparse_attention and merge_attention: what each row attends to.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "cpu/attend.h"
#include "cpu/empty.h"
#include "cpu/isa.h"

namespace branchwise {
namespace {

// Lists of segments become lists of slots.
struct Expanded {
  std::vector<int32_t> slots, counts;
};

void check_list(const char* op, const int32_t* list, int32_t count, int64_t width, int64_t limit,
                int64_t row, int64_t at) {
  BW_CHECK(count >= 0 && count <= width, op, ": counts of row ", row, ", list ", at, " = ", count,
           " must lie between 0 and indices.size(-1) = ", width);
  bool ascending = true;
  for (int32_t i = 1; i < count; ++i) ascending &= list[i] > list[i - 1];
  BW_CHECK(ascending, op, ": indices of row ", row, ", list ", at, " must ascend");
  BW_CHECK(count == 0 || (list[0] >= 0 && list[count - 1] < limit), op, ": indices of row ", row,
           ", list ", at, " go from ", list[0], " to ", list[count - 1],
           " and must lie between 0 and ", limit - 1, ", the last unit of its committed slots");
}

Lists check_lists(const char* op, const AttentionCall& call, const std::optional<Tensor>& indices,
                  const std::optional<Tensor>& counts, int64_t unit,
                  const std::optional<Tensor>& segments, bool has_ranges, Expanded* expanded) {
  Lists lists = check_list_shapes(op, call, indices, counts, unit, segments, has_ranges);
  if (!indices) return lists;
  const int64_t per_row = lists.tokens * lists.heads, all = call.B * per_row;
  if (!segments) {
    for (int64_t i = 0; i < all; ++i) {
      const int64_t row = i / per_row;
      const int64_t slots = call.lens.at(row, i % lists.heads);
      check_list(op, lists.indices + i * lists.width, lists.counts[i], lists.width,
                 (slots + unit - 1) / unit, row, i % per_row);
    }
    return lists;
  }
  const int64_t count = segments->size(2) - 1;
  const int32_t* all_offsets = static_cast<const int32_t*>(segments->const_data_ptr());
  std::vector<int64_t> begins;
  for (int64_t i = 0; i < all; ++i) {
    const int64_t row = i / per_row, head = i % lists.heads;
    const int32_t* list = lists.indices + i * lists.width;
    const int32_t* offsets = all_offsets + (row * lists.heads + head) * (count + 1);
    check_list(op, list, lists.counts[i], lists.width, count, row, i % per_row);
    begins.push_back(static_cast<int64_t>(expanded->slots.size()));
    for (int32_t j = 0; j < lists.counts[i]; ++j) {
      const int32_t begin = offsets[list[j]], end = offsets[list[j] + 1];
      BW_CHECK(begin >= 0 && begin <= end && end <= call.lens.at(row, head), op,
               ": segment_offsets of row ", row, ", segment ", list[j], " go from ", begin, " to ",
               end, " and must ascend between 0 and the row's ", call.lens.at(row, head), " slots");
      for (int32_t slot = begin; slot < end; ++slot) expanded->slots.push_back(slot);
    }
    expanded->counts.push_back(static_cast<int32_t>(expanded->slots.size() - begins.back()));
  }
  // One width for all lists, as a tensor would have.
  int64_t width = 1;
  for (const int32_t n : expanded->counts) width = std::max<int64_t>(width, n);
  std::vector<int32_t> padded(all * width);
  for (int64_t i = 0; i < all; ++i)
    std::copy_n(expanded->slots.begin() + begins[i], expanded->counts[i],
                padded.begin() + i * width);
  expanded->slots = std::move(padded);
  lists.indices = expanded->slots.data();
  lists.counts = expanded->counts.data();
  lists.width = width;
  return lists;
}

// Every page that a row's places lie in exists; pages of other slots may have been given back.
void check_place_pages(const char* op, const AttentionCall& call, const Places& p, int64_t row,
                       int64_t head) {
  const auto check = [&](int64_t begin, int64_t end) {
    check_pages(op, call.args.key_layout, call.shape, row, head, begin, end);
  };
  for (int64_t place = 0; place < p.prefix;) {
    const Places::Run run = p.run(place);
    const int64_t n = std::min(run.length, p.prefix - place);
    check(run.slot, run.slot + n);
    place += n;
  }
  check(p.new_slot, p.new_slot + call.args.N);
}

// Whether the page table holds nothing but pages up to slot `end`: then no place needs a look.
bool all_pages_exist(const AttentionCall& call, int64_t row, int64_t head, int64_t end) {
  const KvLayout& layout = call.args.key_layout;
  if (layout.page_table == nullptr) return true;
  const int32_t* table =
      layout.page_table + row * layout.table_stride + head * layout.table_head_stride;
  bool exist = true;
  for (int64_t n = 0; n * call.shape.page_size < end; ++n)
    exist &= static_cast<uint32_t>(table[n]) < static_cast<uint32_t>(call.shape.pages);
  return exist;
}

}  // namespace

std::tuple<Tensor, Tensor> tree_attention(Tensor query, Tensor key_cache, Tensor value_cache,
                                          Tensor seq_lens, std::optional<Tensor> tree_mask,
                                          std::optional<Tensor> page_table,
                                          std::optional<double> scale, int64_t window,
                                          std::optional<Tensor> sinks, double softcap,
                                          std::optional<Tensor> key_scale,
                                          std::optional<Tensor> value_scale) {
  const char* op = "tree_attention";
  const AttentionInputs in{query, key_cache, value_cache, seq_lens,   tree_mask, page_table,
                           scale, sinks,     softcap,     window > 0, key_scale, value_scale};
  AttentionCall call = check_attention(op, in);
  check_window(op, call, window);
  check_all_pages(op, call.args.key_layout, call.shape, call.lens, call.B, call.args.N);
  std::vector<Places> places;
  places.reserve(call.B * call.args.Hkv);
  for (int64_t b = 0; b < call.B; ++b)
    for (int64_t h = 0; h < call.args.Hkv; ++h)
      places.push_back(dense_places(call.lens.at(b, h), window));
  return run_attention(call, places, false);
}

std::tuple<Tensor, Tensor> sparse_attention(
    Tensor query, Tensor key_cache, Tensor value_cache, Tensor seq_lens,
    std::optional<Tensor> indices, std::optional<Tensor> counts, int64_t unit,
    std::optional<Tensor> segment_offsets, std::optional<Tensor> sink_sizes,
    std::optional<Tensor> recent_sizes, std::optional<Tensor> tree_mask,
    std::optional<Tensor> page_table, std::optional<double> scale, std::optional<Tensor> sinks,
    double softcap, std::optional<Tensor> key_scale, std::optional<Tensor> value_scale) {
  const char* op = "sparse_attention";
  const AttentionInputs in{query,      key_cache,  value_cache, seq_lens, tree_mask,
                           page_table, scale,      sinks,       softcap,  recent_sizes.has_value(),
                           key_scale,  value_scale};
  AttentionCall call = check_attention(op, in);
  const Ranges ranges = check_ranges(op, call, sink_sizes, recent_sizes);
  Expanded expanded;
  const Lists lists = check_lists(op, call, indices, counts, unit, segment_offsets,
                                  sink_sizes.has_value(), &expanded);
  const bool per_token = indices && indices->dim() == 4;
  const int64_t tokens = per_token ? call.args.T : 1;
  std::vector<Places> places;
  places.reserve(call.B * tokens * call.args.Hkv);
  std::vector<bool> complete(call.args.Hkv);
  for (int64_t b = 0; b < call.B; ++b)
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t h = 0; h < call.args.Hkv; ++h) {
        const int64_t at = (b * tokens + t) * lists.heads + (lists.heads > 1 ? h : 0);
        places.push_back(sparse_places(
            call.lens.at(b, h), indices ? lists.indices + at * lists.width : nullptr,
            indices ? lists.counts[at] : 0, lists.unit, ranges.sink ? ranges.sink + h : nullptr,
            ranges.recent ? ranges.recent + h : nullptr,
            [](const int32_t* list, int32_t n, int32_t x) {
              return static_cast<int32_t>(std::lower_bound(list, list + n, x) - list);
            }));
        if (t == 0) complete[h] = all_pages_exist(call, b, h, call.lens.at(b, h) + call.args.N);
        if (!complete[h]) check_place_pages(op, call, places.back(), b, h);
      }
  return run_attention(call, places, per_token);
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
  m.impl("sparse_attention", TORCH_BOX(&branchwise::sparse_attention));
  m.impl("merge_attention", TORCH_BOX(&branchwise::merge_attention));
}
