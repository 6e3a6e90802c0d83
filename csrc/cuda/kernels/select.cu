// select_pages, evict_kv and rerotate_keys: what is attended to, what is kept, and where it stands.
#include "cuda/device.cuh"
#include "cuda/kernels/score.cuh"
#include "cuda/kernels/select-inl.cuh"
#include "cuda/kernels/slots-inl.cuh"

namespace branchwise::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
using Selection = SelectShared<kThreads>;

// A block per list: a radix search for the least key that is taken, then passes that take in order.
__global__ void __launch_bounds__(kThreads) select_kernel(const __grid_constant__ SelectLaunch in) {
  Selection& s = *reinterpret_cast<Selection*>(shared_memory());
  const int64_t list = blockIdx.x, row = list / in.H;
  const auto within = [](int64_t x, int64_t most) { return x < 0 ? 0 : x < most ? x : most; };
  const int64_t all = within(in.num_pages[row], in.N), scored = within(in.num_scored[row], all);
  const int64_t sinks = within(in.num_sinks, scored);
  const int64_t candidates = scored - sinks;
  const int32_t wanted = static_cast<int32_t>(within(in.budgets[list] - sinks, candidates));
  const float* scores = in.scores + list * in.N + sinks;
  int32_t* out = in.indices + list * in.width;

  const bool some = wanted > 0 && wanted < candidates;
  Cut cut{};
  if (some) cut = find_cut(s, candidates, wanted, [&](int64_t i) { return key_of(scores[i]); });

  for (int64_t i = threadIdx.x; i < sinks; i += kThreads) out[i] = static_cast<int32_t>(i);
  int64_t length = sinks;
  int32_t ties_taken = 0;
  for (int64_t begin = 0; begin < candidates && wanted > 0; begin += kThreads) {
    const int64_t i = begin + threadIdx.x;
    const uint32_t key = i < candidates ? key_of(scores[i]) : 0;
    const bool here = i < candidates, tie = some && here && key == cut.least;
    int32_t tied, taken;
    sync_block();
    const int32_t tie_rank = ties_taken + count_before(s, 0, tie, &tied);
    const bool take = here && (!some || key > cut.least || (tie && tie_rank < cut.ties));
    const int32_t before = count_before(s, 1, take, &taken);
    if (take) out[length + before] = static_cast<int32_t>(sinks + i);
    length += taken;
    ties_taken += tied;
  }
  for (int64_t i = scored + threadIdx.x; i < all; i += kThreads)
    out[length + i - scored] = static_cast<int32_t>(i);
  length += all - scored;
  for (int64_t i = length + threadIdx.x; i < in.width; i += kThreads) out[i] = -1;
  if (threadIdx.x == 0) in.counts[list] = static_cast<int32_t>(length);
}

// The sum of what the lanes before this one hold, and of all.
__device__ int64_t sum_before(int64_t own, int64_t* all) {
  int64_t before = 0;
  *all = 0;
  for (int l = 0; l < kWarp; ++l) {
    const int64_t other = shuffle(own, l);
    if (l < static_cast<int>(threadIdx.x % kWarp)) before += other;
    *all += other;
  }
  return before;
}

// A block per list: every segment's rank, then slots given out in that order, then the slots.
__global__ void __launch_bounds__(kThreads)
    select_slots_kernel(const __grid_constant__ SelectSlotsLaunch in) {
  const int64_t list = blockIdx.x, h = list % in.H, row = list / in.H, b = row / in.L;
  const int32_t count = in.num_segments[row];
  const int32_t segments = count < 0 ? 0 : count < in.S ? count : static_cast<int32_t>(in.S);
  const float* scores = in.scores + list * in.S;
  const int32_t* offsets = in.offsets + (b * in.H + h) * (in.S + 1);
  int32_t* order = reinterpret_cast<int32_t*>(shared_memory());  // by rank; later, first entry
  int32_t* taken = order + in.S;                                 // slots of each segment
  int32_t* out = in.indices + list * in.width;
  for (int32_t n = threadIdx.x; n < segments; n += kThreads) {
    const uint32_t key = key_of(scores[n]);
    int32_t rank = 0;
    for (int32_t m = 0; m < segments; ++m) {
      const uint32_t other = key_of(scores[m]);
      rank += other > key || (other == key && m < n) ? 1 : 0;
    }
    order[rank] = n;
  }
  sync_block();
  int64_t total = 0;
  if (threadIdx.x < kWarp) {
    const int lane = threadIdx.x;
    int64_t given = 0;
    for (int32_t begin = 0; begin < segments; begin += kWarp) {
      const int32_t n = begin + lane < segments ? order[begin + lane] : -1;
      const int64_t size =
          n >= 0 && scores[n] > -INFINITY ? int64_t{offsets[n + 1]} - offsets[n] : 0;
      int64_t all;
      const int64_t before = given + sum_before(size > 0 ? size : 0, &all);
      const int64_t left = in.budget - before;
      if (n >= 0) taken[n] = static_cast<int32_t>(size <= 0 || left <= 0 ? 0 : min(size, left));
      given += all;
    }
    sync_warp();
    for (int32_t begin = 0; begin < segments; begin += kWarp) {
      const int32_t n = begin + lane;
      int64_t all;
      const int64_t before = total + sum_before(n < segments ? taken[n] : 0, &all);
      if (n < segments) order[n] = static_cast<int32_t>(before);
      total += all;
    }
    if (lane == 0) in.counts[list] = static_cast<int32_t>(total);
    for (int64_t i = total + lane; i < in.width; i += kWarp) out[i] = -1;
  }
  sync_block();
  for (int32_t n = threadIdx.x / kWarp; n < segments; n += kWarps)
    for (int32_t i = threadIdx.x % kWarp; i < taken[n]; i += kWarp)
      out[order[n] + i] = offsets[n] + i;
}

