// path_attention: every node's keys in the order of its text, so that its bits are those it would
// have if its path had been appended token by token.
//
// A row's slots are cut into stretches at fixed places, and those into tiles, wherever the prefix
// ends. Whole tiles of the prefix are the same for all nodes, and are computed for all of
// them. What is left of the prefix and a node's own path behind it are gathered per path from the
// root to a leaf, and computed for those of its nodes that no other path has had, going on from
// where the shared part ended. As in cascade_attention, the many-rows kernel treats every row in a
// lane of its own.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/attend.h"
#include "cpu/empty.h"
#include "cpu/isa.h"
#include "cpu/workers.h"

namespace branchwise {
namespace {

// Where the stretch ends that a slot is in: short ones at first, to keep threads busy.
int64_t stretch_end(int64_t slot) {
  const int64_t size = slot < 16 * kKeyTile ? 4 * kKeyTile : 16 * kKeyTile;
  return (slot / size + 1) * size;
}

constexpr int64_t kSharedRows = 6 * kRowPad;  // packed rows per shared unit: two groups

// Nodes nodes[begin] to nodes[begin + length - 1] of a list, root first; those from `first` on are
// computed.
struct Path {
  int64_t begin, first, length;
};

// Whether `row` sees just those nodes that `of` sees and that come before node `end`.
bool is_start(const int64_t* row, const int64_t* of, int64_t end, int64_t W) {
  for (int64_t w = 0; w < W; ++w) {
    const int64_t bits = std::clamp<int64_t>(end - w * 64, 0, 64);
    const uint64_t low = bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
    if (static_cast<uint64_t>(row[w]) != (static_cast<uint64_t>(of[w]) & low)) return false;
  }
  return true;
}

// Appends the paths of one batch row's query nodes, each of which is computed in one of them.
void find_paths(const char* op, const AttentionArgs& a, int64_t b, std::vector<int32_t>& nodes,
                std::vector<Path>& paths) {
  const int64_t N = a.N, queries = N - a.T;
  if (a.tree_mask == nullptr) {
    paths.push_back({static_cast<int64_t>(nodes.size()), queries, N});
    for (int64_t i = 0; i < N; ++i) nodes.push_back(static_cast<int32_t>(i));
    return;
  }
  const int64_t* mask = a.tree_mask + b * N * a.W;
  std::vector<bool> computed(N);
  for (int64_t leaf = N - 1; leaf >= queries; --leaf) {
    if (computed[leaf]) continue;
    const int64_t* row = mask + leaf * a.W;
    Path path{static_cast<int64_t>(nodes.size()), 0, 0};
    for (int64_t w = 0; w < a.W; ++w)
      for (uint64_t bits = static_cast<uint64_t>(row[w]); bits != 0; bits &= bits - 1)
        nodes.push_back(static_cast<int32_t>(w * 64 + __builtin_ctzll(bits)));
    BW_CHECK(nodes.back() == leaf, op, ": tree_mask[", b, ", ", leaf, "] has bit ", nodes.back(),
             " set; a path ends in its own node");
    path.first = path.length = static_cast<int64_t>(nodes.size()) - path.begin;
    while (path.first > 0) {
      const int64_t node = nodes[path.begin + path.first - 1];
      if (node < queries || computed[node] || !is_start(mask + node * a.W, row, node + 1, a.W))
        break;
      computed[node] = true;
      --path.first;
    }
    paths.push_back(path);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> path_attention(Tensor query, Tensor key_cache, Tensor value_cache,
                                          Tensor seq_lens, std::optional<Tensor> tree_mask,
                                          std::optional<Tensor> page_table,
                                          std::optional<double> scale, int64_t window,
                                          std::optional<Tensor> sinks, double softcap,
                                          std::optional<Tensor> key_scale,
                                          std::optional<Tensor> value_scale) {
  const char* op = "path_attention";
  const AttentionInputs in{query, key_cache, value_cache, seq_lens,   tree_mask, page_table,
                           scale, sinks,     softcap,     window > 0, key_scale, value_scale};
  AttentionCall call = check_attention(op, in);
  check_window(op, call, window);
  AttentionArgs& args = call.args;
  check_all_pages(op, args.key_layout, call.shape, call.lens, call.B, args.N);
  const int64_t B = call.B, Hq = args.Hq, Hkv = args.Hkv, T = args.T, D = args.D, G = Hq / Hkv;
  std::vector<int32_t> nodes, batches;
  std::vector<Path> paths;
  std::vector<int64_t> first_path;
  for (int64_t b = 0; b < B && T > 0; ++b) {
    batches.push_back(static_cast<int32_t>(b));
    first_path.push_back(static_cast<int64_t>(paths.size()));
    find_paths(op, args, b, nodes, paths);
  }
  first_path.push_back(static_cast<int64_t>(paths.size()));
  Tensor out = empty<4>({B, Hq, T, D}, query.scalar_type());
  Tensor lse = empty<3>({B, Hq, T}, ScalarType::Float);
  if (call.empty()) return {out, lse};
  args.out = out.mutable_data_ptr();
  args.lse = static_cast<float*>(lse.mutable_data_ptr());

  std::vector<Places> places;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < Hkv; ++h) places.push_back(dense_places(call.lens.at(b, h), window));
  std::vector<AttentionUnit> shared, own;
  std::vector<PathRows> blocks;
  std::vector<int64_t> first_shared, first_own;  // of each block
  int64_t slots_read = 0, most_own = 0;
  const auto add = [&](std::vector<AttentionUnit>& units, int64_t b, int64_t h, int64_t row_begin,
                       int64_t row_end, int64_t begin, int64_t end, const int32_t* path) {
    units.push_back({static_cast<int32_t>(b), static_cast<int32_t>(h),
                     static_cast<int32_t>(row_begin), static_cast<int32_t>(row_end), begin, end,
                     nullptr, &places[b * Hkv + h], nullptr, &batches[b], 1, path});
    slots_read += (end - begin) * (row_end - row_begin);
  };
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < Hkv; ++h) {
      // Up to the last whole tile, from the first stretch that a window leaves something of. Blocks
      // of a prompt are work enough for all threads, and share nothing.
      const int64_t length = call.lens.at(b, h), rows = T * G;
      const int64_t low = window > 0 ? std::max<int64_t>(0, length - window + 1) : 0;
      int64_t start = 0;
      while (stretch_end(start) <= low) start = stretch_end(start);
      const bool prompt = first_path[b + 1] - first_path[b] == 1 && rows >= 4 * kPathRows;
      const int64_t common = prompt ? start : length / kKeyTile * kKeyTile;
      const int64_t first = static_cast<int64_t>(shared.size());
      int64_t stretches = 0;
      bool continues = false;
      for (int64_t begin = start, end; begin < common; begin = end) {
        end = stretch_end(begin);
        continues = end > common;
        stretches += !continues;
        for (int64_t row = 0; row < rows; row += kSharedRows)
          add(shared, b, h, row, std::min(rows, row + kSharedRows), begin, std::min(end, common),
              nullptr);
      }
      for (int64_t i = first_path[b]; i < first_path[b + 1]; ++i)
        for (int64_t row = paths[i].first * G; row < paths[i].length * G; row += kPathRows) {
          const int64_t row_end = std::min(row + kPathRows, paths[i].length * G);
          const int64_t end = length + (row_end - 1) / G + 1;
          first_shared.push_back(first);
          first_own.push_back(static_cast<int64_t>(own.size()));
          int64_t at = common;
          if (prompt && window > 0)  // what it hides from all of these tokens
            while (stretch_end(at) <= length + row / G - window + 1) at = stretch_end(at);
          for (; at < end; at = stretch_end(at))
            add(own, b, h, row, row_end, at, std::min(stretch_end(at), end),
                nodes.data() + paths[i].begin);
          blocks.push_back({nullptr, stretches, (rows + kSharedRows - 1) / kSharedRows, kSharedRows,
                            nullptr, static_cast<int64_t>(own.size()) - first_own.back(),
                            continues});
          most_own = std::max(most_own, blocks.back().num_own);
        }
    }
  int64_t floats = 0;
  for (const AttentionUnit& u : shared) floats += partial_floats(u.rows(), D);
  float* partial = workspace_buffer.reserve(floats);
  for (AttentionUnit& u : shared) {
    u.partial = partial;
    partial += partial_floats(u.rows(), D);
  }
  for (auto* units : {&shared, &own})
    for (size_t i = 0; i + 1 < units->size(); ++i) (*units)[i].following = &(*units)[i + 1];
  for (size_t i = 0; i < blocks.size(); ++i) {
    blocks[i].shared = shared.data() + first_shared[i];
    blocks[i].own = own.data() + first_own[i];
  }

  const AttentionKernels& k = many_rows_kernels(args);
  const bool serial = slots_read * D < (1 << 18);
  run_guided(static_cast<int64_t>(shared.size()),
             shared_scratch_floats(std::min(T * G, kSharedRows), D), serial,
             [&](int64_t i, float* buffer) { k.run_shared(args, shared[i], buffer); });
  run_guided(static_cast<int64_t>(blocks.size()),
             path_scratch_floats(std::min(T * G, kPathRows), D, most_own), serial,
             [&](int64_t i, float* buffer) { k.run_path(args, blocks[i], buffer); });
  workspace_buffer.trim();
  return {out, lse};
}

}  // namespace branchwise

STABLE_TORCH_LIBRARY_IMPL(branchwise, CPU, m) {
  m.impl("path_attention", TORCH_BOX(&branchwise::path_attention));
}
