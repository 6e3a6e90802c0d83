// Eight elements that lie next to each other, as floats.
#pragma once

#include "cuda/device.cuh"

namespace branchwise::cuda {

// Elements [at, at + 8) of a row of `size`; `beyond` behind its end. By loads of 16 bytes,
// or all eight if that is less, where they lie on as many.
template <typename Element>
__device__ void load_eight(const Element* row, int64_t at, int64_t size, float beyond,
                           float (&x)[8]) {
  constexpr int kPerVector = sizeof(Element) == 1 ? 8 : 16 / sizeof(Element);
  struct alignas(kPerVector * sizeof(Element)) Vector {
    Element elements[kPerVector];
  };
  if (at + 8 <= size && reinterpret_cast<uintptr_t>(row + at) % sizeof(Vector) == 0) {
#pragma unroll
    for (int v = 0; v < 8 / kPerVector; ++v) {
      const Vector loaded = reinterpret_cast<const Vector*>(row + at)[v];
#pragma unroll
      for (int i = 0; i < kPerVector; ++i) x[v * kPerVector + i] = to_float(loaded.elements[i]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = at + i < size ? to_float(row[at + i]) : beyond;
}

}  // namespace branchwise::cuda
