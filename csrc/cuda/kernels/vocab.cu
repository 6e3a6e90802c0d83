#include "common/gumbel.h"
#include "common/vocab_score.h"
#include "cuda/kernels/eight-inl.cuh"
#include "cuda/kernels/select-inl.cuh"
#include "cuda/kernels/vocab.cuh"

namespace branchwise::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr float kLog2e = 1.44269504f;
constexpr double kLn2 = 0.6931471805599453;

struct Excluded {
  const int64_t* tokens;
  int64_t count;
  __device__ bool has(int64_t token) const {
    for (int64_t i = 0; i < count; ++i)
      if (tokens[i] == token) return true;
    return false;
  }
};

struct Shared {
  float top[kWarps];
  double sum[kWarps];
  int64_t at[kWarps];
};

// Sums of 2^((x - top) log2 e), and the largest x.
struct RowSum {
  float top;
  double sum;
};

__device__ RowSum join(RowSum a, RowSum b) {
  const float top = fmaxf(a.top, b.top), shift = top == -INFINITY ? 0.f : top;
  return {top, a.sum * exp2f((a.top - shift) * kLog2e) + b.sum * exp2f((b.top - shift) * kLog2e)};
}

// In one order always: a thread's tokens, its warp's threads, the block's warps.
template <typename Element>
__device__ RowSum row_sum(const Element* row, int64_t V, Excluded excluded, Shared& s) {
  float top = -INFINITY, sum = 0.f;
#pragma unroll 2
  for (int64_t at = int64_t{threadIdx.x} * 8; at < V; at += kThreads * 8) {
    float x[8], most = top;
    load_eight(row, at, V, -INFINITY, x);
    for (int i = 0; i < 8; ++i) {
      if (excluded.has(at + i)) x[i] = -INFINITY;
      most = fmaxf(most, x[i]);
    }
    const float shift = most == -INFINITY ? 0.f : most;
    sum *= exp2f((top - shift) * kLog2e);
    for (int i = 0; i < 8; ++i) sum += exp2f((x[i] - shift) * kLog2e);
    top = most;
  }
  RowSum all{top, sum};
  for (int i = kWarp / 2; i > 0; i /= 2)
    all = join(all, {shuffle_xor(all.top, i), shuffle_xor(all.sum, i)});
  sync_block();
  if (threadIdx.x % kWarp == 0) {
    s.top[threadIdx.x / kWarp] = all.top;
    s.sum[threadIdx.x / kWarp] = all.sum;
  }
  sync_block();
  all = {s.top[0], s.sum[0]};
  for (int w = 1; w < kWarps; ++w) all = join(all, {s.top[w], s.sum[w]});
  return all;
}

__device__ double block_sum(double value, Shared& s) {
  value = warp_sum(value);
  sync_block();
  if (threadIdx.x % kWarp == 0) s.sum[threadIdx.x / kWarp] = value;
  sync_block();
  value = 0;
  for (int w = 0; w < kWarps; ++w) value += s.sum[w];
  return value;
}

// A value and the token that has it: the largest, of equals the lowest token.
struct Best {
  double value = -INFINITY;
  int64_t at = INT64_MAX;
  __device__ void meet(double other, int64_t other_at) {
    if (other > value || (other == value && other_at < at)) {
      value = other;
      at = other_at;
    }
  }
};

__device__ Best block_best(Best best, Shared& s) {
  for (int i = kWarp / 2; i > 0; i /= 2)
    best.meet(shuffle_xor(best.value, i), shuffle_xor(best.at, i));
  sync_block();
  if (threadIdx.x % kWarp == 0) {
    s.sum[threadIdx.x / kWarp] = best.value;
    s.at[threadIdx.x / kWarp] = best.at;
  }
  sync_block();
  for (int w = 0; w < kWarps; ++w) best.meet(s.sum[w], s.at[w]);
  return best;
}

template <typename Element>
__device__ const Element* row_of(const VocabLaunch& in) {
  return reinterpret_cast<const Element*>(in.logits + int64_t{blockIdx.x} * in.row_bytes);
}

struct TopShared {
  Shared sums;
  SelectShared<kThreads> select;
};

