#include "host/page_pool.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace branchwise {

PagePool::PagePool(int32_t page_size) : page_size_(page_size) {
  if (page_size < 1)
    throw std::invalid_argument("page_size must be at least 1, got " + std::to_string(page_size));
}

const PagePool::Entry& PagePool::at(Branch branch) const {
  const auto found = entries_.find(branch);
  if (found == entries_.end())
    throw std::invalid_argument("branch " + std::to_string(branch) +
                                " does not exist, or not any more");
  return found->second;
}

Branch PagePool::add(Entry entry) {
  entries_.emplace(next_, std::move(entry));
  return next_++;
}

Branch PagePool::root() { return add({}); }

std::vector<Branch> PagePool::fork(Branch branch, int64_t n) {
  if (n < 0) throw std::invalid_argument("n must be at least 0, got " + std::to_string(n));
  Entry parent = at(branch);
  // Not what was reserved and never written: a fork reserves its own.
  parent.pages.resize((parent.length + page_size_ - 1) / page_size_);
  std::vector<Branch> forks;
  for (int64_t i = 0; i < n; ++i) {
    for (const int32_t page : parent.pages) ++references_[page];
    forks.push_back(add(parent));
  }
  return forks;
}

void PagePool::prune(const std::vector<Branch>& branches) {
  for (const Branch branch : branches) at(branch);  // all or none
  for (const Branch branch : branches) {
    if (entries_.count(branch) == 0) continue;  // named twice
    release(at(branch), 0);
    entries_.erase(branch);
  }
}

std::vector<Branch> PagePool::resample(const std::vector<Branch>& branches,
                                       const std::vector<int64_t>& ancestors) {
  for (const Branch branch : branches) at(branch);
  const auto n = static_cast<int64_t>(branches.size());
  for (const int64_t a : ancestors)
    if (a < 0 || a >= n)
      throw std::invalid_argument("ancestors must lie between 0 and " + std::to_string(n - 1) +
                                  ", got " + std::to_string(a));
  std::vector<Branch> forks;
  for (const int64_t a : ancestors) forks.push_back(fork(branches[a], 1)[0]);
  prune(branches);  // last, so that no shared page was free in between
  return forks;
}

std::vector<PageCopy> PagePool::reserve(const std::vector<Branch>& branches, int64_t slots) {
  if (slots < 0)
    throw std::invalid_argument("slots must be at least 0, got " + std::to_string(slots));
  for (const Branch branch : branches) at(branch);
  std::vector<PageCopy> copies;
  for (const Branch branch : branches) {
    Entry& entry = at(branch);
    const int64_t length = entry.length, first = length / page_size_;
    if (slots > 0 && length % page_size_ != 0 && references_[entry.pages[first]] > 1) {
      const int32_t own = take(), shared = entry.pages[first];
      copies.push_back({shared, own});
      --references_[shared];
      entry.pages[first] = own;
    }
    const int64_t needed = (length + slots + page_size_ - 1) / page_size_;
    while (static_cast<int64_t>(entry.pages.size()) < needed) entry.pages.push_back(take());
  }
  return copies;
}

void PagePool::set_length(Branch branch, int64_t length) {
  Entry& entry = at(branch);
  const auto room = static_cast<int64_t>(entry.pages.size()) * page_size_;
  if (length < 0 || length > room)
    throw std::invalid_argument("length must lie between 0 and the " + std::to_string(room) +
                                " slots that branch " + std::to_string(branch) + " has, got " +
                                std::to_string(length));
  entry.length = length;
  release(entry, static_cast<size_t>((length + page_size_ - 1) / page_size_));
}

std::vector<Branch> PagePool::branches() const {
  std::vector<Branch> names;
  for (const auto& [branch, entry] : entries_) names.push_back(branch);
  std::sort(names.begin(), names.end());
  return names;
}

int32_t PagePool::references(int64_t page) const {
  if (page < 0 || page >= size())
    throw std::invalid_argument("page must lie between 0 and " + std::to_string(size() - 1) +
                                ", got " + std::to_string(page));
  return references_[page];
}

std::vector<int32_t> PagePool::compact() {
  std::vector<int32_t> kept, name(references_.size());
  for (size_t page = 0; page < references_.size(); ++page) {
    if (references_[page] == 0) continue;
    name[page] = static_cast<int32_t>(kept.size());
    references_[kept.size()] = references_[page];
    kept.push_back(static_cast<int32_t>(page));
  }
  references_.resize(kept.size());
  free_.clear();
  for (auto& [branch, entry] : entries_)
    for (int32_t& page : entry.pages) page = name[page];
  return kept;
}

void PagePool::release(Entry& entry, std::size_t pages) {
  while (entry.pages.size() > pages) {
    const int32_t page = entry.pages.back();
    entry.pages.pop_back();
    if (--references_[page] == 0) free_.push_back(page);
  }
}

int32_t PagePool::take() {
  if (free_.empty()) {
    free_.push_back(static_cast<int32_t>(references_.size()));
    references_.push_back(0);
  }
  const int32_t page = free_.back();
  free_.pop_back();
  references_[page] = 1;
  return page;
}

}  // namespace branchwise
