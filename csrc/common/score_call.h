// The arguments of the ops that KV policies use, and their checks: of shapes everywhere, of values
// where they are at hand and not checked along with the work.
#pragma once
#include <optional>

#include "common/attention_args.h"
#include "common/kv_args.h"
#include "common/summary.h"

namespace branchwise {

struct SummaryCall {
  CacheShape shape;
  RowLens from, to;
  Summary kind;
  const int32_t* offsets;  // of segments, or null
};
SummaryCall check_page_summaries(const char* op, const Tensor& key_cache, const Tensor& begin,
                                 const Tensor& end, const Tensor& summaries, int64_t page_size,
                                 const std::optional<Tensor>& segment_offsets,
                                 const std::optional<Tensor>& page_table);

// Returns how many pages each row and head has.
RowLens check_score_pages(const char* op, const Tensor& query, const Tensor& summaries,
                          const Tensor& num_pages, int64_t reduce);

struct MassCall {
  CacheShape shape;
  RowLens lens;
  const float *lse, *weights;  // or null
};
MassCall check_attention_mass(const char* op, const Tensor& query, const Tensor& key_cache,
                              const Tensor& seq_lens, const std::optional<Tensor>& lse,
                              const std::optional<Tensor>& weights,
                              const std::optional<Tensor>& page_table, int64_t reduce,
                              double softcap);

void check_select_pages(const char* op, const Tensor& scores, const Tensor& num_pages,
                        const Tensor& num_scored, const Tensor& budgets, int64_t num_sinks);

void check_select_slots(const char* op, const Tensor& scores, const Tensor& segment_offsets,
                        const Tensor& num_segments, int64_t budget);

CacheShape check_evict(const char* op, const Tensor& key_cache, const Tensor& value_cache,
                       const Tensor& keep, const Tensor& counts,
                       const std::optional<Tensor>& page_table);

struct RerotateCall {
  CacheShape shape;
  RowLens from, to;
};
RerotateCall check_rerotate(const char* op, const Tensor& key_cache, const Tensor& begin,
                            const Tensor& end, const Tensor& shift, const Tensor& inv_freq,
                            const std::optional<Tensor>& page_table);

}  // namespace branchwise
