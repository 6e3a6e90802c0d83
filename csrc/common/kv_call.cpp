#include "common/kv_call.h"

#include <string>
#include <utility>

namespace branchwise {

AppendCall check_append(const char* op, const Tensor& key, const Tensor& value,
                        const Tensor& key_cache, const Tensor& value_cache, const Tensor& seq_lens,
                        const std::optional<Tensor>& page_table, const std::optional<Tensor>& cos,
                        const std::optional<Tensor>& sin, const std::optional<Tensor>& key_scale,
                        const std::optional<Tensor>& value_scale) {
  check_dim(op, "key", key, 4, "[B, Hkv, T, D]");
  check_dim(op, "value", value, 4, "[B, Hkv, T, D]");
  check_float_dtype(op, "key", key);
  check_dtype(op, "value", value, key.scalar_type());
  check_last_contiguous(op, "key", key);
  check_last_contiguous(op, "value", value);
  const CacheScales scales = check_scales(op, key_cache, value_cache, key.scalar_type(),
                                          key.size(1), key_scale, value_scale);
  const int64_t B = key.size(0), Hkv = key.size(1), T = key.size(2);
  for (int i = 0; i < 3; ++i) check_size(op, "value", value, i, key.size(i), "that of key");

  const Tensor* from[] = {&key, &value};
  const Tensor* to[] = {&key_cache, &value_cache};
  const char* names[] = {"key_cache", "value_cache"};
  RowLens lens{};
  for (int i = 0; i < 2; ++i) {
    const CacheShape shape = check_cache(op, names[i], *to[i], B, page_table);
    BW_CHECK(shape.Hkv == Hkv, op, ": ", names[i], " must have Hkv = ", Hkv, " heads, got ",
             shape.Hkv);
    check_size(op, names[i], *to[i], 3, from[i]->size(3), "D");
    lens = check_seq_lens(op, seq_lens, B, T, shape);
    const KvLayout layout = layout_of(*to[i], page_table);
    for (int64_t b = 0; kChecksValues && b < B && page_table; ++b)
      for (int64_t h = 0; h < Hkv; ++h)
        check_pages(op, layout, shape, b, h, lens.at(b, h), lens.at(b, h) + T);
  }

  RopeArgs rope{dtype_of(key.scalar_type()), DType::f32, key.size(3), 0};
  BW_CHECK(cos.has_value() == sin.has_value(), op, ": cos and sin must be given together");
  for (const auto& [name, angles] : {std::pair{"cos", &cos}, {"sin", &sin}}) {
    if (!*angles) continue;
    const Tensor& a = **angles;
    check_dim(op, name, a, 3, "[B, T, R] or [1, T, R]");
    check_last_contiguous(op, name, a);
    BW_CHECK(a.size(0) == B || a.size(0) == 1, op, ": ", name, ".size(0) must be B = ", B,
             " or 1, got shape ", shape_of(a));
    check_size(op, name, a, 1, T, "T");
    BW_CHECK(a.size(2) % 2 == 0 && a.size(2) <= key.size(3), op, ": ", name,
             ".size(2) = ", a.size(2), " must be even and at most D = ", key.size(3));
    BW_CHECK(a.scalar_type() == ScalarType::Float || a.scalar_type() == key.scalar_type(), op, ": ",
             name, " must be float32 or the dtype of key, got ", name_of(a.scalar_type()));
    check_dtype(op, name, a, cos->scalar_type());
    check_size(op, name, a, 2, cos->size(2), "that of cos");
    rope.R = a.size(2);
    rope.angle_type = dtype_of(a.scalar_type());
  }
  return {lens, rope, scales};
}

CommitCall check_commit(const char* op, const std::vector<Tensor>& caches, const Tensor& accepted,
                        const Tensor& num_accepted, const Tensor& seq_lens,
                        const std::optional<Tensor>& page_table) {
  check_dim(op, "accepted", accepted, 2, "[B, A]");
  check_dtype(op, "accepted", accepted, ScalarType::Int);
  check_contiguous(op, "accepted", accepted);
  const int64_t B = accepted.size(0), A = accepted.size(1);
  check_dim(op, "num_accepted", num_accepted, 1, "[B]");
  check_size(op, "num_accepted", num_accepted, 0, B, "B");
  check_dtype(op, "num_accepted", num_accepted, ScalarType::Int);
  check_contiguous(op, "num_accepted", num_accepted);
  const int32_t* path = static_cast<const int32_t*>(accepted.const_data_ptr());
  const int32_t* count = static_cast<const int32_t*>(num_accepted.const_data_ptr());
  for (int64_t b = 0; kChecksValues && b < B; ++b) {
    BW_CHECK(count[b] >= 0 && count[b] <= A, op, ": num_accepted[", b, "] = ", count[b],
             " must lie between 0 and accepted.size(1) = ", A);
    for (int32_t j = 0; j < count[b]; ++j)
      BW_CHECK(path[b * A + j] >= (j ? path[b * A + j - 1] + 1 : 0), op, ": accepted[", b, ", ", j,
               "] = ", path[b * A + j], " must be a node id, ascending along the path");
  }

  // Nothing moves before every cache has passed its checks.
  RowLens lens{};
  for (size_t i = 0; i < caches.size(); ++i) {
    const std::string name = "caches[" + std::to_string(i) + "]";
    if (caches[i].scalar_type() != ScalarType::Float8_e4m3fn)
      check_float_dtype(op, name.c_str(), caches[i]);
    const CacheShape shape = check_cache(op, name.c_str(), caches[i], B, page_table);
    lens = check_seq_lens(op, seq_lens, B, 0, shape);
    const KvLayout layout = layout_of(caches[i], page_table);
    for (int64_t b = 0; kChecksValues && b < B; ++b)
      for (int64_t h = 0; h < (count[b] ? shape.Hkv : 0); ++h) {
        const int64_t last = lens.at(b, h) + path[b * A + count[b] - 1];
        BW_CHECK(last < shape.capacity, op, ": accepted[", b, ", ", count[b] - 1, "] lies in slot ",
                 last, ", past the ", shape.capacity, " slots of ", name);
        check_pages(op, layout, shape, b, h, lens.at(b, h), last + 1);
      }
  }
  const int64_t heads = seq_lens.dim() == 2 ? seq_lens.size(1) : 1;
  if (caches.empty()) lens = check_seq_lens(op, seq_lens, B, 0, {heads, 0, INT32_MAX, 1, 1});
  return {lens, heads};
}

}  // namespace branchwise
