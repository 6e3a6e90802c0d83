// rms_norm and apply_rope: one op for what torch does in many.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/layer_call.h"
#include "cpu/empty.h"
#include "cpu/isa.h"
#include "cpu/kernels/layer_kernel.h"
#include "cpu/workers.h"

namespace branchwise {
namespace {

// Calls f(begin, end) on runs of rows that are worth a thread's while.
template <typename F>
void run_rows(int64_t rows, int64_t values, const F& f) {
  const int64_t run = std::max<int64_t>(1, (1 << 13) / std::max<int64_t>(1, values));
  const int64_t runs = (rows + run - 1) / run;
  run_guided(runs, 0, runs < 4,
             [&](int64_t i, float*) { f(i * run, std::min(rows, (i + 1) * run)); });
}

}  // namespace

Tensor rms_norm(Tensor x, Tensor weight, double eps, double offset, bool weight_first) {
  NormArgs args = check_rms_norm(x, weight, eps, offset, weight_first);
  const Tensor rows = x.is_contiguous() ? x : torch::stable::contiguous(x);
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < x.dim(); ++d) shape.push_back(x.size(d));
  Tensor out = empty_of(shape, x.scalar_type());
  args.x = rows.const_data_ptr();
  args.out = out.mutable_data_ptr();
  const LayerKernels& k = BW_KERNELS(layer_kernels);
  run_rows(args.M, args.H, [&](int64_t begin, int64_t end) { k.norm_rows(args, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> apply_rope(Tensor query, Tensor key, Tensor cos, Tensor sin) {
  RotateArgs args = check_apply_rope(query, key, cos, sin);
  const auto result = [&](RotateArgs::Rows& rows) {
    const int64_t H = rows.heads;
    Tensor out = empty_strided_of<std::array<int64_t, 4>>(
        {args.B, H, args.T, args.D}, {args.T * H * args.D, args.D, H * args.D, 1},
        query.scalar_type());
    rows.to = out.mutable_data_ptr();
    return out;
  };
  std::tuple<Tensor, Tensor> out{result(args.rows[0]), result(args.rows[1])};
  const LayerKernels& k = BW_KERNELS(layer_kernels);
  run_rows(args.B * args.T, (args.rows[0].heads + args.rows[1].heads) * args.D,
           [&](int64_t begin, int64_t end) { k.rotate_tokens(args, begin, end); });
  return out;
}

}  // namespace branchwise

STABLE_TORCH_LIBRARY_IMPL(branchwise, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&branchwise::rms_norm));
  m.impl("apply_rope", TORCH_BOX(&branchwise::apply_rope));
}
