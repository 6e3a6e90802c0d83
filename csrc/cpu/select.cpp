// select_pages and select_slots: from scores to ascending lists.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/score_call.h"
#include "cpu/empty.h"
#include "cpu/isa.h"
#include "cpu/kernels/vocab_kernel.h"

namespace branchwise {
namespace {

// The floats in order, numbered from -kInfinity, which is -infinity, over 0 to kInfinity.
constexpr int32_t kInfinity = 0x7f800000;
float numbered(int32_t n) {
  const int32_t bits = std::abs(n);
  float x;
  std::memcpy(&x, &bits, 4);
  return n < 0 ? -x : x;
}

// Ascending indices from `begin` on, at most `count`: those of scores that are `sure`, and of the
// others those that are `maybe` while `rest` lasts. Without a branch on a score, since which ones
// are taken is not to be foreseen.
template <typename F, typename G>
int32_t* take(const float* scores, int64_t begin, int64_t end, int64_t count, int32_t* out,
              const F& sure, const G& maybe, int64_t rest) {
  const int32_t* last = out + count;
  for (int64_t i = begin; i < end && out != last; ++i) {
    const bool tie = maybe(scores[i]) & (rest > 0);
    rest -= tie;
    *out = static_cast<int32_t>(i);
    out += sure(scores[i]) | tie;
  }
  return out;
}

// The `count` best of scores[begin, end), ties to the lower index and NaN last, as ascending
// indices: bisects for a value that as many scores reach, each step a pass that counts.
int32_t* take_best(const float* scores, int64_t begin, int64_t end, int64_t count, int32_t* out) {
  if (count >= end - begin) {
    for (int64_t i = begin; i < end; ++i) *out++ = static_cast<int32_t>(i);
    return out;
  }
  if (count <= 0) return out;
  const VocabKernels& kernels = BW_KERNELS(vocab_kernels);
  const LogitsRow row{scores, DType::f32, end, 1.f};
  const auto reach = [&](int32_t n) {
    return kernels.count_above(row, begin, end, numbered(n), true);
  };
  int64_t low = -kInfinity, high = int64_t{kInfinity} + 1;  // `count` or more reach low, not high
  int64_t reached = reach(-kInfinity);
  if (reached < count)
    return take(
        scores, begin, end, count, out, [](float x) { return !std::isnan(x); },
        [](float x) { return std::isnan(x); }, count - reached);
  while (reached != count && high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    const int64_t found = reach(static_cast<int32_t>(middle));
    if (found < count) {
      high = middle;
    } else {
      low = middle;
      reached = found;
    }
  }
  const float least = numbered(static_cast<int32_t>(low));
  const int64_t above = kernels.count_above(row, begin, end, least, false);
  return take(
      scores, begin, end, count, out, [=](float x) { return x > least; },
      [=](float x) { return x == least; }, count - above);
}

const int32_t* check_limits(const char* op, const char* name, const Tensor& t, int64_t B, int64_t L,
                            int64_t N) {
  check_nodes(op, name, t, B, L, ScalarType::Int);
  const int32_t* data = static_cast<const int32_t*>(t.const_data_ptr());
  for (int64_t i = 0; i < B * L; ++i)
    BW_CHECK(data[i] >= 0 && data[i] <= N, op, ": ", name, "[", i / L, ", ", i % L, "] = ", data[i],
             " must lie between 0 and N = ", N);
  return data;
}

}  // namespace

std::tuple<Tensor, Tensor> select_pages(Tensor scores, Tensor num_pages, Tensor num_scored,
                                        Tensor budgets, int64_t num_sinks) {
  const char* op = "select_pages";
  check_select_pages(op, scores, num_pages, num_scored, budgets, num_sinks);
  const int64_t B = scores.size(0), L = scores.size(1), H = scores.size(2), N = scores.size(3);
  const int32_t* budget = static_cast<const int32_t*>(budgets.const_data_ptr());
  const int32_t* all = check_limits(op, "num_pages", num_pages, B, L, N);
  const int32_t* scored = check_limits(op, "num_scored", num_scored, B, L, N);
  int64_t width = 1;
  for (int64_t i = 0; i < B * L; ++i) {
    BW_CHECK(scored[i] <= all[i], op, ": num_scored[", i / L, ", ", i % L, "] = ", scored[i],
             " must be at most num_pages there, ", all[i]);
    int64_t taken = std::min<int64_t>(num_sinks, scored[i]);
    for (int64_t h = 0; h < H; ++h) {
      BW_CHECK(budget[i * H + h] >= 0, op, ": budgets[", i / L, ", ", i % L, ", ", h,
               "] = ", budget[i * H + h], " must not be negative");
      taken = std::max<int64_t>(taken, budget[i * H + h]);
    }
    width = std::max<int64_t>(width, std::min<int64_t>(taken, scored[i]) + all[i] - scored[i]);
  }
  Tensor indices = empty<4>({B, L, H, width}, ScalarType::Int);
  Tensor counts = empty<3>({B, L, H}, ScalarType::Int);
  int32_t* lists = static_cast<int32_t*>(indices.mutable_data_ptr());
  int32_t* sizes = static_cast<int32_t*>(counts.mutable_data_ptr());
  const float* data = static_cast<const float*>(scores.const_data_ptr());
  const int64_t grain = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, N));
  torch::stable::parallel_for(0, B * L * H, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / H, sinks = std::min<int64_t>(num_sinks, scored[row]);
      int32_t *list = lists + i * width, *at = list;
      for (int64_t n = 0; n < sinks; ++n) *at++ = static_cast<int32_t>(n);
      at = take_best(data + i * N, sinks, scored[row], budget[i] - sinks, at);
      for (int64_t n = scored[row]; n < all[row]; ++n) *at++ = static_cast<int32_t>(n);
      sizes[i] = static_cast<int32_t>(at - list);
      std::fill(at, list + width, -1);
    }
  });
  return {indices, counts};
}

