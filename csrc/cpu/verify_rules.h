// The acceptance rules on one row of a batch; see the Python wrappers for what each one does. Names
// in brackets are those of the card tree-verify.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/residual.h"

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

// Thrown where a rule wants the logits of a node that is not ready.
struct NotReady {
  int32_t node;
};

struct Verdict {
  std::vector<int32_t> path;  // root first
  int64_t bonus;
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

Verdict greedy(const VerifyRow& row, const VocabKernels& k);  // A
Verdict sample(const VerifyRow& row, const VocabKernels& k, SampleRule rule,
               Thresholds at);                                                       // E F J
Verdict multi_draft(const VerifyRow& row, const VocabKernels& k, bool replacement);  // B C D
Verdict traversal(const VerifyRow& row, const VocabKernels& k, bool replacement);    // G H
Verdict typical(const VerifyRow& row, const VocabKernels& k, double epsilon, double alpha);  // I
Verdict policy(const VerifyRow& row, const VocabKernels& k, const PolicyOptions& options);

// No node has two children.
void check_chain(const VerifyRow& row);

}  // namespace branchwise
