#include "cuda/plan.h"

#include <algorithm>

namespace branchwise::cuda {
namespace {

// Blocks that one batch row is cut into, if it is long enough: two waves of two blocks per SM of an
// H200, so that the last ones do not leave most of the chip idle.
constexpr int64_t kBlocksPerRow = 512;
constexpr int64_t kMostSplits = 128;

}  // namespace

AttentionPlan plan_attention(const AttentionShape& shape) {
  AttentionPlan plan{};
  const int64_t rows_together = shape.per_token ? shape.G : shape.G * shape.T;
  for (const int head_dim : {64, 96, 128, 256})
    if (shape.aligned && plan.head_dim == 0 && shape.D <= head_dim) plan.head_dim = head_dim;
  if (shape.eight_bits)  // fewer instances
    plan.head_dim = !shape.aligned || shape.D > 128 ? 0 : shape.D <= 64 ? 64 : 128;
  plan.eight_bits = shape.eight_bits;
  if (plan.head_dim == 0) {
    plan.warps_m = 4;
    plan.warps_k = 1;
    plan.rows = 4;
  } else {
    // Few rows leave warps free to share out the places of a tile.
    // 64 rows of the largest head dim would not fit the shared memory of an A100.
    const bool wide = plan.head_dim > 128;
    // A row's bits must not depend on how many there are where stretches are asked for.
    const int64_t rows = shape.by_stretch > 0 ? 64 : rows_together;
    plan.warps_m = rows <= 16 ? 1 : rows <= 32 || wide ? 2 : 4;
    plan.warps_k = 4 / plan.warps_m;
    plan.rows = 16 * plan.warps_m;
    plan.shared_bytes = shared_bytes(plan.head_dim, plan.rows, plan.eight_bits);
    if (shape.by_stretch > 0)
      plan.rows = static_cast<int>(std::min<int64_t>(plan.rows, rows_together));
  }
  const int64_t of_together = (rows_together + plan.rows - 1) / plan.rows;
  plan.blocks = shape.per_token ? shape.T * of_together : of_together;
  const int64_t wanted = kBlocksPerRow / std::max<int64_t>(1, shape.Hkv * plan.blocks);
  plan.most_splits = std::clamp<int64_t>(wanted, 1, kMostSplits);
  // Not the splits of the longest row: a shorter one can have more, of fewer tiles each.
  const int64_t tiles = (shape.most_places + kTile - 1) / kTile;
  plan.splits = std::clamp<int64_t>((tiles + kLeastTiles - 1) / kLeastTiles, 1, plan.most_splits);
  if (shape.by_stretch > 0)
    plan.splits = std::min(shape.by_stretch, stretch_of(shape.most_places - 1) + 1);
  plan.unit_floats = plan.rows * (shape.D + 2);
  return plan;
}

}  // namespace branchwise::cuda
