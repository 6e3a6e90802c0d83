// What the acceptance rules are asked for, on any device; see the Python wrappers for what each one
// does. Letters in brackets are those of the card tree-verify. Torch-free.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace branchwise {

// One row's tree, the model's verdict on it, and the noise.
struct VerifyRow {
  const char* op;
  int64_t batch, T, V;
  const int64_t* tokens;
  const int32_t *next_token, *next_sibling;
  const char* logits;  // of node 0
  int64_t node_bytes;  // between nodes
  DType type;
  float scale;            // log2(e) / temperature
  const float* uniforms;  // [T, 2]: accept, draw; null for rules without noise
  const float* draft;     // [R, V], or null
  int64_t draft_rows;
  const int32_t* draft_index;  // [T] row of draft that the children of a node were drawn from
  const bool* ready;           // [T] the logits of a node may be read; null: all
};

enum class SampleRule : int { each_child, one_coin, match };
enum class Policy : int { greedy_match, surprisal, probability_floor, typical };

// Lossy where below 1 (J).
struct Thresholds {
  double single = 1, accumulated = 1;
};
struct PolicyOptions {
  Policy policy;
  double threshold;  // surprisal in nats, least probability, or epsilon
  double alpha;      // typical
  int64_t top_k;     // probability_floor
  bool first_only;   // surprisal: what follows the first token above the threshold is not tested
};

}  // namespace branchwise
