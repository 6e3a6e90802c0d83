// Attention for one ISA level (BW_ISA); see attention_kernel.h for the plan.
#include "cpu/kernels/attention_kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace branchwise::BW_ISA {
namespace {

#include "cpu/kernels/vec-inl.h"

// Calls f with a value of the element type.
template <typename F>
void by_type(KvType type, F f) {
  switch (type) {
    case KvType::f32:
      return f(float{});
    case KvType::bf16:
      return f(Bf16{});
    case KvType::f16:
      return f(F16{});
  }
}

// Calls f(first_row, NV) for the groups of a row block: three vectors at a time, then the rest.
// A group's data (query^T, out^T) is contiguous and starts at first_row * D.
template <typename F>
void for_each_group(int64_t rows, F f) {
  const int64_t vectors = (rows + kLanes - 1) / kLanes;
  int64_t v = 0;
  for (; v + 3 <= vectors; v += 3) f(v * kLanes, 3);
  if (v < vectors) f(v * kLanes, static_cast<int>(vectors - v));
}

// Where a unit starts to read: nothing before the lowest row's window is visible to its block.
// Nodes are never skipped, since a node's position is not its slot.
inline int64_t first_visible_slot(const AttentionUnit& u, int64_t lowest_low, int64_t prefix) {
  const int64_t first = lowest_low < prefix ? lowest_low : prefix;
  return first > u.slot_begin ? first : u.slot_begin;
}

#include "cpu/kernels/few_rows-inl.h"
#include "cpu/kernels/many_rows-inl.h"

constexpr int64_t kFewRows = kLanes / 4;

template <typename T>
void pack_query_typed(const AttentionArgs& a, const AttentionUnit& u, float* packed) {
  const int64_t G = a.Hq / a.Hkv, rows = u.row_end - u.row_begin;
  const auto row_of = [&](int64_t r) {
    // Padding lanes repeat the last row: finite numbers, never read.
    const int64_t row = u.row_begin + (r < rows ? r : rows - 1);
    return static_cast<const T*>(a.query) + u.batch * a.q_stride[0] +
           (u.kv_head * G + row % G) * a.q_stride[1] + row / G * a.q_stride[2];
  };
  if (rows <= kFewRows) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < a.D; ++d) packed[r * a.D + d] = to_float(row_of(r)[d]) * a.scale;
    return;
  }
  for_each_group(rows, [&](int64_t first, int nv) {
    const int64_t ld = nv * kLanes;
    for (int64_t i = 0; i < ld; ++i) {
      const T* from = row_of(first + i);
      float* to = packed + first * a.D + i;
      for (int64_t d = 0; d < a.D; ++d) to[d * ld] = to_float(from[d]) * a.scale;
    }
  });
}

void pack_query(const AttentionArgs& a, const AttentionUnit& u, float* packed) {
  by_type(a.type, [&](auto type) { pack_query_typed<decltype(type)>(a, u, packed); });
}

template <typename T>
void run_unit_typed(const AttentionArgs& a, const AttentionUnit& u, float* scratch) {
  switch (u.row_end - u.row_begin <= kFewRows ? u.row_end - u.row_begin : 0) {
    case 1:
      return run_few_rows<T, 1>(a, u, scratch);
    case 2:
      return run_few_rows<T, 2>(a, u, scratch);
    case 3:
      return run_few_rows<T, 3>(a, u, scratch);
    case 4:
      return run_few_rows<T, 4>(a, u, scratch);
    default:
      return run_many_rows<T>(a, u, scratch);
  }
}

void run_unit(const AttentionArgs& a, const AttentionUnit& u, float* scratch) {
  by_type(a.type, [&](auto type) { run_unit_typed<decltype(type)>(a, u, scratch); });
}

