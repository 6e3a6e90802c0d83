// fetch_slots: keeps the pages that lists name at hand, copied from a slower store.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "common/fetch_call.h"

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

// The pages of the source that a row and head wants.
void collect(const FetchCall& f, int64_t b, int64_t h, Wanted& wanted) {
  wanted.reset(f.pages);
  const int64_t complete = f.tail_begin(b, h);
  for (int64_t t = 0; t < f.tokens; ++t) {
    const int64_t list = (b * f.tokens + t) * f.heads + (f.heads == 1 ? 0 : h);
    for (int32_t j = 0; j < f.counts[list]; ++j) {
      const int64_t page = f.indices[list * f.width + j] * f.unit / f.page_size;
      if (page < complete) wanted.add(page);
    }
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
int32_t move_pages(const FetchCall& f, const Side (&sides)[2], int64_t b, int64_t h,
                   Wanted& wanted) {
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
  const FetchCall f =
      check_fetch_slots(op, key_source, value_source, source_table, indices, counts, unit, seq_lens,
                        new_tokens, key_cache, value_cache, page_table, owners);

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
      collect(f, b, h, wanted);
      const int64_t first = f.tail_begin(b, h), end = f.tail_end(b, h);
      BW_CHECK(end <= f.table_pages, op, ": page_table has ", f.table_pages,
               " pages per head; row ", b, " needs ", end);
      for (int64_t page = 0; page < first; ++page)
        if (wanted.has(page))
          check_pages(op, key_layout, f.source, b, h, page * f.page_size, (page + 1) * f.page_size);
      check_pages(op, key_layout, f.source, b, h, first * f.page_size, f.lens.at(b, h) + f.T);
      need[b * f.Hkv + h] = static_cast<int32_t>(wanted.count + end - first);
      copies[b * f.Hkv + h] = 0;
      fits &= need[b * f.Hkv + h] <= f.slots;
    }
  if (!fits) return {needed, copied};
  const int64_t bytes = key_source.scalar_type() == ScalarType::Float ? 4 : 2;
  const Side sides[] = {
      {static_cast<const char*>(key_source.const_data_ptr()), key_layout,
       static_cast<char*>(key_cache.mutable_data_ptr()), f.source.D * bytes, bytes},
      {static_cast<const char*>(value_source.const_data_ptr()), value_layout,
       static_cast<char*>(value_cache.mutable_data_ptr()), f.value_D * bytes, bytes}};
  for (int64_t b = 0; b < f.B; ++b)
    for (int64_t h = 0; h < f.Hkv; ++h)
      copies[b * f.Hkv + h] = move_pages(f, sides, b, h, all[b * f.Hkv + h]);
  return {needed, copied};
}

}  // namespace branchwise

STABLE_TORCH_LIBRARY_IMPL(branchwise, CPU, m) {
  m.impl("fetch_slots", TORCH_BOX(&branchwise::fetch_slots));
}
