// Single elements of a type that is known at run time only; not for hot loops.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "common/dtype.h"

namespace branchwise {

// Calls f with the data as a pointer to its elements.
template <typename F>
auto with_elements(DType type, void* data, const F& f) {
  switch (type) {
    case DType::bf16:
      return f(static_cast<torch::headeronly::BFloat16*>(data));
    case DType::f16:
      return f(static_cast<torch::headeronly::Half*>(data));
    default:
      return f(static_cast<float*>(data));
  }
}

inline float read_element(DType type, const void* data, int64_t i) {
  return with_elements(type, const_cast<void*>(data),
                       [&](const auto* x) { return static_cast<float>(x[i]); });
}

}  // namespace branchwise
