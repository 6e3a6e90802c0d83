// append_kv and commit_kv: the two writers of a KV cache.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <utility>
#include <vector>

#include "common/kv_args.h"
#include "cpu/isa.h"
#include "cpu/kernels/rope_kernel.h"

namespace branchwise {
namespace {

int64_t element_size(const Tensor& t) { return t.scalar_type() == ScalarType::Float ? 4 : 2; }

}  // namespace

void append_kv(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor seq_lens,
               std::optional<Tensor> page_table, std::optional<Tensor> cos,
               std::optional<Tensor> sin) {
  const char* op = "append_kv";
  check_dim(op, "key", key, 4, "[B, Hkv, T, D]");
  check_dim(op, "value", value, 4, "[B, Hkv, T, D]");
  check_float_dtype(op, "key", key);
  check_dtype(op, "value", value, key.scalar_type());
  check_last_contiguous(op, "key", key);
  check_last_contiguous(op, "value", value);
  check_dtype(op, "key_cache", key_cache, key.scalar_type());
  check_dtype(op, "value_cache", value_cache, key.scalar_type());
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
    for (int64_t b = 0; b < B && page_table; ++b)
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
  const RopeKernels& kernels = BW_KERNELS(rope_kernels);
  // Address of the angles of token t of row b.
  const auto angles_at = [&](const Tensor& a, int64_t b, int64_t t) {
    const int64_t at = (a.size(0) == 1 ? 0 : b * a.stride(0)) + t * a.stride(1);
    return static_cast<const char*>(a.const_data_ptr()) + at * element_size(a);
  };

  const int64_t bytes = element_size(key);
  for (int i = 0; i < 2; ++i) {
    const bool rotated = i == 0 && cos.has_value();
    const KvLayout layout = layout_of(*to[i], page_table);
    const char* source = static_cast<const char*>(from[i]->const_data_ptr());
    char* target = static_cast<char*>(to[i]->mutable_data_ptr());
    const int64_t s0 = from[i]->stride(0), s1 = from[i]->stride(1), s2 = from[i]->stride(2);
    const int64_t row_bytes = from[i]->size(3) * bytes;
    // A long prompt is worth the threads, a few tokens are not.
    const int64_t grain = std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(1, T * row_bytes));
    torch::stable::parallel_for(0, B * Hkv, grain, [&](int64_t begin, int64_t end) {
      for (int64_t bh = begin; bh < end; ++bh) {
        const int64_t b = bh / Hkv, h = bh % Hkv;
        for (int64_t t = 0; t < T; ++t) {
          char* to = target + layout.offset(b, h, lens.at(b, h) + t) * bytes;
          const char* row = source + (b * s0 + h * s1 + t * s2) * bytes;
          if (rotated)
            kernels.rotate_row(rope, row, angles_at(*cos, b, t), angles_at(*sin, b, t), to);
          else
            std::memcpy(to, row, row_bytes);
        }
      }
    });
  }
}

Tensor commit_kv(std::vector<Tensor> caches, Tensor accepted, Tensor num_accepted, Tensor seq_lens,
                 std::optional<Tensor> page_table) {
  const char* op = "commit_kv";
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
  for (int64_t b = 0; b < B; ++b) {
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
    check_float_dtype(op, name.c_str(), caches[i]);
    const CacheShape shape = check_cache(op, name.c_str(), caches[i], B, page_table);
    lens = check_seq_lens(op, seq_lens, B, 0, shape);
    const KvLayout layout = layout_of(caches[i], page_table);
    for (int64_t b = 0; b < B; ++b)
      for (int64_t h = 0; h < (count[b] ? shape.Hkv : 0); ++h) {
        const int64_t last = lens.at(b, h) + path[b * A + count[b] - 1];
        BW_CHECK(last < shape.capacity, op, ": accepted[", b, ", ", count[b] - 1, "] lies in slot ",
                 last, ", past the ", shape.capacity, " slots of ", name);
        check_pages(op, layout, shape, b, h, lens.at(b, h), last + 1);
      }
  }
  const int64_t heads = seq_lens.dim() == 2 ? seq_lens.size(1) : 1;
  if (caches.empty()) lens = check_seq_lens(op, seq_lens, B, 0, {heads, 0, INT32_MAX, 1, 1});

  for (const Tensor& cache : caches) {
    const KvLayout layout = layout_of(cache, page_table);
    const int64_t bytes = element_size(cache), row_bytes = cache.size(3) * bytes;
    const int64_t Hkv = layout.table_head_stride ? page_table->size(1) : cache.size(1);
    char* data = static_cast<char*>(cache.mutable_data_ptr());
    for (int64_t b = 0; b < B; ++b)
      for (int32_t j = 0; j < count[b]; ++j) {
        const int32_t node = path[b * A + j];
        if (node == j) continue;  // ascending: the source is never behind the target
        for (int64_t h = 0; h < Hkv; ++h)
          std::memcpy(data + layout.offset(b, h, lens.at(b, h) + j) * bytes,
                      data + layout.offset(b, h, lens.at(b, h) + node) * bytes, row_bytes);
      }
  }
  Tensor after = torch::stable::new_empty(seq_lens, seq_lens.sizes());
  int32_t* out = static_cast<int32_t*>(after.mutable_data_ptr());
  for (int64_t i = 0; i < B * heads; ++i) out[i] = lens.data[i] + count[i / heads];
  return after;
}

}  // namespace branchwise

STABLE_TORCH_LIBRARY_IMPL(branchwise, CPU, m) {
  m.impl("append_kv", TORCH_BOX(&branchwise::append_kv));
  m.impl("commit_kv", TORCH_BOX(&branchwise::commit_kv));
}
