// page_summaries, score_pages and attention_mass: what a KV policy looks at.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/score_call.h"
#include "cpu/empty.h"
#include "cpu/isa.h"
#include "cpu/kernels/score_kernel.h"
#include "cpu/workers.h"

namespace branchwise {
namespace {

constexpr int64_t kKeysPerUnit = 16 * kKeyTile;
constexpr int64_t kRowsPerLse = 48;  // query rows of one pass over the keys

// Four rows of e4m3 took tile registers 0.9 to 1.2 of the vectors' time, 16 rows 0.2 (measured);
// of bf16, so few are limited by memory anyway.
const ScoreKernels& kernels_for(const ScoreArgs& args, int64_t rows) {
#if defined(__x86_64__)
  if (current_isa() == Isa::amx_bf16 && args.type == DType::bf16 && args.D % 32 == 0 && rows > 8)
    return amx_bf16::score_kernels;
#endif
  return BW_KERNELS(score_kernels);
}

// Runs units, each over its keys; those of one head lie together.
void run_units(const ScoreArgs& args, const std::vector<ScoreUnit>& units, int64_t most_rows,
               bool lse) {
  const ScoreKernels& k = kernels_for(args, most_rows);
  int64_t work = 0;
  for (const ScoreUnit& u : units) work += (u.end - u.begin) * (u.tokens * u.heads + 4) * args.D;
  run_guided(static_cast<int64_t>(units.size()), score_scratch(most_rows, args.D), work < (1 << 18),
             [&](int64_t i, float* scratch) {
               (lse ? k.row_lse : k.reduce_rows)(args, units[i], scratch);
             });
}

// The logits' log-sum-exp of every query row, f32[B, Hq, T], over keys [0, end(b, h)).
template <typename F>
std::vector<float> lse_of_rows(ScoreArgs args, int64_t B, bool causal, const RowLens* lens,
                               const F& end) {
  std::vector<float> lse(B * args.Hq * args.T);
  std::vector<ScoreUnit> units;
  const int64_t G = args.Hq / args.Hkv, tokens = std::max<int64_t>(1, kRowsPerLse / G);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < args.Hkv; ++h)
      for (int64_t t = 0; t < args.T; t += tokens)
        units.push_back({static_cast<int32_t>(b), static_cast<int32_t>(h), static_cast<int32_t>(t),
                         static_cast<int32_t>(std::min(tokens, args.T - t)), 0,
                         static_cast<int32_t>(G), 0, end(b, h), causal ? lens->at(b, h) : kSeesAll,
                         lse.data() + (b * args.Hq + h * G) * args.T});
  args.lse = nullptr;
  run_units(args, units, std::min(tokens, args.T) * G, true);
  return lse;
}

// Moves the values with a sign bit, the last one of the element in every dtype, from to[0, D) to
// to[D, 2 D).
template <typename Bits>
void split_signs(const Bits* from, int64_t D, Bits* to) {
  for (int64_t d = 0; d < D; ++d) {
    const bool negative = from[d] >> (8 * sizeof(Bits) - 1);
    to[d] = negative ? 0 : from[d];
    to[D + d] = negative ? from[d] : 0;
  }
}

}  // namespace

