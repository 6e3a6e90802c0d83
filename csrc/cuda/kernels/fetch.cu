#include "cuda/device.cuh"
#include "cuda/kernels/fetch.cuh"
#include "cuda/kernels/select-inl.cuh"
#include "cuda/kernels/slots-inl.cuh"

namespace branchwise::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kCopyBlocks = 16;  // per row and head: enough reads on their way for a bus
constexpr int32_t kFree = -1;

// One row and head.
struct Head {
  const FetchLaunch& in;
  int64_t at, b, h, committed, end;
  __device__ explicit Head(const FetchLaunch& in, int64_t at)
      : in(in), at(at), b(at / in.Hkv), h(at % in.Hkv) {
    const int64_t table = in.table_pages * in.page_size, capacity = in.sources[0].capacity;
    const int64_t most = table < capacity ? table : capacity, length = length_of(in.lens, b, h);
    committed = length < 0 ? 0 : length < most ? length : most;
    end = committed + in.T < most ? committed + in.T : most;
  }
  // Pages whose slots can still change.
  __device__ int64_t tail_begin() const { return committed / in.page_size; }
  __device__ int64_t tail_end() const { return (end + in.page_size - 1) / in.page_size; }
  __device__ uint32_t* wanted() const { return in.wanted + at * fetch_words(in.pages); }
  __device__ bool wants(int64_t page) const { return wanted()[page / 32] >> (page % 32) & 1; }
  __device__ int32_t* pages() const { return in.moves + at * 2 * in.slots; }
  __device__ int32_t* targets() const { return pages() + in.slots; }
};

__global__ void __launch_bounds__(kThreads) wanted_kernel(const __grid_constant__ FetchLaunch in) {
  const Head head(in, blockIdx.x);
  auto* counts = reinterpret_cast<int32_t*>(shared_memory());
  const int64_t words = fetch_words(in.pages);
  for (int64_t w = threadIdx.x; w < words; w += kThreads) head.wanted()[w] = 0;
  sync_block();
  const int64_t complete = head.tail_begin();
  for (int64_t t = 0; t < in.tokens; ++t) {
    const int64_t list = (head.b * in.tokens + t) * in.heads + (in.heads == 1 ? 0 : head.h);
    const int64_t named = in.counts[list], count = named < in.width ? named : in.width;
    for (int64_t j = threadIdx.x; j < count; j += kThreads) {
      const int64_t slot = in.indices[list * in.width + j] * in.unit;
      if (slot < 0 || slot >= complete * in.page_size) continue;
      // In 64 bits, the compiler keeps part of the division on the stack.
      const uint32_t page = static_cast<uint32_t>(slot) / static_cast<uint32_t>(in.page_size);
      or_atomic(&head.wanted()[page / 32], 1u << (page % 32));
    }
  }
  sync_block();
  int32_t own = 0;
  for (int64_t w = threadIdx.x; w < words; w += kThreads) own += count_bits(head.wanted()[w]);
  own = warp_sum(own);
  if (threadIdx.x % kWarp == 0) counts[threadIdx.x / kWarp] = own;
  sync_block();
  if (threadIdx.x != 0) return;
  int64_t all = head.tail_end() - complete;
  for (int w = 0; w < kWarps; ++w) all += counts[w];
  in.needed[head.at] = static_cast<int32_t>(all);
}

