// The tile registers of AMX: eight tiles of 16 rows of 64 bytes. Register numbers are template
// arguments, so that loops over them unroll into instructions.
//
// No kernel uses more than four, two of them for sums. The two hyperthreads of a core share what
// stands behind the registers: where the other one's are in use as well, a product and its load
// take four times as long with eight registers, and twice as long with four (measured).
#pragma once

#include "cpu/kernels/vec-inl.h"

constexpr int64_t kTileRows = 16, kTileBytes = 64;
constexpr int64_t kTileFloats = 256;

struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes_per_row[16];
  uint8_t rows[16];
};

// A constant, as the intrinsic tells the compiler of its first bytes only.
alignas(64) constexpr TileConfig kTileConfig = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// All tiles are full ones while this lives.
struct TilesInUse {
  TilesInUse() { _tile_loadconfig(&kTileConfig); }
  ~TilesInUse() { _tile_release(); }
  TilesInUse(const TilesInUse&) = delete;
  TilesInUse& operator=(const TilesInUse&) = delete;
};

// gcc's own intrinsics for these do not tell the compiler that they read memory.
template <int R>
inline void load_tile(const void* from, int64_t bytes_apart) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(bytes_apart), "i"(R) : "memory");
}
template <int R>
inline void store_tile(void* to, int64_t bytes_apart) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(bytes_apart), "i"(R) : "memory");
}
template <int R>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(R));
}
// sum[i][j] += over k of a[i][k] b[k][j], k by k; elements of a and b are pairs of bf16, whose two
// products are added. Numbers too small to be normal ones count as zero.
template <int Sum, int A, int B>
inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
}

// f(Int<0>), ..., f(Int<N - 1>).
template <int N, typename F>
[[gnu::always_inline]] inline void unrolled(const F& f) {
  if constexpr (N > 0) {
    unrolled<N - 1>(f);
    f(Int<N - 1>{});
  }
}