void page_summaries(Tensor key_cache, Tensor begin, Tensor end, Tensor summaries, int64_t page_size,
                    std::optional<Tensor> segment_offsets, std::optional<Tensor> page_table) {
  const char* op = "page_summaries";
  const SummaryCall call = check_page_summaries(op, key_cache, begin, end, summaries, page_size,
                                                segment_offsets, page_table);
  const CacheShape& shape = call.shape;
  const RowLens &from = call.from, &to = call.to;
  const int32_t* offsets = call.offsets;
  const int64_t B = summaries.size(0), Hkv = shape.Hkv, D = shape.D, N = summaries.size(2);
  const KvLayout layout = layout_of(key_cache, page_table);
  // Units [first, last) of a row and head: pages that slots were added to, or given segments.
  const auto first = [&](int64_t b, int64_t h) -> int64_t {
    return offsets ? from.at(b, h) : from.at(b, h) / page_size;
  };
  const auto last = [&](int64_t b, int64_t h) -> int64_t {
    return offsets ? to.at(b, h) : (to.at(b, h) + page_size - 1) / page_size;
  };
  const auto slots = [&](int64_t b, int64_t h, int64_t n) -> std::pair<int64_t, int64_t> {
    if (offsets == nullptr)
      return {n * page_size, std::min<int64_t>((n + 1) * page_size, to.at(b, h))};
    const int32_t* at = offsets + (b * Hkv + h) * (N + 1) + n;
    return {at[0], at[1]};
  };
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < Hkv; ++h) {
      if (from.at(b, h) >= to.at(b, h)) continue;
      BW_CHECK(last(b, h) <= N, op, ": summaries has room for N = ", N, " units per head, row ", b,
               " needs ", last(b, h));
      for (int64_t n = first(b, h); n < last(b, h); ++n) {
        const auto [low, high] = slots(b, h, n);
        BW_CHECK(low >= 0 && low <= high && high <= shape.capacity, op, ": segment_offsets[", b,
                 ", ", h, "] goes from ", low, " to ", high, " at ", n,
                 " and must ascend between 0 and ", shape.capacity);
        check_pages(op, layout, shape, b, h, low, high);
      }
    }

  const ScoreKernels& k = BW_KERNELS(score_kernels);
  const DType type = dtype_of(key_cache.scalar_type());
  const int64_t bytes = bytes_of(type), width = summaries.size(3);
  const bool e4m3 = summaries.scalar_type() == ScalarType::Float8_e4m3fn;
  const char* keys = static_cast<const char*>(key_cache.const_data_ptr());
  char* out = static_cast<char*>(summaries.mutable_data_ptr());
  const int64_t out_bytes = width * (e4m3 ? 1 : bytes);
  int64_t most = 0;
  for (int64_t b = 0; b < B; ++b) most = std::max<int64_t>(most, last(b, 0) - first(b, 0));
  const int64_t grain = most > 16 ? 1 : B * Hkv;
  torch::stable::parallel_for(0, B * Hkv, grain, [&](int64_t first_item, int64_t last_item) {
    std::vector<const void*> rows;
    for (int64_t i = first_item; i < last_item; ++i) {
      const int64_t b = i / Hkv, h = i % Hkv;
      if (from.at(b, h) >= to.at(b, h)) continue;
      for (int64_t n = first(b, h); n < last(b, h); ++n) {
        const auto [low, high] = slots(b, h, n);
        rows.clear();
        for (int64_t slot = low; slot < high; ++slot)
          rows.push_back(keys + layout.offset(b, h, slot) * bytes);
        char* to_row = out + (i * N + n) * out_bytes;
        if (rows.empty())
          std::fill(to_row, to_row + out_bytes, 0);
        else
          k.summarise(type, rows.data(), high - low, D, call.kind, e4m3, to_row);
      }
    }
  });
}

Tensor score_pages(Tensor query, Tensor summaries, Tensor num_pages, int64_t reduce, bool per_token,
                   bool normalize, double scale) {
  const char* op = "score_pages";
  const RowLens pages = check_score_pages(op, query, summaries, num_pages, reduce);
  const int64_t B = query.size(0), Hq = query.size(1), T = query.size(2), D = query.size(3);
  const int64_t Hkv = summaries.size(1), N = summaries.size(2), width = summaries.size(3);
  const int64_t tokens = per_token ? T : 1;
  Tensor out = empty<4>({B, tokens, Hkv, N}, ScalarType::Float);
  float* scores = static_cast<float*>(out.mutable_data_ptr());
  std::fill(scores, scores + B * tokens * Hkv * N, -INFINITY);
  if (B * T * N == 0) return out;

  ScoreArgs args{};
  args.type = dtype_of(query.scalar_type());
  args.query = query.const_data_ptr();
  for (int i = 0; i < 3; ++i) args.q_stride[i] = query.stride(i);
  // The bound sum_d max(q_d max_d, q_d min_d) is the product of (q+, q-) with (max, min).
  std::vector<char> halves;
  if (width == 2 * D) {
    const int64_t bytes = bytes_of(args.type);
    halves.resize(B * Hq * T * width * bytes);
    for (int64_t row = 0; row < B * Hq * T; ++row) {
      const int64_t b = row / (Hq * T), h = row / T % Hq, t = row % T;
      const char* from = static_cast<const char*>(query.const_data_ptr()) +
                         (b * query.stride(0) + h * query.stride(1) + t * query.stride(2)) * bytes;
      char* to = halves.data() + row * width * bytes;
      if (bytes == 2)
        split_signs(reinterpret_cast<const uint16_t*>(from), D, reinterpret_cast<uint16_t*>(to));
      else
        split_signs(reinterpret_cast<const uint32_t*>(from), D, reinterpret_cast<uint32_t*>(to));
    }
    args.query = halves.data();
    args.q_stride[0] = Hq * T * width;
    args.q_stride[1] = T * width;
    args.q_stride[2] = width;
  }
  args.keys = summaries.const_data_ptr();
  args.e4m3_keys = summaries.scalar_type() == ScalarType::Float8_e4m3fn;
  args.layout = layout_of(summaries, std::nullopt);
  args.Hq = Hq;
  args.Hkv = Hkv;
  args.T = T;
  args.D = width;
  args.scale = static_cast<float>(scale);
  args.take_max = reduce == 1;
  std::vector<float> lse;
  if (normalize) {
    lse =
        lse_of_rows(args, B, false, nullptr, [&](int64_t b, int64_t h) { return pages.at(b, h); });
    args.lse = lse.data();
  }
  std::vector<ScoreUnit> units;
  const int32_t heads = static_cast<int32_t>(Hq / Hkv);
  const int32_t together = static_cast<int32_t>(per_token ? 1 : T);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < Hkv; ++h)
      for (int64_t begin = 0; begin < pages.at(b, h); begin += kKeysPerUnit)
        for (int64_t t = 0; t < tokens; ++t)
          units.push_back({static_cast<int32_t>(b), static_cast<int32_t>(h),
                           static_cast<int32_t>(t), together, 0, heads, begin,
                           std::min<int64_t>(begin + kKeysPerUnit, pages.at(b, h)), kSeesAll,
                           scores + ((b * tokens + t) * Hkv + h) * N + begin});
  run_units(args, units, together * heads, false);
  return out;
}

