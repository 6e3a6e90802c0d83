// CUDA binding of fetch_slots.
#include "cuda/kernels/fetch.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "common/fetch_call.h"
#include "cuda/cache_ref.h"
#include "cuda/stream.h"

namespace branchwise {

std::tuple<Tensor, Tensor> fetch_slots_cuda(Tensor key_source, Tensor value_source,
                                            std::optional<Tensor> source_table, Tensor indices,
                                            Tensor counts, int64_t unit, Tensor seq_lens,
                                            int64_t new_tokens, Tensor key_cache,
                                            Tensor value_cache, Tensor page_table, Tensor owners) {
  const char* op = "fetch_slots";
  const OnDevice device(op, key_cache,
                        {{"value_cache", &value_cache},
                         {"source_table", if_given(source_table)},
                         {"indices", &indices},
                         {"counts", &counts},
                         {"seq_lens", &seq_lens},
                         {"page_table", &page_table},
                         {"owners", &owners}});
  const FetchCall f =
      check_fetch_slots(op, key_source, value_source, source_table, indices, counts, unit, seq_lens,
                        new_tokens, key_cache, value_cache, page_table, owners);
  for (const auto& [name, source] :
       {std::pair{"key_source", &key_source}, {"value_source", &value_source}})
    BW_CHECK(source->numel() == 0 || cuda::can_read(source->const_data_ptr()), op, ": ", name,
             " must be on the GPU or in pinned memory, as kernels read it");
  Tensor needed = torch::stable::new_empty(owners, {f.B, f.Hkv});
  Tensor copied = torch::stable::new_empty(owners, {f.B, f.Hkv});
  Tensor wanted = torch::stable::new_empty(owners, {f.B * f.Hkv, cuda::fetch_words(f.pages)});
  Tensor moves = torch::stable::new_empty(owners, {f.B * f.Hkv, 2, f.slots});
  const auto data = [](const Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); };
  check_launch(op,
               cuda::fetch_slots({{cuda::cache_ref(op, key_source, f.B, source_table),
                                   cuda::cache_ref(op, value_source, f.B, source_table)},
                                  {key_cache.mutable_data_ptr(), value_cache.mutable_data_ptr()},
                                  cuda::lengths_of(f.lens),
                                  f.B,
                                  f.Hkv,
                                  f.T,
                                  f.tokens,
                                  f.heads,
                                  f.width,
                                  f.unit,
                                  f.page_size,
                                  f.slots,
                                  f.pages,
                                  f.table_pages,
                                  f.indices,
                                  f.counts,
                                  f.table,
                                  f.owners,
                                  data(needed),
                                  data(copied),
                                  reinterpret_cast<uint32_t*>(data(wanted)),
                                  data(moves)},
                                 device.stream()));
  return {needed, copied};
}

}  // namespace branchwise

BW_CUDA_LIBRARY(m) { m.impl("fetch_slots", TORCH_BOX(&branchwise::fetch_slots_cuda)); }
