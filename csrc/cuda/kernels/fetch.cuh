// Pages of a slower store, brought to a faster one, on device pointers: what the lists want, where
// it goes, the copies, a launch each. The source may be pinned memory of the host, which blocks
// read themselves. Returns the CUDA error code of the launches.
#pragma once
#include <cstdint>

#include "common/device.h"
#include "cuda/kernels/kv.cuh"

namespace branchwise::cuda {

struct FetchLaunch {
  CacheRef sources[2];  // keys, values
  void* caches[2];      // [B * Hkv * slots, 1, page_size, D]
  Lengths lens;
  int64_t B, Hkv, T, tokens, heads, width, unit, page_size, slots, pages, table_pages;
  const int32_t* indices;    // [B, tokens, heads, width]
  const int32_t* counts;     // [B, tokens, heads]
  int32_t* table;            // [B, Hkv, table_pages]
  int32_t* owners;           // [B, Hkv, slots]
  int32_t *needed, *copied;  // [B, Hkv]
  uint32_t* wanted;          // workspace: [B, Hkv, fetch_words(pages)] bits
  int32_t* moves;            // workspace: [B, Hkv, 2, slots], pages and the slots that they go to
};
BW_HOST_DEVICE constexpr int64_t fetch_words(int64_t pages) { return (pages + 31) / 32; }
int fetch_slots(const FetchLaunch& launch, void* stream);

// Whether kernels can read memory at this address: the device's, or pinned.
bool can_read(const void* address);

}  // namespace branchwise::cuda
