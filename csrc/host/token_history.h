// The last tokens of a stream of texts, with every place where a run of tokens occurred before: the
// hash chains of LZ77 (as in zlib) at several run lengths. Appending costs a constant per token,
// memory is bounded, and the oldest tokens are forgotten by being overwritten. Not thread-safe.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace branchwise {

class TokenHistory {
 public:
  // Run lengths that are indexed.
  static constexpr std::array<int32_t, 4> kOrders{8, 4, 2, 1};
  static constexpr int32_t kEnd = -1;  // what lies between two texts

  // Keeps the last `capacity` tokens; 0 keeps all.
  explicit TokenHistory(int64_t capacity);

  void append(int32_t token);
  void end_text();  // the next token starts another text

  int64_t size() const { return end_; }     // positions ever used, ends of texts included
  int64_t first() const { return first_; }  // oldest position that is still there
  // Token at a position from first() on; kEnd behind the last one and between texts.
  int32_t at(int64_t position) const {
    return position < end_ ? tokens_[slot(position)] : static_cast<int32_t>(kEnd);
  }

  // Calls found(next, length) for places where a suffix of the context occurred: the position
  // behind it, and how many tokens agree, at most max_match. Latest first per order, longest order
  // first; at most `limit` places per order are looked at, and no place is reported twice.
  template <typename F>
  void find(const int32_t* context, int64_t n, int32_t max_match, int32_t limit, F found) const {
    for (size_t order = 0; order < kOrders.size(); ++order) {
      const int32_t k = kOrders[order];
      if (n < k) continue;
      int64_t last = latest(order, hash(context + n - k, k));
      for (int32_t looked = 0; last >= first_ + k - 1 && looked < limit; ++looked) {
        const int32_t length = agreement(context, n, last, max_match);
        const bool reported = order > 0 && length >= kOrders[order - 1];
        if (length >= k && !reported && at(last + 1) != kEnd) found(last + 1, length);
        last = previous(order, last);
      }
    }
  }

 private:
  struct Order {
    std::vector<int64_t> heads;  // by hash: latest position where such a run ends, or -1
    std::vector<int32_t> back;   // by slot: distance to the place before with that hash, or 0
  };

  int64_t slot(int64_t position) const { return capacity_ > 0 ? position % capacity_ : position; }
  static uint64_t hash(const int32_t* run, int32_t k);
  int64_t latest(size_t order, uint64_t hash) const {
    const std::vector<int64_t>& heads = orders_[order].heads;
    return heads[hash & (heads.size() - 1)];
  }
  int64_t previous(size_t order, int64_t position) const {
    const int32_t back = orders_[order].back[slot(position)];
    return back > 0 ? position - back : -1;
  }
  // How many tokens before and at `last` agree with the end of the context.
  int32_t agreement(const int32_t* context, int64_t n, int64_t last, int32_t max_match) const;
  void push(int32_t token);
  void grow_heads();

  const int64_t capacity_;
  int64_t end_ = 0, first_ = 0;
  std::vector<int32_t> tokens_;
  std::array<Order, kOrders.size()> orders_;
  std::array<int32_t, kOrders[0]> recent_{};  // the last tokens of the current text, latest last
  int32_t in_text_ = 0;                       // how many of recent_ belong to it
};

}  // namespace branchwise
