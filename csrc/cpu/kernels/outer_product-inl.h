// Outer products over the slots of a tile, as many rows need them: elements of keys and values are
// broadcast against vectors of query rows, sums stay in registers.
#pragma once

#include "cpu/kernels/half-inl.h"
#include "cpu/kernels/product-inl.h"
#include "cpu/kernels/tile-inl.h"
#include "cpu/kernels/vec-inl.h"

// Accumulators kBroadcast x NV must fit the registers beside NV loaded vectors.
template <int NV>
constexpr int kBroadcast = NV == 1 || kRegisters == 32 ? 8 : 4;

// Eight sums are too few to hide how long a multiply-add takes. Sixteen have registers for the
// sums, but not for as many pointers: they need elements at distances that the compiler knows.
template <int NV>
constexpr int kWide = NV == 1 && kRegisters == 32 ? 16 : kBroadcast<NV>;

constexpr int64_t kPairs = kKeyTile / 2;

// A tile as the products read it: lines of elements.
template <typename M>
struct Lines {
  int64_t begin, count;                       // places [begin, begin + count)
  const typename M::Element* keys[kKeyTile];  // one per slot
  // One per slot; of pairs, the first of all: [D / kLanes][kPairs][kLanes], so that what a block of
  // sums reads lies together.
  const typename M::Element* values[M::kPack == 1 ? kKeyTile : 1];
};

// sum[b][v] += sum over i of the element at elements(i)(b), broadcast, times vector v of panel row
// i. `ahead` steps once per line of elements in memory: it is done when the tile is.
template <typename M, int NV, int NB, typename P, typename F>
inline void multiply(const float* panel, int64_t steps, const F& elements, f32v (&sum)[NB][NV],
                     P& ahead) {
  constexpr int64_t ld = NV * kLanes;
  const auto step = [&](int64_t i) {
    typename M::Vec x[NV];
#pragma GCC unroll 3
    for (int v = 0; v < NV; ++v) x[v] = load_as<typename M::Vec>(panel + i * ld + v * kLanes);
    const auto of_step = elements(i);
#pragma GCC unroll 16
    for (int b = 0; b < NB; ++b) {
      const typename M::Vec y = M::broadcast(of_step(b));
#pragma GCC unroll 3
      for (int v = 0; v < NV; ++v) sum[b][v] = M::multiply_add(y, x[v], sum[b][v]);
    }
  };
  constexpr int kLine = P::kValues / M::kPack, kRun = kLine > NB ? kLine / NB : 1;
  P local = ahead;  // in registers
  int64_t i = 0;
  for (; i + kRun <= steps; i += kRun) {
    local.step();
#pragma GCC unroll 2
    for (int j = 0; j < kRun; ++j) step(i + j);
  }
  if (steps % kRun != 0)  // where steps are known, gcc 12 warns of a loop that never runs
    for (; i < steps; ++i) step(i);
  ahead = local;
}

// NB keys or value columns against NV vectors of rows, accumulators in registers. Not inlined: the
// registers of what is around them would go to the stack from here. Keys lie Steps elements apart,
// as many as they have; or anywhere, with 0.
template <typename M, int NV, int NB, int Steps, typename P>
[[gnu::noinline]] void scores_block(const float* query, const typename M::Element* const* keys,
                                    int64_t steps, float* scores, P& ahead) {
  f32v acc[NB][NV] = {};
  if constexpr (Steps > 0) {
    const auto elements = [first = keys[0]](int64_t i) {
      return [from = first + i](int b) { return from + b * Steps; };
    };
    multiply<M>(query, Steps, elements, acc, ahead);
  } else {
    const auto elements = [&](int64_t i) { return [=](int b) { return keys[b] + i; }; };
    multiply<M>(query, steps, elements, acc, ahead);
  }
#pragma GCC unroll 16
  for (int b = 0; b < NB; ++b)
#pragma GCC unroll 3
    for (int v = 0; v < NV; ++v) store(scores + (b * NV + v) * kLanes, acc[b][v]);
}

// In bytes: lines may lie half an element apart.
template <typename E>
inline bool one_after_another(const E* const* lines, int count, int64_t length) {
  const int64_t first = reinterpret_cast<int64_t>(lines[0]);
  int64_t off = 0;
  for (int i = 1; i < count; ++i)
    off |= reinterpret_cast<int64_t>(lines[i]) - first - i * length * int64_t{sizeof(E)};
  return off == 0;
}

