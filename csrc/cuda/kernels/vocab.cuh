// What drafters and masked-diffusion decoders ask of rows of logits, on device pointers: a block
// per row. All return the CUDA error code of their launch.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace branchwise::cuda {

struct VocabLaunch {
  const char* logits;
  DType type;
  int64_t rows, V, row_bytes;
  const int64_t* exclude;  // [E], in any order
  int64_t E;
};

// Bytes of shared memory that `count` candidates need.
int64_t top_tokens_bytes(int64_t count);

struct TopTokensLaunch {
  VocabLaunch in;
  int64_t k;
  int32_t* tokens;   // [rows, k]
  float* log_probs;  // [rows, k]
};
int top_tokens(const TopTokensLaunch& launch, void* stream);

struct ConfidenceLaunch {
  VocabLaunch in;
  double temperature;   // 0: the likeliest token
  const int64_t* keys;  // [rows], or null
  int score;
  int64_t* tokens;  // [rows]
  float* scores;    // [rows]
};
int confidence(const ConfidenceLaunch& launch, void* stream);

}  // namespace branchwise::cuda
