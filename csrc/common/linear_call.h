// The arguments of invariant_linear, and their checks, on any device.
#pragma once
#include <optional>
#include <vector>

#include "common/check.h"
#include "common/linear_args.h"

namespace branchwise {

// All but x and out, which the bindings make contiguous and new.
inline LinearArgs check_linear(const Tensor& x, const Tensor& weight,
                               const std::optional<Tensor>& bias) {
  const char* op = "invariant_linear";
  BW_CHECK(x.dim() >= 1, op, ": x must have shape [..., K], got a scalar");
  check_float_dtype(op, "x", x);
  check_dim(op, "weight", weight, 2, "[N, K]");
  const int64_t K = x.size(x.dim() - 1), N = weight.size(0);
  check_size(op, "weight", weight, 1, K, "x.size(-1)");
  check_dtype(op, "weight", weight, x.scalar_type());
  BW_CHECK(K > 0, op, ": x.size(-1) must be at least 1, got shape ", shape_of(x));
  check_last_contiguous(op, "weight", weight);
  if (bias) {
    check_dim(op, "bias", *bias, 1, "[N]");
    check_size(op, "bias", *bias, 0, N, "weight.size(0)");
    check_dtype(op, "bias", *bias, x.scalar_type());
    check_contiguous(op, "bias", *bias);
  }
  LinearArgs args{};
  args.type = dtype_of(x.scalar_type());
  args.weight = weight.const_data_ptr();
  args.bias = bias ? bias->const_data_ptr() : nullptr;
  args.M = x.numel() / K;
  args.N = N;
  args.K = K;
  args.weight_stride = weight.stride(0);
  return args;
}

// Shape of the result.
inline std::vector<int64_t> linear_shape(const Tensor& x, int64_t N) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < x.dim(); ++d) shape.push_back(x.size(d));
  shape.back() = N;
  return shape;
}

}  // namespace branchwise
