// The acceptance rules on one row of a batch; see the Python wrappers for what each one does. Names
// in brackets are those of the card tree-verify.
#pragma once
#include <cstdint>
#include <vector>

#include "common/verify_row.h"
#include "cpu/residual.h"

namespace branchwise {

// Thrown where a rule wants the logits of a node that is not ready.
struct NotReady {
  int32_t node;
};

struct Verdict {
  std::vector<int32_t> path;  // root first
  int64_t bonus;
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
