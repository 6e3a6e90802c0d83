// New CPU tensors without the dispatcher, which takes a microsecond per tensor.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <array>

#include "common/check.h"

namespace branchwise {

template <typename Sizes>
Tensor empty_strided_of(const Sizes& sizes, const Sizes& strides, ScalarType type) {
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Contiguous and uninitialised.
template <typename Sizes>
Tensor empty_of(const Sizes& sizes, ScalarType type) {
  Sizes strides = sizes;
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i]) strides[i] = stride;
  return empty_strided_of(sizes, strides, type);
}

template <size_t N>
Tensor empty(const std::array<int64_t, N>& sizes, ScalarType type) {
  return empty_of(sizes, type);
}

}  // namespace branchwise
