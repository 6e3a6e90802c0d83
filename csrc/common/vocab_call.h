// The arguments of the ops that read rows of logits one by one, and their checks.
#pragma once
#include <cmath>
#include <optional>

#include "common/check.h"
#include "common/vocab_score.h"

namespace branchwise {

struct VocabCall {
  const char* data;
  DType type;
  int64_t rows, V, row_bytes;
  const int64_t* exclude;  // [E]
  int64_t E;
};

inline VocabCall check_vocab(const char* op, const char* rows_name, const Tensor& logits,
                             const std::optional<Tensor>& exclude) {
  check_dim(op, "logits", logits, 2, rows_name);
  check_float_dtype(op, "logits", logits);
  check_last_contiguous(op, "logits", logits);
  BW_CHECK(logits.size(1) <= INT32_MAX, op, ": logits.size(1) = ", logits.size(1),
           " must be below 2^31");
  VocabCall call{static_cast<const char*>(logits.const_data_ptr()),
                 dtype_of(logits.scalar_type()),
                 logits.size(0),
                 logits.size(1),
                 logits.stride(0) * static_cast<int64_t>(logits.element_size()),
                 nullptr,
                 0};
  if (exclude) {
    check_dim(op, "exclude", *exclude, 1, "[E]");
    check_dtype(op, "exclude", *exclude, ScalarType::Long);
    check_contiguous(op, "exclude", *exclude);
    call.exclude = static_cast<const int64_t*>(exclude->const_data_ptr());
    call.E = exclude->size(0);
  }
  return call;
}

inline VocabCall check_top_tokens(const char* op, const Tensor& logits, int64_t k,
                                  const std::optional<Tensor>& exclude) {
  const VocabCall call = check_vocab(op, "[N, V]", logits, exclude);
  BW_CHECK(k >= 1, op, ": k must be at least 1, got ", k);
  return call;
}

// Returns the keys, i64[R] or null.
inline const int64_t* check_confidence(const char* op, int64_t R, double temperature,
                                       const std::optional<Tensor>& keys, int64_t score) {
  BW_CHECK(temperature >= 0 && std::isfinite(temperature), op,
           ": temperature must be 0 (greedy) or positive, got ", temperature);
  BW_CHECK(score >= 0 && score <= 2, op, ": score must be 0, 1 or 2, got ", score);
  BW_CHECK(temperature == 0 || keys, op, ": temperature = ", temperature, " needs keys");
  if (!keys) return nullptr;
  check_dim(op, "keys", *keys, 1, "[R]");
  check_size(op, "keys", *keys, 0, R, "R");
  check_dtype(op, "keys", *keys, ScalarType::Long);
  check_contiguous(op, "keys", *keys);
  return static_cast<const int64_t*>(keys->const_data_ptr());
}

}  // namespace branchwise
