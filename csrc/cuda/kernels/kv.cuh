// The writers of a KV cache on device pointers; all return the CUDA error code of their launch.
// What lengths, paths and pages place outside a cache is left out.
#pragma once
#include <cstdint>

#include "common/kv_layout.h"
#include "common/rope_args.h"

namespace branchwise::cuda {

// Committed slots per row, or per row and head (common/kv_args.h).
struct Lengths {
  const int32_t* data;
  int64_t row_stride, head_stride;
};

struct CacheRef {
  void* data;
  KvLayout layout;
  int64_t D, element_bytes, capacity, pages;
};

// Keys and values of the T new tokens of B rows; cos, sin null: keys are not rotated.
struct AppendLaunch {
  const void* from[2];
  int64_t stride[2][3];  // elements, for B, Hkv, T
  CacheRef to[2];
  Lengths lens;
  int64_t B, Hkv, T;
  RopeArgs rope;
  const void *cos, *sin;
  int64_t cos_stride[2], sin_stride[2];  // elements, for B (0: shared), T
  const float* scale[2];                 // [Hkv], of caches in e4m3; null: of the dtype of `from`
};
int append_kv(const AppendLaunch& launch, void* stream);

// Moves the accepted nodes of every row behind its committed slots, in up to kCommitCaches caches
// at once, and writes the new lengths, if asked for.
constexpr int kCommitCaches = 24;
struct CommitLaunch {
  CacheRef caches[kCommitCaches];
  int64_t Hkv[kCommitCaches];
  int32_t num_caches;
  const int32_t* accepted;      // [B, A]
  const int32_t* num_accepted;  // [B]
  Lengths lens;
  int64_t B, A, heads;
  int32_t* after;  // [B, heads], or null
};
int commit_kv(const CommitLaunch& launch, void* stream);

// parents [B, T] -> mask [B, T, W], positions [B, T], links [B, T] each.
int build_tree(const int32_t* parents, const int32_t* seq_lens, int64_t* mask, int64_t* positions,
               int32_t* next_token, int32_t* next_sibling, int64_t B, int64_t T, void* stream);

}  // namespace branchwise::cuda
