// The arguments of the verification family, and their checks.
#pragma once
#include <optional>

#include "common/check.h"
#include "common/verify_row.h"

namespace branchwise {

struct VerifyBatch {
  const char* op;
  const Tensor &tokens, &next_token, &next_sibling, &logits;
  const std::optional<Tensor>& ready;
  double temperature = 1;
  const Tensor* uniforms = nullptr;
  const Tensor* draft = nullptr;
  const Tensor* draft_index = nullptr;

  void check() const {
    check_dim(op, "tokens", tokens, 2, "[B, T]");
    const int64_t B = tokens.size(0), T = tokens.size(1);
    BW_CHECK(T >= 1, op, ": tokens must hold at least the root, got shape ", shape_of(tokens));
    check_nodes(op, "tokens", tokens, B, T, ScalarType::Long);
    check_nodes(op, "next_token", next_token, B, T, ScalarType::Int);
    check_nodes(op, "next_sibling", next_sibling, B, T, ScalarType::Int);
    check_dim(op, "logits", logits, 3, "[B, T, V]");
    check_size(op, "logits", logits, 0, B, "B");
    check_size(op, "logits", logits, 1, T, "T");
    check_float_dtype(op, "logits", logits);
    check_last_contiguous(op, "logits", logits);
    const int64_t V = logits.size(2);
    BW_CHECK(V >= 1 && V < (int64_t{1} << 31), op,
             ": logits must hold between 1 and 2^31 - 1 tokens, got shape ", shape_of(logits));
    BW_CHECK(temperature >= 1e-30, op, ": temperature must be at least 1e-30, got ", temperature);
    if (uniforms != nullptr) {
      check_dim(op, "uniforms", *uniforms, 3, "[B, T, 2]");
      check_size(op, "uniforms", *uniforms, 0, B, "B");
      check_size(op, "uniforms", *uniforms, 1, T, "T");
      check_size(op, "uniforms", *uniforms, 2, 2, "2");
      check_dtype(op, "uniforms", *uniforms, ScalarType::Float);
      check_contiguous(op, "uniforms", *uniforms);
    }
    if (draft != nullptr) {
      check_dim(op, "draft", *draft, 2, "[R, V]");
      check_size(op, "draft", *draft, 1, V, "V");
      check_dtype(op, "draft", *draft, ScalarType::Float);
      check_contiguous(op, "draft", *draft);
      check_nodes(op, "draft_index", *draft_index, B, T, ScalarType::Int);
    }
    if (ready) check_nodes(op, "ready", *ready, B, T, ScalarType::Bool);
  }

  template <typename T>
  static const T* data(const Tensor& t) {
    return static_cast<const T*>(t.const_data_ptr());
  }

  VerifyRow row(int64_t b) const {
    const int64_t T = tokens.size(1), bytes = logits.element_size();
    const char* first = data<char>(logits) + b * logits.stride(0) * bytes;
    return {op,
            b,
            T,
            logits.size(2),
            data<int64_t>(tokens) + b * T,
            data<int32_t>(next_token) + b * T,
            data<int32_t>(next_sibling) + b * T,
            first,
            logits.stride(1) * bytes,
            dtype_of(logits.scalar_type()),
            static_cast<float>(1.44269504088896341 / temperature),
            uniforms == nullptr ? nullptr : data<float>(*uniforms) + 2 * b * T,
            draft == nullptr ? nullptr : data<float>(*draft),
            draft == nullptr ? 0 : draft->size(0),
            draft == nullptr ? nullptr : data<int32_t>(*draft_index) + b * T,
            ready ? data<bool>(*ready) + b * T : nullptr};
  }
};

// Returns the options.
inline PolicyOptions check_policy(const char* op, int64_t policy, double threshold, double alpha,
                                  int64_t top_k, bool first_only) {
  BW_CHECK(policy >= 0 && policy <= 3, op, ": policy must lie between 0 and 3, got ", policy);
  BW_CHECK(threshold >= 0, op, ": threshold must not be negative, got ", threshold);
  BW_CHECK(alpha >= 0, op, ": alpha must not be negative, got ", alpha);
  BW_CHECK(top_k >= 1, op, ": top_k must be at least 1, got ", top_k);
  return {static_cast<Policy>(policy), threshold, alpha, top_k, first_only};
}

inline void check_typical(const char* op, double epsilon, double alpha) {
  BW_CHECK(epsilon >= 0, op, ": epsilon must not be negative, got ", epsilon);
  BW_CHECK(alpha >= 0, op, ": alpha must not be negative, got ", alpha);
}

inline void check_sample(const char* op, int64_t rule, const Thresholds& at) {
  BW_CHECK(rule >= 0 && rule <= 2, op, ": rule must be 0, 1 or 2, got ", rule);
  BW_CHECK(at.single > 0 && at.single <= 1, op, ": threshold_single must lie in (0, 1], got ",
           at.single);
  BW_CHECK(at.accumulated > 0 && at.accumulated <= 1, op,
           ": threshold_accumulated must lie in (0, 1], got ", at.accumulated);
}

}  // namespace branchwise