// Gives up pages that are not listed, and places for those that are: the lowest to the lowest.
__global__ void __launch_bounds__(kThreads) place_kernel(const __grid_constant__ FetchLaunch in) {
  SelectShared<kThreads>& s = *reinterpret_cast<SelectShared<kThreads>*>(shared_memory());
  const Head head(in, blockIdx.x);
  int32_t *pages = head.pages(), *targets = head.targets();
  int32_t* table = in.table + head.at * in.table_pages;
  int32_t* owner = in.owners + head.at * in.slots;
  bool fits = true;
  for (int64_t i = threadIdx.x; i < in.B * in.Hkv; i += kThreads)
    fits = fits && in.needed[i] <= in.slots;
  int32_t too_many;
  count_before(s, 0, !fits, &too_many);
  if (threadIdx.x == 0) in.copied[head.at] = 0;
  if (too_many > 0) return;

  int32_t free_slots = 0, all;
  for (int64_t begin = 0; begin < in.slots; begin += kThreads) {
    const int64_t c = begin + threadIdx.x;
    bool is_free = c < in.slots;
    if (is_free && owner[c] != kFree) {
      const int64_t page = owner[c] >= 0 ? owner[c] : -2 - int64_t{owner[c]};
      if (owner[c] >= 0 && page < in.pages && head.wants(page)) {
        and_atomic(&head.wanted()[page / 32], ~(1u << (page % 32)));
        is_free = false;
      } else {
        if (page < in.table_pages) table[page] = -1;
        owner[c] = kFree;
      }
    }
    sync_block();
    const int32_t before = count_before(s, 0, is_free, &all);
    if (is_free) targets[free_slots + before] = static_cast<int32_t>(c);
    free_slots += all;
    sync_block();
  }
  int32_t count = 0;
  const int64_t tail = head.tail_begin();
  for (int64_t begin = 0; begin < head.tail_end(); begin += kThreads) {
    const int64_t page = begin + threadIdx.x;
    const bool moves = page < tail ? head.wants(page) : page < head.tail_end();
    sync_block();
    const int32_t before = count_before(s, 1, moves, &all);
    if (moves && count + before < free_slots) pages[count + before] = static_cast<int32_t>(page);
    count += all;
    sync_block();
  }
  count = min(count, free_slots);  // owners that name a page twice leave too few
  for (int32_t i = threadIdx.x; i < count; i += kThreads) {
    const int32_t page = pages[i], c = targets[i];
    table[page] = static_cast<int32_t>(head.at * in.slots + c);
    owner[c] = page < tail ? page : -2 - page;
  }
  if (threadIdx.x == 0) in.copied[head.at] = count;
}

template <typename Unit>
__global__ void __launch_bounds__(kThreads) copy_kernel(const __grid_constant__ FetchLaunch in) {
  constexpr int kTogether = 4;
  const Head head(in, blockIdx.x / kCopyBlocks);
  const int32_t count = in.copied[head.at];
  for (int side = 0; side < 2; ++side) {
    const CacheRef& source = in.sources[side];
    const int64_t units = source.D * source.element_bytes / static_cast<int64_t>(sizeof(Unit));
    const int64_t page_units = in.page_size * units, total = count * page_units;
    auto* cache = static_cast<Unit*>(in.caches[side]) + head.at * in.slots * page_units;
    const int64_t step = int64_t{kCopyBlocks} * kThreads;
    for (int64_t begin = blockIdx.x % kCopyBlocks * kThreads + threadIdx.x; begin < total;
         begin += kTogether * step) {
      Unit values[kTogether] = {};  // or the compiler keeps 16-bit ones on the stack
      Unit* to[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int64_t i = begin + j * step;
        to[j] = nullptr;
        if (i >= total) continue;
        const int64_t move = i / page_units, slot = i % page_units / units;
        const int64_t from = int64_t{head.pages()[move]} * in.page_size + slot;
        const char* row = from < head.end ? slot_at(source, head.b, head.h, from) : nullptr;
        if (row == nullptr) continue;
        values[j] = reinterpret_cast<const Unit*>(row)[i % units];
        to[j] = cache + head.targets()[move] * page_units + i % page_units;
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j)
        if (to[j] != nullptr) *to[j] = values[j];
    }
  }
}

}  // namespace

int fetch_slots(const FetchLaunch& in, void* stream) {
  const int64_t heads = in.B * in.Hkv;
  if (heads == 0) return 0;
  const Grid grid(static_cast<unsigned>(heads));
  int code = launch(wanted_kernel, grid, kThreads, kWarps * 4, stream, in);
  if (code != 0) return code;
  code = launch(place_kernel, grid, kThreads, static_cast<int>(sizeof(SelectShared<kThreads>)),
                stream, in);
  if (code != 0) return code;
  const bool wide = on_16_bytes(in.sources[0]) && on_16_bytes(in.sources[1]) &&
                    reinterpret_cast<uintptr_t>(in.caches[0]) % 16 == 0 &&
                    reinterpret_cast<uintptr_t>(in.caches[1]) % 16 == 0;
  const Grid blocks(static_cast<unsigned>(heads * kCopyBlocks));
  return wide ? launch(copy_kernel<Bytes16>, blocks, kThreads, 0, stream, in)
              : launch(copy_kernel<uint16_t>, blocks, kThreads, 0, stream, in);
}

bool can_read(const void* address) { return is_readable(address); }

}  // namespace branchwise::cuda
