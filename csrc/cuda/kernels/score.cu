// score_pages, attention_mass and page_summaries.
#include "cuda/device.cuh"
#include "cuda/kernels/eight-inl.cuh"
#include "cuda/kernels/score.cuh"
#include "cuda/kernels/slots-inl.cuh"

namespace branchwise::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 8;  // query rows that a key is multiplied with at a time
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Eight rows of a unit in shared memory.
struct Rows {
  float* values;  // [kRows, D], zeros behind the last row
  float* lse2;
  float* weight;
  int32_t* token;
};
__device__ Rows rows_in(char* shared, int64_t D) {
  float* values = reinterpret_cast<float*>(shared);
  float* lse2 = values + kRows * D;
  return {values, lse2, lse2 + kRows, reinterpret_cast<int32_t*>(lse2 + 2 * kRows)};
}
int rows_bytes(int64_t D) { return static_cast<int>((kRows * D + 3 * kRows) * 4); }

// Rows [first, first + 8) of the `count` that share a score: row r is token t0 + r / heads, query
// head h0 + r % heads.
template <typename Element>
__device__ void stage_rows(const ScoreLaunch& in, const Rows& rows, int64_t b, int64_t t0,
                           int64_t h0, int64_t heads, int64_t first, int64_t count) {
  const int64_t D = in.keys.D, width = in.bound ? D / 2 : D;
  for (int64_t i = threadIdx.x; i < kRows * D; i += kThreads) {
    const int64_t r = first + i / D, d = i % D, t = t0 + r / heads, h = h0 + r % heads;
    float x = 0.f;
    if (r < count) {
      const auto* row = static_cast<const Element*>(in.query) + b * in.q_stride[0] +
                        h * in.q_stride[1] + t * in.q_stride[2];
      x = to_float(row[d % width]);
      if (in.bound) x = d < width ? fmaxf(x, 0.f) : fminf(x, 0.f);
    }
    rows.values[i] = x;
  }
  if (threadIdx.x < kRows && first + threadIdx.x < count) {
    const int64_t r = first + threadIdx.x, t = t0 + r / heads, h = h0 + r % heads;
    rows.token[threadIdx.x] = static_cast<int32_t>(t);
    rows.lse2[threadIdx.x] = in.lse != nullptr ? in.lse[(b * in.Hq + h) * in.T + t] * kLog2e : 0.f;
    rows.weight[threadIdx.x] = in.weights != nullptr ? in.weights[b * in.T + t] : 1.f;
  }
}

// A thread's key times eight rows, as logits in base 2.
template <typename Key>
__device__ void multiply_rows(const ScoreLaunch& in, const Rows& rows, const Key* key,
                              float (&out)[kRows]) {
  const int64_t D = in.keys.D;
#pragma unroll
  for (int r = 0; r < kRows; ++r) out[r] = 0.f;
  for (int64_t d = 0; d < D; d += 8) {
    float k[8];
    load_eight(key, d, D, 0.f, k);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (d + i < D) out[r] += k[i] * rows.values[r * D + d + i];
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    out[r] *= in.scale;
    if (in.softcap > 0.f) out[r] = in.softcap * tanhf(out[r] / in.softcap);
    out[r] *= kLog2e;
  }
}

__device__ int64_t end_of(const ScoreLaunch& in, int64_t b, int64_t h) {
  const int64_t end = length_of(in.lens, b, h) + in.added;
  return end < in.keys.capacity ? end : in.keys.capacity;
}

