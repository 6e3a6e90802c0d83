// float8 e4m3fn: sign, four bits of exponent with bias 7, three of mantissa; the largest value is
// 448, there is no infinity, and all ones are NaN. Torch-free.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/device.h"

namespace branchwise {

constexpr float kLargestE4m3 = 448.f;

BW_HOST_DEVICE inline float from_e4m3(uint8_t x) {
  const uint32_t sign = uint32_t{x & 0x80u} << 24, rest = x & 0x7fu;
  // As a float of the same mantissa its exponent is 120 too low, also where it has none.
  const uint32_t bits = rest == 0x7f ? 0x7fc00000u : rest << 20;
  float magnitude;
  memcpy(&magnitude, &bits, sizeof(bits));
  magnitude *= 0x1p120f;
  return sign != 0 ? -magnitude : magnitude;
}

// To nearest, ties to even; what is larger than the largest value becomes it.
BW_HOST_DEVICE inline uint8_t to_e4m3(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const uint8_t sign = static_cast<uint8_t>(bits >> 24 & 0x80u);
  bits &= 0x7fffffffu;
  const float magnitude = fabsf(x);
  if (magnitude != magnitude) return sign | 0x7f;
  if (magnitude >= kLargestE4m3) return sign | 0x7e;
  if (magnitude < 0x1p-6f) return sign | static_cast<uint8_t>(rintf(magnitude * 512.f));
  bits += 0x7ffff + (bits >> 20 & 1);
  return sign | static_cast<uint8_t>((bits >> 20) - (120 << 3));
}

}  // namespace branchwise
