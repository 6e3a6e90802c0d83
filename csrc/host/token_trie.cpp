#include "host/token_trie.h"

#include <algorithm>
#include <cmath>
#include <queue>
#include <stdexcept>
#include <string>

namespace branchwise {

namespace {

// Shape of the scores; what they are worth is measured at run time (decoding/tree_size.py).
constexpr float kMissPerToken = 0.75f;  // chance that a match of length n misleads: this to the n
constexpr float kKeepPerLevel = 0.9f;   // chance that a copied branch goes on as before

}  // namespace

int32_t RunTree::find(int32_t parent, int32_t token) const {
  for (int32_t c = nodes_[parent].first_child; c >= 0; c = nodes_[c].next_sibling)
    if (nodes_[c].token == token) return c;
  return -1;
}

int32_t RunTree::count_up(int32_t parent, int32_t token) {
  int32_t child = find(parent, token);
  if (child < 0) {
    child = static_cast<int32_t>(nodes_.size());
    nodes_.push_back({token, -1, nodes_[parent].first_child, 0.f});
    nodes_[parent].first_child = child;
  }
  nodes_[child].count += 1.f;
  return child;
}

void RunTree::squeeze() {
  std::vector<Node> kept(1);
  std::vector<std::pair<int32_t, int32_t>> todo{{0, 0}};  // (old parent, new parent)
  while (!todo.empty()) {
    const auto [from, to] = todo.back();
    todo.pop_back();
    for (int32_t c = nodes_[from].first_child; c >= 0; c = nodes_[c].next_sibling) {
      if (nodes_[c].count <= 1.f) continue;
      const int32_t copy = static_cast<int32_t>(kept.size());
      kept.push_back({nodes_[c].token, -1, kept[to].first_child, nodes_[c].count * 0.5f});
      kept[to].first_child = copy;
      todo.push_back({c, copy});
    }
  }
  nodes_ = std::move(kept);
  nodes_.shrink_to_fit();
  ++generation_;
}

TokenTrie::TokenTrie(TrieOptions options, std::vector<int32_t> eos)
    : options_(options), eos_(eos.begin(), eos.end()) {
  const auto positive = [](int32_t value, const char* name) {
    if (value < 1)
      throw std::invalid_argument(std::string(name) + " must be at least 1, got " +
                                  std::to_string(value));
  };
  positive(options_.branch_length, "branch_length");
  positive(options_.query_length, "query_length");
  positive(options_.max_nodes, "max_nodes");
  positive(options_.max_output_nodes, "max_output_nodes");
  positive(options_.squeeze_after, "squeeze_after");
  if (!(options_.output_weight >= 0.f && options_.output_weight <= 1.f))
    throw std::invalid_argument("output_weight must lie between 0 and 1, got " +
                                std::to_string(options_.output_weight));
}

const TokenTrie::Request& TokenTrie::request(int64_t id) const {
  const auto found = requests_.find(id);
  if (found == requests_.end())
    throw std::invalid_argument("request must be one that began and has not ended, got " +
                                std::to_string(id));
  return found->second;
}

// Extends every open run by `token` and opens a new one that starts with it. EOS ends all runs and
// is never stored, so drafts never contain it.
void TokenTrie::feed(Runs* runs, std::deque<Cursor>* open, int32_t token,
                     std::unordered_set<int32_t>* touched) const {
  if (eos_.count(token)) return open->clear();
  for (Cursor& cursor : *open) {
    RunTree& tree = (*runs)[cursor.first_token];
    if (cursor.generation != tree.generation()) {
      cursor.length = run_length();  // squeezed meanwhile: this run stops growing
      continue;
    }
    cursor.node = tree.count_up(cursor.node, token);
    ++cursor.length;
    if (tree.size() > options_.max_nodes) tree.squeeze();
    if (touched != nullptr) touched->insert(cursor.first_token);
  }
  while (!open->empty() && open->front().length >= run_length()) open->pop_front();
  open->push_back({token, 0, 0, (*runs)[token].generation()});
}

int64_t TokenTrie::begin(const int32_t* prompt, int64_t n) {
  Request fresh;
  std::deque<Cursor> open;
  for (int64_t i = 0; i < n; ++i) feed(&fresh.prompt, &open, prompt[i], nullptr);
  fresh.context.assign(prompt + std::max<int64_t>(0, n - options_.query_length), prompt + n);
  const std::lock_guard<std::mutex> lock(mutex_);
  requests_.emplace(next_request_, std::move(fresh));
  return next_request_++;
}

void TokenTrie::observe(int64_t id, const int32_t* tokens, int64_t n) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Request& r = const_cast<Request&>(request(id));
  for (int64_t i = 0; i < n; ++i) {
    feed(&outputs_, &r.open, tokens[i], &touched_);
    r.context.push_back(tokens[i]);
  }
  if (static_cast<int32_t>(r.context.size()) > options_.query_length)
    r.context.erase(r.context.begin(), r.context.end() - options_.query_length);
}

void TokenTrie::end(int64_t id) {
  const std::lock_guard<std::mutex> lock(mutex_);
  request(id);
  requests_.erase(id);
  if (static_cast<int32_t>(touched_.size()) < options_.squeeze_after) return;
  for (const int32_t first : touched_) {
    const auto found = outputs_.find(first);
    if (found != outputs_.end() && found->second.size() > options_.max_output_nodes)
      found->second.squeeze();
  }
  touched_.clear();
}