// A block per cache, row and head. Slots move a few kilobytes at a time, all of them read before
// any is written; what is read later lies behind everything written so far.
template <typename Unit>
__global__ void __launch_bounds__(kThreads) evict_kernel(const __grid_constant__ EvictLaunch in) {
  constexpr int kTogether = 4;
  const int64_t heads = in.B * in.Hkv, i = blockIdx.x % heads, b = i / in.Hkv, h = i % in.Hkv;
  const CacheRef& cache = in.caches[blockIdx.x / heads];
  const int64_t list_at = b * in.Hs + (in.Hs > 1 ? h : 0);
  const int32_t* keep = in.keep + list_at * in.K;
  const int64_t count = min(int64_t{in.counts[list_at]}, in.K);
  const int64_t units = cache.D * cache.element_bytes / static_cast<int64_t>(sizeof(Unit));
  for (int64_t begin = 0; begin < count * units; begin += kThreads * kTogether) {
    Unit values[kTogether] = {};  // or the compiler keeps 16-bit ones on the stack
    Unit* targets[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int64_t at = begin + j * kThreads + threadIdx.x, to = at / units;
      targets[j] = nullptr;
      if (at >= count * units || keep[to] <= to) continue;
      const char* source = slot_at(cache, b, h, keep[to]);
      char* target = slot_at(cache, b, h, to);
      if (source == nullptr || target == nullptr) continue;
      values[j] = reinterpret_cast<const Unit*>(source)[at % units];
      targets[j] = reinterpret_cast<Unit*>(target) + at % units;
    }
    sync_block();
#pragma unroll
    for (int j = 0; j < kTogether; ++j)
      if (targets[j] != nullptr) *targets[j] = values[j];
    sync_block();
  }
}

// Blocks of a row and head, a warp per slot, angles in shared memory.
constexpr int kSlots = 64;  // per block
template <typename Element>
__global__ void __launch_bounds__(kThreads)
    rerotate_kernel(const __grid_constant__ RerotateLaunch in) {
  const int64_t chunks = (in.most + kSlots - 1) / kSlots, head = blockIdx.x / chunks;
  const int64_t h = head % in.Hkv, b = head / in.Hkv;
  const int64_t begin = length_of(in.begin, b, h) + blockIdx.x % chunks * kSlots;
  const int64_t end = min(length_of(in.end, b, h), begin + kSlots);
  if (in.shift[b] == 0 || begin >= end) return;
  float* cos_of = reinterpret_cast<float*>(shared_memory());
  float* sin_of = cos_of + in.half;
  for (int64_t i = threadIdx.x; i < in.half; i += kThreads) {
    const double angle = static_cast<double>(in.inv_freq[i]) * static_cast<double>(in.shift[b]);
    cos_of[i] = static_cast<float>(cos(angle));
    sin_of[i] = static_cast<float>(sin(angle));
  }
  sync_block();
  for (int64_t slot = begin + threadIdx.x / kWarp; slot < end; slot += kWarps) {
    auto* key = reinterpret_cast<Element*>(slot_at(in.keys, b, h, slot));
    if (key == nullptr) continue;
    for (int64_t i = threadIdx.x % kWarp; i < in.half; i += kWarp) {
      const float low = to_float(key[i]), high = to_float(key[in.half + i]);
      from_float(low * cos_of[i] - high * sin_of[i], key + i);
      from_float(high * cos_of[i] + low * sin_of[i], key + in.half + i);
    }
  }
}

}  // namespace

int select_pages(const SelectLaunch& in, void* stream) {
  if (in.rows * in.H == 0) return 0;
  return launch(select_kernel, Grid(static_cast<unsigned>(in.rows * in.H)), kThreads,
                static_cast<int>(sizeof(Selection)), stream, in);
}

int select_slots(const SelectSlotsLaunch& in, void* stream) {
  if (in.B * in.L * in.H == 0) return 0;
  return launch(select_slots_kernel, Grid(static_cast<unsigned>(in.B * in.L * in.H)), kThreads,
                static_cast<int>(select_slots_bytes(in.S)), stream, in);
}

int evict_kv(const EvictLaunch& in, void* stream) {
  const int64_t blocks = 2 * in.B * in.Hkv;
  if (blocks == 0) return 0;
  const Grid grid(static_cast<unsigned>(blocks));
  return on_16_bytes(in.caches[0]) && on_16_bytes(in.caches[1])
             ? launch(evict_kernel<Bytes16>, grid, kThreads, 0, stream, in)
             : launch(evict_kernel<uint16_t>, grid, kThreads, 0, stream, in);
}

int rerotate_keys(const RerotateLaunch& in, void* stream) {
  if (in.B * in.Hkv * in.most * in.half == 0) return 0;
  const Grid grid(static_cast<unsigned>((in.most + kSlots - 1) / kSlots * in.B * in.Hkv));
  return dispatch(in.type, [&](auto element) {
    return launch(rerotate_kernel<decltype(element)>, grid, kThreads,
                  static_cast<int>(2 * in.half * 4), stream, in);
  });
}

}  // namespace branchwise::cuda
