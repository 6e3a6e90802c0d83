// Attention over a KV cache: common checks, units of work, threads.
#include "cpu/attend.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/empty.h"
#include "cpu/isa.h"
#include "cpu/workers.h"

namespace branchwise {
namespace {

constexpr int64_t kMinSplit = 4 * kKeyTile;  // slots: less is not worth a merge

// What a call is cut into. Kept by its thread: a short call would notice the allocations.
struct Plan {
  std::vector<AttentionUnit> units;
  std::vector<int64_t> block_of, partial_at;    // of each unit
  std::vector<int64_t> first_unit, unfinished;  // of each block; one more first_unit ends the list

  void clear() {
    constexpr size_t kKept = 4096;
    if (units.capacity() > kKept) *this = Plan{};
    units.clear(), block_of.clear(), partial_at.clear(), first_unit.clear(), unfinished.clear();
  }
};
thread_local Plan kept_plan;

}  // namespace

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
  // The split size depends on the row's own length and the shapes only: about 32 units per row keep
  // many threads busy, and a long prompt, with blocks enough, is not split at all. A row too short
  // to be split is cut into smaller blocks where its heads alone would not keep threads busy.
  const int64_t G = Hq / Hkv;
  const int64_t large_block = per_token ? 1 : std::max<int64_t>(1, kMaxRowBlock / G);
  const int64_t quarter = (T * Hkv + 3) / 4, least = (3 * kRowPad + G - 1) / G;
  const int64_t small_block = std::min(large_block, std::max(quarter, least));
  Plan& plan = kept_plan;
  plan.clear();
  auto& [units, block_of, partial_at, first_unit, unfinished] = plan;
  int64_t floats = 0, slots_read = 0;
  const auto cut = [&](int64_t b, int64_t h, int64_t t, int64_t end_token, const Places& p,
                       int64_t lanes_of_work) {
    const int64_t last = N - T + end_token;  // nodes up to the block's end
    const int64_t slots = p.prefix + (args.tree_mask ? call.reach[b * N + last - 1] : last);
    // Only where places are slots does a window cut off the front of them.
    const bool skips = p.window > 0 && p.kept == 0 && p.sink == p.prefix;
    const int64_t low = skips ? p.prefix + (args.tree_mask ? 0 : t) - p.window + 1 : 0;
    const int64_t first = std::max<int64_t>(0, low) / kKeyTile * kKeyTile;
    const int64_t even = (slots - first) * lanes_of_work / 32 / kKeyTile * kKeyTile;
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
  for (size_t i = 0; i + 1 < first_unit.size(); ++i)
    unfinished.push_back(first_unit[i + 1] - first_unit[i]);

  const int64_t block_rows = std::min(T, large_block) * G;
  const AttentionKernels& k = kernels_for(args, block_rows);
  // A short prefix is less work than waking the threads.
  const bool serial = slots_read * D * (block_rows + 4) < (1 << 18);
  const int64_t scratch = scratch_floats(block_rows, D);
  run_guided(static_cast<int64_t>(units.size()), scratch, serial, [&](int64_t i, float* buffer) {
    k.run_unit(args, plan.units[i], buffer);
    const int64_t block = plan.block_of[i], first = plan.first_unit[block];
    const int64_t count = plan.first_unit[block + 1] - first;
    if (count == 1 || __atomic_sub_fetch(&plan.unfinished[block], 1, __ATOMIC_ACQ_REL) == 0)
      k.merge_units(args, plan.units.data() + first, count);
  });
  workspace_buffer.trim();
  return {out, lse};
}

}  // namespace branchwise
