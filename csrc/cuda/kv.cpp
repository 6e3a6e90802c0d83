// CUDA binding of append_kv, commit_kv and build_tree.
#include "cuda/kernels/kv.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "common/kv_call.h"
#include "common/tree_call.h"
#include "cuda/cache_ref.h"
#include "cuda/stream.h"

namespace branchwise {
void append_kv_cuda(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor seq_lens,
                    std::optional<Tensor> page_table, std::optional<Tensor> cos,
                    std::optional<Tensor> sin, std::optional<Tensor> key_scale,
                    std::optional<Tensor> value_scale) {
  const char* op = "append_kv";
  const OnDevice device(op, key,
                        {{"value", &value},
                         {"key_cache", &key_cache},
                         {"value_cache", &value_cache},
                         {"seq_lens", &seq_lens},
                         {"page_table", if_given(page_table)},
                         {"cos", if_given(cos)},
                         {"sin", if_given(sin)},
                         {"key_scale", if_given(key_scale)},
                         {"value_scale", if_given(value_scale)}});
  const AppendCall call = check_append(op, key, value, key_cache, value_cache, seq_lens, page_table,
                                       cos, sin, key_scale, value_scale);
  cuda::AppendLaunch launch{};
  launch.B = key.size(0);
  launch.Hkv = key.size(1);
  launch.T = key.size(2);
  launch.lens = cuda::lengths_of(call.lens);
  launch.rope = call.rope;
  launch.scale[0] = call.scales.key;
  launch.scale[1] = call.scales.value;
  const Tensor* from[] = {&key, &value};
  const Tensor* to[] = {&key_cache, &value_cache};
  for (int i = 0; i < 2; ++i) {
    launch.from[i] = from[i]->const_data_ptr();
    for (int d = 0; d < 3; ++d) launch.stride[i][d] = from[i]->stride(d);
    launch.to[i] = cuda::cache_ref(op, *to[i], launch.B, page_table);
  }
  if (cos) {
    launch.cos = cos->const_data_ptr();
    launch.sin = sin->const_data_ptr();
    launch.cos_stride[0] = cos->size(0) == 1 ? 0 : cos->stride(0);
    launch.sin_stride[0] = sin->size(0) == 1 ? 0 : sin->stride(0);
    launch.cos_stride[1] = cos->stride(1);
    launch.sin_stride[1] = sin->stride(1);
  }
  check_launch(op, cuda::append_kv(launch, device.stream()));
}

Tensor commit_kv_cuda(std::vector<Tensor> caches, Tensor accepted, Tensor num_accepted,
                      Tensor seq_lens, std::optional<Tensor> page_table) {
  const char* op = "commit_kv";
  const OnDevice device(op, accepted,
                        {{"num_accepted", &num_accepted},
                         {"seq_lens", &seq_lens},
                         {"page_table", if_given(page_table)}});
  for (const Tensor& cache : caches) common_device(op, accepted, {{"caches", &cache}});
  const CommitCall call = check_commit(op, caches, accepted, num_accepted, seq_lens, page_table);
  Tensor after = torch::stable::new_empty(seq_lens, seq_lens.sizes());
  cuda::CommitLaunch launch{};
  launch.accepted = static_cast<const int32_t*>(accepted.const_data_ptr());
  launch.num_accepted = static_cast<const int32_t*>(num_accepted.const_data_ptr());
  launch.lens = cuda::lengths_of(call.lens);
  launch.B = accepted.size(0);
  launch.A = accepted.size(1);
  launch.heads = call.heads;
  launch.after = static_cast<int32_t*>(after.mutable_data_ptr());
  for (size_t first = 0; first == 0 || first < caches.size(); first += cuda::kCommitCaches) {
    const size_t count = std::min<size_t>(cuda::kCommitCaches, caches.size() - first);
    launch.num_caches = static_cast<int32_t>(count);
    for (size_t i = 0; i < count; ++i) {
      launch.caches[i] = cuda::cache_ref(op, caches[first + i], launch.B, page_table);
      launch.Hkv[i] =
          page_table && page_table->dim() == 3 ? page_table->size(1) : caches[first + i].size(1);
    }
    check_launch(op, cuda::commit_kv(launch, device.stream()));
    launch.after = nullptr;
  }
  return after;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> build_tree_cuda(Tensor parents, Tensor seq_lens) {
  const char* op = "build_tree";
  check_tree(op, parents, seq_lens);
  const OnDevice device(op, parents, {{"seq_lens", &seq_lens}});
  const int64_t B = parents.size(0), T = parents.size(1);
  Tensor mask = torch::stable::new_empty(parents, {B, T, (T + 63) / 64}, ScalarType::Long);
  Tensor positions = torch::stable::new_empty(parents, {B, T}, ScalarType::Long);
  Tensor next_token = torch::stable::new_empty(parents, {B, T});
  Tensor next_sibling = torch::stable::new_empty(parents, {B, T});
  check_launch(op, cuda::build_tree(static_cast<const int32_t*>(parents.const_data_ptr()),
                                    static_cast<const int32_t*>(seq_lens.const_data_ptr()),
                                    static_cast<int64_t*>(mask.mutable_data_ptr()),
                                    static_cast<int64_t*>(positions.mutable_data_ptr()),
                                    static_cast<int32_t*>(next_token.mutable_data_ptr()),
                                    static_cast<int32_t*>(next_sibling.mutable_data_ptr()), B, T,
                                    device.stream()));
  return {mask, positions, next_token, next_sibling};
}

}  // namespace branchwise

BW_CUDA_LIBRARY(m) {
  m.impl("append_kv", TORCH_BOX(&branchwise::append_kv_cuda));
  m.impl("commit_kv", TORCH_BOX(&branchwise::commit_kv_cuda));
  m.impl("build_tree", TORCH_BOX(&branchwise::build_tree_cuda));
}
