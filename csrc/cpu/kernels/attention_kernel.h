// Attention over a KV cache for the new tokens of a batch, on pointers and sizes: what the binding
// (cpu/attention.cpp) asks of a kernel level, and what every level provides.
//
// The G*T query rows that share a KV head are packed; row r of a head is query head (r % G) of
// token (r / G). Two forms of the inner kernel:
//   many rows: rows are the lanes of vector registers, so a key or value element is read once,
//     broadcast, and used by all of them, without transposes or horizontal sums;
//   few rows (at most half the lanes): the head dim is in the lanes, dot products;
//   rows of one vector in between: scores as the former, values as the latter.
// On a level with tile registers, many rows of bf16 (five and more) are computed in those instead
// (many_rows_amx-inl.h). Products are fp32, or pairs of bf16 where the level has the instruction
// (product-inl.h).
//
// Work is cut into units = (batch row, KV head, block of packed rows, split of the KV places). A
// unit leaves its unnormalised result in the workspace; whoever finishes the last split of a block
// merges all of them in ascending order. Cuts depend on shapes and the row's own length only, so
// results do not depend on threads or batch.
#pragma once
#include <cstdint>

#include "common/attention_args.h"

namespace branchwise {

// Where the partial result of one row of a unit lies, among those of all its rows: out [rows][ld] |
// max [rows] | sum [rows].
struct RowPartial {
  float* partial;
  int64_t rows, row;
  float* out(int64_t ld) const { return partial + row * ld; }
  float& top(int64_t ld) const { return partial[rows * ld + row]; }
  float& sum(int64_t ld) const { return partial[rows * ld + rows + row]; }
};

// One unit of work and where its partial result lives.
struct AttentionUnit {
  int32_t batch, kv_head;
  int32_t row_begin, row_end;    // packed rows of this block
  int64_t slot_begin, slot_end;  // places of this split
  float* partial;                // partial_floats(rows, D) floats
  const Places* places;
  const AttentionUnit* following;  // likely this thread's next, or nullptr
  // A unit that several batch rows share: packed rows row_begin to row_end - 1 of each, one batch
  // row after the other, `batch` the first of them. Then places[b - batch] are those of row b, and
  // all see the unit's slots in the same pages.
  const int32_t* batches;  // ascending; nullptr: `batch` alone
  int32_t num_batches;
  // A unit of a path: its nodes, root first. They are the places behind the prefix, and packed rows
  // count along them, too. nullptr: nodes in the order of their slots.
  const int32_t* path = nullptr;
  const RowPartial* begun = nullptr;  // of each row, what the result goes on from; nullptr: nothing

  [[gnu::always_inline]] int64_t rows() const {
    return int64_t{row_end - row_begin} * (batches != nullptr ? num_batches : 1);
  }
};

// What a shared unit computed for one batch row: its place among the unit's.
struct SharedPiece {
  int32_t unit, place;
};

// Packed rows of one path. For each of `stretches` stretches of the prefix, shared units have been
// run: `blocks` of `block_rows` packed rows each, in the order of tokens. Its own units come next
// in order, without a place for their results; the first of them goes on from one more stretch if
// `continues`.
struct PathRows {
  const AttentionUnit* shared;
  int64_t stretches, blocks, block_rows;
  AttentionUnit* own;
  int64_t num_own;
  bool continues;
};

constexpr int64_t kKeyTile = 64;       // slots handled together; their scores stay in L1
constexpr int64_t kMaxRowBlock = 384;  // packed rows per unit
constexpr int64_t kRowPad = 16;        // packed rows are padded to this many on every level
constexpr int64_t kPathRows = 192;     // packed rows of a path per unit

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
inline int64_t padded_rows(int64_t rows) { return round_up(rows, kRowPad); }
// Floats between the rows of a few-rows partial result: whole chunks of the head dim.
inline int64_t few_rows_stride(int64_t D) { return round_up(D, 2 * kRowPad); }
// Floats that hold a unit's partial result: out, maxima, sums.
inline int64_t partial_floats(int64_t rows, int64_t D) {
  return (few_rows_stride(D) + 2) * padded_rows(rows);
}
// Floats that hold the scores of a tile for rows that are handled together.
constexpr int64_t kScoreFloats = kKeyTile * 4 * kRowPad;
// Floats that hold its packed queries, and all that a thread needs beside the result.
inline int64_t query_floats(int64_t rows, int64_t D) {
  return round_up(D, kRowPad) * padded_rows(rows);
}
inline int64_t scratch_floats(int64_t rows, int64_t D) {
  return query_floats(rows, D) + kScoreFloats +
         2 * kKeyTile * round_up(D, kRowPad)  // keys and values as the products read them
         + 8 * padded_rows(rows);             // per-row bounds and bit words
}

// merge_attention on [n] rows of D values.
struct MergeArgs {
  const void *out_a, *out_b;
  const float *lse_a, *lse_b;
  void* out;
  float* lse;
  DType type;
  int64_t D;
};

// Floats that a thread needs for a shared unit.
inline int64_t shared_scratch_floats(int64_t rows, int64_t D) {
  return scratch_floats(rows, D) + partial_floats(rows, D);
}

// Floats that a thread needs for rows of a path and their own units.
inline int64_t path_scratch_floats(int64_t rows, int64_t D, int64_t num_own) {
  return shared_scratch_floats(rows, D) + num_own * partial_floats(rows, D);
}

struct AttentionKernels {
  // Leaves the unit's partial result; scratch has scratch_floats(rows, D) floats.
  void (*run_unit)(const AttentionArgs&, const AttentionUnit&, float* scratch);
  // Merges `count` partial results of one row block, in order, into out and lse.
  void (*merge_units)(const AttentionArgs&, const AttentionUnit* first, int64_t count);
  void (*merge_pair)(const MergeArgs&, int64_t begin, int64_t end);
  // The same for shared units. What a row gets depends neither on the other rows of its units nor
  // on their number. Partial results lie row after row.
  void (*run_shared)(const AttentionArgs&, const AttentionUnit&, float* scratch);
  // Merges what units[pieces[i].unit] hold of a batch row, in order.
  void (*merge_shared)(const AttentionArgs&, int64_t batch, const AttentionUnit* units,
                       const SharedPiece* pieces, int64_t count);
  // Runs the units that these rows have to themselves as shared ones, and merges all of theirs.
  void (*run_path)(const AttentionArgs&, const PathRows&, float* scratch);
};

namespace baseline {
extern const AttentionKernels attention_kernels;
}
namespace avx2 {
extern const AttentionKernels attention_kernels;
}
namespace avx512 {
extern const AttentionKernels attention_kernels;
}
namespace avx512_bf16 {
extern const AttentionKernels attention_kernels;
}
namespace amx_bf16 {
extern const AttentionKernels attention_kernels;  // of bf16 with a head dim of 32, 64, 96, ...
}

}  // namespace branchwise
