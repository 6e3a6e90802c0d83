// branchwise._host: data structures of the drafters and of the KV tree; numpy arrays and ints in
// and out, the GIL released around work that takes time.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>

#include "host/merge_drafts.h"
#include "host/page_pool.h"
#include "host/suffix_drafts.h"
#include "host/token_trie.h"

namespace py = pybind11;
using branchwise::Branch;
using branchwise::Draft;
using branchwise::PagePool;
using branchwise::SuffixDrafts;
using branchwise::SuffixOptions;
using branchwise::TokenTrie;
using branchwise::TrieOptions;

namespace {

using Tokens = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

template <typename T>
py::array_t<T> to_numpy(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

void check_flat(const char* name, const Tokens& tokens) {
  if (tokens.ndim() != 1)
    throw py::value_error(std::string(name) + " must be one-dimensional, got " +
                          std::to_string(tokens.ndim()) + " dimensions");
}

using Scores = py::array_t<float, py::array::c_style | py::array::forcecast>;
// tokens, parents, scores, fixed, the drafter's names for its nodes if it has any
using OneDraft = std::tuple<Tokens, Tokens, Scores, int64_t, std::optional<Tokens>>;

py::tuple merge(const std::vector<OneDraft>& drafts, int64_t budget,
                const std::optional<Scores>& factors) {
  std::vector<branchwise::DraftView> views;
  for (const auto& [tokens, parents, scores, fixed, ids] : drafts) {
    check_flat("tokens", tokens);
    if (tokens.size() == 0 || parents.size() != tokens.size() || scores.size() != tokens.size())
      throw py::value_error("tokens, parents and scores must have one equal length of at least 1");
    if (ids && ids->size() != tokens.size())
      throw py::value_error("ids must have one entry per node");
    views.push_back({tokens.data(), parents.data(), scores.data(), ids ? ids->data() : nullptr,
                     tokens.size(), fixed});
  }
  if (views.empty()) throw py::value_error("drafts must hold at least one draft");
  if (factors && (views.size() > 16 || factors->size() != py::ssize_t{1} << views.size()))
    throw py::value_error("factors must have 2^drafts entries, for at most 16 drafts, got " +
                          std::to_string(factors->size()) + " for " + std::to_string(views.size()));
  branchwise::MergedDraft merged;
  {
    py::gil_scoped_release release;
    merged = branchwise::merge_drafts(views, budget, factors ? factors->data() : nullptr);
  }
  const auto count = static_cast<py::ssize_t>(views.size());
  const auto size = static_cast<py::ssize_t>(merged.draft.tokens.size());
  return py::make_tuple(to_numpy(merged.draft.tokens), to_numpy(merged.draft.parents),
                        to_numpy(merged.draft.scores), merged.fixed,
                        to_numpy(merged.names).reshape({count, size}));
}

// begin, observe, propose and end: what every store of drafts has.
template <typename Store>
void bind_requests(py::class_<Store>& store) {
  store
      .def(
          "begin",
          [](Store& self, const Tokens& prompt) {
            check_flat("prompt", prompt);
            const int32_t* data = prompt.data();
            const int64_t n = prompt.size();
            py::gil_scoped_release release;
            return self.begin(data, n);
          },
          py::arg("prompt"))
      .def(
          "observe",
          [](Store& self, int64_t request, const Tokens& tokens) {
            check_flat("tokens", tokens);
            const int32_t* data = tokens.data();
            const int64_t n = tokens.size();
            py::gil_scoped_release release;
            self.observe(request, data, n);
          },
          py::arg("request"), py::arg("tokens"))
      .def(
          "propose",
          [](const Store& self, int64_t request, int32_t max_nodes) {
            Draft draft;
            {
              py::gil_scoped_release release;
              draft = self.propose(request, max_nodes);
            }
            return py::make_tuple(to_numpy(draft.tokens), to_numpy(draft.parents),
                                  to_numpy(draft.scores));
          },
          py::arg("request"), py::arg("max_nodes"))
      .def("end", &Store::end, py::arg("request"), py::call_guard<py::gil_scoped_release>());
}

// Page tables i32[n, longest] of some branches, -1 behind their last pages, and lengths i32[n].
py::tuple page_table(const PagePool& pool, const std::vector<Branch>& branches) {
  size_t width = 0;
  for (const Branch branch : branches) width = std::max(width, pool.pages(branch).size());
  const auto n = static_cast<py::ssize_t>(branches.size());
  py::array_t<int32_t> table({n, static_cast<py::ssize_t>(width)}), lengths(n);
  for (py::ssize_t i = 0; i < n; ++i) {
    const std::vector<int32_t>& pages = pool.pages(branches[i]);
    int32_t* row = table.mutable_data() + i * static_cast<py::ssize_t>(width);
    std::fill(std::copy(pages.begin(), pages.end(), row), row + width, -1);
    lengths.mutable_data()[i] = static_cast<int32_t>(pool.length(branches[i]));
  }
  return py::make_tuple(table, lengths);
}

// Asks for large pages behind [address, address + bytes), as far as whole ones fit: random access
// to a cache of many megabytes otherwise waits for address translation. A hint, and nothing but.
void advise_huge_pages(uintptr_t address, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kSize = 2 << 20;
  const uintptr_t begin = (address + kSize - 1) / kSize * kSize;
  const uintptr_t end = (address + bytes) / kSize * kSize;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side data structures of branchwise (no torch).";
  m.def("advise_huge_pages", &advise_huge_pages, py::arg("address"), py::arg("bytes"));
  m.def("merge_drafts", &merge, py::arg("drafts"), py::arg("budget"),
        py::arg("factors") = py::none());
  py::class_<PagePool>(m, "PagePool")
      .def(py::init<int32_t>(), py::arg("page_size"))
      .def("root", &PagePool::root)
      .def("fork", &PagePool::fork, py::arg("branch"), py::arg("n"))
      .def("prune", &PagePool::prune, py::arg("branches"))
      .def("resample", &PagePool::resample, py::arg("branches"), py::arg("ancestors"))
      .def(
          "reserve",
          [](PagePool& self, const std::vector<Branch>& branches, int64_t slots) {
            std::vector<std::pair<int32_t, int32_t>> copies;
            for (const auto& [from, to] : self.reserve(branches, slots))
              copies.emplace_back(from, to);
            return copies;
          },
          py::arg("branches"), py::arg("slots"))
      .def("set_length", &PagePool::set_length, py::arg("branch"), py::arg("length"))
      .def("length", &PagePool::length, py::arg("branch"))
      .def("page_table", &page_table, py::arg("branches"))
      .def("references", &PagePool::references, py::arg("page"))
      .def("compact", &PagePool::compact)
      .def_property_readonly("branches", &PagePool::branches)
      .def_property_readonly("page_size", &PagePool::page_size)
      .def_property_readonly("size", &PagePool::size)
      .def_property_readonly("num_free", &PagePool::num_free);

  py::class_<TokenTrie> trie(m, "TokenTrie");
  bind_requests(trie);
  trie.def(py::init([](std::vector<int32_t> eos, int32_t branch_length, int32_t query_length,
                       float output_weight, int32_t max_nodes, int32_t max_output_nodes,
                       int32_t squeeze_after) {
             return std::make_unique<TokenTrie>(
                 TrieOptions{branch_length, query_length, output_weight, max_nodes,
                             max_output_nodes, squeeze_after},
                 std::move(eos));
           }),
           py::kw_only(), py::arg("eos"), py::arg("branch_length"), py::arg("query_length"),
           py::arg("output_weight"), py::arg("max_nodes"), py::arg("max_output_nodes"),
           py::arg("squeeze_after"))
      .def("counts", &TokenTrie::counts, py::arg("request"), py::arg("run"),
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("num_nodes", &TokenTrie::num_nodes);

  py::class_<SuffixDrafts> suffix(m, "SuffixDrafts");
  bind_requests(suffix);
  suffix
      .def(py::init([](std::vector<int32_t> eos, int32_t max_match, int32_t occurrences,
                       float growth, float output_weight, float min_score, int64_t capacity) {
             return std::make_unique<SuffixDrafts>(
                 SuffixOptions{max_match, occurrences, growth, output_weight, min_score, capacity},
                 std::move(eos));
           }),
           py::kw_only(), py::arg("eos"), py::arg("max_match"), py::arg("occurrences"),
           py::arg("growth"), py::arg("output_weight"), py::arg("min_score"), py::arg("capacity"))
      .def("outputs",
           [](const SuffixDrafts& self) {
             std::vector<int32_t> tokens;
             {
               py::gil_scoped_release release;
               tokens = self.outputs();
             }
             return to_numpy(tokens);
           })
      .def(
          "add_outputs",
          [](SuffixDrafts& self, const Tokens& tokens) {
            check_flat("tokens", tokens);
            const int32_t* data = tokens.data();
            const int64_t n = tokens.size();
            py::gil_scoped_release release;
            self.add_outputs(data, n);
          },
          py::arg("tokens"));
}
