// The schema of every op of branchwise: the table of contents of the library. Shapes, dtypes and
// errors are documented beside the Python wrappers in python/branchwise/ops.
#include <torch/csrc/stable/library.h>

#if defined(BW_EMULATE)
STABLE_TORCH_LIBRARY(branchwise_emulated, m) {
#else
STABLE_TORCH_LIBRARY(branchwise, m) {
#endif

  // Tree family: attention
  m.def(
      "tree_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor seq_lens, Tensor? "
      "tree_mask=None, "
      "Tensor? page_table=None, float? scale=None, int window=0, Tensor? sinks=None, float "
      "softcap=0., Tensor? key_scale=None, Tensor? value_scale=None) -> (Tensor, Tensor)");
  m.def(
      "cascade_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor seq_lens, "
      "Tensor page_table, Tensor? tree_mask=None, float? scale=None, int window=0, Tensor? "
      "sinks=None, float softcap=0., Tensor? key_scale=None, Tensor? value_scale=None) -> (Tensor, "
      "Tensor)");
  m.def(
      "path_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor seq_lens, Tensor? "
      "tree_mask=None, Tensor? page_table=None, float? scale=None, int window=0, Tensor? "
      "sinks=None, float softcap=0., Tensor? key_scale=None, Tensor? value_scale=None) -> (Tensor, "
      "Tensor)");
  m.def(
      "sparse_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor seq_lens, "
      "Tensor? "
      "indices=None, Tensor? counts=None, int unit=1, Tensor? segment_offsets=None, Tensor? "
      "sink_sizes=None, Tensor? recent_sizes=None, Tensor? tree_mask=None, Tensor? "
      "page_table=None, "
      "float? scale=None, Tensor? sinks=None, float softcap=0., Tensor? key_scale=None, Tensor? "
      "value_scale=None) -> (Tensor, Tensor)");
  m.def(
      "rms_norm(Tensor x, Tensor weight, float eps, float offset=0., bool weight_first=False) -> "
      "Tensor");
  m.def("apply_rope(Tensor query, Tensor key, Tensor cos, Tensor sin) -> (Tensor, Tensor)");
  m.def("invariant_linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def(
      "merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, "
      "Tensor)");

  // Tree family: structure, noise, verification
  m.def("build_tree(Tensor parents, Tensor seq_lens) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "node_uniforms(Tensor seeds, Tensor rows, Tensor rounds, Tensor nodes, int purpose) -> "
      "Tensor");
  m.def(
      "verify_greedy(Tensor tokens, Tensor next_token, Tensor next_sibling, Tensor logits, Tensor? "
      "ready=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "verify_sample(Tensor tokens, Tensor next_token, Tensor next_sibling, Tensor logits, Tensor "
      "uniforms, int rule, float temperature=1., float threshold_single=1., float "
      "threshold_accumulated=1., Tensor? ready=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "verify_chain(Tensor tokens, Tensor next_token, Tensor next_sibling, Tensor logits, Tensor "
      "draft, Tensor draft_index, Tensor uniforms, float temperature=1., Tensor? ready=None) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "verify_multi_draft(Tensor tokens, Tensor next_token, Tensor next_sibling, Tensor logits, "
      "Tensor draft, Tensor draft_index, Tensor uniforms, bool replacement, float temperature=1., "
      "Tensor? ready=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "verify_block(Tensor tokens, Tensor next_token, Tensor next_sibling, Tensor logits, Tensor "
      "draft, Tensor draft_index, Tensor uniforms, float temperature=1., Tensor? ready=None) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "verify_traversal(Tensor tokens, Tensor next_token, Tensor next_sibling, Tensor logits, "
      "Tensor draft, Tensor draft_index, Tensor uniforms, bool replacement, float temperature=1., "
      "Tensor? ready=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "verify_typical(Tensor tokens, Tensor next_token, Tensor next_sibling, Tensor logits, Tensor "
      "uniforms, float epsilon, float alpha, float temperature=1., Tensor? ready=None) -> (Tensor, "
      "Tensor, Tensor)");
  m.def(
      "verify_policy(Tensor tokens, Tensor next_token, Tensor next_sibling, Tensor logits, Tensor "
      "uniforms, int policy, float threshold, float alpha, int top_k, bool first_only, float "
      "temperature=1., Tensor? ready=None) -> (Tensor, Tensor, Tensor)");

  // Drafting
  m.def("top_tokens(Tensor logits, int k, Tensor? exclude=None) -> (Tensor, Tensor)");

  // KV storage
  m.def(
      "append_kv(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor "
      "seq_lens, Tensor? "
      "page_table=None, Tensor? cos=None, Tensor? sin=None, Tensor? key_scale=None, Tensor? "
      "value_scale=None) -> ()");
  m.def(
      "commit_kv(Tensor(a!)[] caches, Tensor accepted, Tensor num_accepted, Tensor seq_lens, "
      "Tensor? page_table=None) "
      "-> Tensor");

  // Sparse KV: what to look at, what to attend to, what to keep
  m.def(
      "page_summaries(Tensor key_cache, Tensor begin, Tensor end, Tensor(a!) summaries, int "
      "page_size, Tensor? segment_offsets=None, Tensor? page_table=None) -> ()");
  m.def(
      "score_pages(Tensor query, Tensor summaries, Tensor num_pages, int reduce, bool per_token, "
      "bool normalize=False, float scale=1.) -> Tensor");
  m.def(
      "attention_mass(Tensor query, Tensor key_cache, Tensor seq_lens, Tensor? lse=None, Tensor? "
      "weights=None, Tensor? page_table=None, int reduce=0, bool per_query_head=False, bool "
      "per_token=False, float? scale=None, float softcap=0.) -> Tensor");
  m.def(
      "select_pages(Tensor scores, Tensor num_pages, Tensor num_scored, Tensor budgets, int "
      "num_sinks=0) -> (Tensor, Tensor)");
  m.def(
      "select_slots(Tensor scores, Tensor segment_offsets, Tensor num_segments, int budget) -> "
      "(Tensor, Tensor)");
  m.def(
      "evict_kv(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor keep, Tensor counts, Tensor? "
      "page_table=None) -> ()");
  m.def(
      "rerotate_keys(Tensor(a!) key_cache, Tensor begin, Tensor end, Tensor shift, Tensor "
      "inv_freq, Tensor? page_table=None) -> ()");
  m.def(
      "fetch_slots(Tensor key_source, Tensor value_source, Tensor? source_table, Tensor indices, "
      "Tensor counts, int unit, Tensor seq_lens, int new_tokens, Tensor(a!) key_cache, Tensor(b!) "
      "value_cache, Tensor(c!) page_table, Tensor(d!) owners) -> (Tensor, Tensor)");

  // Masked diffusion
  m.def(
      "confidence(Tensor logits, Tensor? exclude=None, float temperature=0., Tensor? keys=None, "
      "int "
      "score=0) -> (Tensor, Tensor)");
  m.def(
      "draft_blocks(Tensor window, Tensor tokens, Tensor scores, Tensor origins, Tensor counts, "
      "int "
      "mask_id, int block_size, int rule=0, float level=0.) -> (Tensor, Tensor)");
  m.def(
      "verify_blocks(Tensor drafts, Tensor num_drafts, Tensor tokens, Tensor scores, Tensor "
      "origins, Tensor counts, int mask_id, int block_size, int rule=0, float level=0.) -> Tensor");

  // CPU instruction set: level in use and best level of this machine; request >= 0 changes the
  // level.
  m.def("cpu_isa(int request=-1) -> (int, int)");
}
