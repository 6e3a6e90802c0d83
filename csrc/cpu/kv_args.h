// Checks shared by the ops that read or write KV caches.
#pragma once
#include <optional>

#include "common/check.h"
#include "common/kv_layout.h"

namespace branchwise {

struct CacheShape {
  int64_t Hkv, D;
  int64_t capacity;  // slots a row can address
};

// Contiguous [B, Hkv, S, D], or paged [pages, Hkv, page_size, D] with page_table i32[B, N].
inline CacheShape check_cache(const char* op, const char* name, const Tensor& cache, int64_t B,
                              const std::optional<Tensor>& page_table) {
  check_last_contiguous(op, name, cache);
  if (!page_table) {
    check_dim(op, name, cache, 4, "[B, Hkv, S, D]");
    check_size(op, name, cache, 0, B, "B");
    return {cache.size(1), cache.size(3), cache.size(2)};
  }
  check_dim(op, name, cache, 4, "[pages, Hkv, page_size, D]");
  check_dim(op, "page_table", *page_table, 2, "[B, N]");
  check_size(op, "page_table", *page_table, 0, B, "B");
  check_dtype(op, "page_table", *page_table, ScalarType::Int);
  check_last_contiguous(op, "page_table", *page_table);
  BW_CHECK(cache.size(2) > 0, op, ": ", name, " must have a page_size of at least 1, got shape ",
           shape_of(cache));
  return {cache.size(1), cache.size(3), page_table->size(1) * cache.size(2)};
}

inline KvLayout layout_of(const Tensor& cache, const std::optional<Tensor>& page_table) {
  KvLayout layout{cache.stride(0), cache.stride(1), cache.stride(2), nullptr, 0, 1};
  if (page_table) {
    layout.page_table = static_cast<const int32_t*>(page_table->const_data_ptr());
    layout.table_stride = page_table->stride(0);
    layout.page_size = cache.size(2);
  }
  return layout;
}

// seq_lens i32[B]: every row must hold its P tokens and T more, and its pages must exist.
inline const int32_t* check_seq_lens(const char* op, const Tensor& seq_lens, int64_t B, int64_t T,
                                     const CacheShape& shape, int64_t pages,
                                     const std::optional<Tensor>& page_table) {
  check_dim(op, "seq_lens", seq_lens, 1, "[B]");
  check_size(op, "seq_lens", seq_lens, 0, B, "B");
  check_dtype(op, "seq_lens", seq_lens, ScalarType::Int);
  check_contiguous(op, "seq_lens", seq_lens);
  const int32_t* lens = static_cast<const int32_t*>(seq_lens.const_data_ptr());
  for (int64_t b = 0; b < B; ++b) {
    BW_CHECK(lens[b] >= 0 && lens[b] + T <= shape.capacity, op, ": seq_lens[", b, "] = ", lens[b],
             " plus ", T, " new slots must lie between 0 and the cache's ", shape.capacity,
             " slots");
    if (!page_table) continue;
    const int32_t* table =
        static_cast<const int32_t*>(page_table->const_data_ptr()) + b * page_table->stride(0);
    const int64_t page_size = shape.capacity / page_table->size(1);
    for (int64_t n = 0; n * page_size < lens[b] + T; ++n)
      BW_CHECK(table[n] >= 0 && table[n] < pages, op, ": page_table[", b, ", ", n, "] = ", table[n],
               " must lie between 0 and ", pages - 1);
  }
  return lens;
}

}  // namespace branchwise
