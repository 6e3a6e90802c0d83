// Passes over rows of logits for one ISA level (BW_ISA).
#include "cpu/kernels/vocab_kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace branchwise::BW_ISA {
namespace {

#include "cpu/kernels/half-inl.h"

constexpr int kChains = 4;  // independent sums, enough to hide the latency of an addition

inline float largest_lane(f32v v) { return segment_max<kLanes>(v)[0]; }
inline float lane_sum(f32v v) { return segment_sum<kLanes>(v)[0]; }

// Lanes at and behind n become `rest`.
inline f32v only_first(f32v v, int64_t n, float rest) {
  i32v lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = l;
  return lane < static_cast<int32_t>(n) ? v : splat(rest);
}

// Calls f(chain, offset, n) for the vectors of a block of `count` tokens, full ones with n =
// kLanes.
template <typename F>
inline void for_each_vector(int64_t count, F f) {
  int64_t i = 0;
  for (; i + kChains * kLanes <= count; i += kChains * kLanes) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) f(c, i + c * kLanes, kLanes);
  }
  for (; i < count; i += kLanes) f(0, i, count - i < kLanes ? count - i : int64_t{kLanes});
}

// Calls f(block, begin, count) for the blocks of a row.
template <typename F>
inline void for_each_block(int64_t size, F f, int64_t length = kVocabBlock) {
  for (int64_t b = 0, begin = 0; begin < size; ++b, begin += length)
    f(b, begin, size - begin < length ? size - begin : length);
}

template <typename T>
inline float block_max(const T* x, int64_t count) {
  f32v top[kChains];
  for (int c = 0; c < kChains; ++c) top[c] = splat(-kInf);
  for_each_vector(count, [&](int c, int64_t i, int64_t n) {
    const f32v v = n == kLanes ? load_wide(x + i) : only_first(load_wide(x + i, n), n, -kInf);
    top[c] = max(v, top[c]);  // in this order a NaN is passed over
  });
  return largest_lane(max(max(top[0], top[1]), max(top[2], top[3])));
}

void maxima(const LogitsRow& row, int64_t length, float* largest) {
  by_type(row.type, [&](auto type) {
    const auto* x = static_cast<const decltype(type)*>(row.data);
    for_each_block(
        row.size,
        [&](int64_t b, int64_t begin, int64_t count) { largest[b] = block_max(x + begin, count); },
        length);
  });
}

void softmax(const LogitsRow& row, float* largest, float* sum) {
  by_type(row.type, [&](auto type) {
    const auto* x = static_cast<const decltype(type)*>(row.data);
    for_each_block(row.size, [&](int64_t b, int64_t begin, int64_t count) {
      const float top = block_max(x + begin, count);
      const float shift = top == -kInf ? 0.f : top;
      f32v sums[kChains] = {};
      for_each_vector(count, [&](int c, int64_t i, int64_t n) {
        // Lets memory work on the next block while this one is in the first cache level.
        __builtin_prefetch(x + begin + i + kVocabBlock);
        const f32v v = n == kLanes ? load_wide(x + begin + i)
                                   : only_first(load_wide(x + begin + i, n), n, -kInf);
        sums[c] += exp2((v - shift) * row.scale);
      });
      largest[b] = top;
      sum[b] = lane_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    });
  });
}

// n weights from token i on, and zeros; q receives the draft's probabilities.
template <typename T>
inline f32v weigh(const TokenWeights& w, const T* x, int64_t i, int64_t n, f32v* q) {
  const f32v logit = n == kLanes ? load_wide(x + i) : only_first(load_wide(x + i, n), n, -kInf);
  const f32v target = w.target * exp2((logit - w.top) * w.row.scale);
  if (w.q == nullptr) return target;
  *q = load_wide(w.q + i, n);
  const f32v rest = target - w.draft * *q;
  return rest < 0.f ? f32v{} : rest;  // lets NaN through, to be noticed
}

void sums(const TokenWeights& w, float* sum, float* q_sum) {
  by_type(w.row.type, [&](auto type) {
    const auto* x = static_cast<const decltype(type)*>(w.row.data);
    for_each_block(w.row.size, [&](int64_t b, int64_t begin, int64_t count) {
      f32v total[kChains] = {}, q_total[kChains] = {};
      for_each_vector(count, [&](int c, int64_t i, int64_t n) {
        f32v q{};
        total[c] += weigh(w, x, begin + i, n, &q);
        q_total[c] += q;
      });
      sum[b] = lane_sum((total[0] + total[1]) + (total[2] + total[3]));
      q_sum[b] = lane_sum((q_total[0] + q_total[1]) + (q_total[2] + q_total[3]));
    });
  });
}

void weights(const TokenWeights& w, int64_t begin, int64_t count, float* out) {
  by_type(w.row.type, [&](auto type) {
    const auto* x = static_cast<const decltype(type)*>(w.row.data);
    for_each_vector(count, [&](int, int64_t i, int64_t n) {
      f32v q;
      store_narrow(out + i, weigh(w, x, begin + i, n, &q), n);
    });
  });
}

void moments(const TokenWeights& w, float* sum) {
  by_type(w.row.type, [&](auto type) {
    const auto* x = static_cast<const decltype(type)*>(w.row.data);
    for_each_block(w.row.size, [&](int64_t b, int64_t begin, int64_t count) {
      f32v total[kChains] = {};
      for_each_vector(count, [&](int c, int64_t i, int64_t n) {
        const f32v logit = only_first(load_wide(x + begin + i, n), n, -kInf);
        const f32v exponent = (logit - w.top) * w.row.scale, p = exp2(exponent);
        total[c] += p > 0.f ? p * exponent : f32v{};  // not 0 * -inf
      });
      sum[b] = lane_sum((total[0] + total[1]) + (total[2] + total[3]));
    });
  });
}

int64_t count_above(const LogitsRow& row, int64_t begin, int64_t end, float value, bool or_equal) {
  int64_t found = 0;
  by_type(row.type, [&](auto type) {
    const auto* x = static_cast<const decltype(type)*>(row.data);
    i32v counts{};  // of each lane, at most V
    for_each_vector(end - begin, [&](int, int64_t i, int64_t n) {
      // NaN compares false, whatever the value is.
      const f32v v = only_first(load_wide(x + begin + i, n), n, __builtin_nanf(""));
      counts -= or_equal ? v >= value : v > value;
    });
    for (int l = 0; l < kLanes; ++l) found += counts[l];
  });
  return found;
}

int64_t find(const LogitsRow& row, int64_t begin, int64_t count, float value, int32_t* tokens,
             float* logits) {
  int64_t found = 0;
  by_type(row.type, [&](auto type) {
    const auto* x = static_cast<const decltype(type)*>(row.data);
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t n = count - i < kLanes ? count - i : kLanes;
      const f32v v = only_first(load_wide(x + begin + i, n), n, __builtin_nanf(""));
      const i32v hit = v >= value;  // NaN is not
      if (lane_sum(hit != 0 ? splat(1.f) : f32v{}) == 0.f) continue;
      for (int64_t l = 0; l < n; ++l) {
        if (hit[l] == 0) continue;
        tokens[found] = static_cast<int32_t>(begin + i + l);
        logits[found++] = v[l];
      }
    }
  });
  return found;
}

}  // namespace

extern const VocabKernels vocab_kernels;
const VocabKernels vocab_kernels = {maxima, softmax, sums, weights, moments, count_above, find};

}  // namespace branchwise::BW_ISA