// A thread per key.
template <typename Element, typename Key>
__global__ void __launch_bounds__(kThreads) score_kernel(const __grid_constant__ ScoreLaunch in) {
  const int64_t G = in.Hq / in.Hkv, tokens = in.per_token ? in.T : 1;
  const int64_t heads = in.per_query_head ? in.Hq : in.Hkv;
  const int64_t chunks = (in.S + kThreads - 1) / kThreads, unit = blockIdx.x / chunks;
  const int64_t head = unit % heads, token = unit / heads % tokens, b = unit / heads / tokens;
  const int64_t h = in.per_query_head ? head / G : head;
  const int64_t together = in.per_query_head ? 1 : G, h0 = in.per_query_head ? head : head * G;
  const int64_t count = in.T / tokens * together;
  const int64_t i = blockIdx.x % chunks * kThreads + threadIdx.x;
  const Rows rows = rows_in(shared_memory(), in.keys.D);
  const auto* key =
      i < end_of(in, b, h) ? reinterpret_cast<const Key*>(slot_at(in.keys, b, h, i)) : nullptr;
  const int64_t own = length_of(in.lens, b, h);
  float result = in.take_max ? -INFINITY : 0.f;
  for (int64_t first = 0; first < count; first += kRows) {
    sync_block();
    stage_rows<Element>(in, rows, b, token, h0, together, first, count);
    sync_block();
    if (key == nullptr) continue;
    float x[kRows];
    multiply_rows(in, rows, key, x);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r >= count) continue;
      float score = in.lse != nullptr ? exp2f(x[r] - rows.lse2[r]) : x[r] * kLn2;
      if (in.causal && i > own + rows.token[r]) score = 0.f;
      score *= rows.weight[r];
      result = in.take_max ? fmaxf(result, score) : result + score;
    }
  }
  if (i < in.S) in.out[unit * in.S + i] = key != nullptr ? result : in.nothing;
}

// A block per eight rows of a KV head, over all keys.
template <typename Element, typename Key>
__global__ void __launch_bounds__(kThreads)
    row_lse_kernel(const __grid_constant__ ScoreLaunch in, float* lse) {
  const int64_t G = in.Hq / in.Hkv, count = in.T * G, groups = (count + kRows - 1) / kRows;
  const int64_t group = blockIdx.x % groups, h = blockIdx.x / groups % in.Hkv;
  const int64_t b = blockIdx.x / groups / in.Hkv;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Rows rows = rows_in(shared_memory(), in.keys.D);
  float* joined = reinterpret_cast<float*>(rows.token + kRows);  // [kRows, warps, 2]
  stage_rows<Element>(in, rows, b, 0, h * G, G, group * kRows, count);
  sync_block();
  const int64_t end = end_of(in, b, h), own = length_of(in.lens, b, h);
  float top[kRows], sum[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    top[r] = -INFINITY;
    sum[r] = 0.f;
  }
  for (int64_t i = threadIdx.x; i < end; i += kThreads) {
    const auto* key = reinterpret_cast<const Key*>(slot_at(in.keys, b, h, i));
    if (key == nullptr) continue;
    float x[kRows];
    multiply_rows(in, rows, key, x);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (group * kRows + r >= count || (in.causal && i > own + rows.token[r])) continue;
      const float highest = fmaxf(top[r], x[r]);
      sum[r] = sum[r] * exp2f(top[r] - highest) + exp2f(x[r] - highest);
      top[r] = highest;
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float highest = warp_max(top[r]), shift = highest == -INFINITY ? 0.f : highest;
    const float all = warp_sum(sum[r] * exp2f(top[r] - shift));
    if (lane == 0) {
      joined[(r * (kThreads / kWarp) + warp) * 2] = highest;
      joined[(r * (kThreads / kWarp) + warp) * 2 + 1] = all;
    }
  }
  sync_block();
  const int64_t r = group * kRows + threadIdx.x;
  if (threadIdx.x >= kRows || r >= count) return;
  const float* own_row = joined + threadIdx.x * (kThreads / kWarp) * 2;
  float highest = -INFINITY, all = 0.f;
  for (int w = 0; w < kThreads / kWarp; ++w) highest = fmaxf(highest, own_row[2 * w]);
  const float shift = highest == -INFINITY ? 0.f : highest;
  for (int w = 0; w < kThreads / kWarp; ++w)
    all += own_row[2 * w + 1] * exp2f(own_row[2 * w] - shift);
  lse[(b * in.Hq + h * G + r % G) * in.T + r / G] =
      all > 0.f ? (highest + log2f(all)) * kLn2 : -INFINITY;
}

