// Slots of a cache on the device.
#pragma once

#include "cuda/device.cuh"
#include "cuda/kernels/kv.cuh"

namespace branchwise::cuda {

__device__ inline int64_t length_of(const Lengths& lens, int64_t b, int64_t h) {
  return lens.data[b * lens.row_stride + h * lens.head_stride];
}

// The address of a slot, or null where the cache has none.
__device__ inline char* slot_at(const CacheRef& cache, int64_t b, int64_t h, int64_t slot) {
  if (slot < 0 || slot >= cache.capacity) return nullptr;
  const KvLayout& layout = cache.layout;
  if (layout.page_table != nullptr) {
    const int64_t at = b * layout.table_stride + h * layout.table_head_stride;
    const int32_t page = layout.page_table[at + slot / layout.page_size];
    if (page < 0 || page >= cache.pages) return nullptr;
  }
  return static_cast<char*>(cache.data) + layout.offset(b, h, slot) * cache.element_bytes;
}

struct alignas(16) Bytes16 {
  uint32_t words[4];
};

inline bool on_16_bytes(const CacheRef& cache) {
  const KvLayout& l = cache.layout;
  const int64_t n = 16 / cache.element_bytes;
  return reinterpret_cast<uintptr_t>(cache.data) % 16 == 0 && cache.D % n == 0 &&
         l.stride_outer % n == 0 && l.stride_head % n == 0 && l.stride_slot % n == 0;
}

}  // namespace branchwise::cuda
