// invariant_linear: products of rows with a weight matrix, in units of a block of its rows and a
// number of rows of x.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/empty.h"
#include "cpu/isa.h"
#include "cpu/kernels/linear_kernel.h"
#include "cpu/workers.h"

namespace branchwise {
namespace {

const LinearKernels& kernels_for(DType type) {
#if defined(__x86_64__)
  if (type == DType::bf16 && current_isa() == Isa::amx_bf16) return amx_bf16::linear_amx_kernels;
#endif
  return BW_KERNELS(linear_kernels);
}

}  // namespace

Tensor invariant_linear(Tensor x, Tensor weight, std::optional<Tensor> bias) {
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
  const Tensor rows = x.is_contiguous() ? x : torch::stable::contiguous(x);
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < x.dim(); ++d) shape.push_back(x.size(d));
  shape.back() = N;
  Tensor out = empty_of(shape, x.scalar_type());
  const int64_t M = x.numel() / K;
  const LinearArgs args{dtype_of(x.scalar_type()),
                        rows.const_data_ptr(),
                        weight.const_data_ptr(),
                        bias ? bias->const_data_ptr() : nullptr,
                        out.mutable_data_ptr(),
                        M,
                        N,
                        K,
                        weight.stride(0)};
  if (M == 0 || N == 0) return out;
  const LinearKernels& k = kernels_for(args.type);
  const int64_t blocks = (M + k.row_block - 1) / k.row_block;
  const int64_t columns = (N + k.column_block - 1) / k.column_block;
  const int64_t per_unit = kLinearChunk / k.row_block, chunks = (blocks + per_unit - 1) / per_unit;
  // Less work than waking the threads; so is packing a few rows.
  const bool serial = M * N * K < (1 << 18);
  float* packed = workspace_buffer.reserve(blocks * k.block_floats(args.type, K));
  run_guided(blocks, 0, serial || M < 64,
             [&](int64_t block, float*) { k.pack(args, block, packed); });
  run_guided(chunks * columns, k.scratch_floats, serial, [&](int64_t i, float* scratch) {
    const int64_t begin = i / columns * per_unit;
    k.run(args, packed, begin, std::min(blocks, begin + per_unit), i % columns, scratch);
  });
  workspace_buffer.trim();
  return out;
}

}  // namespace branchwise

STABLE_TORCH_LIBRARY_IMPL(branchwise, CPU, m) {
  m.impl("invariant_linear", TORCH_BOX(&branchwise::invariant_linear));
}