// A warp per unit, lanes along the head dim.
template <typename Element, typename Summary>
__global__ void summary_kernel(const __grid_constant__ SummaryLaunch in) {
  constexpr int kWarps = kThreads / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int64_t chunks = (in.N + kWarps - 1) / kWarps, head = blockIdx.x / chunks;
  const int64_t n = blockIdx.x % chunks * kWarps + threadIdx.x / kWarp;
  const int64_t h = head % in.Hkv, b = head / in.Hkv, D = in.keys.D;
  const int64_t begin = length_of(in.begin, b, h), end = length_of(in.end, b, h);
  if (begin >= end || begin < 0 || n >= in.N) return;
  int64_t low, high;
  if (in.offsets != nullptr) {
    if (n < begin || n >= end) return;
    const int32_t* at = in.offsets + (b * in.Hkv + h) * (in.N + 1) + n;
    low = at[0];
    high = at[1];
  } else {
    if (n < begin / in.page_size || n * in.page_size >= end) return;
    low = n * in.page_size;
    high = min(low + in.page_size, end);
  }
  if (low < 0) low = 0;
  if (high > in.keys.capacity) high = in.keys.capacity;
  auto* out =
      static_cast<Summary*>(in.out) + ((b * in.Hkv + h) * in.N + n) * D * (in.min_max ? 2 : 1);
  for (int64_t d = lane; d < D; d += kWarp) {
    float least = INFINITY, most = -INFINITY, sum = 0.f;
    int64_t count = 0;
    for (int64_t slot = low; slot < high; ++slot) {
      const auto* key = reinterpret_cast<const Element*>(slot_at(in.keys, b, h, slot));
      if (key == nullptr) continue;
      const float x = to_float(key[d]);
      least = fminf(least, x);
      most = fmaxf(most, x);
      sum += x;
      ++count;
    }
    if (count == 0) least = most = 0.f;
    if (in.min_max) {
      from_float(most, out + d);
      from_float(least, out + D + d);
    } else {
      from_float(count > 0 ? sum / static_cast<float>(count) : 0.f, out + d);
    }
  }
}

}  // namespace

int score_keys(const ScoreLaunch& in, void* stream) {
  const int64_t tokens = in.per_token ? in.T : 1, heads = in.per_query_head ? in.Hq : in.Hkv;
  const int64_t blocks = (in.S + kThreads - 1) / kThreads * in.B * tokens * heads;
  if (blocks == 0) return 0;
  const Grid grid(static_cast<unsigned>(blocks));
  return dispatch(in.type, [&](auto element) {
    using Element = decltype(element);
    const auto with = [&](auto* kernel) {
      return launch(kernel, grid, kThreads, rows_bytes(in.keys.D), stream, in);
    };
    return in.e4m3_keys ? with(score_kernel<Element, E4m3>) : with(score_kernel<Element, Element>);
  });
}

int row_lse(const ScoreLaunch& in, float* lse, void* stream) {
  const int64_t groups = (in.T * (in.Hq / in.Hkv) + kRows - 1) / kRows;
  const int64_t blocks = groups * in.Hkv * in.B;
  if (blocks == 0) return 0;
  const int bytes = rows_bytes(in.keys.D) + kRows * (kThreads / kWarp) * 2 * 4;
  const Grid grid(static_cast<unsigned>(blocks));
  return dispatch(in.type, [&](auto element) {
    using Element = decltype(element);
    const auto with = [&](auto* kernel) {
      return launch(kernel, grid, kThreads, bytes, stream, in, lse);
    };
    return in.e4m3_keys ? with(row_lse_kernel<Element, E4m3>)
                        : with(row_lse_kernel<Element, Element>);
  });
}

int page_summaries(const SummaryLaunch& in, void* stream) {
  if (in.B * in.Hkv * in.N == 0) return 0;
  const int64_t of_block = kThreads / kWarp;
  const Grid grid(static_cast<unsigned>((in.N + of_block - 1) / of_block * in.B * in.Hkv));
  return dispatch(in.type, [&](auto element) {
    using Element = decltype(element);
    const auto with = [&](auto* kernel) { return launch(kernel, grid, kThreads, 0, stream, in); };
    return in.to_e4m3 ? with(summary_kernel<Element, E4m3>)
                      : with(summary_kernel<Element, Element>);
  });
}

}  // namespace branchwise::cuda
