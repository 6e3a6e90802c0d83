// cascade_attention: rows that share pages read them once.
//
// The slots of a row are cut into chunks at multiples of kChunk. Rows whose page tables name the
// same pages for a chunk, which lies wholly in their prefixes, are packed side by side for it; a
// chunk that holds new tokens has a unit to itself. Chunks are always cut and merged alike, and the
// many-rows kernel treats every row in a lane of its own, so a row's result does not depend on what
// it shares with whom.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <tuple>
#include <vector>

#include "cpu/attend.h"
#include "cpu/empty.h"
#include "cpu/isa.h"
#include "cpu/workers.h"

namespace branchwise {
namespace {

constexpr int64_t kChunk = kCascadeChunk;
constexpr int64_t kMaxSharedRows = 12 * kRowPad;  // packed rows per unit: more would starve threads

// Batch rows that read one chunk of slots from the same pages.
struct Group {
  int64_t chunk;
  std::vector<int32_t> rows;
};

// Groups in the order of their chunks; `visible(b, chunk)` leaves out what a window hides.
template <typename F>
std::vector<Group> group_rows(const AttentionCall& call, const F& visible) {
  const KvLayout& layout = call.args.key_layout;
  const int64_t pages = kChunk / layout.page_size, N = call.args.N;
  int64_t longest = 0;
  for (int64_t b = 0; b < call.B; ++b) longest = std::max<int64_t>(longest, call.lens.at(b, 0) + N);
  std::vector<Group> groups;
  for (int64_t chunk = 0; chunk * kChunk < longest; ++chunk) {
    const size_t first = groups.size();
    for (int64_t b = 0; b < call.B; ++b) {
      const int64_t length = call.lens.at(b, 0), end = (chunk + 1) * kChunk;
      if (chunk * kChunk >= length + N || !visible(b, chunk)) continue;
      const auto pages_of = [&](int64_t row) {
        return layout.page_table + row * layout.table_stride + chunk * pages;
      };
      size_t g = end <= length ? first : groups.size();
      while (g < groups.size() &&
             !(end <= call.lens.at(groups[g].rows[0], 0) &&
               std::equal(pages_of(b), pages_of(b) + pages, pages_of(groups[g].rows[0]))))
        ++g;
      if (g == groups.size()) groups.push_back({chunk, {}});
      groups[g].rows.push_back(static_cast<int32_t>(b));
    }
  }
  return groups;
}

}  // namespace

std::tuple<Tensor, Tensor> cascade_attention(Tensor query, Tensor key_cache, Tensor value_cache,
                                             Tensor seq_lens, Tensor page_table,
                                             std::optional<Tensor> tree_mask,
                                             std::optional<double> scale, int64_t window,
                                             std::optional<Tensor> sinks, double softcap,
                                             std::optional<Tensor> key_scale,
                                             std::optional<Tensor> value_scale) {
  const char* op = "cascade_attention";
  const AttentionInputs in{query, key_cache, value_cache, seq_lens,   tree_mask, page_table,
                           scale, sinks,     softcap,     window > 0, key_scale, value_scale};
  AttentionCall call = check_cascade(op, in, window);
  AttentionArgs& args = call.args;
  check_all_pages(op, args.key_layout, call.shape, call.lens, call.B, args.N);
  const int64_t B = call.B, Hq = args.Hq, Hkv = args.Hkv, T = args.T, N = args.N, D = args.D;
  Tensor out = empty<4>({B, Hq, T, D}, query.scalar_type());
  Tensor lse = empty<3>({B, Hq, T}, ScalarType::Float);
  if (call.empty()) return {out, lse};
  args.out = out.mutable_data_ptr();
  args.lse = static_cast<float*>(lse.mutable_data_ptr());

  std::vector<Places> places;
  int64_t chunks = 0;
  for (int64_t b = 0; b < B; ++b) {
    places.push_back(dense_places(call.lens.at(b, 0), window));
    chunks = std::max<int64_t>(chunks, (call.lens.at(b, 0) + N + kChunk - 1) / kChunk);
  }
  const std::vector<Group> groups = group_rows(call, [&](int64_t b, int64_t chunk) {
    return window == 0 || (chunk + 1) * kChunk > call.lens.at(b, 0) - window + 1;
  });

  // Blocks are (batch row, head, tokens); a unit computes one chunk for the same block of several
  // batch rows.
  const int64_t G = Hq / Hkv, tokens = std::clamp<int64_t>(kMaxSharedRows / G, 1, T);
  const int64_t blocks_of_row = (T + tokens - 1) / tokens;
  const size_t together = std::max<int64_t>(1, kMaxSharedRows / (tokens * G));
  std::vector<AttentionUnit> units;
  std::vector<int64_t> partial_at;
  std::vector<SharedPiece> pieces(B * Hkv * blocks_of_row * chunks);
  std::vector<int32_t> count(B * Hkv * blocks_of_row);
  int64_t floats = 0, slots_read = 0;
  const auto block_of = [&](int64_t b, int64_t h, int64_t t) {
    return (b * Hkv + h) * blocks_of_row + t / tokens;
  };
  for (int64_t h = 0; h < Hkv; ++h)
    for (const Group& group : groups)
      for (int64_t t = 0; t < T; t += tokens)
        for (size_t first = 0; first < group.rows.size(); first += together) {
          const size_t n = std::min(together, group.rows.size() - first);
          const int32_t b = group.rows[first];
          const int64_t end_token = std::min(T, t + tokens), last = N - T + end_token;
          const int64_t begin = group.chunk * kChunk, length = call.lens.at(b, 0);
          const int64_t seen = length + (args.tree_mask ? call.reach[b * N + last - 1] : last);
          const int64_t end = std::min(begin + kChunk, seen);
          if (end <= begin) continue;  // nodes behind all that this block sees
          for (size_t i = 0; i < n; ++i) {
            const int64_t block = block_of(group.rows[first + i], h, t);
            pieces[block * chunks + count[block]++] = {static_cast<int32_t>(units.size()),
                                                       static_cast<int32_t>(i)};
          }
          units.push_back({b, static_cast<int32_t>(h), static_cast<int32_t>(t * G),
                           static_cast<int32_t>(end_token * G), begin, end, nullptr,
                           places.data() + b, nullptr, group.rows.data() + first,
                           static_cast<int32_t>(n)});
          partial_at.push_back(floats);
          floats += partial_floats(units.back().rows(), D);
          slots_read += (end - begin) * units.back().rows();
        }
  float* workspace = workspace_buffer.reserve(floats);
  for (size_t i = 0; i < units.size(); ++i) {
    units[i].partial = workspace + partial_at[i];
    if (i + 1 < units.size()) units[i].following = &units[i + 1];
  }
  std::unique_ptr<std::atomic<int32_t>[]> unfinished(new std::atomic<int32_t>[count.size()]);
  for (size_t i = 0; i < count.size(); ++i) unfinished[i] = count[i];

  const AttentionKernels& k = many_rows_kernels(args);
  const int64_t most_rows = static_cast<int64_t>(std::min<size_t>(together, B)) * tokens * G;
  const bool serial = slots_read * D < (1 << 18);
  run_guided(static_cast<int64_t>(units.size()), shared_scratch_floats(most_rows, D), serial,
             [&](int64_t i, float* buffer) {
               const AttentionUnit& u = units[i];
               k.run_shared(args, u, buffer);
               for (int32_t j = 0; j < u.num_batches; ++j) {
                 const int64_t block = block_of(u.batches[j], u.kv_head, u.row_begin / G);
                 if (unfinished[block].fetch_sub(1) == 1)
                   k.merge_shared(args, u.batches[j], units.data(), pieces.data() + block * chunks,
                                  count[block]);
               }
             });
  workspace_buffer.trim();
  return {out, lse};
}

}  // namespace branchwise

STABLE_TORCH_LIBRARY_IMPL(branchwise, CPU, m) {
  m.impl("cascade_attention", TORCH_BOX(&branchwise::cascade_attention));
}
