// Attention for one ISA level (BW_ISA); see attention_kernel.h for the plan.
#include "cpu/kernels/attention_kernel.h"

#include "cpu/kernels/memory.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace branchwise::BW_ISA {
namespace {

// Each includes what it builds on; one level per translation unit.
#include "cpu/kernels/few_rows-inl.h"
#include "cpu/kernels/many_rows-inl.h"
#include "cpu/kernels/pack-inl.h"
#if defined(__AMX_BF16__)
#include "cpu/kernels/many_rows_amx-inl.h"
#endif

// Calls f with the types of queries and of keys and values, and the product of a call.
template <typename F>
void by_kernel(const AttentionArgs& a, F f) {
#if defined(__AMX_BF16__)
  // This level is asked for nothing else.
  a.key_scale != nullptr ? f(Bf16{}, E4m3{}, AmxProduct{}) : f(Bf16{}, Bf16{}, AmxProduct{});
#else
  by_type(a.type, [&](auto type) {
    with_product<decltype(type)>(a.D, [&](auto product) {
      a.key_scale != nullptr ? f(type, E4m3{}, product) : f(type, type, product);
    });
  });
#endif
}

// Keys in e4m3 are multiplied as they are; the factor of their head goes into the scale.
AttentionArgs scaled_for(const AttentionArgs& a, const AttentionUnit& u) {
  AttentionArgs scaled = a;
  if (a.key_scale != nullptr) scaled.scale *= a.key_scale[u.kv_head];
  return scaled;
}

template <typename T, typename M, int R = 1>
void run_rows(const AttentionArgs& a, const AttentionUnit& u, const float* query, float* scratch) {
  if constexpr (kTileRegisters || R > kFewRows) {
    run_many_rows<T, M>(a, u, query, scratch);
  } else if (u.row_end - u.row_begin == R) {
    run_few_rows<T, M, R>(a, u, query, scratch);
  } else {
    run_rows<T, M, R + 1>(a, u, query, scratch);
  }
}

template <typename T>
const T* query_row(const AttentionArgs& a, const AttentionUnit& u, int64_t r) {
  const int64_t G = a.Hq / a.Hkv;
  const auto [batch, row] = unit_row(u, r);
  return static_cast<const T*>(a.query) + batch * a.q_stride[0] +
         (u.kv_head * G + row % G) * a.q_stride[1] + token_of(a, u, row) * a.q_stride[2];
}

void run_unit(const AttentionArgs& args, const AttentionUnit& u, float* scratch) {
  const AttentionArgs a = scaled_for(args, u);
  by_kernel(a, [&](auto type, auto cached, auto product) {
    using T = decltype(type);
    pack_query<T, decltype(product)>(u.row_end - u.row_begin, a.D, scratch,
                                     [&](int64_t r) { return query_row<T>(a, u, r); });
    float* rest = scratch + query_floats(u.row_end - u.row_begin, a.D);
    run_rows<decltype(cached), decltype(product)>(a, u, scratch, rest);
  });
}

void merge_units(const AttentionArgs& a, const AttentionUnit* units, int64_t count) {
  by_type(a.type, [&](auto type) {
    if (row_after_row(units[0].row_end - units[0].row_begin))
      merge_few_rows<decltype(type)>(a, units, count);
    else
      merge_many_rows<decltype(type)>(a, units, count);
  });
}

void run_shared(const AttentionArgs& args, const AttentionUnit& u, float* scratch) {
  const AttentionArgs a = scaled_for(args, u);
  by_kernel(a, [&](auto type, auto cached, auto product) {
    using T = decltype(type);
    const int64_t rows = u.rows();
    pack_many_rows<T, decltype(product)>(rows, a.D, scratch,
                                         [&](int64_t r) { return query_row<T>(a, u, r); });
    float* rest = scratch + query_floats(rows, a.D);
    const int64_t ld = few_rows_stride(a.D);
    if (row_after_row(rows)) {
      if (u.begun != nullptr)
        for (int64_t r = 0; r < rows; ++r)
          __builtin_memcpy(u.partial + r * ld, u.begun[r].out(ld), sizeof(float) * ld);
      return run_many_rows<decltype(cached), decltype(product)>(a, u, scratch, rest);
    }
    AttentionUnit lanes = u;
    lanes.partial = scratch + scratch_floats(rows, a.D);
    if (u.begun != nullptr)
      pack_many_rows<float, Fp32Product>(rows, a.D, lanes.partial,
                                         [&](int64_t r) { return u.begun[r].out(ld); });
    run_many_rows<decltype(cached), decltype(product)>(a, lanes, scratch, rest);
    transpose_partial(lanes.partial, rows, a.D, u.partial);
  });
}

void merge_shared(const AttentionArgs& a, int64_t batch, const AttentionUnit* units,
                  const SharedPiece* pieces, int64_t count) {
  by_type(a.type, [&](auto type) {
    merge_rows<decltype(type)>(a, batch, units[pieces[0].unit], count, [&](int64_t r) {
      return [=](int64_t s) {
        const AttentionUnit& u = units[pieces[s].unit];
        return RowPartial{u.partial, u.rows(), pieces[s].place * (u.row_end - u.row_begin) + r};
      };
    });
  });
}

void run_path(const AttentionArgs& args, const PathRows& p, float* scratch) {
  AttentionArgs a = args;  // along a path, what a node sees is what came before it
  a.tree_mask = nullptr;
  a.depths = nullptr;
  const int64_t G = a.Hq / a.Hkv, rows = p.own->row_end - p.own->row_begin;
  // What shared units have of a row, stretch after stretch.
  const auto shared_of = [&](int64_t r) {
    const int64_t row = p.own->row_begin + r, packed = token_of(a, *p.own, row) * G + row % G;
    const AttentionUnit* first = p.shared + packed / p.block_rows;
    return [=, blocks = p.blocks, place = packed % p.block_rows](int64_t stretch) {
      const AttentionUnit& u = first[stretch * blocks];
      return RowPartial{u.partial, u.row_end - u.row_begin, place};
    };
  };
  RowPartial begun[kPathRows];
  for (int64_t r = 0; p.continues && r < rows; ++r) begun[r] = shared_of(r)(p.stretches);
  if (p.continues) p.own->begun = begun;
  float* partial = scratch + shared_scratch_floats(rows, a.D);
  for (int64_t i = 0; i < p.num_own; ++i, partial += partial_floats(rows, a.D)) {
    p.own[i].partial = partial;
    run_shared(a, p.own[i], scratch);
  }
  by_type(a.type, [&](auto type) {
    merge_rows<decltype(type)>(a, p.own->batch, *p.own, p.stretches + p.num_own, [&](int64_t r) {
      return [&, r, shared = shared_of(r)](int64_t s) {
        if (s < p.stretches) return shared(s);
        return RowPartial{p.own[s - p.stretches].partial, rows, r};
      };
    });
  });
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
    for (int64_t d = 0; d < a.D; d += kLanes) {
      const int64_t n = a.D - d < kLanes ? a.D - d : kLanes;
      // An empty side may hold anything; it must not turn into 0 * NaN.
      const f32v from_a = wa > 0.f ? load_wide(out_a + d, n) * wa : f32v{};
      const f32v from_b = wb > 0.f ? load_wide(out_b + d, n) * wb : f32v{};
      store_narrow(out + d, (from_a + from_b) * inverse, n);
    }
  }
}

void merge_pair(const MergeArgs& a, int64_t begin, int64_t end) {
  by_type(a.type, [&](auto type) { merge_pair_typed<decltype(type)>(a, begin, end); });
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {run_unit,   merge_units,  merge_pair,
                                            run_shared, merge_shared, run_path};

}  // namespace branchwise::BW_ISA
