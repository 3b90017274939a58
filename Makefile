# Everything starts here. `make demo` and `make test` do all the set-up; a second call redoes nothing.

VENV    := .venv
PYTHON  := $(VENV)/bin/python
LIBRARY := torch_ext/infold/libinfold.so
SOURCES := $(shell find src csrc cuda -type f 2>/dev/null) build.rs Cargo.toml Cargo.lock setup.py pyproject.toml
CXX_FILES := $(wildcard csrc/*.h csrc/*.cpp cuda/*.cu cuda/*.cuh cuda/*.h cuda/*.cpp benchmarks/*.cu)

# What a wheel's kernels are compiled for; a build of this folder, for those of build.rs.
ARCHITECTURES := 80 89 90a 100 120

# Runs commands and prints how long they took.
step = @start=$$(date +%s); { $(2); } && echo "== $(1): $$(( $$(date +%s) - start )) s"

.PHONY: demo test rust-test neon-test fault-test asan-test fuzz python-test build bench lint format wheel wheel-test gpu-bundle docs requirements tools clean
.DEFAULT_GOAL := build

demo: $(LIBRARY)
	$(call step,demo,$(PYTHON) examples/demo.py --out build/demo)

test: rust-test python-test

# Hostile input by coverage, under AddressSanitizer. Needs cargo-fuzz (cargo install cargo-fuzz); RUNS inputs a target.
RUNS ?= 10000000
fuzz:
	$(call step,fuzzing,cd fuzz && cargo run --quiet --release --bin seeds && RUSTC_BOOTSTRAP=1 cargo fuzz build && for target in header rans alias plain weight; do RUSTC_BOOTSTRAP=1 cargo fuzz run $$target -- -runs=$(RUNS) -max_len=3000 || exit 1; done)

# The Python tests with AddressSanitizer in the library, shim and Rust alike. Needs g++'s libasan; compiles tch anew.
ASAN := build/asan
asan-test: $(VENV)/.ready
	@mkdir -p $(ASAN)
	$(call step,library with AddressSanitizer,LIBTORCH=$(CURDIR)/$(VENV)/torch CARGO_TARGET_DIR=$(ASAN)/target RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address -Zexternal-clangrt" CXXFLAGS="-fsanitize=address -fno-omit-frame-pointer" cargo build --quiet --release --lib --locked --target $$(rustc -vV | sed -n 's/host: //p'))
	@rm -rf $(ASAN)/package && mkdir $(ASAN)/package && cp -r torch_ext/infold $(ASAN)/package/ && cp $(ASAN)/target/*/release/libinfold.so $(ASAN)/package/infold/
	$(call step,tests with AddressSanitizer,LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 PYTHONPATH=$(CURDIR)/$(ASAN)/package $(PYTHON) -m pytest -q -c /dev/null --rootdir . -p no:cacheprovider -k 'not test_example' python_tests)

# Without torch, so that a change to the codec is tested in seconds; on each instruction set up to this machine's widest. The
# GPU's kernels are emulated once: they ask for none.
EMULATED := device device_frequency device_lay_out device_pack
ON_EACH_ISA := $(filter-out $(EMULATED),$(patsubst rust_tests/%.rs,%,$(shell sed -n 's/^path = "\(rust_tests.*\)"/\1/p' Cargo.toml)))
CARGO_TEST := cargo test --release --no-default-features --locked --quiet
rust-test: $(VENV)/.ready
	$(call step,Rust tests,for isa in generic avx2 avx512 amx; do INFOLD_ISA=$$isa $(CARGO_TEST) --lib $(ON_EACH_ISA:%=--test %) || exit 1; done)
	$(call step,emulated kernels,$(CARGO_TEST) $(EMULATED:%=--test %))

# The NEON decoders under emulation. Needs qemu-aarch64 and aarch64-linux-gnu-g++ (Debian: qemu-user, g++-aarch64-linux-gnu) and
# the Rust target. The skipped test starts itself again, which an emulator does not do.
neon-test:
	$(call step,NEON tests,CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu" cargo test --release --no-default-features --locked --quiet --target aarch64-unknown-linux-gnu -- --skip damage_decodes_alike)

# Faults in the device code, planted one at a time in a copy: each must fail a test.
fault-test: $(VENV)/.ready
	$(call step,planted faults,$(PYTHON) rust_tests/plant_faults.py)

python-test: $(LIBRARY)
	$(call step,Python tests,$(PYTHON) -m pytest)

build: $(LIBRARY)

bench: $(LIBRARY)
	@mkdir -p build/bench
	$(call step,benchmarks,$(PYTHON) benchmarks/codec_sizes.py --json build/bench/codec_sizes.json && $(PYTHON) benchmarks/codec.py --json build/bench/codec.json && $(PYTHON) benchmarks/fused_linear.py --json build/bench/fused_linear.json && $(PYTHON) benchmarks/convolution.py --json build/bench/convolution.json && $(PYTHON) benchmarks/frequency.py --json build/bench/frequency.json && $(PYTHON) benchmarks/frequency_conv.py --json build/bench/frequency_conv.json && $(PYTHON) benchmarks/log8.py --json build/bench/log8.json && $(PYTHON) benchmarks/spline_fits.py --json build/bench/spline_fits.json && $(PYTHON) benchmarks/spline_pca.py --json build/bench/spline_pca.json && $(PYTHON) benchmarks/disk.py --folder build && $(PYTHON) benchmarks/tiering.py --json build/bench/tiering.json)

lint: $(LIBRARY)
	@cargo clippy --version >/dev/null 2>&1 && cargo fmt --version >/dev/null 2>&1 || { echo "clippy or rustfmt is missing: rustup component add clippy rustfmt"; exit 1; }
	$(call step,rustfmt and clippy,cargo fmt --check && cargo fmt --check --manifest-path fuzz/Cargo.toml && cargo clippy --release --locked --quiet --lib -- -D warnings && cargo clippy --release --locked --quiet --no-default-features --all-targets -- -D warnings)
	$(call step,ruff and mypy,$(PYTHON) -m ruff check && $(PYTHON) -m ruff format --check && $(PYTHON) -m mypy)
	$(call step,clang-format,$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES))

format: $(VENV)/.ready
	cargo fmt
	$(PYTHON) -m ruff check --fix-only --quiet
	$(PYTHON) -m ruff format --quiet
	$(VENV)/bin/clang-format -i $(CXX_FILES)

wheel: $(VENV)/.ready
	$(call step,wheel,INFOLD_CUDA_ARCHS="$(ARCHITECTURES)" $(PYTHON) -m pip wheel . --quiet --no-build-isolation --no-deps --wheel-dir dist && ls -l dist)

# The wheel in an environment of its own that has neither this folder nor Rust in reach: the operators' and golden files' tests.
wheel-test: wheel
	$(call step,wheel test,rm -rf build/wheel && mkdir -p build/wheel && python3 -m venv build/wheel/venv && $(VENV)/bin/uv pip install --quiet --python build/wheel/venv/bin/python -c requirements.txt dist/infold-*.whl pytest hypothesis && cp -r python_tests build/wheel/ && cd build/wheel && env -i HOME="$$HOME" PATH=/usr/bin:/bin venv/bin/python -m pytest -q -c /dev/null --rootdir . python_tests/test_operators.py python_tests/test_golden.py python_tests/test_layout.py && rm -rf venv)

# What gpu_check.py compares with beside PyTorch, as published; what cannot be fetched is left out.
GPU_PEERS := torchao==0.18.0 dfloat11==0.5.0 dahuffman==0.4.2
fetch_peers = for peer in $(GPU_PEERS); do test -d build/peers/$$peer || $(PYTHON) -m pip install --quiet --disable-pip-version-check --retries 1 --no-deps --no-compile --only-binary :all: --target build/peers/$$peer $$peer || { rm -rf build/peers/$$peer; echo "left out of the bundle, as it cannot be fetched: $$peer"; continue; }; cp -r build/peers/$$peer/. dist/gpu/peers/ || exit 1; done

# What a machine with a GPU needs: run there `python3 dist/gpu/gpu_check.py --json FILE`; see docs/gpu-checks.md.
# What gpu_check.py needs beside torch and transformers comes along, and its peers apart from it, out of the tests' reach.
gpu-bundle: $(LIBRARY)
	$(call step,GPU bundle,rm -rf dist/gpu && mkdir -p dist/gpu/packages dist/gpu/peers && cp -r torch_ext/infold cuda benchmarks/gpu_*.py benchmarks/gpu_rate.cu python_tests/test_device*.py dist/gpu/ && for package in pytest _pytest pluggy iniconfig packaging pygments; do cp -r $$(dirname $$($(PYTHON) -c "import $$package; print($$package.__file__)")) dist/gpu/packages/ || exit 1; done && $(fetch_peers) && strip dist/gpu/infold/libinfold.so && find dist/gpu -name __pycache__ -prune -exec rm -r {} + && du -sh dist/gpu)

docs: $(LIBRARY)
	$(call step,docs,$(PYTHON) -m pdoc --output-directory docs/site/python infold && cargo doc --no-deps --no-default-features --release --quiet --target-dir build/rustdoc && rm -rf docs/site/rust && cp -r build/rustdoc/doc docs/site/rust)

# Pins requirements.in for every supported Python.
requirements: $(VENV)/.ready
	$(VENV)/bin/uv pip compile requirements.in --output-file requirements.txt --universal --python-version 3.10 --no-annotate --no-header --no-emit-index-url --quiet

clean:
	rm -rf build dist docs/site target $(LIBRARY) torch_ext/*.egg-info
	@echo "the environment stays; remove it with: rm -rf $(VENV)"

# --- set-up ---

tools:
	@command -v cargo >/dev/null || { echo "cargo is missing: install Rust 1.89 or newer (rustup or your distribution)"; exit 1; }
	@command -v g++ >/dev/null || { echo "g++ is missing: install it (Debian: apt-get install g++)"; exit 1; }
	@command -v python3 >/dev/null || { echo "python3 is missing: install Python 3.10 or newer"; exit 1; }
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "python3 is too old: install Python 3.10 or newer"; exit 1; }
	@python3 -c 'import venv, ensurepip' || { echo "python3 has no venv: install it (Debian: apt-get install python3-venv)"; exit 1; }

$(VENV)/.ready: requirements.txt | tools
	$(call step,environment,python3 -m venv $(VENV) && $(PYTHON) -m pip install --quiet --disable-pip-version-check uv==0.13.8 && $(VENV)/bin/uv pip install --quiet --python $(PYTHON) -r requirements.txt)
	@ln -sfn "$$($(PYTHON) -c 'import importlib.util as u, os; print(os.path.dirname(u.find_spec("torch").origin))')" $(VENV)/torch
	@touch $@

$(LIBRARY): $(VENV)/.ready $(SOURCES)
	$(call step,library,$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .)
	@touch $@
