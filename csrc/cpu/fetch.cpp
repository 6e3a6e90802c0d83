// fetch_slots: keeps the pages that lists name at hand, copied from a slower store.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "common/kv_args.h"

namespace branchwise {
namespace {

constexpr int32_t kFree = -1;
constexpr size_t kAhead = 8;  // pages that are on their way while one is copied

// A page whose copy may be stale at the next call: its slots can still change.
int32_t scratch(int64_t page) { return static_cast<int32_t>(-2 - page); }

// One row and head: which pages of the source it wants, as bits.
struct Wanted {
  std::vector<uint64_t> bits;
  int32_t count = 0;

  void reset(int64_t pages) {
    bits.assign((pages + 63) / 64, 0);
    count = 0;
  }
  bool has(int64_t page) const { return bits[page / 64] >> (page % 64) & 1; }
  void add(int64_t page) {
    count += !has(page);
    bits[page / 64] |= uint64_t{1} << (page % 64);
  }
  void remove(int64_t page) { bits[page / 64] &= ~(uint64_t{1} << (page % 64)); }
};

struct Fetch {
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

  void collect(int64_t b, int64_t h, Wanted& wanted) const {
    wanted.reset(pages);
    const int64_t complete = tail_begin(b, h);
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t list = (b * tokens + t) * heads + (heads == 1 ? 0 : h);
      for (int32_t j = 0; j < counts[list]; ++j) {
        const int64_t page = indices[list * width + j] * unit / page_size;
        if (page < complete) wanted.add(page);
      }
    }
  }
};

// What a call may not do, whatever fits: lists outside the source, pages that are not there.
void check_lists(const char* op, const Fetch& f, const CacheShape& source) {
  const int64_t per_row = f.tokens * f.heads;
  for (int64_t i = 0; i < f.B * per_row; ++i) {
    const int64_t b = i / per_row;
    BW_CHECK(f.counts[i] >= 0 && f.counts[i] <= f.width, op, ": counts of row ", b, ", list ",
             i % per_row, " = ", f.counts[i],
             " must lie between 0 and indices.size(-1) = ", f.width);
    for (int32_t j = 0; j < f.counts[i]; ++j) {
      const int64_t slot = f.indices[i * f.width + j] * f.unit;
      BW_CHECK(slot >= 0 && slot < source.capacity, op, ": indices of row ", b, ", list ",
               i % per_row, " hold ", f.indices[i * f.width + j], ", which is not a unit of the ",
               source.capacity, " slots of key_source");
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

// Keys or values: where they are and where they go.
struct Side {
  const char* source;
  KvLayout layout;
  char* cache;
  int64_t row_bytes, element_bytes;
};

// Brings the pages of one row and head in; returns how many were copied.
int32_t move_pages(const Fetch& f, const Side (&sides)[2], int64_t b, int64_t h, Wanted& wanted) {
  const int64_t at = b * f.Hkv + h;
  int32_t* table = f.table + at * f.table_pages;
  int32_t* owner = f.owners + at * f.slots;
  for (int64_t c = 0; c < f.slots; ++c) {
    if (owner[c] == kFree) continue;
    const int64_t page = owner[c] >= 0 ? owner[c] : -2 - owner[c];
    if (owner[c] >= 0 && page < f.pages && wanted.has(page)) {
      wanted.remove(page);
    } else {
      table[page] = -1;
      owner[c] = kFree;
    }
  }
  int32_t copied = 0;
  int64_t c = 0;
  const auto source_of = [&](const Side& side, int64_t slot) {
    return side.source + side.layout.offset(b, h, slot) * side.element_bytes;
  };
  const auto copy = [&](int64_t page, int64_t end_slot) {
    while (owner[c] != kFree) ++c;
    table[page] = static_cast<int32_t>(at * f.slots + c);
    for (const Side& side : sides) {
      char* to = side.cache + table[page] * f.page_size * side.row_bytes;
      for (int64_t slot = page * f.page_size; slot < end_slot; ++slot, to += side.row_bytes)
        std::memcpy(to, source_of(side, slot), side.row_bytes);
    }
    ++copied;
  };
  std::vector<int32_t> load;
  for (size_t w = 0; w < wanted.bits.size(); ++w)
    for (uint64_t rest = wanted.bits[w]; rest != 0; rest &= rest - 1)
      load.push_back(static_cast<int32_t>(w * 64 + __builtin_ctzll(rest)));
  for (size_t i = 0; i < load.size(); ++i) {
    // Pages of a token or two are over before the hardware has seen where it goes.
    if (i + kAhead < load.size())
      for (const Side& side : sides) {
        const char* next = source_of(side, load[i + kAhead] * f.page_size);
        for (int64_t line = 0; line < std::min<int64_t>(side.row_bytes, 512); line += 64)
          __builtin_prefetch(next + line);
      }
    copy(load[i], (load[i] + 1) * f.page_size);
    owner[c] = load[i];
  }
  const int64_t end_slot = f.lens.at(b, h) + f.T;
  for (int64_t page = f.tail_begin(b, h); page < f.tail_end(b, h); ++page) {
    copy(page, std::min((page + 1) * f.page_size, end_slot));
    owner[c] = scratch(page);
  }
  return copied;
}

}  // namespace

std::tuple<Tensor, Tensor> fetch_slots(Tensor key_source, Tensor value_source,
                                       std::optional<Tensor> source_table, Tensor indices,
                                       Tensor counts, int64_t unit, Tensor seq_lens,
                                       int64_t new_tokens, Tensor key_cache, Tensor value_cache,
                                       Tensor page_table, Tensor owners) {
  const char* op = "fetch_slots";
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

  Fetch f{};
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
  check_lists(op, f, shape);

  // Nothing moves before every list has passed, and every page has its place.
  Tensor needed = torch::stable::new_empty(owners, {f.B, f.Hkv});
  Tensor copied = torch::stable::new_empty(owners, {f.B, f.Hkv});
  int32_t* need = static_cast<int32_t*>(needed.mutable_data_ptr());
  int32_t* copies = static_cast<int32_t*>(copied.mutable_data_ptr());
  const KvLayout key_layout = layout_of(key_source, source_table);
  const KvLayout value_layout = layout_of(value_source, source_table);
  std::vector<Wanted> all(f.B * f.Hkv);
  bool fits = true;
  for (int64_t b = 0; b < f.B; ++b)
    for (int64_t h = 0; h < f.Hkv; ++h) {
      Wanted& wanted = all[b * f.Hkv + h];
      f.collect(b, h, wanted);
      const int64_t first = f.tail_begin(b, h), end = f.tail_end(b, h);
      BW_CHECK(end <= f.table_pages, op, ": page_table has ", f.table_pages,
               " pages per head; row ", b, " needs ", end);
      for (int64_t page = 0; page < first; ++page)
        if (wanted.has(page))
          check_pages(op, key_layout, shape, b, h, page * f.page_size, (page + 1) * f.page_size);
      check_pages(op, key_layout, shape, b, h, first * f.page_size, f.lens.at(b, h) + f.T);
      need[b * f.Hkv + h] = static_cast<int32_t>(wanted.count + end - first);
      copies[b * f.Hkv + h] = 0;
      fits &= need[b * f.Hkv + h] <= f.slots;
    }
  if (!fits) return {needed, copied};
  const int64_t bytes = key_source.scalar_type() == ScalarType::Float ? 4 : 2;
  const Side sides[] = {
      {static_cast<const char*>(key_source.const_data_ptr()), key_layout,
       static_cast<char*>(key_cache.mutable_data_ptr()), shape.D * bytes, bytes},
      {static_cast<const char*>(value_source.const_data_ptr()), value_layout,
       static_cast<char*>(value_cache.mutable_data_ptr()), value_shape.D * bytes, bytes}};
  for (int64_t b = 0; b < f.B; ++b)
    for (int64_t h = 0; h < f.Hkv; ++h)
      copies[b * f.Hkv + h] = move_pages(f, sides, b, h, all[b * f.Hkv + h]);
  return {needed, copied};
}

}  // namespace branchwise

STABLE_TORCH_LIBRARY_IMPL(branchwise, CPU, m) {
  m.impl("fetch_slots", TORCH_BOX(&branchwise::fetch_slots));
}
