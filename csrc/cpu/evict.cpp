// evict_kv and rerotate_keys: moving and turning what a cache holds, in place.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/score_call.h"
#include "cpu/isa.h"
#include "cpu/kernels/rope_kernel.h"

namespace branchwise {

void evict_kv(Tensor key_cache, Tensor value_cache, Tensor keep, Tensor counts,
              std::optional<Tensor> page_table) {
  const char* op = "evict_kv";
  const CacheShape shape = check_evict(op, key_cache, value_cache, keep, counts, page_table);
  const int64_t B = keep.size(0), Hs = keep.size(1), K = keep.size(2);
  const int32_t* lists = static_cast<const int32_t*>(keep.const_data_ptr());
  const int32_t* sizes = static_cast<const int32_t*>(counts.const_data_ptr());
  const KvLayout layouts[] = {layout_of(key_cache, page_table), layout_of(value_cache, page_table)};
  for (int64_t i = 0; i < B * Hs; ++i) {
    BW_CHECK(sizes[i] >= 0 && sizes[i] <= K, op, ": counts[", i / Hs, ", ", i % Hs,
             "] = ", sizes[i], " must lie between 0 and keep.size(2) = ", K);
    const int32_t* list = lists + i * K;
    for (int32_t j = 0; j < sizes[i]; ++j)
      BW_CHECK(list[j] >= (j ? list[j - 1] + 1 : 0) && list[j] < shape.capacity, op, ": keep[",
               i / Hs, ", ", i % Hs, ", ", j, "] = ", list[j], " must be a slot below ",
               shape.capacity, ", ascending along the list");
    for (int64_t h = Hs == 1 ? 0 : i % Hs; h < (Hs == 1 ? shape.Hkv : i % Hs + 1); ++h) {
      check_pages(op, layouts[0], shape, i / Hs, h, 0, sizes[i]);
      for (int32_t j = 0; j < sizes[i]; ++j)
        check_pages(op, layouts[0], shape, i / Hs, h, list[j], list[j] + 1);
    }
  }
  const int64_t bytes = key_cache.scalar_type() == ScalarType::Float ? 4 : 2;
  const Tensor* caches[] = {&key_cache, &value_cache};
  torch::stable::parallel_for(0, B * shape.Hkv, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / shape.Hkv, h = i % shape.Hkv, at = Hs == 1 ? b : i;
      const int32_t* list = lists + at * K;
      for (int c = 0; c < 2; ++c) {
        char* data = static_cast<char*>(caches[c]->mutable_data_ptr());
        const size_t row_bytes = caches[c]->size(3) * bytes;
        for (int32_t j = 0; j < sizes[at]; ++j)  // ascending: the source is never before the target
          if (list[j] != j)
            std::memcpy(data + layouts[c].offset(b, h, j) * bytes,
                        data + layouts[c].offset(b, h, list[j]) * bytes, row_bytes);
      }
    }
  });
}

void rerotate_keys(Tensor key_cache, Tensor begin, Tensor end, Tensor shift, Tensor inv_freq,
                   std::optional<Tensor> page_table) {
  const char* op = "rerotate_keys";
  const auto [shape, from, to] =
      check_rerotate(op, key_cache, begin, end, shift, inv_freq, page_table);
  const int64_t B = shift.size(0), half = inv_freq.size(0);
  const KvLayout layout = layout_of(key_cache, page_table);

  const RopeArgs rope{dtype_of(key_cache.scalar_type()), DType::f32, shape.D, 2 * half};
  const RopeKernels& kernels = BW_KERNELS(rope_kernels);
  const int64_t bytes = bytes_of(rope.type);
  char* data = static_cast<char*>(key_cache.mutable_data_ptr());
  const int64_t* shifts = static_cast<const int64_t*>(shift.const_data_ptr());
  const float* frequencies = static_cast<const float*>(inv_freq.const_data_ptr());
  std::vector<float> cos(2 * half), sin(2 * half);
  std::vector<char> row(shape.D * bytes);
  for (int64_t b = 0; b < B; ++b) {
    if (shifts[b] == 0) continue;
    for (int64_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(frequencies[i]) * static_cast<double>(shifts[b]);
      cos[i] = cos[half + i] = static_cast<float>(std::cos(angle));
      sin[i] = sin[half + i] = static_cast<float>(std::sin(angle));
    }
    for (int64_t h = 0; h < shape.Hkv; ++h)
      for (int64_t slot = from.at(b, h); slot < to.at(b, h); ++slot) {
        char* key = data + layout.offset(b, h, slot) * bytes;
        std::memcpy(row.data(), key, row.size());
        kernels.rotate_row(rope, row.data(), cos.data(), sin.data(), key);
      }
  }
}

}  // namespace branchwise

STABLE_TORCH_LIBRARY_IMPL(branchwise, CPU, m) {
  m.impl("evict_kv", TORCH_BOX(&branchwise::evict_kv));
  m.impl("rerotate_keys", TORCH_BOX(&branchwise::rerotate_keys));
}
