// append_kv, commit_kv and build_tree.
#include "cuda/device.cuh"
#include "cuda/kernels/kv.cuh"
#include "cuda/kernels/slots-inl.cuh"

namespace branchwise::cuda {
namespace {

constexpr int kThreads = 128;

// A warp per row of one cache.
template <typename Element, typename Angle, typename Stored>
__global__ void append_kernel(const __grid_constant__ AppendLaunch in) {
  const int lane = threadIdx.x % kWarp;
  const int64_t rows = in.B * in.Hkv * in.T, warps = int64_t{gridDim.x} * (kThreads / kWarp);
  for (int64_t i = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp; i < 2 * rows;
       i += warps) {
    const int which = i < rows ? 0 : 1;
    const int64_t row = i % rows, t = row % in.T, h = row / in.T % in.Hkv, b = row / in.T / in.Hkv;
    const CacheRef& cache = in.to[which];
    auto* to = reinterpret_cast<Stored*>(slot_at(cache, b, h, length_of(in.lens, b, h) + t));
    if (to == nullptr) continue;
    const auto* from = static_cast<const Element*>(in.from[which]) + b * in.stride[which][0] +
                       h * in.stride[which][1] + t * in.stride[which][2];
    const int64_t rotated = which == 0 && in.cos != nullptr ? in.rope.R : 0, half = rotated / 2;
    const auto* cos =
        static_cast<const Angle*>(in.cos) + b * in.cos_stride[0] + t * in.cos_stride[1];
    const auto* sin =
        static_cast<const Angle*>(in.sin) + b * in.sin_stride[0] + t * in.sin_stride[1];
    const float scale = sizeof(Stored) == 1 ? in.scale[which][h] : 1.f;
    const auto put = [&](float x, int64_t d) {
      if constexpr (sizeof(Stored) == 1) {
        Element rounded;  // as the CPU does
        from_float(x, &rounded);
        from_float(to_float(rounded) / scale, to + d);
      } else {
        from_float(x, to + d);
      }
    };
    for (int64_t d = lane; d < half; d += kWarp) {
      const float low = to_float(from[d]), high = to_float(from[d + half]);
      put(low * to_float(cos[d]) - high * to_float(sin[d]), d);
      put(high * to_float(cos[d + half]) + low * to_float(sin[d + half]), d + half);
    }
    for (int64_t d = rotated + lane; d < cache.D; d += kWarp) put(to_float(from[d]), d);
  }
}

// A warp per cache, row and head. A lane keeps to its own bytes of all slots and takes nodes in
// ascending order, eight at a time: sources are never behind targets, so no lane has to wait.
template <typename Unit>
__global__ void commit_kernel(const __grid_constant__ CommitLaunch in) {
  constexpr int kTogether = 8;
  const int lane = threadIdx.x % kWarp;
  const int64_t warp = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (in.after != nullptr && blockIdx.x == 0)
    for (int64_t i = threadIdx.x; i < in.B * in.heads; i += kThreads) {
      const int64_t b = i / in.heads, count = in.num_accepted[b];
      const int64_t added = count < 0 ? 0 : count < in.A ? count : in.A;
      in.after[i] = static_cast<int32_t>(length_of(in.lens, b, i % in.heads) + added);
    }
  int64_t at = warp;
  int c = 0;
  for (; c < in.num_caches && at >= in.B * in.Hkv[c]; ++c) at -= in.B * in.Hkv[c];
  if (c == in.num_caches) return;
  const CacheRef& cache = in.caches[c];
  const int64_t b = at / in.Hkv[c], h = at % in.Hkv[c], length = length_of(in.lens, b, h);
  const int32_t* path = in.accepted + b * in.A;
  const int64_t count = min(int64_t{in.num_accepted[b]}, in.A);
  const int64_t units = cache.D * cache.element_bytes / static_cast<int64_t>(sizeof(Unit));
  for (int64_t u = lane; u < units; u += kWarp)
    for (int64_t first = 0; first < count; first += kTogether) {
      Unit values[kTogether] = {};  // or the compiler keeps small ones on the stack
      Unit* targets[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        targets[j] = nullptr;
        if (first + j >= count) continue;
        const int64_t node = path[first + j];
        if (node <= first + j) continue;  // in place already
        const char* from = slot_at(cache, b, h, length + node);
        char* to = slot_at(cache, b, h, length + first + j);
        if (from == nullptr || to == nullptr) continue;
        values[j] = reinterpret_cast<const Unit*>(from)[u];
        targets[j] = reinterpret_cast<Unit*>(to) + u;
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j)
        if (targets[j] != nullptr) *targets[j] = values[j];
    }
}

// A thread per node. Only parents before their node count, so every walk ends.
__global__ void build_tree_kernel(const int32_t* parents, const int32_t* seq_lens, int64_t* mask,
                                  int64_t* positions, int32_t* next_token, int32_t* next_sibling,
                                  int64_t B, int64_t T) {
  const int64_t W = (T + 63) / 64, step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < B * T; i += step) {
    const int64_t b = i / T;
    const int32_t node = static_cast<int32_t>(i % T);
    const int32_t* parent = parents + b * T;
    const auto parent_of = [&](int32_t n) { return parent[n] < n ? parent[n] : -1; };
    int64_t* bits = mask + i * W;
    for (int64_t w = 0; w < W; ++w) bits[w] = 0;
    int64_t depth = -1;
    for (int32_t n = node; n >= 0; n = parent_of(n), ++depth)
      bits[n / 64] |= static_cast<int64_t>(uint64_t{1} << (n % 64));
    positions[i] = seq_lens[b] + depth;
    int32_t child = -1, sibling = -1;
    const int32_t own = parent_of(node);
    for (int32_t n = node + 1; n < T && (child < 0 || (own >= 0 && sibling < 0)); ++n) {
      const int32_t p = parent_of(n);
      if (child < 0 && p == node) child = n;
      if (own >= 0 && sibling < 0 && p == own) sibling = n;
    }
    next_token[i] = child;
    next_sibling[i] = sibling;
  }
}

}  // namespace

