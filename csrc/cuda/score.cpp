// CUDA binding of the ops that KV policies use: checks of shapes, launches. Lists have as many
// entries as there could be, as their lengths are on the device.
#include "cuda/kernels/score.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <tuple>

#include "common/score_call.h"
#include "cuda/cache_ref.h"
#include "cuda/plan.h"
#include "cuda/stream.h"

namespace branchwise {
namespace {

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// What score_pages and attention_mass have in common.
cuda::ScoreLaunch score_launch(const Tensor& query, const cuda::CacheRef& keys, int64_t Hkv,
                               const RowLens& lens, int64_t reduce, bool per_token, double scale) {
  cuda::ScoreLaunch launch{};
  launch.query = query.const_data_ptr();
  for (int i = 0; i < 3; ++i) launch.q_stride[i] = query.stride(i);
  launch.keys = keys;
  launch.lens = cuda::lengths_of(lens);
  launch.type = dtype_of(query.scalar_type());
  launch.B = query.size(0);
  launch.Hq = query.size(1);
  launch.Hkv = Hkv;
  launch.T = query.size(2);
  launch.scale = static_cast<float>(scale);
  launch.take_max = reduce == 1;
  launch.per_token = per_token;
  launch.S = keys.capacity;
  return launch;
}

Tensor run_score(const char* op, const Tensor& query, cuda::ScoreLaunch& launch, bool needs_lse,
                 const OnDevice& device) {
  const int64_t heads = launch.per_query_head ? launch.Hq : launch.Hkv;
  Tensor out = torch::stable::new_empty(
      query, {launch.B, launch.per_token ? launch.T : 1, heads, launch.S}, ScalarType::Float);
  launch.out = data<float>(out);
  Tensor lse = torch::stable::new_empty(query, {needs_lse ? launch.B * launch.Hq * launch.T : 0},
                                        ScalarType::Float);
  if (needs_lse) {
    check_launch(op, cuda::row_lse(launch, data<float>(lse), device.stream()));
    launch.lse = data<float>(lse);
  }
  check_launch(op, cuda::score_keys(launch, device.stream()));
  return out;
}

}  // namespace

void page_summaries_cuda(Tensor key_cache, Tensor begin, Tensor end, Tensor summaries,
                         int64_t page_size, std::optional<Tensor> segment_offsets,
                         std::optional<Tensor> page_table) {
  const char* op = "page_summaries";
  const OnDevice device(op, key_cache,
                        {{"begin", &begin},
                         {"end", &end},
                         {"summaries", &summaries},
                         {"segment_offsets", if_given(segment_offsets)},
                         {"page_table", if_given(page_table)}});
  const SummaryCall call = check_page_summaries(op, key_cache, begin, end, summaries, page_size,
                                                segment_offsets, page_table);
  const int64_t B = summaries.size(0);
  check_launch(
      op, cuda::page_summaries(
              {cuda::cache_ref(op, key_cache, B, page_table), dtype_of(key_cache.scalar_type()),
               cuda::lengths_of(call.from), cuda::lengths_of(call.to), call.offsets, page_size, B,
               call.shape.Hkv, summaries.size(2), call.kind == Summary::min_max,
               summaries.mutable_data_ptr(), summaries.scalar_type() == ScalarType::Float8_e4m3fn},
              device.stream()));
}

Tensor score_pages_cuda(Tensor query, Tensor summaries, Tensor num_pages, int64_t reduce,
                        bool per_token, bool normalize, double scale) {
  const char* op = "score_pages";
  const OnDevice device(op, query, {{"summaries", &summaries}, {"num_pages", &num_pages}});
  const RowLens pages = check_score_pages(op, query, summaries, num_pages, reduce);
  cuda::ScoreLaunch launch =
      score_launch(query, cuda::cache_ref(op, summaries, query.size(0), std::nullopt),
                   summaries.size(1), pages, reduce, per_token, scale);
  launch.e4m3_keys = summaries.scalar_type() == ScalarType::Float8_e4m3fn;
  launch.bound = summaries.size(3) != query.size(3);
  launch.nothing = -INFINITY;
  return run_score(op, query, launch, normalize, device);
}

Tensor attention_mass_cuda(Tensor query, Tensor key_cache, Tensor seq_lens,
                           std::optional<Tensor> lse, std::optional<Tensor> weights,
                           std::optional<Tensor> page_table, int64_t reduce, bool per_query_head,
                           bool per_token, std::optional<double> scale, double softcap) {
  const char* op = "attention_mass";
  const OnDevice device(op, query,
                        {{"key_cache", &key_cache},
                         {"seq_lens", &seq_lens},
                         {"lse", if_given(lse)},
                         {"weights", if_given(weights)},
                         {"page_table", if_given(page_table)}});
  const MassCall call = check_attention_mass(op, query, key_cache, seq_lens, lse, weights,
                                             page_table, reduce, softcap);
  cuda::ScoreLaunch launch = score_launch(
      query, cuda::cache_ref(op, key_cache, query.size(0), page_table), call.shape.Hkv, call.lens,
      reduce, per_token, scale ? *scale : 1.0 / std::sqrt(static_cast<double>(query.size(3))));
  launch.added = launch.T;
  launch.causal = true;
  launch.softcap = static_cast<float>(softcap);
  launch.lse = call.lse;
  launch.weights = call.weights;
  launch.per_query_head = per_query_head;
  return run_score(op, query, launch, call.lse == nullptr, device);
}

std::tuple<Tensor, Tensor> select_pages_cuda(Tensor scores, Tensor num_pages, Tensor num_scored,
                                             Tensor budgets, int64_t num_sinks) {
  const char* op = "select_pages";
  const OnDevice device(
      op, scores, {{"num_pages", &num_pages}, {"num_scored", &num_scored}, {"budgets", &budgets}});
  check_select_pages(op, scores, num_pages, num_scored, budgets, num_sinks);
  const int64_t B = scores.size(0), L = scores.size(1), H = scores.size(2), N = scores.size(3);
  const int64_t width = N > 1 ? N : 1;
  Tensor indices = torch::stable::new_empty(scores, {B, L, H, width}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(scores, {B, L, H}, ScalarType::Int);
  check_launch(op, cuda::select_pages(
                       {data<const float>(scores), data<const int32_t>(num_pages),
                        data<const int32_t>(num_scored), data<const int32_t>(budgets), B * L, H, N,
                        width, num_sinks, data<int32_t>(indices), data<int32_t>(counts)},
                       device.stream()));
  return {indices, counts};
}

std::tuple<Tensor, Tensor> select_slots_cuda(Tensor scores, Tensor segment_offsets,
                                             Tensor num_segments, int64_t budget) {
  const char* op = "select_slots";
  const OnDevice device(op, scores,
                        {{"segment_offsets", &segment_offsets}, {"num_segments", &num_segments}});
  check_select_slots(op, scores, segment_offsets, num_segments, budget);
  const int64_t B = scores.size(0), L = scores.size(1), H = scores.size(2), S = scores.size(3);
  const int64_t width = budget > 1 ? budget : 1;
  BW_CHECK(budget <= INT32_MAX, op, ": budget must be at most 2^31 - 1, got ", budget);
  BW_CHECK(cuda::select_slots_bytes(S) <= cuda::kMostSharedBytes, op, ": S = ", S,
           " segments need ", cuda::select_slots_bytes(S),
           " bytes of a block's shared memory on CUDA, and there are ", cuda::kMostSharedBytes);
  Tensor indices = torch::stable::new_empty(scores, {B, L, H, width}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(scores, {B, L, H}, ScalarType::Int);
  check_launch(op,
               cuda::select_slots({data<const float>(scores), data<const int32_t>(segment_offsets),
                                   data<const int32_t>(num_segments), B, L, H, S, budget, width,
                                   data<int32_t>(indices), data<int32_t>(counts)},
                                  device.stream()));
  return {indices, counts};
}

void evict_kv_cuda(Tensor key_cache, Tensor value_cache, Tensor keep, Tensor counts,
                   std::optional<Tensor> page_table) {
  const char* op = "evict_kv";
  const OnDevice device(op, key_cache,
                        {{"value_cache", &value_cache},
                         {"keep", &keep},
                         {"counts", &counts},
                         {"page_table", if_given(page_table)}});
  const CacheShape shape = check_evict(op, key_cache, value_cache, keep, counts, page_table);
  const int64_t B = keep.size(0);
  check_launch(op, cuda::evict_kv({{cuda::cache_ref(op, key_cache, B, page_table),
                                    cuda::cache_ref(op, value_cache, B, page_table)},
                                   data<const int32_t>(keep),
                                   data<const int32_t>(counts),
                                   B,
                                   shape.Hkv,
                                   keep.size(1),
                                   keep.size(2)},
                                  device.stream()));
}

void rerotate_keys_cuda(Tensor key_cache, Tensor begin, Tensor end, Tensor shift, Tensor inv_freq,
                        std::optional<Tensor> page_table) {
  const char* op = "rerotate_keys";
  const OnDevice device(op, key_cache,
                        {{"begin", &begin},
                         {"end", &end},
                         {"shift", &shift},
                         {"inv_freq", &inv_freq},
                         {"page_table", if_given(page_table)}});
  const auto [shape, from, to] =
      check_rerotate(op, key_cache, begin, end, shift, inv_freq, page_table);
  const int64_t B = shift.size(0);
  check_launch(
      op, cuda::rerotate_keys(
              {cuda::cache_ref(op, key_cache, B, page_table), dtype_of(key_cache.scalar_type()),
               cuda::lengths_of(from), cuda::lengths_of(to), data<const int64_t>(shift),
               data<const float>(inv_freq), B, shape.Hkv, inv_freq.size(0), shape.capacity},
              device.stream()));
}

}  // namespace branchwise

BW_CUDA_LIBRARY(m) {
  m.impl("page_summaries", TORCH_BOX(&branchwise::page_summaries_cuda));
  m.impl("score_pages", TORCH_BOX(&branchwise::score_pages_cuda));
  m.impl("attention_mass", TORCH_BOX(&branchwise::attention_mass_cuda));
  m.impl("select_pages", TORCH_BOX(&branchwise::select_pages_cuda));
  m.impl("select_slots", TORCH_BOX(&branchwise::select_slots_cuda));
  m.impl("evict_kv", TORCH_BOX(&branchwise::evict_kv_cuda));
  m.impl("rerotate_keys", TORCH_BOX(&branchwise::rerotate_keys_cuda));
}
