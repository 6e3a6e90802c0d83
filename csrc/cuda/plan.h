// How attention is laid out over a GPU: kernel, blocks, splits, shared memory. Host arithmetic from
// shapes alone, never from values or the batch size: so a launch fits a CUDA graph, and a row's
// result does not depend on the other rows. Torch-free.
#pragma once
#include <cstdint>

#include "common/device.h"

namespace branchwise::cuda {

// Of shared memory, that a block can have on every device from sm_80 on.
constexpr int64_t kMostSharedBytes = 160 * 1024;
constexpr int kTile = 64;  // places that a block handles together

struct AttentionPlan {
  int head_dim;          // the kernel's, at least D; 0: the plain kernel, a warp per row
  int warps_m, warps_k;  // of the matrix kernel: over rows and over the places of a tile
  int rows;              // packed rows of a block, 16 warps_m at most
  bool eight_bits;       // the kernel of caches in e4m3
  int64_t blocks;        // per KV head
  int64_t most_splits;   // of a row's places, however many it has
  int64_t splits;        // that a row of this cache can have: the grid
  int shared_bytes;      // of the matrix kernel
  int64_t unit_floats;   // that a split leaves for the merge

  int threads() const { return 32 * warps_m * warps_k; }
};

// What a plan depends on.
struct AttentionShape {
  int64_t Hkv, G, T, D;
  int64_t most_places;  // that a row can have, with its nodes
  bool per_token;       // lists of places per token
  bool aligned;         // 16-bit elements, all rows on 16 bytes
  bool eight_bits;      // caches in e4m3; aligned: of bf16 queries only
  int64_t by_stretch;   // path_attention: most stretches that a block's rows touch; 0: even splits
};

// Elements between the rows of a tile in shared memory: whole bank rows of 128 bytes.
BW_HOST_DEVICE constexpr int row_pitch(int head_dim) { return (head_dim + 63) / 64 * 64; }
// Tiles in shared memory, of keys and of values each: enough bytes under way to cover the latency,
// few enough for two blocks on an SM of Hopper.
BW_HOST_DEVICE constexpr int stage_count(int head_dim) {
  return head_dim <= 64 ? 4 : head_dim <= 128 ? 3 : 2;
}
// What a block knows of its rows and places (BlockView), besides.
constexpr int kBlockViewBytes = 3840;
// Of caches in e4m3, tiles arrive as they are, and one of each is unpacked at a time.
BW_HOST_DEVICE constexpr int shared_bytes(int head_dim, int rows, bool eight_bits = false) {
  const int tiles = 2 * kTile * row_pitch(head_dim) * 2, stages = stage_count(head_dim);
  const int arriving = eight_bits ? stages * 2 * kTile * head_dim + tiles : stages * tiles;
  return rows * row_pitch(head_dim) * 2 + arriving + kBlockViewBytes;
}

// A row's places [first, end), cut into `count` splits of whole tiles, `most` of them at most.
struct Splits {
  int64_t size, count;
};
constexpr int64_t kLeastTiles = 4;  // of a split: less is not worth a merge
BW_HOST_DEVICE inline Splits cut_places(int64_t first, int64_t end, int64_t most) {
  const int64_t tiles = (end - first + kTile - 1) / kTile;
  int64_t each = (tiles + most - 1) / most;
  if (each < kLeastTiles) each = kLeastTiles;
  const int64_t count = (tiles + each - 1) / each;
  return {each * kTile, count > 1 ? count : 1};
}

// path_attention cuts at fixed places instead, wherever a row begins or ends: into stretches, short
// ones at first, to keep the chip busy.
constexpr int64_t kShortStretch = 4 * kTile, kLongStretch = 16 * kTile, kShortStretches = 16;
BW_HOST_DEVICE inline int64_t stretch_of(int64_t place) {
  const int64_t rest = place - kShortStretches * kShortStretch;
  return rest < 0 ? place / kShortStretch : kShortStretches + rest / kLongStretch;
}
BW_HOST_DEVICE inline int64_t stretch_begin(int64_t stretch) {
  const int64_t rest = stretch - kShortStretches;
  return rest < 0 ? stretch * kShortStretch : kShortStretches * kShortStretch + rest * kLongStretch;
}
// How many of them so many places can touch.
BW_HOST_DEVICE inline int64_t most_stretches(int64_t places) {
  return (places + kShortStretch - 2) / kShortStretch + 1;
}

AttentionPlan plan_attention(const AttentionShape& shape);

}  // namespace branchwise::cuda
