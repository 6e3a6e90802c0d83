// The device vocabulary of the kernels: element types, warp and block collectives, asynchronous
// copies, matrix products, launches. Kernels use CUDA through this header only, so that the same
// sources also compile for the emulator (cuda/emulate), which runs them on a CPU.
#pragma once
#include <cstdint>

#include "common/device.h"
#include "common/dtype.h"
#include "common/e4m3.h"

#if defined(BW_EMULATE)
#include "cuda/emulate/device.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace branchwise::cuda {

using bf16 = __nv_bfloat16;
using half = __half;
using Grid = dim3;

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(half x) { return __half2float(x); }
__device__ inline void from_float(float x, float* out) { *out = x; }
__device__ inline void from_float(float x, bf16* out) { *out = __float2bfloat16_rn(x); }
__device__ inline void from_float(float x, half* out) { *out = __float2half_rn(x); }

// Two elements in a register, `low` in the lower half.
template <typename T>
__device__ uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<bf16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
template <>
__device__ inline uint32_t pack<half>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// Not made a part of a multiply-add.
__device__ inline float rounded_product(float a, float b) { return __fmul_rn(a, b); }

// 2^x to a relative error of 2^-22; 0 for -inf.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <typename T>
__device__ inline T shuffle(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}
template <typename T>
__device__ inline T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(kAllLanes, value, lane_mask);
}
__device__ inline uint32_t ballot(bool predicate) { return __ballot_sync(kAllLanes, predicate); }
__device__ inline void sync_warp() { __syncwarp(); }
__device__ inline void sync_block() { __syncthreads(); }

__device__ inline int count_bits(uint64_t word) { return __popcll(word); }
__device__ inline int lowest_bit(uint32_t word) { return __ffs(static_cast<int>(word)) - 1; }
__device__ inline uint32_t bits_of(float x) { return __float_as_uint(x); }
// Returns what was there before.
__device__ inline int32_t add_atomic(int32_t* to, int32_t x) { return atomicAdd(to, x); }
__device__ inline void or_atomic(uint32_t* to, uint32_t bits) { atomicOr(to, bits); }
__device__ inline void and_atomic(uint32_t* to, uint32_t bits) { atomicAnd(to, bits); }
__device__ inline int leading_zeros(uint32_t word) { return __clz(static_cast<int>(word)); }

// The block's dynamic shared memory.
__device__ inline char* shared_memory() {
  extern __shared__ __align__(128) char shared[];
  return shared;
}

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory, past the L1 cache, seen by this thread after wait_copies
// and by the others after a barrier behind that. Zeros, and no read, where not valid.
__device__ inline void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `Pending` of the committed groups are under way.
template <int Pending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(Pending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane 8 i + r gives the address of row r of matrix i. Each
// lane gets elements (lane / 4, lane % 4 * 2 + {0, 1}) of every matrix, or of its transpose.
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void load_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b for a [16, 16], b [16, 8], in the register layouts of mma.m16n8k16.
template <typename T>
__device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void multiply<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                      uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void multiply<half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                      uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four e4m3 values as two pairs.
template <typename T>
__device__ inline void unpack_e4m3(uint32_t four, uint32_t (&pairs)[2]) {
#if __CUDA_ARCH__ >= 890
  uint32_t halves[2];
  asm("{\n\t.reg .b16 low, high;\n\tmov.b32 {low, high}, %2;\n\t"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n\tcvt.rn.f16x2.e4m3x2 %1, high;\n\t}"
      : "=r"(halves[0]), "=r"(halves[1])
      : "r"(four));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&halves[i]));
    pairs[i] = pack<T>(both.x, both.y);
  }
#else
#pragma unroll
  for (int i = 0; i < 2; ++i)
    pairs[i] = pack<T>(from_e4m3(four >> (16 * i) & 0xff), from_e4m3(four >> (16 * i + 8) & 0xff));
#endif
}

// Returns the CUDA error code of the launch.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), Grid grid, int threads, int shared_bytes, void* stream,
           const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t code =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (code != cudaSuccess) return static_cast<int>(code);
  }
  // clang-format off
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  // clang-format on
  return static_cast<int>(cudaGetLastError());
}

// Whether kernels can read memory at this address: the device's, or pinned.
inline bool is_readable(const void* address) {
  cudaPointerAttributes attributes;
  if (cudaPointerGetAttributes(&attributes, address) != cudaSuccess) {
    cudaGetLastError();  // or the next launch reports it
    return false;
  }
  return attributes.type != cudaMemoryTypeUnregistered;
}

inline const char* describe_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // namespace branchwise::cuda
#endif

namespace branchwise::cuda {

constexpr int kWarp = 32;

// An element of a cache in e4m3; what it stands for is this times a factor.
struct E4m3 {
  uint8_t bits;
};
__device__ inline float to_float(E4m3 x) { return from_e4m3(x.bits); }
__device__ inline void from_float(float x, E4m3* out) { out->bits = to_e4m3(x); }

template <typename T>
__device__ T warp_sum(T value) {
  for (int i = kWarp / 2; i > 0; i /= 2) value += shuffle_xor(value, i);
  return value;
}
__device__ inline float warp_max(float value) {
  for (int i = kWarp / 2; i > 0; i /= 2) value = fmaxf(value, shuffle_xor(value, i));
  return value;
}

// with(an element of the type)
template <typename With>
int dispatch(DType type, const With& with) {
  switch (type) {
    case DType::bf16:
      return with(bf16{});
    case DType::f16:
      return with(half{});
    default:
      return with(0.f);
  }
}

// As many blocks as there is work, as far as a grid goes; kernels loop over the rest.
inline Grid grid_for(int64_t blocks) {
  return Grid(static_cast<unsigned>(blocks < 65535 ? blocks : 65535));
}

}  // namespace branchwise::cuda
