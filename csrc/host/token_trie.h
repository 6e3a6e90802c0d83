// Trie of token runs with two counters per path, after "Lookahead" (Zhao et al. 2023, arXiv
// 2312.12728): how often a run occurred in this request's prompt, and in any output.
//
// Prompt counts live in a trie of their own per request, so ending a request forgets them at once
// and no request can see another's prompt. Output counts are shared by all requests of one
// TokenTrie object; nothing else is. All public methods may be called from any thread.
#pragma once
#include <cstdint>
#include <deque>
#include <mutex>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "host/draft.h"

namespace branchwise {

// Runs that start with one token. Nodes keep their index until squeeze().
class RunTree {
 public:
  struct Node {
    int32_t token = -1;
    int32_t first_child = -1;
    int32_t next_sibling = -1;
    float count = 0.f;
  };

  RunTree() : nodes_(1) {}
  const Node& node(int32_t i) const { return nodes_[i]; }
  int32_t size() const { return static_cast<int32_t>(nodes_.size()) - 1; }
  int32_t find(int32_t parent, int32_t token) const;  // -1 if absent
  int32_t count_up(int32_t parent, int32_t token);    // adds 1 to the child, creating it
  void squeeze();  // halves counts above 1, drops every other node with its subtree
  uint32_t generation() const { return generation_; }  // changes when indices become invalid

 private:
  std::vector<Node> nodes_;  // nodes_[0] stands for the first token
  uint32_t generation_ = 0;
};

using Runs = std::unordered_map<int32_t, RunTree>;

struct TrieOptions {
  int32_t branch_length = 12;      // longest draft
  int32_t query_length = 5;        // longest context suffix that is looked up
  float output_weight = 0.5f;      // w: weight of output counts, 1 - w: of prompt counts
  int32_t max_nodes = 65536;       // per first token: squeezed on the spot
  int32_t max_output_nodes = 512;  // per first token: squeezed when enough trees were touched
  int32_t squeeze_after = 1024;    // touched trees that make a squeeze worth while
};

class TokenTrie {
 public:
  TokenTrie(TrieOptions options, std::vector<int32_t> eos);

  int64_t begin(const int32_t* prompt, int64_t n);
  void observe(int64_t request, const int32_t* tokens, int64_t n);  // emitted tokens, in order
  Draft propose(int64_t request, int32_t max_nodes) const;          // max_nodes counts the root
  void end(int64_t request);

  // Counters of a run for tests and inspection: {prompt count, output count}.
  std::pair<float, float> counts(int64_t request, const std::vector<int32_t>& run) const;
  int64_t num_nodes() const;  // output nodes in all trees
  const TrieOptions& options() const { return options_; }

 private:
  // A run that is still growing: one per start position among the last few tokens.
  struct Cursor {
    int32_t first_token;
    int32_t node;
    int32_t length;
    uint32_t generation;
  };
  struct Request {
    Runs prompt;
    std::vector<int32_t> context;  // last query_length tokens
    std::deque<Cursor> open;
  };

  int32_t run_length() const { return options_.branch_length + options_.query_length - 1; }
  const Request& request(int64_t id) const;
  void feed(Runs* runs, std::deque<Cursor>* open, int32_t token,
            std::unordered_set<int32_t>* touched) const;

  const TrieOptions options_;
  const std::unordered_set<int32_t> eos_;
  mutable std::mutex mutex_;
  Runs outputs_;
  std::unordered_set<int32_t> touched_;
  std::unordered_map<int64_t, Request> requests_;
  int64_t next_request_ = 0;
};

}  // namespace branchwise