template <typename T>
void merge_units_typed(const AttentionArgs& a, const AttentionUnit* units, int64_t count) {
  const AttentionUnit& u = units[0];
  const int64_t G = a.Hq / a.Hkv, rows = u.row_end - u.row_begin, padded = padded_rows(rows);
  for_each_group(rows, [&](int64_t first, int nv) {
    const int64_t ld = nv * kLanes;
    for (int64_t i = 0; i < ld && first + i < rows; i += kLanes) {
      const int64_t at = first + i, lanes = rows - at < kLanes ? rows - at : kLanes;
      f32v top = splat(-kInf);
      for (int64_t s = 0; s < count; ++s)
        top = max(top, load(units[s].partial + a.D * padded + at));
      float sink[kLanes];
      for (int l = 0; l < kLanes; ++l) {
        const int64_t head = u.kv_head * G + (u.row_begin + at + (l < lanes ? l : 0)) % G;
        sink[l] = a.sinks != nullptr ? a.sinks[head] : -kInf;
      }
      top = max(top, load(sink));
      const f32v shift = top == -kInf ? f32v{} : top;
      f32v sum = exp(load(sink) - shift);
      for (int64_t s = 0; s < count; ++s) {
        float* max_s = units[s].partial + a.D * padded + at;
        const f32v weight = exp(load(max_s) - shift);
        sum += load(max_s + padded) * weight;
        store(max_s, weight);  // the maxima are not needed again
      }
      float total[kLanes], high[kLanes];
      store(total, sum);
      store(high, top);
      const f32v inverse = sum > 0.f ? 1.f / sum : f32v{};
      for (int64_t l = 0; l < lanes; ++l) {
        const int64_t row = u.row_begin + at + l;
        a.lse[(u.batch * a.Hq + u.kv_head * G + row % G) * a.T + row / G] =
            total[l] > 0.f ? high[l] + __builtin_logf(total[l]) : -kInf;
      }
      for (int64_t d = 0; d < a.D; ++d) {
        f32v acc = {};
        for (int64_t s = 0; s < count; ++s)
          acc += load(units[s].partial + first * a.D + d * ld + i) *
                 load(units[s].partial + a.D * padded + at);
        float lane[kLanes];
        store(lane, acc * inverse);
        for (int64_t l = 0; l < lanes; ++l) {
          const int64_t row = u.row_begin + at + l;
          T* to = static_cast<T*>(a.out) +
                  ((u.batch * a.Hq + u.kv_head * G + row % G) * a.T + row / G) * a.D + d;
          from_float(lane[l], to);
        }
      }
    }
  });
}

void merge_units(const AttentionArgs& a, const AttentionUnit* units, int64_t count) {
  by_type(a.type, [&](auto type) { merge_units_typed<decltype(type)>(a, units, count); });
}

template <typename T>
void merge_pair_typed(const MergeArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const float la = a.lse_a[r], lb = a.lse_b[r], top = la > lb ? la : lb;
    const float shift = top == -kInf ? 0.f : top;
    const float wa = __builtin_expf(la - shift), wb = __builtin_expf(lb - shift), sum = wa + wb;
    a.lse[r] = sum > 0.f ? top + __builtin_logf(sum) : -kInf;
    const float inverse = sum > 0.f ? 1.f / sum : 0.f;
    const T *out_a = static_cast<const T*>(a.out_a) + r * a.D,
            *out_b = static_cast<const T*>(a.out_b) + r * a.D;
    T* out = static_cast<T*>(a.out) + r * a.D;
    for (int64_t d = 0; d < a.D; ++d) {
      // An empty side may hold anything; it must not turn into 0 * NaN.
      const float from_a = wa > 0.f ? to_float(out_a[d]) * wa : 0.f;
      const float from_b = wb > 0.f ? to_float(out_b[d]) * wb : 0.f;
      from_float((from_a + from_b) * inverse, out + d);
    }
  }
}

void merge_pair(const MergeArgs& a, int64_t begin, int64_t end) {
  by_type(a.type, [&](auto type) { merge_pair_typed<decltype(type)>(a, begin, end); });
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {pack_query, run_unit, merge_units, merge_pair};

}  // namespace branchwise::BW_ISA
