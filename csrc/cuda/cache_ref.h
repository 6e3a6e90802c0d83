// Caches and lengths as kernels take them.
#pragma once
#include <optional>

#include "common/kv_args.h"
#include "cuda/kernels/kv.cuh"

namespace branchwise::cuda {

inline Lengths lengths_of(const RowLens& lens) {
  return {lens.data, lens.row_stride, lens.head_stride};
}

inline CacheRef cache_ref(const char* op, const Tensor& cache, int64_t B,
                          const std::optional<Tensor>& page_table) {
  const CacheShape shape = check_cache(op, "cache", cache, B, page_table);
  return {cache.mutable_data_ptr(),
          layout_of(cache, page_table),
          shape.D,
          static_cast<int64_t>(cache.element_size()),
          shape.capacity,
          shape.pages};
}

}  // namespace branchwise::cuda
