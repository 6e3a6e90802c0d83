// Which page of a paged KV store holds what: branches of a tree of texts share the pages of what
// they have in common. Counts and lists only; the pages themselves are somewhere else. Not
// thread-safe.
//
// A branch is a length and a list of pages, whose references are counted. Forking copies the list;
// a page that several branches hold is copied when one of them is about to write behind its
// committed slots (copy on write, at most one page per branch).
#pragma once
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace branchwise {

using Branch = int64_t;  // a number that is never given twice

struct PageCopy {
  int32_t from, to;
};

class PagePool {
 public:
  explicit PagePool(int32_t page_size);

  Branch root();  // without a slot
  std::vector<Branch> fork(Branch branch, int64_t n);
  void prune(const std::vector<Branch>& branches);
  // New branches, the i-th a fork of branches[ancestors[i]]; the old ones are pruned.
  std::vector<Branch> resample(const std::vector<Branch>& branches,
                               const std::vector<int64_t>& ancestors);
  // Gives every branch pages of its own for `slots` more; what must be copied before they are
  // written.
  std::vector<PageCopy> reserve(const std::vector<Branch>& branches, int64_t slots);
  // The committed slots: as many as were reserved at most. Pages behind them are given back.
  void set_length(Branch branch, int64_t length);

  int64_t length(Branch branch) const { return at(branch).length; }
  const std::vector<int32_t>& pages(Branch branch) const { return at(branch).pages; }
  std::vector<Branch> branches() const;  // ascending
  int32_t page_size() const { return page_size_; }
  int64_t size() const { return static_cast<int64_t>(references_.size()); }  // pages ever named
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }
  int32_t references(int64_t page) const;
  // Numbers the used pages 0, 1, ...; returns what each was before.
  std::vector<int32_t> compact();

 private:
  struct Entry {
    int64_t length = 0;
    std::vector<int32_t> pages;
  };
  const Entry& at(Branch branch) const;
  Entry& at(Branch branch) {
    return const_cast<Entry&>(static_cast<const PagePool*>(this)->at(branch));
  }
  Branch add(Entry entry);
  void release(Entry& entry, std::size_t pages);  // all but the first `pages`
  int32_t take();

  int32_t page_size_;
  Branch next_ = 0;
  std::unordered_map<Branch, Entry> entries_;
  std::vector<int32_t> references_;  // of each page
  std::vector<int32_t> free_;
};

}  // namespace branchwise