template <typename Element>
__global__ void __launch_bounds__(kThreads)
    top_tokens_kernel(const __grid_constant__ TopTokensLaunch launch) {
  const VocabLaunch& in = launch.in;
  const Element* row = row_of<Element>(in);
  TopShared& s = *reinterpret_cast<TopShared*>(shared_memory());
  float* logit = reinterpret_cast<float*>(shared_memory() + sizeof(TopShared));
  const int64_t wanted = min(launch.k + in.E, in.V);
  int32_t* token = reinterpret_cast<int32_t*>(logit + wanted);
  const RowSum sum = row_sum(row, in.V, {nullptr, 0}, s.sums);
  const double log_sum = sum.top + log(sum.sum);
  const int32_t count = take_largest(
      s.select, in.V, wanted, key_of(-INFINITY),
      [&](int64_t i) { return key_of(to_float(row[i])); },
      [&](int64_t i, int32_t n) {
        logit[n] = to_float(row[i]);
        token[n] = static_cast<int32_t>(i);
      });
  int32_t* out_tokens = launch.tokens + blockIdx.x * launch.k;
  float* out_log_probs = launch.log_probs + blockIdx.x * launch.k;
  const Excluded excluded{in.exclude, in.E};
  int32_t written = 0;  // as many for every thread
  for (int32_t c = 0; c < count; ++c) written += excluded.has(token[c]) ? 0 : 1;
  for (int32_t c = threadIdx.x; c < count; c += kThreads) {
    if (excluded.has(token[c])) continue;
    int32_t rank = 0;
    for (int32_t o = 0; o < count; ++o)
      if ((logit[o] > logit[c] || (logit[o] == logit[c] && token[o] < token[c])) &&
          !excluded.has(token[o]))
        ++rank;
    if (rank >= launch.k) continue;
    out_tokens[rank] = token[c];
    out_log_probs[rank] = static_cast<float>(logit[c] - log_sum);
  }
  for (int64_t i = written + threadIdx.x; i < launch.k; i += kThreads) {
    out_tokens[i] = -1;
    out_log_probs[i] = -INFINITY;
  }
}

template <typename Element>
__global__ void __launch_bounds__(kThreads)
    confidence_kernel(const __grid_constant__ ConfidenceLaunch launch) {
  const VocabLaunch& in = launch.in;
  const Element* row = row_of<Element>(in);
  Shared& s = *reinterpret_cast<Shared*>(shared_memory());
  const Excluded excluded{in.exclude, in.E};
  const RowSum sum = row_sum(row, in.V, excluded, s);
  // Logits with NaN or infinities, or nothing to choose from: no token, which is never chosen.
  if (!(sum.sum > 0) || !(sum.sum < INFINITY) || !(sum.top < INFINITY)) {
    if (threadIdx.x == 0) {
      launch.tokens[blockIdx.x] = -1;
      launch.scores[blockIdx.x] = -INFINITY;
    }
    return;
  }
  const bool draws = launch.temperature > 0;
  const double least =
      draws ? sum.top - (kGumbelHigh - kGumbelLow) * launch.temperature : double{sum.top};
  const int64_t key = launch.keys != nullptr ? launch.keys[blockIdx.x] : 0;
  Best best, top;
  for (int64_t i = threadIdx.x; i < in.V; i += kThreads) {
    const float x = to_float(row[i]);
    if (!(x >= least) || excluded.has(i)) continue;
    best.meet(draws ? x / launch.temperature + gumbel(key, i) : double{x}, i);
    top.meet(x, i);
  }
  best = block_best(best, s);
  const float logit = to_float(row[best.at]);
  double score;
  if (launch.score == static_cast<int>(Score::probability)) {
    score = exp2((double{logit} - sum.top) * 1.4426950408889634) / sum.sum;
  } else if (launch.score == static_cast<int>(Score::margin)) {
    top = block_best(top, s);
    Best second;
    for (int64_t i = threadIdx.x; i < in.V; i += kThreads)
      if (i != top.at && !excluded.has(i)) second.meet(to_float(row[i]), i);
    second = block_best(second, s);
    score = (1 - exp2((second.value - sum.top) * 1.4426950408889634)) / sum.sum;
  } else {  // -H = sum p log p = (moment / sum - log2 sum) ln 2
    float moment = 0.f;
    for (int64_t i = threadIdx.x; i < in.V; i += kThreads) {
      const float bits = (to_float(row[i]) - sum.top) * kLog2e, weight = exp2f(bits);
      if (weight > 0.f && !excluded.has(i)) moment += weight * bits;
    }
    score = (block_sum(moment, s) / sum.sum - log2(sum.sum)) * kLn2;
  }
  if (threadIdx.x == 0) {
    launch.tokens[blockIdx.x] = best.at;
    launch.scores[blockIdx.x] = static_cast<float>(score);
  }
}

}  // namespace

int64_t top_tokens_bytes(int64_t count) {
  return static_cast<int64_t>(sizeof(TopShared)) + 8 * count;
}

int top_tokens(const TopTokensLaunch& in, void* stream) {
  if (in.in.rows == 0) return 0;
  const int64_t count = in.k + in.in.E < in.in.V ? in.k + in.in.E : in.in.V;
  return dispatch(in.in.type, [&](auto element) {
    return launch(top_tokens_kernel<decltype(element)>, Grid(static_cast<unsigned>(in.in.rows)),
                  kThreads, static_cast<int>(top_tokens_bytes(count)), stream, in);
  });
}

int confidence(const ConfidenceLaunch& in, void* stream) {
  if (in.in.rows == 0) return 0;
  return dispatch(in.in.type, [&](auto element) {
    return launch(confidence_kernel<decltype(element)>, Grid(static_cast<unsigned>(in.in.rows)),
                  kThreads, static_cast<int>(sizeof(Shared)), stream, in);
  });
}

}  // namespace branchwise::cuda
