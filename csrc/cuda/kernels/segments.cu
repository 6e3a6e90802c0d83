#include "cuda/device.cuh"
#include "cuda/kernels/segments.cuh"

namespace branchwise::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

// A block per list: a thread per segment finds where its slots go, a warp per segment writes them.
__global__ void __launch_bounds__(kThreads)
    segments_kernel(const __grid_constant__ SegmentsLaunch in) {
  auto* first = reinterpret_cast<int32_t*>(shared_memory());  // of each segment's slots
  int32_t *begins = first + kThreads, *sizes = begins + kThreads, *sums = sizes + kThreads;
  const int64_t list = blockIdx.x, head = list % in.heads, row = list / in.heads / in.tokens;
  const int32_t* segments = in.indices + list * in.width;
  const int32_t* offsets = in.offsets + (row * in.heads + head) * (in.S + 1);
  int32_t* out = in.slots + list * in.most;
  const int64_t named = in.counts[list], count = named < in.width ? named : in.width;
  const int32_t most = static_cast<int32_t>(in.most);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int32_t total = 0;
  for (int64_t at = 0; at < count; at += kThreads) {
    int32_t begin = 0, size = 0;
    if (at + threadIdx.x < count) {
      const int32_t segment = segments[at + threadIdx.x];
      if (segment >= 0 && segment < in.S) {
        begin = max(offsets[segment], 0);
        size = max(min(offsets[segment + 1], most) - begin, 0);
      }
    }
    int32_t before = size;  // up to this lane, then up to the one before it
    for (int i = 1; i < kWarp; i *= 2) {
      const int32_t other = shuffle(before, lane - i < 0 ? lane : lane - i);
      if (lane >= i) before += other;
    }
    if (lane == kWarp - 1) sums[warp] = before;
    before -= size;
    sync_block();
    int32_t all = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += sums[w];
      all += sums[w];
    }
    first[threadIdx.x] = total + before;
    begins[threadIdx.x] = begin;
    sizes[threadIdx.x] = size;
    sync_block();
    for (int s = warp; s < kThreads && at + s < count; s += kWarps)
      for (int32_t i = lane; i < sizes[s] && first[s] + i < most; i += kWarp)
        out[first[s] + i] = begins[s] + i;
    total = min(total + min(all, most), most);
    sync_block();
  }
  if (threadIdx.x == 0) in.num_slots[list] = total;
}

}  // namespace

int expand_segments(const SegmentsLaunch& in, void* stream) {
  const int64_t lists = in.B * in.tokens * in.heads;
  if (lists == 0) return 0;
  return launch(segments_kernel, Grid(static_cast<unsigned>(lists)), kThreads,
                (3 * kThreads + kWarps) * 4, stream, in);
}

}  // namespace branchwise::cuda
