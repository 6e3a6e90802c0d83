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
__global__ void __launch_bounds__(32 * kWarps)
    plain_attention_kernel(const __grid_constant__ AttentionLaunch in) {
  const AttentionArgs& a = in.args;
  const int64_t block = blockIdx.x % in.blocks, b = blockIdx.y;
  const int64_t h = blockIdx.x / in.blocks % a.Hkv, split = blockIdx.x / in.blocks / a.Hkv;
  const RowBlock rows = row_block(in, block);
  const Places places = places_of(in, b, h, rows.first_token);
  const Span span = span_of(in, places, rows);
  const int row = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int32_t packed = rows.first + row, G = static_cast<int32_t>(a.Hq / a.Hkv);
  if (split >= span.splits.count || packed >= rows.end) return;
  const int64_t begin = span.first + split * span.splits.size;
  const int64_t end = min(span.end, begin + span.splits.size);

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
  const float stored_key = sizeof(Stored) == 1 ? a.key_scale[h] : 1.f;
  const float stored_value = sizeof(Stored) == 1 ? a.value_scale[h] : 1.f;
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
      float score = warp_sum(dot) * stored_key * a.scale;
      if (a.softcap > 0.f) score = a.softcap * tanhf(score / a.softcap);
      score *= kLog2e;
      const float highest = fmaxf(top, score);
      const float shrink = exp2f(top - highest), weight = exp2f(score - highest);
      top = highest;
      sum = sum * shrink + weight;
#pragma unroll
      for (int j = 0; j < kLaneValues; ++j) {
        const int d = lane + j * kWarp;
        if (d < a.D) out[j] = out[j] * shrink + weight * stored_value * to_float(value[d]);
      }
    }
  }
  if (span.splits.count == 1) {
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

// A warp per packed row, splits in ascending order.
template <typename Element>
__global__ void __launch_bounds__(32 * kWarps)
    merge_kernel(const __grid_constant__ AttentionLaunch in) {
  const AttentionArgs& a = in.args;
  const int64_t b = blockIdx.y, warps = (in.rows + kWarps - 1) / kWarps;  // grid blocks per block
  const int64_t at = blockIdx.x / warps, block = at % in.blocks, h = at / in.blocks;
  const RowBlock rows = row_block(in, block);
  const Places places = places_of(in, b, h, rows.first_token);
  const int64_t count = span_of(in, places, rows).splits.count;
  const int row = static_cast<int>(blockIdx.x % warps) * kWarps + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (count == 1 || rows.first + row >= rows.end) return;
  const float* first = partial_of(in, b, h, block, 0);
  const float* tops = first + in.rows * a.D + row;
  const float* sums = tops + in.rows;
  float top = -INFINITY;
  for (int64_t s = lane; s < count; s += kWarp) top = fmaxf(top, tops[s * in.unit_floats]);
  top = warp_max(top);
  const float shift = top == -INFINITY ? 0.f : top;
  float sum = 0.f, out[kLaneValues] = {};
  for (int64_t s = 0; s < count; ++s) {
    const float weight = exp2f(tops[s * in.unit_floats] - shift);
    const float* values = first + s * in.unit_floats + row * a.D;
    sum += weight * sums[s * in.unit_floats];
#pragma unroll
    for (int j = 0; j < kLaneValues; ++j) {
      const int d = lane + j * kWarp;
      if (d < a.D) out[j] += weight * values[d];
    }
  }
  const Finish f = finish_row(a, b, h, rows.first + row, top, sum, lane == 0);
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

}  // namespace

int attend(const AttentionLaunch& in, const AttentionPlan& plan, void* stream) {
  if (in.B * in.args.T == 0) return 0;
  const Grid grid(static_cast<unsigned>(in.splits * in.args.Hkv * in.blocks),
                  static_cast<unsigned>(in.B));
  int code;
  if (plan.head_dim == 0) {
    code = dispatch(in.args.type, [&](auto element) {
      using Element = decltype(element);
      return plan.eight_bits
                 ? launch(plain_attention_kernel<Element, E4m3>, grid, 32 * kWarps, 0, stream, in)
                 : launch(plain_attention_kernel<Element, Element>, grid, 32 * kWarps, 0, stream,
                          in);
    });
  } else {
    code = in.args.type == DType::bf16 ? launch_matrix_attention<bf16>(in, plan, stream)
                                       : launch_matrix_attention<half>(in, plan, stream);
  }
  if (code != 0 || in.splits == 1) return code;
  const int64_t warps = (in.rows + kWarps - 1) / kWarps;
  const Grid rows(static_cast<unsigned>(in.args.Hkv * in.blocks * warps),
                  static_cast<unsigned>(in.B));
  return dispatch(in.args.type, [&](auto element) {
    return launch(merge_kernel<decltype(element)>, rows, 32 * kWarps, 0, stream, in);
  });
}

}  // namespace branchwise::cuda
