// Rows of fp32, bf16, fp16 and e4m3 (see common/e4m3.h) as fp32 vectors, and back.
#pragma once

#include "cpu/kernels/vec-inl.h"

// Conversion rounds to nearest even and keeps NaN; to e4m3 it saturates.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
struct E4m3 {
  uint8_t bits;
};
// The same where products may read values below 2^-6 as 0, and NaN as 480.
struct CoarseE4m3 : E4m3 {};

inline float as_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(F16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // inf, NaN
  // Multiplying by 2^112 moves the exponent and handles subnormals in one step.
  return as_float(sign | as_bits(as_float(rest << 13) * as_float(0x77800000)));
#endif
}

inline void from_float(float x, F16* out) {
#if defined(__F16C__)
  out->bits = _cvtss_sh(x, 0);
#else
  const uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  uint32_t half;
  if (rest > 0x7f800000) {
    half = 0x7e00;
  } else if (rest >= 0x477ff000) {
    half = 0x7c00;  // overflow after rounding
  } else if (rest < 0x38800000) {
    // Subnormal: let the addition of 0.5 round at the right bit.
    half = as_bits(as_float(rest) + 0.5f) - 0x3f000000;
  } else {
    half = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
#endif
}

// kLanes values of a row, as floats.
inline f32v load_wide(const float* p) { return load(p); }
// gcc 12 widens integers in halves, with four shuffles where one instruction does it.
inline u32v widen(u16v v) {
#if defined(__AVX512F__)
  return reinterpret_cast<u32v>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(v)));
#elif defined(__AVX2__)
  return reinterpret_cast<u32v>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(v)));
#else
  return __builtin_convertvector(v, u32v);
#endif
}
inline f32v load_wide(const Bf16* p) {
  const u32v wide = widen(load_as<u16v>(p)) << 16;
  f32v v;
  __builtin_memcpy(&v, &wide, sizeof v);
  return v;
}
inline f32v load_wide(const F16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<f32v>(
      _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return reinterpret_cast<f32v>(
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  f32v v;
  for (int l = 0; l < kLanes; ++l) v[l] = to_float(p[l]);
  return v;
#endif
}

// Through no float that is denormal: CPUs take a hundred cycles and more for those.
inline f32v load_wide(const E4m3* p) {
#if defined(__AVX512F__)
  // Normal numbers are those of the same mantissa with 120 more in their exponent. The others, the
  // eight smallest and NaN, are in a table: `code` ends in 8 to 15 and in 7 for these.
  alignas(64) static constexpr float kOthers[16] = {
      0,  0,       0,       0,       0,       0,       0,       __builtin_nanf(""),
      0., 0x1p-9f, 0x2p-9f, 0x3p-9f, 0x4p-9f, 0x5p-9f, 0x6p-9f, 0x7p-9f};
  const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m512i code =
      _mm512_sub_epi32(_mm512_and_si512(wide, _mm512_set1_epi32(0x7f)), _mm512_set1_epi32(8));
  const __m512i normal =
      _mm512_add_epi32(_mm512_slli_epi32(code, 20), _mm512_set1_epi32(121 << 23));
  const __m512i magnitude =
      _mm512_mask_permutexvar_epi32(normal, _mm512_cmpgt_epu32_mask(code, _mm512_set1_epi32(118)),
                                    code, _mm512_load_si512(kOthers));
  const __m512i sign = _mm512_set1_epi32(INT32_MIN);
  return reinterpret_cast<f32v>(_mm512_ternarylogic_epi32(magnitude, wide, sign, 0xd8));
#elif defined(__F16C__)
  // As fp16 of the same mantissa the exponent is 8 too low, of numbers that have none, too.
  const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i all_ones = _mm_set1_epi16(0x7f << 7);
  const __m128i half = _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(-0x4080));
  const __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(half, all_ones), all_ones);
  return reinterpret_cast<f32v>(_mm256_cvtph_ps(_mm_or_si128(half, nan))) * 256.f;
#else
  const i32v wide = __builtin_convertvector(load_as<i8v>(p), i32v), code = wide & 0x7f;
  // With the exponent of the smallest normal number, which is then taken away, or its own.
  const i32v above = (code << 20) + (121 << 23), own = (code << 20) + (120 << 23);
  const f32v small = load_as<f32v>(&above) - 0x1p-6f;
  f32v x = code < 8 ? small : load_as<f32v>(&own);
  x = code == 0x7f ? splat(__builtin_nanf("")) : x;
  const i32v bits = load_as<i32v>(&x) | (wide & INT32_MIN);
  return load_as<f32v>(&bits);
#endif
}

// The first n <= kLanes values of a row, then zeros; reads nothing behind them.
template <typename T>
inline f32v load_wide(const T* p, int64_t n) {
  if (n == kLanes) return load_wide(p);
  T part[kLanes] = {};
  __builtin_memcpy(part, p, n * sizeof(T));
  return load_wide(part);
}

// A copy of fixed size is one store, one of any size a loop over bytes.
template <typename T, typename V>
inline void copy_lanes(T* to, V v, int64_t n) {
  if (n == kLanes)
    __builtin_memcpy(to, &v, kLanes * sizeof(T));
  else
    __builtin_memcpy(to, &v, n * sizeof(T));
}

// The first n <= kLanes lanes, rounded to the type of the row.
inline void store_narrow(float* to, f32v v, int64_t n) { copy_lanes(to, v, n); }
inline void store_narrow(Bf16* to, f32v v, int64_t n) {
  u32v bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  const u32v rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const i32v nan = v != v;
  copy_lanes(to, __builtin_convertvector(nan ? u32v{} + 0x7fc0 : rounded, u16v), n);
}
inline void store_narrow(F16* to, f32v v, int64_t n) {
#if defined(__AVX512F__)
  copy_lanes(to, _mm512_cvtps_ph(reinterpret_cast<__m512>(v), 0), n);
#else
  for (int64_t l = 0; l < n; ++l) from_float(v[l], to + l);
#endif
}

inline void store_narrow(E4m3* to, f32v v, int64_t n) {
  const i32v bits = load_as<i32v>(&v), nan = v != v;
  const i32v magnitude = bits & 0x7fffffff;
  const f32v limited = load_as<f32v>(&magnitude) > 448.f ? splat(448.f) : load_as<f32v>(&magnitude);
  const i32v normal = load_as<i32v>(&limited);
  // Of steps of 2^-9, where the exponent no longer falls: an addition that rounds at their bit.
  const f32v small = limited * 0x1p9f + 0x1p23f;
  const i32v steps = load_as<i32v>(&small) - 0x4b000000;
  i32v code = ((normal + 0x7ffff + ((normal >> 20) & 1)) >> 20) - (120 << 3);
  code = limited < 0x1p-6f ? steps : code;
  code = nan ? splat(0x7f) : code;
  copy_lanes(to, __builtin_convertvector(code | ((bits >> 24) & 0x80), i8v), n);
}

// n values of any type as those of another; n need not be a multiple of the lanes.
template <typename T, typename U>
inline void convert_row(const T* from, U* to, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_narrow(to + i, load_wide(from + i), kLanes);
  if (i < n) store_narrow(to + i, load_wide(from + i, n - i), n - i);
}

// Calls f with a value of the element type.
template <typename F>
void by_type(DType type, F f) {
  switch (type) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(Bf16{});
    case DType::f16:
      return f(F16{});
  }
}
