// What the lossy policies ask of a row of logits besides its softmax: a token's rank, and a draw
// from the likeliest. All threads of a block call both together.
#pragma once

#include "cuda/kernels/residual-inl.cuh"
#include "cuda/kernels/select-inl.cuh"

namespace branchwise::cuda {

// Shared memory of a policy, which keeps no gone tokens and no frames; the likeliest tokens lie
// behind it.
struct PolicyShared {
  SelectShared<kBlockThreads> select;
  int32_t counts[kBlockWarps];
  int64_t drawn;
};

// How many tokens come before this one in the order of logits, lower ids first among equals.
template <typename Element>
__device__ int64_t rank_of(const Element* values, int64_t V, int64_t token, PolicyShared& shared) {
  const float value = to_float(values[token]);
  int32_t own = 0;
  for (int64_t i = threadIdx.x; i < V; i += kBlockThreads) {
    const float x = to_float(values[i]);
    own += x > value || (x == value && i < token) ? 1 : 0;
  }
  own = warp_sum(own);
  sync_block();
  if (threadIdx.x % kWarp == 0) shared.counts[threadIdx.x / kWarp] = own;
  sync_block();
  int64_t all = 0;
  for (int w = 0; w < kBlockWarps; ++w) all += shared.counts[w];
  return all;
}

// A token among the `count` largest logits (lower ids win ties), by their probabilities.
template <typename Element>
__device__ int64_t draw_likeliest(const Element* values, int64_t V, int64_t count, float scale,
                                  float u, PolicyShared& shared) {
  auto* candidates = reinterpret_cast<int64_t*>(&shared + 1);
  int64_t* sorted = candidates + count;  // ascending
  const int32_t found = take_largest(
      shared.select, V, count, 0, [&](int64_t i) { return key_of(to_float(values[i])); },
      [&](int64_t i, int32_t n) { candidates[n] = i; });
  for (int32_t c = threadIdx.x; c < found; c += kBlockThreads) {
    int32_t before = 0;
    for (int32_t o = 0; o < found; ++o) before += candidates[o] < candidates[c] ? 1 : 0;
    sorted[before] = candidates[c];
  }
  sync_block();
  if (threadIdx.x == 0) {
    float top = -INFINITY;
    for (int32_t c = 0; c < found; ++c) top = fmaxf(top, to_float(values[sorted[c]]));
    const auto weight = [&](int32_t c) {
      return static_cast<double>(exp2f((to_float(values[sorted[c]]) - top) * scale));
    };
    double mass = 0;
    for (int32_t c = 0; c < found; ++c) mass += weight(c);
    double rest = u * mass;
    int64_t last = sorted[0];
    for (int32_t c = 0; c < found && rest >= 0; ++c) {
      if (weight(c) == 0) continue;
      last = sorted[c];
      rest -= weight(c);
    }
    shared.drawn = last;
  }
  sync_block();
  return shared.drawn;
}

}  // namespace branchwise::cuda
