// How products of queries with keys, and of probabilities with values, are formed. A vector holds
// kLanes elements of four bytes, an element kPack values: one float, or a pair of bf16 for the
// instruction that multiplies two pairs and adds both products. fp32 sums either way.
#pragma once

#include "cpu/kernels/half-inl.h"
#include "cpu/kernels/vec-inl.h"

// A level of tile registers is asked for products of bf16 with many rows in them, and nothing else.
#if defined(__AMX_BF16__)
constexpr bool kTileRegisters = true;
#else
constexpr bool kTileRegisters = false;
#endif

struct Fp32Product {
  static constexpr int kPack = 1;
  struct InUse {};  // lives while products are formed
  using Vec = f32v;
  using Element = float;
  using Value = float;  // rows of which need no conversion
  static Vec broadcast(const Element* p) { return splat(*p); }
  static f32v multiply_add(Vec a, Vec b, f32v sum) { return a * b + sum; }

  // kLanes elements of a row, or the first n values of them and zeros.
  template <typename T>
  static Vec row(const T* p) {
    return load_wide(p);
  }
#if defined(__AVX512F__)
  // Two vectors of e4m3, as 2^-8 of their values: fp16 of the same mantissa, also where there is no
  // exponent.
  static void two_rows(const E4m3* p, Vec* out) {
    const __m512i wide =
        _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __m512i all_ones = _mm512_set1_epi16(0x7f << 7);
    const __m512i half = _mm512_and_si512(_mm512_slli_epi16(wide, 7), _mm512_set1_epi16(-0x4080));
    const __m512i made = _mm512_mask_mov_epi16(
        half, _mm512_cmpeq_epi16_mask(_mm512_and_si512(half, all_ones), all_ones),
        _mm512_set1_epi16(0x7fff));
    out[0] = reinterpret_cast<Vec>(_mm512_cvtph_ps(_mm512_castsi512_si256(made)));
    out[1] = reinterpret_cast<Vec>(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(made, 1)));
  }
#endif
  template <typename T>
  static Vec row(const T* p, int64_t n) {
    return load_wide(p, n);
  }
  // Elements that hold kPack rows of values column by column; kPack vectors from kPack rows.
  template <typename T>
  static void columns(const T* const* rows, int64_t at, Vec* out) {
    out[0] = load_wide(rows[0] + at);
  }
  template <typename T>
  static void columns(const T* const* rows, int64_t at, int64_t n, Vec* out) {
    out[0] = load_wide(rows[0] + at, n);
  }
  // Probabilities of kPack slots as one vector of elements, and of kPack neighbouring lanes as one.
  static Vec combine(const f32v* p) { return p[0]; }
  static void store_lanes(float* to, f32v p) { store(to, p); }
};

#if defined(__AVX512BF16__)
typedef uint16_t bf16v __attribute__((vector_size(64)));

