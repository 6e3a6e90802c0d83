// CUDA binding of invariant_linear.
#include "cuda/kernels/linear.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/linear_call.h"
#include "cuda/stream.h"

namespace branchwise {

Tensor invariant_linear_cuda(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  const char* op = "invariant_linear";
  const OnDevice device(op, x, {{"weight", &weight}, {"bias", if_given(bias)}});
  LinearArgs args = check_linear(x, weight, bias);
  Tensor out = torch::stable::new_empty(x, linear_shape(x, args.N));
  if (args.M == 0 || args.N == 0) return out;
  BW_CHECK((args.M / 16 + 1) * (args.N / 32 + 1) < (int64_t{1} << 31), op,
           ": too large a result, got ", args.M, " rows of ", args.N);
  const auto on_16_bytes = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool aligned = args.type != DType::f32 && on_16_bytes(args.weight) && args.K % 8 == 0 &&
                       args.weight_stride % 8 == 0;
  Tensor rows = x.is_contiguous() ? x : torch::stable::contiguous(x);
  // A row's bits must not depend on where it lies.
  if (aligned && !on_16_bytes(rows.const_data_ptr())) rows = torch::stable::clone(rows);
  args.x = rows.const_data_ptr();
  args.out = out.mutable_data_ptr();
  check_launch(op, cuda::linear(args, aligned, device.stream()));
  return out;
}

}  // namespace branchwise

BW_CUDA_LIBRARY(m) { m.impl("invariant_linear", TORCH_BOX(&branchwise::invariant_linear_cuda)); }
