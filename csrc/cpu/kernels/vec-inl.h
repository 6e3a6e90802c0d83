// fp32 vectors of this ISA level as GNU vector types: arithmetic, comparison and selection are the
// compiler's, so one source serves every level. Included only by kernel sources, inside
// namespace branchwise::BW_ISA; uses no C++ library.

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
#endif

typedef float f32v __attribute__((vector_size(kLanes * 4)));
typedef int32_t i32v __attribute__((vector_size(kLanes * 4)));
typedef uint32_t u32v __attribute__((vector_size(kLanes * 4)));
typedef uint16_t u16v __attribute__((vector_size(kLanes * 2)));

constexpr float kInf = __builtin_inff();

inline f32v load(const float* p) {
  f32v v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline i32v load(const int32_t* p) {
  i32v v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, f32v v) { __builtin_memcpy(p, &v, sizeof v); }
inline f32v splat(float x) { return x - f32v{}; }
inline i32v splat(int32_t x) { return x - i32v{}; }
inline f32v max(f32v a, f32v b) { return a > b ? a : b; }

// exp(x), relative error below 2 ulp on [-87, 88]; exactly 0 below -87.3, exp(88) above 88.
inline f32v exp(f32v x) {
  const i32v tiny = x < -87.3f;
  x = x > 88.f ? splat(88.f) : x;
  x = tiny ? splat(-87.3f) : x;
  const f32v magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const f32v n = (x * 1.44269504088896341f + magic) - magic;
  const f32v r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  f32v p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const i32v bits = (__builtin_convertvector(n, i32v) + 127) << 23;
  f32v power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return tiny ? f32v{} : p * power;
}

// tanh(x), absolute error below 2e-7: a polynomial near 0, where the exp form cancels.
inline f32v tanh(f32v x) {
  const f32v a = x < 0.f ? -x : x;
  const f32v e = exp(a + a);
  const f32v far = 1.f - 2.f / (e + 1.f);
  const f32v z = x * x;
  f32v p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z + -5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z + -3.33332819422e-1f;
  const f32v near = p * z * x + x;
  return a < 0.625f ? near : (x < 0.f ? -far : far);
}

// 16-bit floats. Conversion to bf16 and fp16 rounds to nearest even and keeps NaN.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

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

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, Bf16* out) {
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  out->bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
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
inline f32v load_wide(const Bf16* p) {
  u16v half;
  __builtin_memcpy(&half, p, sizeof half);
  const u32v wide = __builtin_convertvector(half, u32v) << 16;
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

inline float horizontal_sum(f32v v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#else
  // Pairwise, so that the compiler can halve the vector.
  float lane[kLanes];
  store(lane, v);
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int l = 0; l < step; ++l) lane[l] += lane[l + step];
  return lane[0];
#endif
}

// n floats from a row of any type; n need not be a multiple of the lanes.
template <typename T>
inline void convert_row(const T* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load_wide(from + i));
  for (; i < n; ++i) to[i] = to_float(from[i]);
}
