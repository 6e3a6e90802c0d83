// The device vocabulary (cuda/device.cuh) on a CPU: every thread of a block is a fiber, collectives
// are where fibers meet. Slow, and strict where hardware is forgiving: warps run in random order
// between barriers, shared memory begins as NaN, an asynchronous copy arrives no sooner than it is
// waited for, and lanes that part before a collective are an error. Built with AddressSanitizer it
// also sees every read outside a tensor.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>

#include "common/e4m3.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace branchwise::cuda {

using bf16 = c10::BFloat16;
using half = c10::Half;
using std::max;
using std::min;

struct Grid {
  unsigned x, y, z;
  explicit Grid(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern Grid threadIdx, blockIdx, blockDim, gridDim;

namespace emulate {

// Where the lanes of a warp meet: all of them with the same operation, which then runs once on what
// each of them brought.
using Operation = void (*)(void* const* operands);
void meet(Operation operation, void* operand);
char* shared();
void copy(void* to, const void* from, bool valid);
void commit();
void wait(int pending);
// Throws where lanes part, or threads wait for some that have ended.
void run(Grid grid, int threads, int shared_bytes, const std::function<void()>& kernel);

template <typename T>
T& at(void* const* operands, int lane) {
  return *static_cast<T*>(operands[lane]);
}

template <typename T>
float element(uint32_t pair, int which) {
  T value;
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * which));
  std::memcpy(&value, &bits, sizeof(bits));
  return static_cast<float>(value);
}

struct MatrixLoad {
  const void* row;
  uint32_t out[4];
};
template <bool Transposed>
void load_matrices(void* const* operands) {
  const auto element = [&](int matrix, int row, int column) -> uint32_t {
    return static_cast<const uint16_t*>(at<MatrixLoad>(operands, 8 * matrix + row).row)[column];
  };
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int a = lane / 4, b = lane % 4 * 2;
      at<MatrixLoad>(operands, lane).out[i] = Transposed
                                                  ? element(i, b, a) | element(i, b + 1, a) << 16
                                                  : element(i, a, b) | element(i, a, b + 1) << 16;
    }
}

struct Product {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};
template <typename T>
void multiply(void* const* operands) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Product& from = at<Product>(operands, lane);
    for (int e = 0; e < 2; ++e)
      for (int k = 0; k < 2; ++k) {
        const int at = lane % 4 * 2 + e + 8 * k;
        b[at][lane / 4] = element<T>(from.b[k], e);
        for (int r = 0; r < 2; ++r) a[lane / 4 + 8 * r][at] = element<T>(from.a[2 * k + r], e);
      }
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      at<Product>(operands, lane).c[i] += sum;
    }
}

}  // namespace emulate

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return x; }
inline float to_float(half x) { return x; }
template <typename T>
void from_float(float x, T* out) {
  *out = static_cast<T>(x);
}
template <typename T>
uint32_t pack(float low, float high) {
  const T both[2] = {static_cast<T>(low), static_cast<T>(high)};
  uint32_t bits;
  std::memcpy(&bits, both, sizeof(bits));
  return bits;
}
inline float rounded_product(float a, float b) { return a * b; }
inline float exp2_approx(float x) { return std::exp2(x); }

template <typename T>
T shuffle(T value, int lane) {
  struct Operand {
    T value;
    int lane;
    T out;
  } operand{value, lane, value};
  emulate::meet(
      [](void* const* all) {
        for (int i = 0; i < 32; ++i) {
          Operand& own = emulate::at<Operand>(all, i);
          own.out = emulate::at<Operand>(all, own.lane & 31).value;
        }
      },
      &operand);
  return operand.out;
}
template <typename T>
T shuffle_xor(T value, int lane_mask) {
  return shuffle(value, static_cast<int>(threadIdx.x % 32) ^ lane_mask);
}
inline uint32_t ballot(bool predicate) {
  struct Operand {
    bool predicate;
    uint32_t out;
  } operand{predicate, 0};
  emulate::meet(
      [](void* const* all) {
        uint32_t bits = 0;
        for (int i = 0; i < 32; ++i) bits |= uint32_t{emulate::at<Operand>(all, i).predicate} << i;
        for (int i = 0; i < 32; ++i) emulate::at<Operand>(all, i).out = bits;
      },
      &operand);
  return operand.out;
}
inline void sync_warp() {
  emulate::meet([](void* const*) {}, nullptr);
}
void sync_block();

inline int count_bits(uint64_t word) { return __builtin_popcountll(word); }
inline int lowest_bit(uint32_t word) { return __builtin_ctz(word); }
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline int32_t add_atomic(int32_t* to, int32_t x) {
  const int32_t before = *to;
  *to += x;
  return before;
}
inline void or_atomic(uint32_t* to, uint32_t bits) { *to |= bits; }
inline void and_atomic(uint32_t* to, uint32_t bits) { *to &= bits; }
inline int leading_zeros(uint32_t word) { return __builtin_clz(word); }
inline char* shared_memory() { return emulate::shared(); }
inline void copy_async(void* to, const void* from, bool valid) { emulate::copy(to, from, valid); }
inline void commit_copies() { emulate::commit(); }
template <int Pending>
void wait_copies() {
  emulate::wait(Pending);
}
inline void load_matrices(uint32_t (&r)[4], const void* row) {
  emulate::MatrixLoad operand{row, {}};
  emulate::meet(emulate::load_matrices<false>, &operand);
  std::memcpy(r, operand.out, sizeof(r));
}
inline void load_transposed(uint32_t (&r)[4], const void* row) {
  emulate::MatrixLoad operand{row, {}};
  emulate::meet(emulate::load_matrices<true>, &operand);
  std::memcpy(r, operand.out, sizeof(r));
}
template <typename T>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulate::Product operand{c, a, {b0, b1}};
  emulate::meet(emulate::multiply<T>, &operand);
}

template <typename T>
void unpack_e4m3(uint32_t four, uint32_t (&pairs)[2]) {
  for (int i = 0; i < 2; ++i)
    pairs[i] = pack<T>(from_e4m3(four >> (16 * i) & 0xff), from_e4m3(four >> (16 * i + 8) & 0xff));
}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), Grid grid, int threads, int shared_bytes, void*,
           const Arguments&... arguments) {
  emulate::run(grid, threads, shared_bytes, [&] { kernel(arguments...); });
  return 0;
}
inline bool is_readable(const void*) { return true; }
inline const char* describe_error(int) { return "emulated kernel"; }

}  // namespace branchwise::cuda
