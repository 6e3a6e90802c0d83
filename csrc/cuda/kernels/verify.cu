#include "cuda/kernels/verify-inl.cuh"
#include "cuda/kernels/verify.cuh"

namespace branchwise::cuda {

int64_t verify_shared_bytes(Rule rule, int64_t T, int64_t top_k) {
  if (rule == Rule::policy)
    return static_cast<int64_t>(sizeof(Scratch) + sizeof(PolicyShared)) + 16 * top_k;
  const int64_t frame = rule == Rule::traversal ? static_cast<int64_t>(sizeof(Frame<float>))
                        : rule == Rule::typical ? 16
                                                : 0;
  return static_cast<int64_t>(sizeof(Scratch)) + T * (static_cast<int64_t>(sizeof(Gone)) + frame);
}

int verify(const VerifyLaunch& in, void* stream) {
  if (in.B == 0) return 0;
  const int shared = static_cast<int>(
      verify_shared_bytes(in.rule, in.first.T, drawn_tokens(in.policy, in.first.V)));
  const Grid grid(static_cast<unsigned>(in.B));
  return dispatch(in.first.type, [&](auto element) {
    using Element = decltype(element);
    const auto with = [&](auto* kernel) {
      return launch(kernel, grid, kBlockThreads, shared, stream, in);
    };
    switch (family_of(in.rule)) {
      case Family::greedy:
        return with(verify_kernel<Element, Family::greedy>);
      case Family::sample:
        return with(verify_kernel<Element, Family::sample>);
      case Family::draft:
        return with(verify_kernel<Element, Family::draft>);
      case Family::traversal:
        return with(verify_kernel<Element, Family::traversal>);
      case Family::policy:
        return with(verify_kernel<Element, Family::policy>);
      default:
        return with(verify_kernel<Element, Family::typical>);
    }
  });
}

}  // namespace branchwise::cuda
