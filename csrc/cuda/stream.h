// Where a CUDA op runs: the device of its tensors, and torch's current stream there, without
// linking any CUDA library of torch.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <optional>

#include "common/check.h"

#if defined(BW_EMULATE)
// The emulator's ops: the same schemas in a namespace of their own, on CPU tensors.
#define BW_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(branchwise_emulated, CPU, m)
#else
#include <torch/csrc/stable/accelerator.h>
#define BW_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(branchwise, CUDA, m)

// Exported by libtorch_cuda.so; weak, so that this library also loads under a CPU-only torch.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device,
                                                                            void** stream);
#endif

namespace branchwise {

struct NamedTensor {
  const char* name;
  const Tensor* tensor;  // null: not given
};

// The device of `first`, where the other tensors must be, too.
inline int32_t common_device(const char* op, const Tensor& first,
                             std::initializer_list<NamedTensor> others) {
  const int32_t device = first.get_device_index();
#if !defined(BW_EMULATE)
  BW_CHECK(device >= 0, op, ": the first argument must be on the GPU, as others are, got the CPU");
#endif
  for (const auto& [name, tensor] : others)
    BW_CHECK(tensor == nullptr || tensor->get_device_index() == device, op, ": ", name,
             " must be on device ", device, ", as the first argument is, got ",
             tensor->get_device_index(), " (-1: CPU)");
  return device;
}

// Makes that device the current one while it lives.
class OnDevice {
 public:
  OnDevice(const char* op, const Tensor& first, std::initializer_list<NamedTensor> others)
      : device_(common_device(op, first, others))
#if !defined(BW_EMULATE)
        ,
        guard_(device_)
#endif
  {
  }

  void* stream() const {
    void* stream = nullptr;
#if !defined(BW_EMULATE)
    BW_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
             "branchwise: this torch has no CUDA support");
    BW_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream) == 0,
             "branchwise: no CUDA stream on device ", device_);
#endif
    return stream;
  }

 private:
  int32_t device_;
#if !defined(BW_EMULATE)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

inline const Tensor* if_given(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

namespace cuda {
const char* error_string(int code);
}

inline void check_launch(const char* op, int code) {
  BW_CHECK(code == 0, op, ": CUDA launch failed: ", cuda::error_string(code));
}

}  // namespace branchwise
