#include "host/suffix_drafts.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

namespace branchwise {
namespace {

constexpr int32_t kLongest = SuffixDrafts::kLongest;
constexpr float kUnseen = 4.f;          // votes for what no occurrence says
constexpr float kKeepPerLevel = 0.95f;  // chance that a copied text goes on as before

struct Occurrence {
  const TokenHistory* history;
  int64_t next;
  int32_t length;
  float votes;
  int32_t token;  // at next
};

struct Branch {
  float score;
  int32_t parent;  // in the draft
  int32_t token;
  size_t begin, end;  // of all occurrences, those where the token comes next
  bool operator<(const Branch& other) const { return score < other.score; }
};

}  // namespace

SuffixDrafts::SuffixDrafts(SuffixOptions options, std::vector<int32_t> eos)
    : options_(options), eos_(eos.begin(), eos.end()), outputs_(options.capacity) {
  const auto at_least = [](double value, double least, const char* name) {
    if (!(value >= least))
      throw std::invalid_argument(std::string(name) + " must be at least " +
                                  (least < 1 ? "0" : "1") + ", got " + std::to_string(value));
  };
  at_least(options_.max_match, 1, "max_match");
  at_least(options_.occurrences, 1, "occurrences");
  at_least(options_.growth, 1, "growth");
  at_least(options_.output_weight, 0, "output_weight");
  at_least(options_.min_score, 0, "min_score");
  at_least(static_cast<double>(options_.capacity), 1, "capacity");
  for (int32_t i = 0; i <= kLongest; ++i) votes_[i] = std::pow(options_.growth, i);
}

const SuffixDrafts::Request& SuffixDrafts::request(int64_t id) const {
  const auto found = requests_.find(id);
  if (found == requests_.end())
    throw std::invalid_argument("request must be one that began and has not ended, got " +
                                std::to_string(id));
  return found->second;
}

void SuffixDrafts::say(Request& request, int32_t token) const {
  request.text.append(token);
  if (static_cast<int32_t>(request.context.size()) == options_.max_match)
    request.context.erase(request.context.begin());
  request.context.push_back(token);
}

int64_t SuffixDrafts::begin(const int32_t* prompt, int64_t n) {
  if (n < 1) throw std::invalid_argument("prompt must hold at least one token, got 0");
  Request request;
  for (int64_t i = 0; i < n; ++i) say(request, prompt[i]);
  request.prompt_length = n;
  const std::lock_guard lock(mutex_);
  requests_.emplace(next_request_, std::move(request));
  return next_request_++;
}

void SuffixDrafts::observe(int64_t id, const int32_t* tokens, int64_t n) {
  const std::lock_guard lock(mutex_);
  this->request(id);  // throws where there is none
  for (int64_t i = 0; i < n; ++i) say(requests_.at(id), tokens[i]);
}

void SuffixDrafts::end(int64_t id) {
  const std::lock_guard lock(mutex_);
  const Request& request = this->request(id);
  for (int64_t i = request.prompt_length; i < request.text.size(); ++i)
    outputs_.append(request.text.at(i));
  outputs_.end_text();
  requests_.erase(id);
}

Draft SuffixDrafts::propose(int64_t id, int32_t max_nodes) const {
  const std::lock_guard lock(mutex_);
  const Request& request = this->request(id);
  const std::vector<int32_t>& context = request.context;
  Draft draft{{context.back()}, {-1}, {1.f}};

  // Of the root, then of one branch after the other as they are expanded.
  std::vector<Occurrence> all;
  const auto collect = [&](const TokenHistory& history, float weight) {
    history.find(context.data(), static_cast<int64_t>(context.size()), options_.max_match,
                 options_.occurrences, [&](int64_t next, int32_t length) {
                   const float votes = votes_[std::min(length, kLongest)];
                   all.push_back({&history, next, length, weight * votes, history.at(next)});
                 });
  };
  collect(request.text, 1.f);
  if (options_.output_weight > 0) collect(outputs_, options_.output_weight);

  std::vector<Branch> open;  // a heap
  // `all` from `first` on are the occurrences of the node `parent`.
  const auto expand = [&](size_t first, int32_t parent, float score) {
    std::stable_sort(all.begin() + static_cast<int64_t>(first), all.end(),
                     [](const Occurrence& a, const Occurrence& b) { return a.token < b.token; });
    float total = kUnseen;
    for (size_t i = first; i < all.size(); ++i) total += all[i].votes;
    for (size_t i = first; i < all.size();) {
      Branch branch{0, parent, all[i].token, i, i};
      float votes = 0;
      for (; i < all.size() && all[i].token == branch.token; ++i) votes += all[i].votes;
      branch.end = i;
      branch.score = score * votes / total * kKeepPerLevel;
      // A text that ended says nothing, and EOS is never drafted; both keep their votes.
      const bool ends = branch.token == TokenHistory::kEnd || eos_.count(branch.token) > 0;
      if (ends || branch.score < options_.min_score) continue;
      open.push_back(branch);
      std::push_heap(open.begin(), open.end());
    }
  };
  expand(0, 0, 1.f);
  while (!open.empty() && static_cast<int32_t>(draft.tokens.size()) < max_nodes) {
    std::pop_heap(open.begin(), open.end());
    const Branch best = open.back();
    open.pop_back();
    const int32_t node = static_cast<int32_t>(draft.tokens.size());
    draft.tokens.push_back(best.token);
    draft.parents.push_back(best.parent);
    draft.scores.push_back(best.score);
    if (node + 1 == max_nodes) break;
    const size_t first = all.size();
    for (size_t i = best.begin; i < best.end; ++i) {
      Occurrence o = all[i];
      o.token = o.history->at(++o.next);
      if (++o.length <= kLongest) o.votes *= options_.growth;
      all.push_back(o);
    }
    expand(first, node, best.score);
  }
  return draft;
}

std::vector<int32_t> SuffixDrafts::outputs() const {
  const std::lock_guard lock(mutex_);
  std::vector<int32_t> tokens;
  for (int64_t i = outputs_.first(); i < outputs_.size(); ++i) tokens.push_back(outputs_.at(i));
  return tokens;
}

void SuffixDrafts::add_outputs(const int32_t* tokens, int64_t n) {
  const std::lock_guard lock(mutex_);
  for (int64_t i = 0; i < n; ++i)
    if (tokens[i] == TokenHistory::kEnd)
      outputs_.end_text();
    else
      outputs_.append(tokens[i]);
  outputs_.end_text();
}

}  // namespace branchwise