// scores^T[slot][row] of `count` keys.
template <typename M, int NV, typename P>
void score_lines(const float* query, const typename M::Element* const* keys, int64_t count,
                 int64_t steps, float* scores, P& ahead) {
  constexpr int64_t ld = NV * kLanes;
  constexpr int NB = kBroadcast<NV>, kMost = kWide<NV>;
  const auto block = [&](auto blocked, auto known, int64_t s) {
    scores_block<M, NV, decltype(blocked)::value, decltype(known)::value>(query, keys + s, steps,
                                                                          scores + s * ld, ahead);
  };
  int64_t s = 0;
  if constexpr (kMost > NB) {
    const auto wide = [&](auto known) {
      for (; s + kMost <= count && one_after_another(keys + s, kMost, steps); s += kMost)
        block(Int<kMost>{}, known, s);
    };
    if (steps == 32) wide(Int<32>{});
    if (steps == 64) wide(Int<64>{});
    if (steps == 128) wide(Int<128>{});
  }
  for (; s + NB <= count; s += NB) block(Int<NB>{}, Int<0>{}, s);
  for (; s < count; ++s) block(Int<1>{}, Int<0>{}, s);
}

template <typename M, int NV, int NB, typename P>
[[gnu::noinline]] void values_block(const float* probs, const typename M::Element* const* values,
                                    int64_t d, int64_t steps, const f32v* alpha, float* out,
                                    P& ahead) {
  out += d * NV * kLanes;
  f32v acc[NB][NV];
#pragma GCC unroll 16
  for (int b = 0; b < NB; ++b)
#pragma GCC unroll 3
    for (int v = 0; v < NV; ++v) acc[b][v] = load(out + (b * NV + v) * kLanes) * alpha[v];
  if constexpr (M::kPack == 1) {
    const auto elements = [&](int64_t i) {
      const typename M::Element* from = values[i] + d;
      asm("" : "+r"(from));  // one address per step, not one offset per sum
      return [from](int b) { return from + b; };
    };
    multiply<M>(probs, steps, elements, acc, ahead);
  } else {
    const auto elements = [first =
                               values[0] + d / kLanes * kLanes * kPairs + d % kLanes](int64_t i) {
      return [from = first + i * kLanes](int b) { return from + b; };
    };
    multiply<M>(probs, steps, elements, acc, ahead);
  }
#pragma GCC unroll 16
  for (int b = 0; b < NB; ++b)
#pragma GCC unroll 3
    for (int v = 0; v < NV; ++v) store(out + (b * NV + v) * kLanes, acc[b][v]);
}

// Lines of a tile: in place where the cache already holds elements, else converted into `buffer`
// (kKeyTile floats for every key and value of a row, D rounded up to 16).
template <typename T, typename M>
void make_key_lines(const T* const* rows, int64_t count, int64_t D, float* buffer,
                    Lines<M>* lines) {
  for (int64_t s = 0; s < count; ++s) {
    if constexpr (__is_same(T, typename M::Value)) {
      lines->keys[s] = reinterpret_cast<const typename M::Element*>(rows[s]);
    } else {
      auto* to = reinterpret_cast<typename M::Value*>(buffer) + s * D;
      if constexpr (M::kPack == 1) {
        convert_row(rows[s], to, D);
      } else {
        for (int64_t d = 0; d < D; d += 2 * kLanes) {  // what is behind a row is written later
          const auto x = D - d < 2 * kLanes ? M::row(rows[s] + d, D - d) : M::row(rows[s] + d);
          __builtin_memcpy(to + d, &x, sizeof x);
        }
      }
      lines->keys[s] = reinterpret_cast<const typename M::Element*>(to);
    }
  }
}

template <typename T, typename M>
void make_value_lines(const T* const* rows, int64_t count, int64_t D, float* buffer,
                      Lines<M>* lines) {
  if constexpr (M::kPack == 2) {
    lines->values[0] = reinterpret_cast<const typename M::Element*>(buffer);
    for (int64_t s = 0; s < count; s += 2) {
      typename M::Vec x[2];
      float* to = buffer + s / 2 * kLanes;
      int64_t d = 0;
      for (; d + 2 * kLanes <= D; d += 2 * kLanes, to += 2 * kLanes * kPairs) {
        M::columns(rows + s, d, x);
        __builtin_memcpy(to, x, sizeof *x);
        __builtin_memcpy(to + kLanes * kPairs, x + 1, sizeof *x);
      }
      if (d == D) continue;
      M::columns(rows + s, d, D - d, x);
      __builtin_memcpy(to, x, sizeof *x);
      if (D - d > kLanes) __builtin_memcpy(to + kLanes * kPairs, x + 1, sizeof *x);
    }
  } else {
    for (int64_t s = 0; s < count; ++s) {
      if constexpr (__is_same(T, float)) {
        lines->values[s] = rows[s];
      } else {
        convert_row(rows[s], buffer + s * D, D);
        lines->values[s] = buffer + s * D;
      }
    }
  }
}
