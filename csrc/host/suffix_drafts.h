// Drafts from everything that followed the same tokens before, in this request's text and in past
// outputs, after SuffixDecoding (Oliaro et al. 2024, arXiv 2411.04975). Every earlier occurrence of
// a suffix of the context votes for the token behind it, with a weight that grows with the length
// that agrees; votes are shares of a best-first tree.
//
// The text of a request is private to it; its output joins the shared history when it ends. All
// public methods may be called from any thread.
#pragma once
#include <array>
#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "host/draft.h"
#include "host/token_history.h"

namespace branchwise {

struct SuffixOptions {
  int32_t max_match = 32;      // longest agreement that is measured
  int32_t occurrences = 64;    // looked at per history and indexed run length
  float growth = 2.f;          // votes per token of agreement: growth^length, up to length 16
  float output_weight = 1.f;   // of occurrences in past outputs, relative to the own text
  float min_score = 0.01f;     // least estimated probability of a drafted path
  int64_t capacity = 1 << 18;  // tokens of past outputs that are kept
};

class SuffixDrafts {
 public:
  static constexpr int32_t kLongest = 16;  // agreement beyond this earns no more votes

  SuffixDrafts(SuffixOptions options, std::vector<int32_t> eos);

  int64_t begin(const int32_t* prompt, int64_t n);
  void observe(int64_t request, const int32_t* tokens, int64_t n);  // emitted tokens, in order
  Draft propose(int64_t request, int32_t max_nodes) const;          // max_nodes counts the root
  void end(int64_t request);  // its output becomes a past output

  // Past outputs, oldest first, each followed by -1; and the way back.
  std::vector<int32_t> outputs() const;
  void add_outputs(const int32_t* tokens, int64_t n);

 private:
  struct Request {
    TokenHistory text{0};
    int64_t prompt_length = 0;
    std::vector<int32_t> context;  // the last max_match tokens
  };
  const Request& request(int64_t id) const;
  void say(Request& request, int32_t token) const;

  const SuffixOptions options_;
  const std::unordered_set<int32_t> eos_;
  std::array<float, kLongest + 1> votes_;  // growth^length
  mutable std::mutex mutex_;
  std::unordered_map<int64_t, Request> requests_;
  TokenHistory outputs_;
  int64_t next_request_ = 0;
};

}  // namespace branchwise
