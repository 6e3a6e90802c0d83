// fp32 vectors of this ISA level as GNU vector types: arithmetic, comparison and selection are the
// compiler's, so one source serves every level. Included only by kernel sources, inside
// namespace branchwise::BW_ISA; uses no C++ library.
#pragma once

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
typedef int8_t i8v __attribute__((vector_size(kLanes)));

constexpr float kInf = __builtin_inff();
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

template <typename V>
inline V load_as(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline f32v load(const float* p) { return load_as<f32v>(p); }
inline i32v load(const int32_t* p) { return load_as<i32v>(p); }
inline void store(float* p, f32v v) { __builtin_memcpy(p, &v, sizeof v); }
inline f32v splat(float x) { return x - f32v{}; }
inline i32v splat(int32_t x) { return x - i32v{}; }
inline f32v max(f32v a, f32v b) { return a > b ? a : b; }

// 2^x for x <= 128, relative error below 2e-7; exactly 1 at 0, and 0 below -126: CPUs take a
// hundred cycles and more for results, and later for products, that are denormal.
inline f32v exp2(f32v x) {
#if defined(__AVX512DQ__)
  // x - floor(x), and 0 at -inf; the last instruction floors x by itself.
  const f32v r = reinterpret_cast<f32v>(_mm512_reduce_ps(reinterpret_cast<__m512>(x), 0x09));
#else
  const i32v tiny = x < -126.f;  // this form has no subnormal results
  x = tiny ? splat(-126.f) : x;
  const f32v magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const f32v n = (x - 0.5f + magic) - magic;
  const f32v r = x - n;
#endif
  f32v p = splat(1.86712629e-3f);  // minimax on [0, 1] with p(0) = 1, 8e-8 before rounding
  p = p * r + 9.01703830e-3f;
  p = p * r + 5.57999075e-2f;
  p = p * r + 2.40164452e-1f;
  p = p * r + 6.93151312e-1f;
  p = p * r + 1.f;
#if defined(__AVX512DQ__)
  const __m512 power = reinterpret_cast<__m512>(x);
  const __mmask16 normal = _mm512_cmp_ps_mask(power, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
  return reinterpret_cast<f32v>(_mm512_maskz_scalef_ps(normal, reinterpret_cast<__m512>(p), power));
#else
  const i32v bits = (__builtin_convertvector(n, i32v) + 127) << 23;
  f32v power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return tiny ? f32v{} : p * power;
#endif
}
inline float exp2(float x) { return exp2(splat(x))[0]; }

// tanh(x), absolute error below 2e-7: a polynomial near 0, where the exponential form cancels.
inline f32v tanh(f32v x) {
  const f32v a = x < 0.f ? -x : x;
  const f32v capped = a > 40.f ? splat(40.f) : a;
  const f32v e = exp2(capped * (2.f * kLog2e));
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

template <int N>
struct Int {
  static constexpr int value = N;
};

// Shuffles of two vectors by a rule: lane l of the result is element Rule::at(l) of a|b.
template <int... I>
struct Lanes {};
template <int N, int... I>
struct FirstLanes : FirstLanes<N - 1, N - 1, I...> {};
template <int... I>
struct FirstLanes<0, I...> {
  using type = Lanes<I...>;
};
template <typename Rule, typename V, int... I>
inline V shuffle(V a, V b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, Rule::at(I)...);
}
template <typename Rule, typename V>
inline V shuffle(V a, V b) {
  return shuffle<Rule>(a, b, typename FirstLanes<sizeof(V) / sizeof(a[0])>::type{});
}
template <int H>
struct Straight {  // a where bit H of the lane is 0, else b
  static constexpr int at(int l) { return l & H ? kLanes + l : l; }
};
template <int H>
struct Crossed {  // the same with lanes swapped H apart
  static constexpr int at(int l) { return (l & H ? kLanes : 0) + (l ^ H); }
};
template <int H>
struct Swapped {
  static constexpr int at(int l) { return l ^ H; }
};

// v[i][l] becomes v[l][i].
template <int H = 1>
inline void transpose(f32v* v) {
  if constexpr (H < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & H) continue;
      const f32v a = v[i], b = v[i + H];
      struct Low {  // a where bit H is 0, else b from H lanes lower
        static constexpr int at(int l) { return l & H ? kLanes + (l ^ H) : l; }
      };
      struct High {  // a from H lanes higher where bit H is 0, else b
        static constexpr int at(int l) { return l & H ? kLanes + l : l ^ H; }
      };
      v[i] = shuffle<Low>(a, b);
      v[i + H] = shuffle<High>(a, b);
    }
    transpose<2 * H>(v);
  }
}

// Lane l of the result is the sum, or the largest, of all lanes of v[l]; destroys v.
template <bool Max, int H = 1>
[[gnu::always_inline]] inline f32v folds(f32v* v) {
  if constexpr (H == kLanes) {
    return v[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i += 2 * H) {
      const f32v a = shuffle<Straight<H>>(v[i], v[i + H]), b = shuffle<Crossed<H>>(v[i], v[i + H]);
      v[i] = Max ? max(a, b) : a + b;
    }
    return folds<Max, 2 * H>(v);
  }
}

// Each lane's largest (or summed) value over its aligned segment of S lanes.
template <int S>
inline f32v segment_max(f32v v) {
  if constexpr (S > 1) {
    v = max(v, shuffle<Swapped<S / 2>>(v, v));
    return segment_max<S / 2>(v);
  }
  return v;
}
template <int S>
inline f32v segment_sum(f32v v) {
  if constexpr (S > 1) {
    v = v + shuffle<Swapped<S / 2>>(v, v);
    return segment_sum<S / 2>(v);
  }
  return v;
}
