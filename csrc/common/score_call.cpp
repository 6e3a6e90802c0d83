#include "common/score_call.h"

#include <cmath>

namespace branchwise {
namespace {

struct QueryShape {
  int64_t B, Hq, T, D;
};

QueryShape check_query(const char* op, const Tensor& query) {
  check_dim(op, "query", query, 4, "[B, Hq, T, D]");
  check_float_dtype(op, "query", query);
  check_last_contiguous(op, "query", query);
  return {query.size(0), query.size(1), query.size(2), query.size(3)};
}

// Summaries have the dtype of what they are made of or met by, or are in e4m3.
void check_summary_dtype(const char* op, const Tensor& summaries, ScalarType type) {
  BW_CHECK(summaries.scalar_type() == type || summaries.scalar_type() == ScalarType::Float8_e4m3fn,
           op, ": summaries must be ", name_of(type), " or float8_e4m3fn, got ",
           name_of(summaries.scalar_type()));
}

void check_reduce(const char* op, int64_t reduce) {
  BW_CHECK(reduce == 0 || reduce == 1, op, ": reduce must be 0 (sum) or 1 (max), got ", reduce);
}

}  // namespace

SummaryCall check_page_summaries(const char* op, const Tensor& key_cache, const Tensor& begin,
                                 const Tensor& end, const Tensor& summaries, int64_t page_size,
                                 const std::optional<Tensor>& segment_offsets,
                                 const std::optional<Tensor>& page_table) {
  check_float_dtype(op, "key_cache", key_cache);
  check_dim(op, "summaries", summaries, 4, "[B, Hkv, N, D or 2 D]");
  check_summary_dtype(op, summaries, key_cache.scalar_type());
  check_contiguous(op, "summaries", summaries);
  const int64_t B = summaries.size(0);
  const CacheShape shape = check_cache(op, "key_cache", key_cache, B, page_table);
  const int64_t Hkv = shape.Hkv, D = shape.D, N = summaries.size(2);
  check_size(op, "summaries", summaries, 1, Hkv, "Hkv");
  BW_CHECK(summaries.size(3) == D || summaries.size(3) == 2 * D, op,
           ": summaries.size(3) must be D (mean) or 2 D (max and min), with D = ", D,
           ", got shape ", shape_of(summaries));
  const Summary kind = summaries.size(3) == D ? Summary::mean : Summary::min_max;
  const RowLens from = check_seq_lens(op, begin, B, 0, shape, "begin");
  const RowLens to = check_seq_lens(op, end, B, 0, shape, "end");
  const int32_t* offsets = nullptr;
  if (segment_offsets) {
    check_dim(op, "segment_offsets", *segment_offsets, 3, "[B, Hkv, N + 1]");
    check_size(op, "segment_offsets", *segment_offsets, 0, B, "B");
    check_size(op, "segment_offsets", *segment_offsets, 1, Hkv, "Hkv");
    check_size(op, "segment_offsets", *segment_offsets, 2, N + 1, "N + 1");
    check_dtype(op, "segment_offsets", *segment_offsets, ScalarType::Int);
    check_contiguous(op, "segment_offsets", *segment_offsets);
    offsets = static_cast<const int32_t*>(segment_offsets->const_data_ptr());
  } else {
    BW_CHECK(page_size >= 1, op, ": page_size must be at least 1, got ", page_size);
  }
  return {shape, from, to, kind, offsets};
}

RowLens check_score_pages(const char* op, const Tensor& query, const Tensor& summaries,
                          const Tensor& num_pages, int64_t reduce) {
  const auto [B, Hq, T, D] = check_query(op, query);
  check_reduce(op, reduce);
  check_dim(op, "summaries", summaries, 4, "[B, Hkv, N, D or 2 D]");
  check_summary_dtype(op, summaries, query.scalar_type());
  check_last_contiguous(op, "summaries", summaries);
  check_size(op, "summaries", summaries, 0, B, "B");
  const int64_t Hkv = summaries.size(1), N = summaries.size(2), width = summaries.size(3);
  BW_CHECK(Hkv > 0 && Hq % Hkv == 0, op, ": query heads Hq = ", Hq,
           " must be a multiple of the KV heads Hkv = ", Hkv);
  BW_CHECK(width == D || width == 2 * D, op, ": summaries.size(3) must be D or 2 D with D = ", D,
           ", got shape ", shape_of(summaries));
  BW_CHECK(D >= 1 && width <= kMaxHeadDim, op, ": summaries.size(3) = ", width,
           " must lie between 1 and ", kMaxHeadDim);
  return check_seq_lens(op, num_pages, B, 0, {Hkv, D, N, N, B}, "num_pages");
}

MassCall check_attention_mass(const char* op, const Tensor& query, const Tensor& key_cache,
                              const Tensor& seq_lens, const std::optional<Tensor>& lse,
                              const std::optional<Tensor>& weights,
                              const std::optional<Tensor>& page_table, int64_t reduce,
                              double softcap) {
  const auto [B, Hq, T, D] = check_query(op, query);
  check_reduce(op, reduce);
  check_dtype(op, "key_cache", key_cache, query.scalar_type());
  const CacheShape shape = check_cache(op, "key_cache", key_cache, B, page_table);
  const int64_t Hkv = shape.Hkv;
  check_size(op, "key_cache", key_cache, 3, D, "D of query");
  BW_CHECK(D >= 1 && D <= kMaxHeadDim, op, ": query.size(3) = ", D,
           " must be a head dim between 1 and ", kMaxHeadDim);
  BW_CHECK(Hkv > 0 && Hq % Hkv == 0, op, ": query heads Hq = ", Hq,
           " must be a multiple of the KV heads Hkv = ", Hkv);
  BW_CHECK(softcap >= 0 && std::isfinite(softcap), op,
           ": softcap must be 0 (none) or positive, got ", softcap);
  const RowLens lens = check_seq_lens(op, seq_lens, B, T, shape);
  check_all_pages(op, layout_of(key_cache, page_table), shape, lens, B, T);
  MassCall call{shape, lens, nullptr, nullptr};
  if (lse) {
    check_dim(op, "lse", *lse, 3, "[B, Hq, T]");
    for (int i = 0; i < 3; ++i) check_size(op, "lse", *lse, i, query.size(i), "that of query");
    check_dtype(op, "lse", *lse, ScalarType::Float);
    check_contiguous(op, "lse", *lse);
    call.lse = static_cast<const float*>(lse->const_data_ptr());
  }
  if (weights) {
    check_nodes(op, "weights", *weights, B, T, ScalarType::Float);
    call.weights = static_cast<const float*>(weights->const_data_ptr());
    for (int64_t i = 0; kChecksValues && i < B * T; ++i)
      BW_CHECK(call.weights[i] >= 0, op, ": weights[", i / T, ", ", i % T, "] = ", call.weights[i],
               " must not be negative");
  }
  return call;
}

void check_select_pages(const char* op, const Tensor& scores, const Tensor& num_pages,
                        const Tensor& num_scored, const Tensor& budgets, int64_t num_sinks) {
  check_dim(op, "scores", scores, 4, "[B, L, Hs, N]");
  check_dtype(op, "scores", scores, ScalarType::Float);
  check_contiguous(op, "scores", scores);
  const int64_t B = scores.size(0), L = scores.size(1);
  check_dim(op, "budgets", budgets, 3, "[B, L, Hs]");
  for (int i = 0; i < 3; ++i)
    check_size(op, "budgets", budgets, i, scores.size(i), "that of scores");
  check_dtype(op, "budgets", budgets, ScalarType::Int);
  check_contiguous(op, "budgets", budgets);
  check_nodes(op, "num_pages", num_pages, B, L, ScalarType::Int);
  check_nodes(op, "num_scored", num_scored, B, L, ScalarType::Int);
  BW_CHECK(num_sinks >= 0, op, ": num_sinks must not be negative, got ", num_sinks);
}

void check_select_slots(const char* op, const Tensor& scores, const Tensor& segment_offsets,
                        const Tensor& num_segments, int64_t budget) {
  check_dim(op, "scores", scores, 4, "[B, L, Hs, S]");
  check_dtype(op, "scores", scores, ScalarType::Float);
  check_contiguous(op, "scores", scores);
  const int64_t B = scores.size(0), H = scores.size(2), S = scores.size(3);
  BW_CHECK(budget >= 0, op, ": budget must not be negative, got ", budget);
  check_dim(op, "segment_offsets", segment_offsets, 3, "[B, Hs, S + 1]");
  check_size(op, "segment_offsets", segment_offsets, 0, B, "B");
  check_size(op, "segment_offsets", segment_offsets, 1, H, "Hs");
  check_size(op, "segment_offsets", segment_offsets, 2, S + 1, "S + 1");
  check_dtype(op, "segment_offsets", segment_offsets, ScalarType::Int);
  check_contiguous(op, "segment_offsets", segment_offsets);
  check_nodes(op, "num_segments", num_segments, B, scores.size(1), ScalarType::Int);
}

CacheShape check_evict(const char* op, const Tensor& key_cache, const Tensor& value_cache,
                       const Tensor& keep, const Tensor& counts,
                       const std::optional<Tensor>& page_table) {
  check_float_dtype(op, "key_cache", key_cache);
  check_dtype(op, "value_cache", value_cache, key_cache.scalar_type());
  check_dim(op, "keep", keep, 3, "[B, Hs, K]");
  check_dtype(op, "keep", keep, ScalarType::Int);
  check_contiguous(op, "keep", keep);
  const int64_t B = keep.size(0), Hs = keep.size(1);
  check_dim(op, "counts", counts, 2, "[B, Hs]");
  check_size(op, "counts", counts, 0, B, "B");
  check_size(op, "counts", counts, 1, Hs, "Hs");
  check_dtype(op, "counts", counts, ScalarType::Int);
  check_contiguous(op, "counts", counts);
  const CacheShape shape = check_cache(op, "key_cache", key_cache, B, page_table);
  const CacheShape value_shape = check_cache(op, "value_cache", value_cache, B, page_table);
  BW_CHECK(value_shape.Hkv == shape.Hkv && value_shape.capacity == shape.capacity &&
               value_shape.pages == shape.pages,
           op, ": value_cache must have the heads and slots of key_cache, got ",
           shape_of(value_cache), " and ", shape_of(key_cache));
  BW_CHECK(Hs == 1 || Hs == shape.Hkv, op, ": keep.size(1) must be 1 or Hkv = ", shape.Hkv,
           ", got shape ", shape_of(keep));
  return shape;
}

RerotateCall check_rerotate(const char* op, const Tensor& key_cache, const Tensor& begin,
                            const Tensor& end, const Tensor& shift, const Tensor& inv_freq,
                            const std::optional<Tensor>& page_table) {
  check_float_dtype(op, "key_cache", key_cache);
  check_dim(op, "shift", shift, 1, "[B]");
  check_dtype(op, "shift", shift, ScalarType::Long);
  check_contiguous(op, "shift", shift);
  const int64_t B = shift.size(0);
  const CacheShape shape = check_cache(op, "key_cache", key_cache, B, page_table);
  const RowLens from = check_seq_lens(op, begin, B, 0, shape, "begin");
  const RowLens to = check_seq_lens(op, end, B, 0, shape, "end");
  check_dim(op, "inv_freq", inv_freq, 1, "[R / 2]");
  check_dtype(op, "inv_freq", inv_freq, ScalarType::Float);
  check_contiguous(op, "inv_freq", inv_freq);
  const int64_t half = inv_freq.size(0);
  BW_CHECK(2 * half <= shape.D, op, ": inv_freq.size(0) = ", half,
           " must be at most half of D = ", shape.D);
  const KvLayout layout = layout_of(key_cache, page_table);
  for (int64_t b = 0; kChecksValues && b < B; ++b)
    for (int64_t h = 0; h < shape.Hkv; ++h)
      check_pages(op, layout, shape, b, h, from.at(b, h), to.at(b, h));
  return {shape, from, to};
}

}  // namespace branchwise
