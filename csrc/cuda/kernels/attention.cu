// Attention for every head dim and fp32, a warp per row; the merge of splits; which kernel runs.
#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/kernels/attention.cuh"
#include "cuda/kernels/places-inl.cuh"

namespace branchwise::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kLaneValues = kMaxHeadDim / kWarp;  // of a row, that a lane holds

template <typename Element, typename Stored>
__global__ void __launch_bounds__(32 * kWarps, 3)  // of four, e4m3 would spill
    plain_attention_kernel(const __grid_constant__ AttentionLaunch in) {
  const AttentionArgs& a = in.args;
  const Unit unit = unit_of_block(in);
  const int b = unit.b, h = unit.h, block = unit.block, split = unit.split;
  const RowBlock rows = row_block(in, block);
  const Places places = places_of(in, b, h, rows.first_token);
  const Span span = span_of(in, places, rows);
  const int row = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int32_t packed = rows.first + row, G = static_cast<int32_t>(a.Hq / a.Hkv);
  if (split >= span.count || packed >= rows.end) return;
  const int64_t begin = span.begin_of(split), end = span.end_of(split);

  const int64_t token = packed / G;
  const Element* query = static_cast<const Element*>(a.query) + b * a.q_stride[0] +
                         (h * G + packed % G) * a.q_stride[1] + token * a.q_stride[2];
  float q[kLaneValues], out[kLaneValues];
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    const int d = lane + i * kWarp;
    q[i] = d < a.D ? to_float(query[d]) : 0.f;
    out[i] = 0.f;
  }
  const float scale = sizeof(Stored) == 1 ? a.scale * a.key_scale[h] : a.scale;
  const RowView view = view_of(a, places, b, token);
  float top = -INFINITY, sum = 0.f;
  for (int64_t place = begin; place < end; place += kTile) {
    const Address low = address_of(in, places, b, h, place + lane, end);
    const Address high = address_of(in, places, b, h, place + lane + kWarp, end);
    const uint64_t there = ballot(low.exists) | uint64_t{ballot(high.exists)} << 32;
    const uint64_t seen = visible(a, places, view, place, end) & there;
    for (int i = 0; i < kTile; ++i) {
      if ((seen >> i & 1) == 0) continue;
      const auto* key = static_cast<const Stored*>(a.key_cache) +
                        shuffle(i < kWarp ? low.key : high.key, i % kWarp);
      const auto* value = static_cast<const Stored*>(a.value_cache) +
                          shuffle(i < kWarp ? low.value : high.value, i % kWarp);
      float dot = 0.f;
#pragma unroll
      for (int j = 0; j < kLaneValues; ++j) {
        const int d = lane + j * kWarp;
        if (d < a.D) dot += q[j] * to_float(key[d]);
      }
      float score = warp_sum(dot) * scale;
      if (a.softcap > 0.f) score = a.softcap * tanhf(score / a.softcap);
      score *= kLog2e;
      const float highest = fmaxf(top, score);
      const float shrink = exp2f(top - highest), weight = exp2f(score - highest);
      top = highest;
      sum = sum * shrink + weight;
#pragma unroll
      for (int j = 0; j < kLaneValues; ++j) {
        const int d = lane + j * kWarp;
        if (d < a.D) out[j] = out[j] * shrink + weight * to_float(value[d]);
      }
    }
  }
  if constexpr (sizeof(Stored) == 1) {
    const float stored_value = a.value_scale[h];
#pragma unroll
    for (float& value : out) value *= stored_value;
  }
  if (!in.by_stretch && span.count == 1) {
    const Finish f = finish_row(a, b, h, packed, top, sum, lane == 0);
#pragma unroll
    for (int j = 0; j < kLaneValues; ++j) {
      const int d = lane + j * kWarp;
      if (d < a.D) from_float(out[j] * f.factor, static_cast<Element*>(a.out) + f.at + d);
    }
    return;
  }
  float* partial = partial_of(in, b, h, block, split);
#pragma unroll
  for (int j = 0; j < kLaneValues; ++j) {
    const int d = lane + j * kWarp;
    if (d < a.D) partial[row * a.D + d] = out[j];
  }
  if (lane == 0) {
    partial[in.rows * a.D + row] = top;
    partial[in.rows * (a.D + 1) + row] = sum;
  }
}

// What a launch left of one packed row, split by split.
struct RowPartials {
  const float *values, *tops, *sums;
  int64_t count, stride;
};
__device__ inline RowPartials partials_of(const AttentionLaunch& in, int64_t b, int64_t h,
                                          int64_t block, int row) {
  const RowBlock rows = row_block(in, block);
  const Span span = span_of(in, places_of(in, b, h, rows.first_token), rows);
  const float* first = partial_of(in, b, h, block, 0);
  const float* tops = first + in.rows * in.args.D + row;
  return {first + row * in.args.D, tops, tops + in.rows, span.count, in.unit_floats};
}

