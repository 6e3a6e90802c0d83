// Argument checks of the op bindings. A failed check throws; the text names the op, the argument,
// its value and the rule, and becomes a RuntimeError in Python.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/dtype.h"

namespace branchwise {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

#define BW_CHECK(cond, ...)            \
  do {                                 \
    if (!(cond)) [[unlikely]]          \
      ::branchwise::fail(__VA_ARGS__); \
  } while (0)

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << "]";
  return text.str();
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    default:
      return "another dtype";
  }
}

// Whether ops read the values of index tensors, and so can refuse bad ones. On a GPU that would
// wait for the device; kernels there leave out what lies outside a tensor instead.
#if defined(BW_DEVICE_TENSORS)
constexpr bool kChecksValues = false;
#else
constexpr bool kChecksValues = true;
#endif

// "shape" is written as in the docs, for example "[B, Hq, T, D]".
inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim,
                      const char* shape) {
  BW_CHECK(t.dim() == dim, op, ": ", name, " must have shape ", shape, ", got ", shape_of(t));
}

inline void check_size(const char* op, const char* name, const Tensor& t, int64_t axis,
                       int64_t want, const char* meaning) {
  BW_CHECK(t.size(axis) == want, op, ": ", name, ".size(", axis, ") must be ", meaning, " = ", want,
           ", got shape ", shape_of(t));
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType want) {
  BW_CHECK(t.scalar_type() == want, op, ": ", name, " must be ", name_of(want), ", got ",
           name_of(t.scalar_type()));
}

inline void check_float_dtype(const char* op, const char* name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  BW_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
           op, ": ", name, " must be float32, bfloat16 or float16, got ", name_of(type));
}

// Of a dtype that check_float_dtype lets through.
inline DType dtype_of(ScalarType type) {
  return type == ScalarType::Float      ? DType::f32
         : type == ScalarType::BFloat16 ? DType::bf16
                                        : DType::f16;
}

inline void check_last_contiguous(const char* op, const char* name, const Tensor& t) {
  BW_CHECK(t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1, op, ": ", name,
           " must be contiguous in its last dimension, got stride ", t.stride(t.dim() - 1));
}

inline void check_contiguous(const char* op, const char* name, const Tensor& t) {
  BW_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous, got shape ", shape_of(t));
}

// One value per tree node.
inline void check_nodes(const char* op, const char* name, const Tensor& t, int64_t B, int64_t T,
                        ScalarType type) {
  check_dim(op, name, t, 2, "[B, T]");
  check_size(op, name, t, 0, B, "B");
  check_size(op, name, t, 1, T, "T");
  check_dtype(op, name, t, type);
  check_contiguous(op, name, t);
}

// Arguments of merge_attention, on any device.
inline void check_merge_args(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                             const Tensor& lse_b) {
  const char* op = "merge_attention";
  check_dim(op, "out_a", out_a, 4, "[B, Hq, T, D]");
  check_float_dtype(op, "out_a", out_a);
  check_dtype(op, "out_b", out_b, out_a.scalar_type());
  check_dim(op, "out_b", out_b, 4, "[B, Hq, T, D]");
  check_dim(op, "lse_a", lse_a, 3, "[B, Hq, T]");
  check_dim(op, "lse_b", lse_b, 3, "[B, Hq, T]");
  for (int i = 0; i < 4; ++i) {
    check_size(op, "out_b", out_b, i, out_a.size(i), "that of out_a");
    if (i == 3) break;
    check_size(op, "lse_a", lse_a, i, out_a.size(i), "that of out_a");
    check_size(op, "lse_b", lse_b, i, out_a.size(i), "that of out_a");
  }
  check_dtype(op, "lse_a", lse_a, ScalarType::Float);
  check_dtype(op, "lse_b", lse_b, ScalarType::Float);
  check_contiguous(op, "out_a", out_a);
  check_contiguous(op, "out_b", out_b);
  check_contiguous(op, "lse_a", lse_a);
  check_contiguous(op, "lse_b", lse_b);
}

// Arguments of node_uniforms, on any device.
inline void check_noise_args(const Tensor& seeds, const Tensor& rows, const Tensor& rounds,
                             const Tensor& nodes) {
  const char* op = "node_uniforms";
  check_dim(op, "rounds", rounds, 2, "[B, N]");
  check_dim(op, "nodes", nodes, 2, "[B, N]");
  check_size(op, "nodes", nodes, 0, rounds.size(0), "B");
  check_size(op, "nodes", nodes, 1, rounds.size(1), "N");
  check_dim(op, "seeds", seeds, 1, "[B]");
  check_size(op, "seeds", seeds, 0, rounds.size(0), "B");
  check_dim(op, "rows", rows, 1, "[B]");
  check_size(op, "rows", rows, 0, rounds.size(0), "B");
  for (const auto& [name, t] :
       {std::pair{"seeds", &seeds}, {"rows", &rows}, {"rounds", &rounds}, {"nodes", &nodes}}) {
    check_dtype(op, name, *t, ScalarType::Long);
    check_contiguous(op, name, *t);
  }
}

}  // namespace branchwise