Tensor attention_mass(Tensor query, Tensor key_cache, Tensor seq_lens, std::optional<Tensor> lse,
                      std::optional<Tensor> weights, std::optional<Tensor> page_table,
                      int64_t reduce, bool per_query_head, bool per_token,
                      std::optional<double> scale, double softcap) {
  const char* op = "attention_mass";
  const MassCall call = check_attention_mass(op, query, key_cache, seq_lens, lse, weights,
                                             page_table, reduce, softcap);
  const RowLens& lens = call.lens;
  const int64_t B = query.size(0), Hq = query.size(1), T = query.size(2), D = query.size(3);
  const int64_t Hkv = call.shape.Hkv;
  ScoreArgs args{};
  args.layout = layout_of(key_cache, page_table);
  args.lse = call.lse;
  args.weights = call.weights;
  const int64_t Ho = per_query_head ? Hq : Hkv, S = call.shape.capacity;
  const int64_t tokens = per_token ? T : 1;
  Tensor out = empty<4>({B, tokens, Ho, S}, ScalarType::Float);
  float* mass = static_cast<float*>(out.mutable_data_ptr());
  std::fill(mass, mass + B * tokens * Ho * S, 0.f);
  if (B * T == 0) return out;
  args.type = dtype_of(query.scalar_type());
  args.query = query.const_data_ptr();
  for (int i = 0; i < 3; ++i) args.q_stride[i] = query.stride(i);
  args.keys = key_cache.const_data_ptr();
  args.Hq = Hq;
  args.Hkv = Hkv;
  args.T = T;
  args.D = D;
  args.scale = static_cast<float>(scale ? *scale : 1.0 / std::sqrt(static_cast<double>(D)));
  args.softcap = static_cast<float>(softcap);
  args.take_max = reduce == 1;
  const auto end = [&](int64_t b, int64_t h) -> int64_t { return lens.at(b, h) + T; };
  std::vector<float> computed;
  if (!lse) {
    computed = lse_of_rows(args, B, true, &lens, end);
    args.lse = computed.data();
  }
  std::vector<ScoreUnit> units;
  const int64_t G = Hq / Hkv, together = per_query_head ? 1 : G;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < Hkv; ++h)
      for (int64_t begin = 0; begin < end(b, h); begin += kKeysPerUnit)
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t g = 0; g < G; g += together) {
            const int64_t head = per_query_head ? h * G + g : h;
            units.push_back({static_cast<int32_t>(b), static_cast<int32_t>(h),
                             static_cast<int32_t>(t), static_cast<int32_t>(T / tokens),
                             static_cast<int32_t>(g), static_cast<int32_t>(together), begin,
                             std::min(begin + kKeysPerUnit, end(b, h)), lens.at(b, h),
                             mass + ((b * tokens + t) * Ho + head) * S + begin});
          }
  run_units(args, units, T / tokens * together, false);
  return out;
}

}  // namespace branchwise

STABLE_TORCH_LIBRARY_IMPL(branchwise, CPU, m) {
  m.impl("page_summaries", TORCH_BOX(&branchwise::page_summaries));
  m.impl("score_pages", TORCH_BOX(&branchwise::score_pages));
  m.impl("attention_mass", TORCH_BOX(&branchwise::attention_mass));
}
