// The current CUDA stream of torch, without linking any CUDA library of torch.
#pragma once
#include <cstdint>

#include "common/check.h"

// Exported by libtorch_cuda.so; weak, so that this library also loads under a CPU-only torch.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device,
                                                                            void** stream);

namespace branchwise {

inline void* current_cuda_stream(int32_t device) {
  void* stream = nullptr;
  BW_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
           "branchwise: this torch has no CUDA support");
  BW_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0,
           "branchwise: no CUDA stream on device ", device);
  return stream;
}

}  // namespace branchwise