int append_kv(const AppendLaunch& in, void* stream) {
  const int64_t rows = 2 * in.B * in.Hkv * in.T, of_block = kThreads / kWarp;
  if (rows == 0) return 0;
  const Grid grid = grid_for((rows + of_block - 1) / of_block);
  return dispatch(in.rope.type, [&](auto element) {
    using Element = decltype(element);
    const auto with = [&](auto* kernel) { return launch(kernel, grid, kThreads, 0, stream, in); };
    if (in.scale[0] != nullptr)
      return in.rope.angle_type == DType::f32 ? with(append_kernel<Element, float, E4m3>)
                                              : with(append_kernel<Element, Element, E4m3>);
    return in.rope.angle_type == DType::f32 ? with(append_kernel<Element, float, Element>)
                                            : with(append_kernel<Element, Element, Element>);
  });
}

int commit_kv(const CommitLaunch& in, void* stream) {
  int64_t warps = 1;  // for the lengths
  bool aligned = true;
  for (int c = 0; c < in.num_caches; ++c) {
    warps += in.B * in.Hkv[c];
    aligned &= on_16_bytes(in.caches[c]);
  }
  const int64_t of_block = kThreads / kWarp;
  const Grid grid(static_cast<unsigned>((warps + of_block - 1) / of_block));
  if (aligned) return launch(commit_kernel<Bytes16>, grid, kThreads, 0, stream, in);
  for (int c = 0; c < in.num_caches; ++c)
    if (in.caches[c].element_bytes == 1)
      return launch(commit_kernel<uint8_t>, grid, kThreads, 0, stream, in);
  return launch(commit_kernel<uint16_t>, grid, kThreads, 0, stream, in);
}

int build_tree(const int32_t* parents, const int32_t* seq_lens, int64_t* mask, int64_t* positions,
               int32_t* next_token, int32_t* next_sibling, int64_t B, int64_t T, void* stream) {
  if (B * T == 0) return 0;
  return launch(build_tree_kernel, grid_for((B * T + kThreads - 1) / kThreads), kThreads, 0, stream,
                parents, seq_lens, mask, positions, next_token, next_sibling, B, T);
}

}  // namespace branchwise::cuda