struct Bf16Product {
  static constexpr int kPack = 2;
  struct InUse {};
  using Vec = i32v;
  using Value = Bf16;
  struct Element {
    uint16_t pair[2];
  };
  static Vec broadcast(const Element* p) { return splat(load_as<int32_t>(p)); }
  static f32v multiply_add(Vec a, Vec b, f32v sum) {
    return reinterpret_cast<f32v>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                   reinterpret_cast<__m512bh>(a),
                                                   reinterpret_cast<__m512bh>(b)));
  }

  static Vec row(const Bf16* p) { return load_as<Vec>(p); }
  static Vec row(const Bf16* p, int64_t n) {
    const __mmask32 mask = n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1;
    return reinterpret_cast<Vec>(_mm512_maskz_loadu_epi16(mask, p));
  }
  // As load_wide; from 23 on the table has NaN and 0 to 7 * 2^-9.
  static Vec row(const E4m3* p) {
    alignas(64) static constexpr int16_t kOthers[32] = {
        0, 0, 0, 0, 0, 0, 0, 0,      0, 0,      0,      0,      0,      0,      0,      0,
        0, 0, 0, 0, 0, 0, 0, 0x7fc0, 0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};
    const __m512i wide =
        _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __m512i code =
        _mm512_sub_epi16(_mm512_and_si512(wide, _mm512_set1_epi16(0x7f)), _mm512_set1_epi16(8));
    const __m512i normal =
        _mm512_add_epi16(_mm512_slli_epi16(code, 4), _mm512_set1_epi16(121 << 7));
    const __m512i magnitude =
        _mm512_mask_permutexvar_epi16(normal, _mm512_cmpgt_epu16_mask(code, _mm512_set1_epi16(118)),
                                      code, _mm512_load_si512(kOthers));
    const __m512i sign = _mm512_set1_epi16(INT16_MIN);
    return reinterpret_cast<Vec>(_mm512_ternarylogic_epi32(magnitude, wide, sign, 0xd8));
  }
  // An e4m3 value is the bf16 one of the same mantissa with 120 more in its exponent, but for those
  // that are 0 here.
  static Vec row(const CoarseE4m3* p) {
    const __m512i wide =
        _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __m512i bits = _mm512_and_si512(_mm512_slli_epi16(wide, 4),
                                          _mm512_set1_epi16(static_cast<int16_t>(0x87f0)));
    return reinterpret_cast<Vec>(_mm512_maskz_add_epi16(
        _mm512_test_epi16_mask(wide, _mm512_set1_epi16(0x78)), bits, _mm512_set1_epi16(120 << 7)));
  }
  template <typename T>  // of e4m3
  static Vec row(const T* p, int64_t n) {
    T part[32] = {};
    __builtin_memcpy(part, p, n < 32 ? n : 32);
    return row(part);
  }
  struct LowPairs {  // a0 b0 a1 b1 ...
    static constexpr int at(int l) { return l / 2 + (l & 1 ? 32 : 0); }
  };
  struct HighPairs {  // a16 b16 a17 b17 ...
    static constexpr int at(int l) { return 16 + l / 2 + (l & 1 ? 32 : 0); }
  };
  static void interleave(Vec a, Vec b, Vec* out) {
    const bf16v x = reinterpret_cast<bf16v>(a), y = reinterpret_cast<bf16v>(b);
    out[0] = reinterpret_cast<Vec>(shuffle<LowPairs>(x, y));
    out[1] = reinterpret_cast<Vec>(shuffle<HighPairs>(x, y));
  }
  template <typename T>
  static void columns(const T* const* rows, int64_t at, Vec* out) {
    interleave(row(rows[0] + at), row(rows[1] + at), out);
  }
  template <typename T>
  static void columns(const T* const* rows, int64_t at, int64_t n, Vec* out) {
    interleave(row(rows[0] + at, n), row(rows[1] + at, n), out);
  }
  static Vec combine(const f32v* p) {
    const bf16v both = reinterpret_cast<bf16v>(_mm512_cvtne2ps_pbh(
        reinterpret_cast<__m512>(p[1]), reinterpret_cast<__m512>(p[0])));  // p[0] | p[1]
    struct Pairs {
      static constexpr int at(int l) { return l / 2 + (l & 1 ? 16 : 0); }
    };
    return reinterpret_cast<Vec>(shuffle<Pairs>(both, both));
  }
  static void store_lanes(Element* to, f32v p) {
    const auto half = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(p));
    __builtin_memcpy(to, &half, 32);
  }
};
#endif

// Whether few rows read values of type T two vectors at a time, as 2^-8 of what they are.
template <typename T, typename M>
constexpr bool kReadsTwo =
#if defined(__AVX512F__)
    __is_same(T, E4m3) && M::kPack == 1;
#else
    false;
#endif
template <typename T, typename M>
constexpr float kUnit = kReadsTwo<T, M> ? 256.f : 1.f;

// The product for values of type T with head dim D.
template <typename T, typename F>
inline void with_product(int64_t D, F f) {
#if defined(__AVX512BF16__)
  if constexpr (__is_same(T, Bf16)) {
    if (D % 2 == 0) return f(Bf16Product{});
  }
#endif
  (void)D;
  f(Fp32Product{});
}
