// The arguments of rms_norm and apply_rope, and their checks, on any device.
#pragma once
#include <cmath>

#include "common/check.h"
#include "common/layer_args.h"

namespace branchwise {

// All but x and out.
inline NormArgs check_rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset,
                               bool weight_first) {
  const char* op = "rms_norm";
  BW_CHECK(x.dim() >= 1, op, ": x must have shape [..., H], got a scalar");
  check_float_dtype(op, "x", x);
  const int64_t H = x.size(x.dim() - 1);
  BW_CHECK(H > 0, op, ": x.size(-1) must be at least 1, got shape ", shape_of(x));
  check_dim(op, "weight", weight, 1, "[H]");
  check_size(op, "weight", weight, 0, H, "x.size(-1)");
  check_dtype(op, "weight", weight, x.scalar_type());
  check_contiguous(op, "weight", weight);
  BW_CHECK(eps >= 0 && std::isfinite(eps), op, ": eps must be finite and not negative, got ", eps);
  NormArgs args{};
  args.type = dtype_of(x.scalar_type());
  args.weight = weight.const_data_ptr();
  args.M = x.numel() / H;
  args.H = H;
  args.eps = static_cast<float>(eps);
  args.offset = static_cast<float>(offset);
  args.weight_first = weight_first;
  return args;
}

// All but the results.
inline RotateArgs check_apply_rope(const Tensor& query, const Tensor& key, const Tensor& cos,
                                   const Tensor& sin) {
  const char* op = "apply_rope";
  check_dim(op, "query", query, 4, "[B, Hq, T, D]");
  check_dim(op, "key", key, 4, "[B, Hkv, T, D]");
  check_float_dtype(op, "query", query);
  RotateArgs args{};
  args.type = dtype_of(query.scalar_type());
  args.B = query.size(0), args.T = query.size(2), args.D = query.size(3);
  BW_CHECK(args.D % 2 == 0, op, ": query.size(3) must be even, got shape ", shape_of(query));
  for (const int64_t axis : {0, 2, 3})
    check_size(op, "key", key, axis, query.size(axis), "that of query");
  check_dtype(op, "key", key, query.scalar_type());
  int i = 0;
  for (const auto& [name, t] : {std::pair{"query", &query}, {"key", &key}}) {
    check_last_contiguous(op, name, *t);
    RotateArgs::Rows& rows = args.rows[i++];
    rows.from = t->const_data_ptr();
    rows.heads = t->size(1);
    for (int axis = 0; axis < 3; ++axis) rows.stride[axis] = t->stride(axis);
  }
  const auto angles = [&](const char* name, const Tensor& t, int64_t* stride) {
    check_dim(op, name, t, 3, "[B or 1, T, D]");
    BW_CHECK(t.size(0) == 1 || t.size(0) == args.B, op, ": ", name,
             ".size(0) must be 1 or B = ", args.B, ", got shape ", shape_of(t));
    check_size(op, name, t, 1, args.T, "T");
    check_size(op, name, t, 2, args.D, "D");
    check_dtype(op, name, t, query.scalar_type());
    check_last_contiguous(op, name, t);
    stride[0] = t.size(0) == 1 ? 0 : t.stride(0);
    stride[1] = t.stride(1);
    return t.const_data_ptr();
  };
  args.cos = angles("cos", cos, args.cos_stride);
  args.sin = angles("sin", sin, args.sin_stride);
  return args;
}

}  // namespace branchwise
