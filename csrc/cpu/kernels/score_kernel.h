// Scores of keys against queries, reduced over query rows, without values: what score_pages and
// attention_mass ask of a kernel level; and summaries of keys. On pointers and sizes.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "common/kv_layout.h"
#include "common/summary.h"
#include "cpu/kernels/attention_kernel.h"

namespace branchwise {

struct ScoreArgs {
  const void* query;    // [B, Hq, T, D], last dimension contiguous
  int64_t q_stride[3];  // elements, for B, Hq, T
  const void* keys;
  KvLayout layout;
  DType type;      // of both
  bool e4m3_keys;  // of the query alone, keys are in e4m3
  int64_t Hq, Hkv, T, D;
  float scale, softcap;  // softcap 0: none
  const float* lse;      // [B, Hq, T]: scores are probabilities; nullptr: they are logits
  const float* weights;  // [B, T] factors of the query rows, or nullptr
  bool take_max;         // of the rows, else their sum
};

// Rows that are reduced together, against keys [begin, end). Row r is query head
// r % heads + head_begin of the KV head's group, of token token_begin + r / heads.
struct ScoreUnit {
  int32_t batch, kv_head;
  int32_t token_begin, tokens;
  int32_t head_begin, heads;
  int64_t begin, end;
  int64_t new_slot;  // token t sees keys up to new_slot + t; kSeesAll: every key
  float* out;        // score of key i in out[i - begin]; or lse of token t of head h at h * T + t
};
constexpr int64_t kSeesAll = INT64_MAX / 2;

// Floats that a unit of so many rows needs: packed queries, scores and converted keys of a tile,
// and per row two of a log-sum-exp and four of what a lane knows of its row.
inline int64_t score_scratch(int64_t rows, int64_t D) {
  return query_floats(rows, D) + kKeyTile * 3 * kRowPad + kKeyTile * D + 6 * padded_rows(rows);
}

struct ScoreKernels {
  void (*reduce_rows)(const ScoreArgs&, const ScoreUnit&, float* scratch);
  // Log-sum-exp of the logits of every row over the unit's keys.
  void (*row_lse)(const ScoreArgs&, const ScoreUnit&, float* scratch);
  // min_max: out[2 D], the largest and then the smallest value of every column; mean: out[D]. Of
  // the rows' type, or e4m3.
  void (*summarise)(DType, const void* const* rows, int64_t count, int64_t D, Summary, bool to_e4m3,
                    void* out);
};

namespace baseline {
extern const ScoreKernels score_kernels;
}
namespace avx2 {
extern const ScoreKernels score_kernels;
}
namespace avx512 {
extern const ScoreKernels score_kernels;
}
namespace avx512_bf16 {
extern const ScoreKernels score_kernels;
}
namespace amx_bf16 {  // of bf16 queries, D a multiple of 32
extern const ScoreKernels score_kernels;
}

}  // namespace branchwise
