// Selecting the largest of many by a radix search: what a block does to find where to cut.
#pragma once

#include "cuda/device.cuh"

namespace branchwise::cuda {

// Larger floats have larger keys; NaN counts as the smallest.
__device__ inline uint32_t key_of(float x) {
  if (x != x) return 0;
  x += 0.f;  // -0 equals 0
  const uint32_t bits = bits_of(x);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

constexpr int kBins = 2048;

template <int Threads>
struct SelectShared {
  int32_t bins[kBins];
  int32_t warps[2][Threads / kWarp];
  int32_t bin, left, taken;
};

// Thread by thread, how many before it in the block have the flag, and how many all have. `which`
// alternates, so that the next call need not wait for readers of this one.
template <int Threads>
__device__ int32_t count_before(SelectShared<Threads>& s, int which, bool flag, int32_t* all) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t bits = ballot(flag);
  if (lane == 0) s.warps[which][warp] = count_bits(bits);
  sync_block();
  int32_t before = count_bits(bits & ((1u << lane) - 1));
  *all = 0;
  for (int w = 0; w < Threads / kWarp; ++w) {
    if (w < warp) before += s.warps[which][w];
    *all += s.warps[which][w];
  }
  return before;
}

// From the top, the bin in which the cumulative count reaches `wanted`, and what is wanted of it.
template <int Threads>
__device__ void find_bin(SelectShared<Threads>& s, int bins, int32_t wanted) {
  if (threadIdx.x >= kWarp) return;
  const int lane = threadIdx.x, each = bins / kWarp, top = bins - 1 - lane * each;
  int32_t own = 0, before = 0;
  for (int i = 0; i < each; ++i) own += s.bins[top - i];
  for (int l = 0; l < kWarp; ++l) {
    const int32_t other = shuffle(own, l);
    if (l < lane) before += other;
  }
  if (before >= wanted || before + own < wanted) return;
  int i = 0;
  for (; before + s.bins[top - i] < wanted; ++i) before += s.bins[top - i];
  s.bin = top - i;
  s.left = wanted - before;
}

// The largest `wanted` keys are those above `least` and `ties` of the `equal` ones.
struct Cut {
  uint32_t least;
  int32_t ties, equal;
};

// For 0 < wanted < n. All threads call it together; `key` is called three times per element.
template <int Threads, typename Key>
__device__ Cut find_cut(SelectShared<Threads>& s, int64_t n, int32_t wanted, const Key& key) {
  Cut cut{0, wanted, 0};
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, bits = pass == 2 ? 10 : 11;
    const uint32_t fixed = pass == 0 ? 0 : pass == 1 ? ~0u << 21 : ~0u << 10;
    sync_block();
    for (int i = threadIdx.x; i < kBins; i += Threads) s.bins[i] = 0;
    sync_block();
    for (int64_t i = threadIdx.x; i < n; i += Threads) {
      const uint32_t k = key(i);
      if ((k & fixed) == (cut.least & fixed))
        add_atomic(&s.bins[k >> shift & ((1u << bits) - 1)], 1);
    }
    sync_block();
    find_bin(s, 1 << bits, cut.ties);
    sync_block();
    cut.least |= static_cast<uint32_t>(s.bin) << shift;
    cut.ties = s.left;
    cut.equal = s.bins[s.bin];
  }
  return cut;
}

// Calls take(i, n) for the `wanted` elements with the largest keys, of equal ones the first, in any
// order; n counts them. Elements with a key of at most `none` are passed over. Returns how many
// there were.
template <int Threads, typename Key, typename Take>
__device__ int32_t take_largest(SelectShared<Threads>& s, int64_t n, int64_t wanted, uint32_t none,
                                const Key& key, const Take& take) {
  uint32_t least = none, last_tie = 0;  // of those with the least key, by ~i
  if (wanted < n) {
    const Cut cut = find_cut(s, n, static_cast<int32_t>(wanted), key);
    if (cut.least > none) {
      least = cut.least;
      if (cut.ties < cut.equal)
        last_tie = find_cut(s, n, cut.ties, [&](int64_t i) {
                     return key(i) == least ? ~static_cast<uint32_t>(i) : 0u;
                   }).least;
    }
  }
  sync_block();
  if (threadIdx.x == 0) s.taken = 0;
  sync_block();
  for (int64_t i = threadIdx.x; i < n; i += Threads) {
    const uint32_t k = key(i);
    if (k > least || (k == least && k > none && ~static_cast<uint32_t>(i) >= last_tie))
      take(i, add_atomic(&s.taken, 1));
  }
  sync_block();
  return s.taken;
}

}  // namespace branchwise::cuda