Draft TokenTrie::propose(int64_t id, int32_t max_nodes) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Request& r = request(id);
  Draft draft;
  if (r.context.empty()) return draft;
  draft.tokens = {r.context.back()};
  draft.parents = {-1};
  draft.scores = {1.f};
  std::vector<int32_t> depth{0}, first_child{-1}, next_sibling{-1};

  // Best-first over both counters at once: a candidate is a place in the prompt trie, in the output
  // trie, or in both, that would extend node `parent` of the draft.
  struct Place {
    const RunTree* prompt;
    const RunTree* output;
    int32_t prompt_node, output_node;  // -1: not there
  };
  struct Candidate {
    float score;
    int32_t order;  // earlier wins ties, so drafts are reproducible
    int32_t parent, token;
    Place at;
    bool operator<(const Candidate& o) const {
      return score != o.score ? score < o.score : order > o.order;
    }
  };
  std::priority_queue<Candidate> heap;
  int32_t order = 0;
  const float w = options_.output_weight;

  const auto expand = [&](const Place& at, int32_t parent, float score) {
    struct Child {
      int32_t token;
      float weight;
      int32_t prompt_node, output_node;
    };
    std::vector<Child> children;
    float total = 0.f;
    if (at.prompt_node >= 0)
      for (int32_t c = at.prompt->node(at.prompt_node).first_child; c >= 0;
           c = at.prompt->node(c).next_sibling) {
        const int32_t o =
            at.output_node >= 0 ? at.output->find(at.output_node, at.prompt->node(c).token) : -1;
        const float weight =
            (1.f - w) * at.prompt->node(c).count + (o >= 0 ? w * at.output->node(o).count : 0.f);
        children.push_back({at.prompt->node(c).token, weight, c, o});
        total += weight;
      }
    if (at.output_node >= 0)
      for (int32_t c = at.output->node(at.output_node).first_child; c >= 0;
           c = at.output->node(c).next_sibling) {
        if (at.prompt_node >= 0 && at.prompt->find(at.prompt_node, at.output->node(c).token) >= 0)
          continue;
        children.push_back({at.output->node(c).token, w * at.output->node(c).count, -1, c});
        total += w * at.output->node(c).count;
      }
    if (total <= 0.f) return;
    for (const Child& c : children)
      if (c.weight > 0.f)
        heap.push({score * c.weight / total,
                   order++,
                   parent,
                   c.token,
                   {at.prompt, at.output, c.prompt_node, c.output_node}});
  };

  // A longer match is right more often; shorter ones fill what is left of the budget.
  const int32_t longest =
      std::min<int32_t>(options_.query_length, static_cast<int32_t>(r.context.size()));
  for (int32_t length = longest; length >= 1; --length) {
    const int32_t* suffix = r.context.data() + r.context.size() - length;
    const auto in = r.prompt.find(suffix[0]);
    const auto out = outputs_.find(suffix[0]);
    Place at{in != r.prompt.end() ? &in->second : nullptr,
             out != outputs_.end() ? &out->second : nullptr, in != r.prompt.end() ? 0 : -1,
             out != outputs_.end() ? 0 : -1};
    for (int32_t i = 1; i < length; ++i) {
      if (at.prompt_node >= 0) at.prompt_node = at.prompt->find(at.prompt_node, suffix[i]);
      if (at.output_node >= 0) at.output_node = at.output->find(at.output_node, suffix[i]);
    }
    expand(at, 0, 1.f - std::pow(kMissPerToken, static_cast<float>(length)));
  }

  while (!heap.empty() && static_cast<int32_t>(draft.tokens.size()) < max_nodes) {
    const Candidate best = heap.top();
    heap.pop();
    int32_t node = first_child[best.parent];
    while (node >= 0 && draft.tokens[node] != best.token) node = next_sibling[node];
    if (node < 0) {
      node = static_cast<int32_t>(draft.tokens.size());
      draft.tokens.push_back(best.token);
      draft.parents.push_back(best.parent);
      draft.scores.push_back(best.score);
      depth.push_back(depth[best.parent] + 1);
      first_child.push_back(-1);
      next_sibling.push_back(first_child[best.parent]);
      first_child[best.parent] = node;
    }
    if (depth[node] < options_.branch_length) expand(best.at, node, best.score * kKeepPerLevel);
  }
  return draft;
}

std::pair<float, float> TokenTrie::counts(int64_t id, const std::vector<int32_t>& run) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto count = [&run](const Runs& runs) {
    if (run.size() < 2) return 0.f;
    const auto tree = runs.find(run[0]);
    if (tree == runs.end()) return 0.f;
    int32_t node = 0;
    for (size_t i = 1; i < run.size() && node >= 0; ++i) node = tree->second.find(node, run[i]);
    return node >= 0 ? tree->second.node(node).count : 0.f;
  };
  return {id >= 0 ? count(request(id).prompt) : 0.f, count(outputs_)};
}

int64_t TokenTrie::num_nodes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  int64_t total = 0;
  for (const auto& [first, tree] : outputs_) total += tree.size();
  return total;
}

}  // namespace branchwise
