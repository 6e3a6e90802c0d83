// Where a slot of a row lives: contiguous caches [B, Hkv, S, D], paged ones [pages, Hkv, page_size,
// D] behind a page table i32[B, N], or ones with pages of their own for every head, [pages, 1,
// page_size, D] behind i32[B, Hkv, N]. Torch-free.
#pragma once
#include <cstdint>

#include "common/device.h"

namespace branchwise {

struct KvLayout {
  int64_t stride_outer;  // elements between batch rows, or between pages
  int64_t stride_head;
  int64_t stride_slot;
  const int32_t* page_table;  // nullptr: contiguous
  int64_t table_stride;       // elements between rows of the page table
  int64_t table_head_stride;  // 0: the heads of a row share its pages
  int64_t page_size;

  BW_INLINE int64_t offset(int64_t row, int64_t head, int64_t slot) const {
    if (page_table == nullptr) return row * stride_outer + head * stride_head + slot * stride_slot;
    const uint32_t size = static_cast<uint32_t>(page_size), at = static_cast<uint32_t>(slot);
    const int64_t page = page_table[row * table_stride + head * table_head_stride + at / size];
    return page * stride_outer + head * stride_head + (at % size) * stride_slot;
  }
};

}  // namespace branchwise
