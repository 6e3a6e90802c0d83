// CUDA bindings of rms_norm and apply_rope.
#include "cuda/kernels/layer.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/layer_call.h"
#include "cuda/stream.h"

namespace branchwise {

Tensor rms_norm_cuda(Tensor x, Tensor weight, double eps, double offset, bool weight_first) {
  const char* op = "rms_norm";
  const OnDevice device(op, x, {{"weight", &weight}});
  NormArgs args = check_rms_norm(x, weight, eps, offset, weight_first);
  BW_CHECK(args.M < (int64_t{1} << 31), op, ": too many rows, got shape ", shape_of(x));
  const Tensor rows = x.is_contiguous() ? x : torch::stable::contiguous(x);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  args.x = rows.const_data_ptr();
  args.out = out.mutable_data_ptr();
  check_launch(op, cuda::rms_norm(args, device.stream()));
  return out;
}

std::tuple<Tensor, Tensor> apply_rope_cuda(Tensor query, Tensor key, Tensor cos, Tensor sin) {
  const char* op = "apply_rope";
  const OnDevice device(op, query, {{"key", &key}, {"cos", &cos}, {"sin", &sin}});
  RotateArgs args = check_apply_rope(query, key, cos, sin);
  const auto result = [&](RotateArgs::Rows& rows) {
    Tensor out = torch::stable::new_empty(query, {args.B, args.T, rows.heads, args.D});
    rows.to = out.mutable_data_ptr();
    return torch::stable::transpose(out, 1, 2);
  };
  std::tuple<Tensor, Tensor> out{result(args.rows[0]), result(args.rows[1])};
  check_launch(op, cuda::apply_rope(args, device.stream()));
  return out;
}

}  // namespace branchwise

BW_CUDA_LIBRARY(m) {
  m.impl("rms_norm", TORCH_BOX(&branchwise::rms_norm_cuda));
  m.impl("apply_rope", TORCH_BOX(&branchwise::apply_rope_cuda));
}