std::tuple<Tensor, Tensor> select_slots(Tensor scores, Tensor segment_offsets, Tensor num_segments,
                                        int64_t budget) {
  const char* op = "select_slots";
  check_select_slots(op, scores, segment_offsets, num_segments, budget);
  const int64_t B = scores.size(0), L = scores.size(1), H = scores.size(2), S = scores.size(3);
  const int32_t* offsets = static_cast<const int32_t*>(segment_offsets.const_data_ptr());
  const int32_t* segments = check_limits(op, "num_segments", num_segments, B, L, S);
  int64_t width = 1;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h) {
      const int32_t* at = offsets + (b * H + h) * (S + 1);
      const int32_t most = *std::max_element(segments + b * L, segments + (b + 1) * L);
      for (int32_t n = 0; n < most; ++n)
        BW_CHECK(at[n] >= 0 && at[n] <= at[n + 1], op, ": segment_offsets[", b, ", ", h,
                 "] goes from ", at[n], " to ", at[n + 1], " at ", n, " and must ascend from 0");
      if (most > 0) width = std::max<int64_t>(width, std::min<int64_t>(budget, at[most] - at[0]));
    }
  Tensor indices = empty<4>({B, L, H, width}, ScalarType::Int);
  Tensor counts = empty<3>({B, L, H}, ScalarType::Int);
  int32_t* lists = static_cast<int32_t*>(indices.mutable_data_ptr());
  int32_t* sizes = static_cast<int32_t*>(counts.mutable_data_ptr());
  const float* data = static_cast<const float*>(scores.const_data_ptr());
  torch::stable::parallel_for(0, B * L * H, 8, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> order;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / (L * H), h = i % H;
      const int32_t* at = offsets + (b * H + h) * (S + 1);
      const float* of = data + i * S;
      order.clear();
      for (int32_t n = 0; n < segments[i / H]; ++n)
        if (of[n] > -INFINITY) order.push_back(n);  // NaN is not, either
      std::stable_sort(order.begin(), order.end(),
                       [&](int32_t x, int32_t y) { return of[x] > of[y]; });
      int32_t *list = lists + i * width, *to = list;
      int64_t left = budget;
      for (const int32_t n : order) {
        for (int32_t slot = at[n]; slot < at[n + 1] && left > 0; ++slot, --left) *to++ = slot;
        if (left == 0) break;
      }
      std::sort(list, to);
      sizes[i] = static_cast<int32_t>(to - list);
      std::fill(to, list + width, -1);
    }
  });
  return {indices, counts};
}

}  // namespace branchwise

STABLE_TORCH_LIBRARY_IMPL(branchwise, CPU, m) {
  m.impl("select_pages", TORCH_BOX(&branchwise::select_pages));
  m.impl("select_slots", TORCH_BOX(&branchwise::select_slots));
}
