// Threads that take work from a shared list, and buffers that they keep between calls.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

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

// Calls f(item, scratch). Threads take runs of items, long ones first: what lies together in memory
// is mostly read by one thread, and a long row does not hold up the others.
template <typename F>
void run_guided(int64_t items, int64_t scratch, bool serial, const F& f) {
  const int64_t workers = serial ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), items);
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    float* buffer = scratch_buffer.reserve(scratch);
    int64_t begin = next.load();
    while (begin < items) {
      const int64_t end = begin + std::max<int64_t>(1, (items - begin) / (2 * workers));
      if (!next.compare_exchange_weak(begin, end)) continue;
      for (int64_t i = begin; i < end; ++i) f(i, buffer);
      begin = next.load();
    }
  };
  if (workers <= 1) return work();
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) work();
  });
}

}  // namespace branchwise