// A warp per packed row, splits in ascending order. before: a launch of the same rows whose splits
// come first, or none (partial null).
template <typename Element>
__global__ void __launch_bounds__(32 * kWarps)
    merge_kernel(const __grid_constant__ AttentionLaunch in,
                 const __grid_constant__ AttentionLaunch before) {
  const AttentionArgs& a = in.args;
  const int64_t warps = (in.rows + kWarps - 1) / kWarps;  // grid blocks per block
  const int64_t at = blockIdx.x / warps, b = blockIdx.y + in.first_batch;
  const int64_t block = at % in.blocks + in.first_block, h = at / in.blocks;
  const RowBlock rows = row_block(in, block);
  const int row = static_cast<int>(blockIdx.x % warps) * kWarps + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp, packed = rows.first + row;
  if (packed >= rows.end) return;
  RowPartials parts[2] = {{}, partials_of(in, b, h, block, row)};
  if (before.partial != nullptr)
    parts[0] = partials_of(before, b, h, packed / before.rows, packed % before.rows);
  if (!in.by_stretch && parts[1].count == 1) return;  // finished already
  float top = -INFINITY;
#pragma unroll
  for (const RowPartials& p : parts)
    for (int64_t s = lane; s < p.count; s += kWarp) top = fmaxf(top, p.tops[s * p.stride]);
  top = warp_max(top);
  const float shift = top == -INFINITY ? 0.f : top;
  float sum = 0.f, out[kLaneValues] = {};
#pragma unroll
  for (const RowPartials& p : parts)
    for (int64_t s = 0; s < p.count; ++s) {
      const float weight = exp2f(p.tops[s * p.stride] - shift);
      const float* values = p.values + s * p.stride;
      sum += weight * p.sums[s * p.stride];
#pragma unroll
      for (int j = 0; j < kLaneValues; ++j) {
        const int d = lane + j * kWarp;
        if (d < a.D) out[j] += weight * values[d];
      }
    }
  const Finish f = finish_row(a, b, h, packed, top, sum, lane == 0);
#pragma unroll
  for (int j = 0; j < kLaneValues; ++j) {
    const int d = lane + j * kWarp;
    if (d < a.D) from_float(out[j] * f.factor, static_cast<Element*>(a.out) + f.at + d);
  }
}

template <typename Element>
int launch_matrix_attention(const AttentionLaunch& in, const AttentionPlan& plan, void* stream) {
  if constexpr (std::is_same_v<Element, bf16>)
    if (plan.eight_bits)
      return plan.head_dim == 64 ? launch_attention<Element, E4m3, 64>(in, plan, stream)
                                 : launch_attention<Element, E4m3, 128>(in, plan, stream);
  switch (plan.head_dim) {
    case 64:
      return launch_attention<Element, Element, 64>(in, plan, stream);
    case 96:
      return launch_attention<Element, Element, 96>(in, plan, stream);
    case 128:
      return launch_attention<Element, Element, 128>(in, plan, stream);
    default:
      return launch_attention<Element, Element, 256>(in, plan, stream);
  }
}

int launch_splits(const AttentionLaunch& in, const AttentionPlan& plan, void* stream) {
  if (plan.head_dim != 0)
    return in.args.type == DType::bf16 ? launch_matrix_attention<bf16>(in, plan, stream)
                                       : launch_matrix_attention<half>(in, plan, stream);
  const Grid grid(static_cast<unsigned>(in.splits * in.args.Hkv * in.blocks),
                  static_cast<unsigned>(in.B));
  return dispatch(in.args.type, [&](auto element) {
    using Element = decltype(element);
    return plan.eight_bits
               ? launch(plain_attention_kernel<Element, E4m3>, grid, 32 * kWarps, 0, stream, in)
               : launch(plain_attention_kernel<Element, Element>, grid, 32 * kWarps, 0, stream, in);
  });
}

int merge_splits(const AttentionLaunch& in, const AttentionLaunch& before, void* stream) {
  const int64_t warps = (in.rows + kWarps - 1) / kWarps;
  const Grid rows(static_cast<unsigned>(in.args.Hkv * in.blocks * warps),
                  static_cast<unsigned>(in.B));
  return dispatch(in.args.type, [&](auto element) {
    return launch(merge_kernel<decltype(element)>, rows, 32 * kWarps, 0, stream, in, before);
  });
}

}  // namespace

int attend(const AttentionLaunch& in, const AttentionPlan& plan, void* stream) {
  if (in.B * in.args.T == 0) return 0;
  const int code = launch_splits(in, plan, stream);
  if (code != 0 || (in.splits == 1 && !in.by_stretch)) return code;
  return merge_splits(in, AttentionLaunch{}, stream);
}

int attend_paths(const AttentionLaunch& shared, const AttentionPlan& shared_plan,
                 const AttentionLaunch& own, const AttentionPlan& own_plan, void* stream) {
  int code = launch_splits(shared, shared_plan, stream);
  if (code == 0) code = launch_splits(own, own_plan, stream);
  return code != 0 ? code : merge_splits(own, shared, stream);
}

}  // namespace branchwise::cuda
