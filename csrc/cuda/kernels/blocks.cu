#include "cuda/device.cuh"
#include "cuda/kernels/blocks.cuh"

namespace branchwise::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;

// A row's window and what a step finds there, in shared memory.
struct Stepper {
  const BlockSteps& in;
  int64_t row;
  int64_t* window;  // [W]
  int32_t* order;   // [W] masked positions of the block, by rank
  int32_t* flags;   // [kWarps] and what the first thread decides

  // The least of what the threads bring.
  __device__ int32_t least(int32_t value) {
    for (int i = kWarp / 2; i > 0; i /= 2) value = min(value, shuffle_xor(value, i));
    sync_block();
    if (threadIdx.x % kWarp == 0) flags[threadIdx.x / kWarp] = value;
    sync_block();
    for (int w = 0; w < kWarps; ++w) value = min(value, flags[w]);
    return value;
  }

  // One step in place: in the first block that has masks, unmasks what the rule says, surest first
  // and of equals the lower position. False, and nothing done, where masks lack a prediction.
  __device__ bool step(const int64_t* tokens, const float* scores, int64_t count, bool single) {
    const int32_t W = static_cast<int32_t>(in.W);
    int32_t first = W;
    for (int32_t i = threadIdx.x; i < W && first == W; i += kThreads)
      if (window[i] == in.mask_id) first = i;
    first = least(first);
    if (first == W) return false;
    const int64_t block = in.block_of(row, first);
    const auto masked = [&](int32_t i) {
      return window[i] == in.mask_id && in.block_of(row, i) == block;
    };
    int32_t masks = 0, known = 1;
    for (int32_t i = first; i < W && in.block_of(row, i) == block; ++i)
      masks += window[i] == in.mask_id ? 1 : 0;
    for (int32_t i = first + threadIdx.x; i < W; i += kThreads)
      if (masked(i) && !(scores[i] > -INFINITY)) known = 0;
    if (least(known) == 0) return false;
    for (int32_t i = first + threadIdx.x; i < W; i += kThreads) {
      if (!masked(i)) continue;
      int32_t rank = 0;
      for (int32_t j = first; j < W && in.block_of(row, j) == block; ++j)
        if (window[j] == in.mask_id && (scores[j] > scores[i] || (scores[j] == scores[i] && j < i)))
          ++rank;
      order[rank] = i;
    }
    sync_block();
    int32_t n = 1;
    if (!single) switch (in.rule) {
        case UnmaskRule::count:
          n = static_cast<int32_t>(count < 1 ? 1 : count < masks ? count : masks);
          break;
        case UnmaskRule::threshold:
          while (n < masks && scores[order[n]] >= in.level) ++n;
          break;
        case UnmaskRule::budget: {
          double sum = -double{scores[order[0]]};
          while (n < masks && (sum -= scores[order[n]]) <= in.level) ++n;
          break;
        }
      }
    for (int32_t i = threadIdx.x; i < n; i += kThreads) window[order[i]] = tokens[order[i]];
    sync_block();
    return true;
  }
};

__device__ Stepper stepper_of(const BlockSteps& steps) {
  int64_t* window = reinterpret_cast<int64_t*>(shared_memory());
  int32_t* order = reinterpret_cast<int32_t*>(window + steps.W);
  return {steps, blockIdx.x, window, order, order + steps.W};
}

__device__ void copy(const int64_t* from, int64_t* to, int64_t count) {
  sync_block();
  for (int64_t i = threadIdx.x; i < count; i += kThreads) to[i] = from[i];
  sync_block();
}

__global__ void __launch_bounds__(kThreads)
    draft_blocks_kernel(const __grid_constant__ DraftBlocksLaunch in) {
  const int64_t b = blockIdx.x, W = in.steps.W, K = in.steps.K;
  Stepper stepper = stepper_of(in.steps);
  copy(in.window + b * W, stepper.window, W);
  int32_t count = 0;
  bool going = true;
  for (int64_t k = 0; k < K; ++k) {
    // Behind the first step of a rule that looks at scores, one position after the other.
    const bool single = k > 0 && in.steps.rule != UnmaskRule::count;
    going = going && stepper.step(in.steps.tokens + b * W, in.steps.scores + b * W,
                                  in.steps.count(b, k), single);
    count += going ? 1 : 0;
    copy(stepper.window, in.drafts + (b * K + k) * W, W);
  }
  if (threadIdx.x == 0) in.num_drafts[b] = count;
}

__global__ void __launch_bounds__(kThreads)
    verify_blocks_kernel(const __grid_constant__ VerifyBlocksLaunch in) {
  const int64_t b = blockIdx.x, W = in.steps.W, K = in.steps.K;
  Stepper stepper = stepper_of(in.steps);
  const int64_t* drafts = in.drafts + b * K * W;
  const int32_t given = in.num_drafts[b];
  const int32_t num = given < 0 ? 0 : given < K ? given : static_cast<int32_t>(K);
  int32_t best = num > 0 ? 0 : -1;
  for (bool found = best == 0; found;) {
    found = false;
    copy(drafts + best * W, stepper.window, W);
    const int64_t at = (b * K + best) * W;
    if (!stepper.step(in.steps.tokens + at, in.steps.scores + at, in.steps.count(b, best + 1),
                      false))
      break;
    for (int32_t j = num - 1; j > best && !found; --j) {
      int32_t equal = 1;
      for (int64_t i = threadIdx.x; i < W; i += kThreads)
        if (stepper.window[i] != drafts[j * W + i]) equal = 0;
      if (stepper.least(equal) != 0) {
        best = j;
        found = true;
      }
    }
  }
  if (threadIdx.x == 0) in.accepted[b] = best;
}

}  // namespace

int draft_blocks(const DraftBlocksLaunch& in, void* stream) {
  if (in.steps.B == 0) return 0;
  return launch(draft_blocks_kernel, Grid(static_cast<unsigned>(in.steps.B)), kThreads,
                static_cast<int>(blocks_bytes(in.steps.W)), stream, in);
}

int verify_blocks(const VerifyBlocksLaunch& in, void* stream) {
  if (in.steps.B == 0) return 0;
  return launch(verify_blocks_kernel, Grid(static_cast<unsigned>(in.steps.B)), kThreads,
                static_cast<int>(blocks_bytes(in.steps.W)), stream, in);
}

}  // namespace branchwise::cuda
