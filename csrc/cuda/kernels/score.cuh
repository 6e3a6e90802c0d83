// What KV policies look at, on device pointers; all return the CUDA error code of their launch.
#pragma once
#include <cstdint>

#include "cuda/kernels/kv.cuh"

namespace branchwise::cuda {

// Scores of keys against query rows, reduced over the rows of a KV head; see cpu/kernels/
// score_kernel.h. Keys [0, end) of a row and head, end = its length + `added`.
struct ScoreLaunch {
  const void* query;    // [B, Hq, T, D], or with `bound` [B, Hq, T, D / 2]
  int64_t q_stride[3];  // elements, for B, Hq, T
  CacheRef keys;
  Lengths lens;
  int64_t added;
  bool causal;  // token t sees keys up to its own, length + t
  bool bound;   // keys are largest and smallest values: the query's positive part meets the first
  DType type;
  bool e4m3_keys;  // instead of `type`, which is the query's
  int64_t B, Hq, Hkv, T;
  float scale, softcap;  // softcap 0: none
  const float* lse;      // [B, Hq, T]: scores are probabilities; null: logits
  const float* weights;  // [B, T] factors of the query rows, or null
  bool take_max;         // of the rows, else their sum
  bool per_token, per_query_head;
  float nothing;  // score of what is no key
  int64_t S;      // keys that out has room for
  float* out;     // [B, T or 1, Hq or Hkv, S]
};
int score_keys(const ScoreLaunch& launch, void* stream);
// Log-sum-exp of the logits of every query row, f32[B, Hq, T].
int row_lse(const ScoreLaunch& launch, float* lse, void* stream);

struct SummaryLaunch {
  CacheRef keys;
  DType type;
  Lengths begin, end;      // slots; with offsets, segments
  const int32_t* offsets;  // [B, Hkv, N + 1], or null: pages of page_size slots
  int64_t page_size, B, Hkv, N;
  bool min_max;  // else the mean
  void* out;     // [B, Hkv, N, 2 D or D]
  bool to_e4m3;  // out, instead of `type`
};
int page_summaries(const SummaryLaunch& launch, void* stream);

// Ascending lists of the best pages, B * L * H of them: the first num_sinks, the best of the others
// up to budget, and those behind num_scored.
struct SelectLaunch {
  const float* scores;                              // [B, L, H, N]
  const int32_t *num_pages, *num_scored, *budgets;  // [B, L], [B, L], [B, L, H]
  int64_t rows, H, N, width, num_sinks;             // rows: B * L
  int32_t* indices;                                 // [B, L, H, width]
  int32_t* counts;                                  // [B, L, H]
};
int select_pages(const SelectLaunch& launch, void* stream);

// Ascending slots of the best segments, up to `budget` of them.
struct SelectSlotsLaunch {
  const float* scores;                    // [B, L, H, S]
  const int32_t *offsets, *num_segments;  // [B, H, S + 1], [B, L]
  int64_t B, L, H, S, budget, width;
  int32_t* indices;  // [B, L, H, width]
  int32_t* counts;   // [B, L, H]
};
// Bytes of shared memory that S segments need.
constexpr int64_t select_slots_bytes(int64_t S) { return 8 * S + 16; }
int select_slots(const SelectSlotsLaunch& launch, void* stream);

// Moves kept slots to the front of both caches.
struct EvictLaunch {
  CacheRef caches[2];
  const int32_t* keep;    // [B, Hs, K]
  const int32_t* counts;  // [B, Hs]
  int64_t B, Hkv, Hs, K;
};
int evict_kv(const EvictLaunch& launch, void* stream);

struct RerotateLaunch {
  CacheRef keys;
  DType type;
  Lengths begin, end;
  const int64_t* shift;        // [B]
  const float* inv_freq;       // [half]
  int64_t B, Hkv, half, most;  // most: slots that a row can have
};
int rerotate_keys(const RerotateLaunch& launch, void* stream);

}  // namespace branchwise::cuda
