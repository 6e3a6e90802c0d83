// The arguments of fetch_slots, and their checks.
#pragma once
#include <optional>
#include <utility>

#include "common/kv_args.h"

namespace branchwise {

struct FetchCall {
  CacheShape source;
  int64_t value_D;
  int64_t B, Hkv, T, tokens, heads, width, unit, page_size, slots, pages, table_pages;
  const int32_t* indices;
  const int32_t* counts;
  RowLens lens;
  int32_t* table;   // [B, Hkv, table_pages]
  int32_t* owners;  // [B, Hkv, slots]

  // Pages that new tokens are written to, and whose committed slots may lack some.
  int64_t tail_begin(int64_t b, int64_t h) const { return lens.at(b, h) / page_size; }
  int64_t tail_end(int64_t b, int64_t h) const {
    return (lens.at(b, h) + T + page_size - 1) / page_size;
  }
};

// What a call may not do, whatever fits: lists outside the source, pages that are not there.
inline void check_lists(const char* op, const FetchCall& f) {
  const int64_t per_row = f.tokens * f.heads;
  for (int64_t i = 0; i < f.B * per_row; ++i) {
    const int64_t b = i / per_row;
    BW_CHECK(f.counts[i] >= 0 && f.counts[i] <= f.width, op, ": counts of row ", b, ", list ",
             i % per_row, " = ", f.counts[i],
             " must lie between 0 and indices.size(-1) = ", f.width);
    for (int32_t j = 0; j < f.counts[i]; ++j) {
      const int64_t slot = f.indices[i * f.width + j] * f.unit;
      BW_CHECK(slot >= 0 && slot < f.source.capacity, op, ": indices of row ", b, ", list ",
               i % per_row, " hold ", f.indices[i * f.width + j], ", which is not a unit of the ",
               f.source.capacity, " slots of key_source");
    }
  }
  for (int64_t i = 0; i < f.B * f.Hkv; ++i)
    for (int64_t c = 0; c < f.slots; ++c) {
      const int64_t owner = f.owners[i * f.slots + c];
      BW_CHECK(owner < f.table_pages && -2 - owner < f.table_pages, op, ": owners[", i / f.Hkv,
               ", ", i % f.Hkv, ", ", c, "] = ", owner, " must be -1 or stand for one of the ",
               f.table_pages, " pages of page_table");
    }
}

inline FetchCall check_fetch_slots(const char* op, const Tensor& key_source,
                                   const Tensor& value_source,
                                   const std::optional<Tensor>& source_table, const Tensor& indices,
                                   const Tensor& counts, int64_t unit, const Tensor& seq_lens,
                                   int64_t new_tokens, const Tensor& key_cache,
                                   const Tensor& value_cache, const Tensor& page_table,
                                   const Tensor& owners) {
  check_float_dtype(op, "key_source", key_source);
  for (const auto& [name, t] : {std::pair{"value_source", &value_source},
                                {"key_cache", &key_cache},
                                {"value_cache", &value_cache}})
    check_dtype(op, name, *t, key_source.scalar_type());
  check_dim(op, "page_table", page_table, 3, "[B, Hkv, N]");
  check_contiguous(op, "page_table", page_table);
  check_dim(op, "owners", owners, 3, "[B, Hkv, C]");
  check_dtype(op, "owners", owners, ScalarType::Int);
  check_contiguous(op, "owners", owners);

  FetchCall f{};
  f.B = page_table.size(0);
  f.Hkv = page_table.size(1);
  f.table_pages = page_table.size(2);
  f.T = new_tokens;
  f.slots = owners.size(2);
  f.unit = unit;
  BW_CHECK(new_tokens >= 0, op, ": new_tokens must not be negative, got ", new_tokens);
  check_size(op, "owners", owners, 0, f.B, "B");
  check_size(op, "owners", owners, 1, f.Hkv, "Hkv");
  const CacheShape cache = check_cache(op, "key_cache", key_cache, f.B, page_table);
  check_cache(op, "value_cache", value_cache, f.B, page_table);
  check_contiguous(op, "key_cache", key_cache);
  check_contiguous(op, "value_cache", value_cache);
  check_size(op, "key_cache", key_cache, 0, f.B * f.Hkv * f.slots, "B Hkv C");
  for (int i = 0; i < 3; ++i)
    check_size(op, "value_cache", value_cache, i, key_cache.size(i), "that of key_cache");
  f.page_size = cache.page_size;
  BW_CHECK(unit >= 1 && f.page_size % unit == 0, op, ": unit = ", unit,
           " must divide the page size of key_cache, ", f.page_size);
  const CacheShape shape = check_cache(op, "key_source", key_source, f.B, source_table);
  const CacheShape value_shape = check_cache(op, "value_source", value_source, f.B, source_table);
  BW_CHECK(shape.Hkv == f.Hkv && value_shape.Hkv == f.Hkv &&
               value_shape.capacity == shape.capacity && value_shape.pages == shape.pages,
           op, ": key_source and value_source must have the same slots for ", f.Hkv, " heads, got ",
           shape_of(key_source), " and ", shape_of(value_source));
  check_size(op, "key_cache", key_cache, 3, shape.D, "D");
  check_size(op, "value_cache", value_cache, 3, value_shape.D, "D");
  f.lens = check_seq_lens(op, seq_lens, f.B, new_tokens, shape);
  f.pages = (shape.capacity + f.page_size - 1) / f.page_size;

  const int64_t dim = indices.dim();
  BW_CHECK(dim == 3 || dim == 4, op, ": indices must have shape [B, Hs, K] or [B, T, Hs, K], got ",
           shape_of(indices));
  check_dtype(op, "indices", indices, ScalarType::Int);
  check_contiguous(op, "indices", indices);
  check_size(op, "indices", indices, 0, f.B, "B");
  check_dtype(op, "counts", counts, ScalarType::Int);
  check_contiguous(op, "counts", counts);
  check_dim(op, "counts", counts, dim - 1, "that of indices without K");
  for (int64_t i = 0; i + 1 < dim; ++i)
    check_size(op, "counts", counts, i, indices.size(i), "that of indices");
  f.tokens = dim == 4 ? indices.size(1) : 1;
  f.heads = indices.size(dim - 2);
  f.width = indices.size(dim - 1);
  BW_CHECK(f.heads == 1 || f.heads == f.Hkv, op, ": indices.size(", dim - 2,
           ") must be 1 or Hkv = ", f.Hkv, ", got shape ", shape_of(indices));
  f.indices = static_cast<const int32_t*>(indices.const_data_ptr());
  f.counts = static_cast<const int32_t*>(counts.const_data_ptr());
  f.table = static_cast<int32_t*>(page_table.mutable_data_ptr());
  f.owners = static_cast<int32_t*>(owners.mutable_data_ptr());
  f.source = shape;
  f.value_D = value_shape.D;
  if (kChecksValues) check_lists(op, f);
  return f;
}

}  // namespace branchwise
