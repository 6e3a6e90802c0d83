// Threads that take work from a shared list, and buffers that they keep between calls.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace branchwise {

// A thread's buffer of at least so many floats. Kept between calls: fresh pages from the system can
// cost more than the attention of a decode step.
class Buffer {
 public:
  float* reserve(int64_t floats) {
    if (floats > size_) {
      data_.reset();
      data_.reset(static_cast<float*>(::operator new[](floats * sizeof(float), kLine)));
      size_ = floats;
    }
    return data_.get();
  }
  // A long prompt's buffer is not worth keeping.
  void trim() {
    if (size_ <= kKept) return;
    data_.reset();
    size_ = 0;
  }

 private:
  static constexpr int64_t kKept = 4 << 20;
  // A vector register is a line: across two of them, every load and store is two.
  static constexpr std::align_val_t kLine{64};
  struct Delete {
    void operator()(float* data) const { ::operator delete[](data, kLine); }
  };
  std::unique_ptr<float[], Delete> data_;
  int64_t size_ = 0;
};
inline thread_local Buffer workspace_buffer, scratch_buffer;

// Calls f(item, scratch). Every thread has a share of the items, the same one whenever a call is
// repeated, since what it read may still be in its core's caches; it takes half of what is left of
// it at a time, so that a long row does not hold up the others, and then items of others' shares.
template <typename F>
void run_guided(int64_t items, int64_t scratch, bool serial, const F& f) {
  const int64_t workers = serial ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), items);
  if (workers <= 1) {
    float* buffer = scratch_buffer.reserve(scratch);
    for (int64_t i = 0; i < items; ++i) f(i, buffer);
    return;
  }
  struct alignas(64) Share {  // of a cache line of its own
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Share> shares(workers);
  for (int64_t w = 0; w < workers; ++w) {
    shares[w].next.store(items * w / workers, std::memory_order_relaxed);
    shares[w].end = items * (w + 1) / workers;
  }
  const auto work = [&](int64_t worker) {
    float* buffer = scratch_buffer.reserve(scratch);
    for (int64_t v = 0; v < workers; ++v) {
      Share& share = shares[(worker + v) % workers];
      int64_t begin = share.next.load();
      while (begin < share.end) {
        const int64_t end = begin + (v == 0 ? (share.end - begin + 1) / 2 : 1);
        if (!share.next.compare_exchange_weak(begin, end)) continue;
        for (int64_t i = begin; i < end; ++i) f(i, buffer);
        begin = share.next.load();
      }
    }
  };
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) work(w);
  });
}

}  // namespace branchwise
