// invariant_linear: products of rows with a weight matrix, in units of a block of its rows and a
// number of rows of x.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "common/linear_call.h"
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
  LinearArgs args = check_linear(x, weight, bias);
  const Tensor rows = x.is_contiguous() ? x : torch::stable::contiguous(x);
  Tensor out = empty_of(linear_shape(x, args.N), x.scalar_type());
  args.x = rows.const_data_ptr();
  args.out = out.mutable_data_ptr();
  const int64_t M = args.M, N = args.N, K = args.K;
  if (M == 0 || N == 0) return out;
  const LinearKernels& k = kernels_for(args.type);
  const int64_t blocks = (M + k.row_block - 1) / k.row_block;
  const int64_t columns = (N + k.column_block - 1) / k.column_block;
  const int64_t per_unit = kLinearChunk / k.row_block, chunks = (blocks + per_unit - 1) / per_unit;
  // Less work than waking the threads; so is packing a few rows. Weights may have to come from
  // memory, which takes two threads half the time from small matrices on.
  const bool serial = M * N * K < (1 << 18) && N * K * bytes_of(args.type) < (1 << 17);
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
