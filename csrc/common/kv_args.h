// Checks shared by the ops that read or write KV caches.
#pragma once
#include <cmath>
#include <optional>
#include <string>

#include "common/check.h"
#include "common/kv_layout.h"

namespace branchwise {

struct CacheShape {
  int64_t Hkv, D;
  int64_t capacity;  // slots a row can address
  int64_t page_size, pages;
};

// Contiguous [B, Hkv, S, D]; with page_table i32[B, N] [pages, Hkv, page_size, D]; with
// i32[B, Hkv, N], where every head has pages of its own, [pages, 1, page_size, D].
inline CacheShape check_cache(const char* op, const char* name, const Tensor& cache, int64_t B,
                              const std::optional<Tensor>& page_table) {
  check_last_contiguous(op, name, cache);
  if (!page_table) {
    check_dim(op, name, cache, 4, "[B, Hkv, S, D]");
    check_size(op, name, cache, 0, B, "B");
    return {cache.size(1), cache.size(3), cache.size(2), cache.size(2), B};
  }
  const bool per_head = page_table->dim() == 3;
  if (!per_head) check_dim(op, "page_table", *page_table, 2, "[B, N] or [B, Hkv, N]");
  check_dim(op, name, cache, 4,
            per_head ? "[pages, 1, page_size, D]" : "[pages, Hkv, page_size, D]");
  if (per_head) check_size(op, name, cache, 1, 1, "1, as every head has pages of its own,");
  check_size(op, "page_table", *page_table, 0, B, "B");
  check_dtype(op, "page_table", *page_table, ScalarType::Int);
  check_last_contiguous(op, "page_table", *page_table);
  BW_CHECK(cache.size(2) > 0, op, ": ", name, " must have a page_size of at least 1, got shape ",
           shape_of(cache));
  const int64_t N = page_table->size(page_table->dim() - 1);
  return {per_head ? page_table->size(1) : cache.size(1), cache.size(3), N * cache.size(2),
          cache.size(2), cache.size(0)};
}

// Caches of the dtype `type`, or in float8_e4m3fn with factors f32[Hkv] for keys and for values.
struct CacheScales {
  const float *key, *value;  // null: of that dtype
};
inline CacheScales check_scales(const char* op, const Tensor& key_cache, const Tensor& value_cache,
                                ScalarType type, int64_t Hkv,
                                const std::optional<Tensor>& key_scale,
                                const std::optional<Tensor>& value_scale) {
  BW_CHECK(key_scale.has_value() == value_scale.has_value(), op,
           ": key_scale and value_scale must be given together");
  const ScalarType wanted = key_scale ? ScalarType::Float8_e4m3fn : type;
  check_dtype(op, "key_cache", key_cache, wanted);
  check_dtype(op, "value_cache", value_cache, wanted);
  if (!key_scale) return {nullptr, nullptr};
  for (const auto& [name, scale] :
       {std::pair{"key_scale", &*key_scale}, {"value_scale", &*value_scale}}) {
    check_dim(op, name, *scale, 1, "[Hkv]");
    check_size(op, name, *scale, 0, Hkv, "Hkv");
    check_dtype(op, name, *scale, ScalarType::Float);
    check_contiguous(op, name, *scale);
    const float* factor = static_cast<const float*>(scale->const_data_ptr());
    for (int64_t h = 0; kChecksValues && h < Hkv; ++h)
      BW_CHECK(factor[h] > 0 && std::isfinite(factor[h]), op, ": ", name, "[", h, "] = ", factor[h],
               " must be positive and finite");
  }
  return {static_cast<const float*>(key_scale->const_data_ptr()),
          static_cast<const float*>(value_scale->const_data_ptr())};
}

inline KvLayout layout_of(const Tensor& cache, const std::optional<Tensor>& page_table) {
  KvLayout layout{cache.stride(0), cache.stride(1), cache.stride(2), nullptr, 0, 0, 1};
  if (page_table) {
    layout.page_table = static_cast<const int32_t*>(page_table->const_data_ptr());
    layout.table_stride = page_table->stride(0);
    layout.page_size = cache.size(2);
    if (page_table->dim() == 3) {
      layout.table_head_stride = page_table->stride(1);
      layout.stride_head = 0;
    }
  }
  return layout;
}

// Committed slots of every row, or of every row and KV head.
struct RowLens {
  const int32_t* data;
  int64_t row_stride, head_stride;
  int32_t at(int64_t row, int64_t head) const {
    return data[row * row_stride + head * head_stride];
  }
  int64_t heads(int64_t Hkv) const { return head_stride ? Hkv : 1; }
};

// seq_lens i32[B] or i32[B, Hkv]: every row must hold its slots and T more.
inline RowLens check_seq_lens(const char* op, const Tensor& seq_lens, int64_t B, int64_t T,
                              const CacheShape& shape, const char* name = "seq_lens") {
  const bool per_head = seq_lens.dim() == 2;
  if (!per_head) check_dim(op, name, seq_lens, 1, "[B] or [B, Hkv]");
  check_size(op, name, seq_lens, 0, B, "B");
  if (per_head) check_size(op, name, seq_lens, 1, shape.Hkv, "Hkv");
  check_dtype(op, name, seq_lens, ScalarType::Int);
  check_contiguous(op, name, seq_lens);
  const RowLens lens{static_cast<const int32_t*>(seq_lens.const_data_ptr()),
                     per_head ? shape.Hkv : 1, per_head ? 1 : 0};
  if (!kChecksValues) return lens;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < lens.heads(shape.Hkv); ++h)
      BW_CHECK(lens.at(b, h) >= 0 && lens.at(b, h) + T <= shape.capacity, op, ": ", name, "[", b,
               per_head ? ", " + std::to_string(h) : std::string(), "] = ", lens.at(b, h), " plus ",
               T, " new slots must lie between 0 and the cache's ", shape.capacity, " slots");
  return lens;
}

// The pages that hold slots [begin, end) of a row and head exist. Others may be anything.
inline void check_pages(const char* op, const KvLayout& layout, const CacheShape& shape,
                        int64_t row, int64_t head, int64_t begin, int64_t end) {
  if (!kChecksValues || layout.page_table == nullptr || begin >= end) return;
  const int32_t* table =
      layout.page_table + row * layout.table_stride + head * layout.table_head_stride;
  for (int64_t n = begin / shape.page_size; n * shape.page_size < end; ++n)
    BW_CHECK(table[n] >= 0 && table[n] < shape.pages, op, ": page_table[", row,
             layout.table_head_stride ? ", " + std::to_string(head) : std::string(), ", ", n,
             "] = ", table[n], " must lie between 0 and ", shape.pages - 1);
}

// The same for every row and head, from its first slot to T behind its last.
inline void check_all_pages(const char* op, const KvLayout& layout, const CacheShape& shape,
                            const RowLens& lens, int64_t B, int64_t T) {
  if (!kChecksValues) return;
  const bool per_head = lens.head_stride != 0 || layout.table_head_stride != 0;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < (per_head ? shape.Hkv : 1); ++h)
      check_pages(op, layout, shape, b, h, 0, lens.at(b, h) + T);
}

}  // namespace branchwise
