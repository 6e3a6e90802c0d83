// append_kv and commit_kv: the two writers of a KV cache.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <vector>

#include "common/kv_call.h"
#include "cpu/isa.h"
#include "cpu/kernels/rope_kernel.h"

namespace branchwise {

void append_kv(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor seq_lens,
               std::optional<Tensor> page_table, std::optional<Tensor> cos,
               std::optional<Tensor> sin, std::optional<Tensor> key_scale,
               std::optional<Tensor> value_scale) {
  const char* op = "append_kv";
  const AppendCall call = check_append(op, key, value, key_cache, value_cache, seq_lens, page_table,
                                       cos, sin, key_scale, value_scale);
  const RowLens& lens = call.lens;
  const RopeArgs& rope = call.rope;
  const int64_t B = key.size(0), Hkv = key.size(1), T = key.size(2);
  const Tensor* from[] = {&key, &value};
  const Tensor* to[] = {&key_cache, &value_cache};
  const RopeKernels& kernels = BW_KERNELS(rope_kernels);
  // Address of the angles of token t of row b.
  const auto angles_at = [&](const Tensor& a, int64_t b, int64_t t) {
    const int64_t at = (a.size(0) == 1 ? 0 : b * a.stride(0)) + t * a.stride(1);
    return static_cast<const char*>(a.const_data_ptr()) + at * a.element_size();
  };

  const int64_t bytes = key.element_size(), cache_bytes = key_cache.element_size();
  for (int i = 0; i < 2; ++i) {
    const bool rotated = i == 0 && cos.has_value();
    const float* scale = i == 0 ? call.scales.key : call.scales.value;
    const int64_t D = from[i]->size(3);
    const KvLayout layout = layout_of(*to[i], page_table);
    const char* source = static_cast<const char*>(from[i]->const_data_ptr());
    char* target = static_cast<char*>(to[i]->mutable_data_ptr());
    const int64_t s0 = from[i]->stride(0), s1 = from[i]->stride(1), s2 = from[i]->stride(2);
    const int64_t row_bytes = D * bytes;
    // A long prompt is worth the threads, a few tokens are not.
    const int64_t grain = std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(1, T * row_bytes));
    torch::stable::parallel_for(0, B * Hkv, grain, [&](int64_t begin, int64_t end) {
      std::vector<char> turned(scale != nullptr ? row_bytes : 0);
      for (int64_t bh = begin; bh < end; ++bh) {
        const int64_t b = bh / Hkv, h = bh % Hkv;
        for (int64_t t = 0; t < T; ++t) {
          char* to = target + layout.offset(b, h, lens.at(b, h) + t) * cache_bytes;
          const char* row = source + (b * s0 + h * s1 + t * s2) * bytes;
          if (rotated) {
            char* whole = scale != nullptr ? turned.data() : to;
            kernels.rotate_row(rope, row, angles_at(*cos, b, t), angles_at(*sin, b, t), whole);
            row = whole;
          }
          if (scale != nullptr)
            kernels.quantise_row(rope.type, row, D, scale[h], to);
          else if (!rotated)
            std::memcpy(to, row, row_bytes);
        }
      }
    });
  }
}

Tensor commit_kv(std::vector<Tensor> caches, Tensor accepted, Tensor num_accepted, Tensor seq_lens,
                 std::optional<Tensor> page_table) {
  const char* op = "commit_kv";
  const CommitCall call = check_commit(op, caches, accepted, num_accepted, seq_lens, page_table);
  const RowLens& lens = call.lens;
  const int64_t B = accepted.size(0), A = accepted.size(1), heads = call.heads;
  const int32_t* path = static_cast<const int32_t*>(accepted.const_data_ptr());
  const int32_t* count = static_cast<const int32_t*>(num_accepted.const_data_ptr());

  for (const Tensor& cache : caches) {
    const KvLayout layout = layout_of(cache, page_table);
    const int64_t bytes = cache.element_size(), row_bytes = cache.size(3) * bytes;
    const int64_t Hkv = layout.table_head_stride ? page_table->size(1) : cache.size(1);
    char* data = static_cast<char*>(cache.mutable_data_ptr());
    for (int64_t b = 0; b < B; ++b)
      for (int32_t j = 0; j < count[b]; ++j) {
        const int32_t node = path[b * A + j];
        if (node == j) continue;  // ascending: the source is never behind the target
        for (int64_t h = 0; h < Hkv; ++h)
          std::memcpy(data + layout.offset(b, h, lens.at(b, h) + j) * bytes,
                      data + layout.offset(b, h, lens.at(b, h) + node) * bytes, row_bytes);
      }
  }
  Tensor after = torch::stable::new_empty(seq_lens, seq_lens.sizes());
  int32_t* out = static_cast<int32_t*>(after.mutable_data_ptr());
  for (int64_t i = 0; i < B * heads; ++i) out[i] = lens.data[i] + count[i / heads];
  return after;
}

}  // namespace branchwise

STABLE_TORCH_LIBRARY_IMPL(branchwise, CPU, m) {
  m.impl("append_kv", TORCH_BOX(&branchwise::append_kv));
  m.impl("commit_kv", TORCH_BOX(&branchwise::commit_kv));
}
