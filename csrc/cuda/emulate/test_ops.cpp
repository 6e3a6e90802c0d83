// What tests want to see of the CUDA library, as ops: the layout of launches, the emulator's own
// positive controls.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "cuda/emulate/faults.h"
#include "cuda/plan.h"
#include "cuda/stream.h"

namespace branchwise {

// head_dim, warps_m, warps_k, rows, blocks, most_splits, splits, shared_bytes, unit_floats
std::vector<int64_t> plan_attention_op(int64_t Hkv, int64_t G, int64_t T, int64_t D,
                                       int64_t most_places, bool per_token, bool aligned,
                                       bool eight_bits, int64_t by_stretch) {
  const cuda::AttentionPlan p =
      cuda::plan_attention({Hkv, G, T, D, most_places, per_token, aligned, eight_bits, by_stretch});
  return {p.head_dim,    p.warps_m, p.warps_k,      p.rows,       p.blocks,
          p.most_splits, p.splits,  p.shared_bytes, p.unit_floats};
}

}  // namespace branchwise

STABLE_TORCH_LIBRARY_FRAGMENT(branchwise_emulated, m) {
  m.def(
      "plan_attention(int Hkv, int G, int T, int D, int most_places, bool per_token, bool aligned, "
      "bool eight_bits=False, int by_stretch=0) -> int[]");
  m.def("run_fault(int kind, bool planted) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(branchwise_emulated, CompositeExplicitAutograd, m) {
  m.impl("plan_attention", TORCH_BOX(&branchwise::plan_attention_op));
  m.impl("run_fault", TORCH_BOX(&branchwise::cuda::run_fault));
}
