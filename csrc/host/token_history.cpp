#include "host/token_history.h"

#include <algorithm>
#include <limits>

namespace branchwise {

TokenHistory::TokenHistory(int64_t capacity) : capacity_(capacity) {
  for (Order& order : orders_) order.heads.assign(256, -1);
}

uint64_t TokenHistory::hash(const int32_t* run, int32_t k) {
  uint64_t h = 0x9E3779B97F4A7C15;
  for (int32_t i = 0; i < k; ++i) {
    h = (h ^ static_cast<uint32_t>(run[i])) * 0xFF51AFD7ED558CCD;
    h ^= h >> 32;
  }
  return h;
}

int32_t TokenHistory::agreement(const int32_t* context, int64_t n, int64_t last,
                                int32_t max_match) const {
  const int64_t most = std::min<int64_t>({n, max_match, last - first_ + 1});
  int32_t length = 0;
  // kEnd equals no token, so a match does not reach into another text.
  while (length < most && at(last - length) == context[n - 1 - length]) ++length;
  return length;
}

void TokenHistory::push(int32_t token) {
  if (capacity_ > 0 && end_ - first_ == capacity_) ++first_;
  const int64_t at = slot(end_);
  if (at == static_cast<int64_t>(tokens_.size())) {
    tokens_.push_back(token);
    for (Order& order : orders_) order.back.push_back(0);
  } else {
    tokens_[at] = token;
    for (Order& order : orders_) order.back[at] = 0;
  }
  ++end_;
}

void TokenHistory::append(int32_t token) {
  push(token);
  std::rotate(recent_.begin(), recent_.begin() + 1, recent_.end());
  recent_.back() = token;
  in_text_ = std::min<int32_t>(in_text_ + 1, kOrders[0]);
  if (static_cast<int64_t>(tokens_.size()) > 2 * static_cast<int64_t>(orders_[0].heads.size()))
    grow_heads();
  for (size_t i = 0; i < kOrders.size(); ++i) {
    const int32_t k = kOrders[i];
    if (in_text_ < k) continue;
    std::vector<int64_t>& heads = orders_[i].heads;
    int64_t& head = heads[hash(recent_.data() + kOrders[0] - k, k) & (heads.size() - 1)];
    const int64_t back = head < first_ ? 0 : end_ - 1 - head;
    orders_[i].back[slot(end_ - 1)] =
        back > std::numeric_limits<int32_t>::max() ? 0 : static_cast<int32_t>(back);
    head = end_ - 1;
  }
}

void TokenHistory::end_text() {
  if (in_text_ == 0) return;
  push(kEnd);
  in_text_ = 0;
}

// Four times as many heads; the chains stay as they are, so a chain may hold runs of several new
// hashes, which cost a comparison each until they are forgotten.
void TokenHistory::grow_heads() {
  for (Order& order : orders_) {
    const size_t old = order.heads.size();
    order.heads.resize(4 * old);
    for (size_t copy = 1; copy < 4; ++copy)
      std::copy_n(order.heads.begin(), old, order.heads.begin() + copy * old);
  }
}

}  // namespace branchwise
