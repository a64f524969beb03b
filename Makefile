# Every target does its own set-up in .venv
PYTHON ?= python3
BIN = .venv/bin
SHELL = /bin/bash
.SHELLFLAGS = -o pipefail -c
.PHONY: demo test test-all check sync readme outputs docs bench bench-gpu wheels tables rerun clean

demo: .venv/installed
	$(BIN)/kdfast demo

# Before each commit: style, exports, the library's notebooks, the quick tests
test: NOTEBOOKS_RUN = --library
test: TESTS_RUN = -m 'not slow'
test: check

# glibc keeps the memory of a network's activations instead of returning it to the system and asking for it anew at each step
export MALLOC_MMAP_THRESHOLD_ = 33554432
export MALLOC_TRIM_THRESHOLD_ = 268435456

# What CI runs: every notebook, and slow tests as well
test-all: check

# chkstyle takes cells marked exporti for examples
STYLE = $(BIN)/python -c "from chkstyle import core; core.NB_EXPORT_KEYS.add('exporti'); core.cli()"

# Each step runs whatever the ones before it have found, and prints what took longest; the exit code tells at the end
check: .venv/developing
	@failed=; \
	$(STYLE) kdfast nbs || failed=style; \
	$(MAKE) --no-print-directory sync || failed="$$failed sync"; \
	OMP_NUM_THREADS=1 $(BIN)/python tools/notebooks.py $(NOTEBOOKS_RUN) || failed="$$failed notebooks"; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations 10 $(TESTS_RUN) || failed="$$failed tests"; \
	test -z "$$failed" || { echo "Failed: $$failed"; exit 1; }

# The library is what the notebooks export; where it is not, it is left as it was
sync: .venv/developing
	rm -rf .venv/before && cp -r kdfast .venv/before && cp -p pyproject.toml .venv
	$(BIN)/nbdev-export
	if cmp -s pyproject.toml .venv/pyproject.toml; then touch -r .venv/pyproject.toml pyproject.toml; fi  # or make would install anew
	diff -r -x __pycache__ .venv/before kdfast || { rm -rf kdfast && mv .venv/before kdfast; exit 1; }

# README.md and its pictures, from nbs/index.ipynb
readme: .venv/developing
	$(BIN)/python tools/site.py --readme $(or $(OUT),.)

# The outputs that the notebooks keep
outputs: .venv/developing
	PYTHONWARNINGS=ignore OMP_NUM_THREADS=1 $(BIN)/python tools/outputs.py
	$(BIN)/nbdev-clean

# The pages as a site in _docs, to be browsed without Quarto, and nbs/llms.txt
docs: .venv/developing
	$(BIN)/python -W ignore tools/site.py

# The tables in results/tables, from results/records.jsonl
tables: .venv/developing
	$(BIN)/kdfast table sanity,best-teacher,substitutions,stagewise,compression,teachers,budget-1mb --schedule cpu --report --out results

# A cell of each committed table trained anew, or one by its name, beside its record: CELL='shares/10-1 from 16-2/kd' CIFAR=path IMAGENETTE=path make rerun
CELL ?= random
rerun: .venv/developing
	$(BIN)/python -W ignore tools/rerun.py '$(CELL)' $(addprefix --cifar ,$(CIFAR)) $(addprefix --imagenette ,$(IMAGENETTE))

# What a machine with a GPU makes of kdfast, in eight minutes; a machine without a registry takes its packages from `make wheels`
bench-gpu:
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) benchmarks/gpu.py --out $(or $(OUT),gpu)

# In .wheels, for Python 3.12, with CIFAR=path the images to train on: what bench-gpu needs beside torch, torchvision, timm, scikit-learn, pandas, matplotlib and pytest, in the versions of .venv
WHEELS = fastai fastcore fastdownload fastprogress fasttransform plum-dispatch beartype python-fasthtml starlette itsdangerous python-multipart httpx2 httpcore2 truststore torchdistill fasterai torch-pruning
wheels: .venv/developing
	rm -rf .wheels
	$(BIN)/pip freeze | grep -iE "^($$(echo $(WHEELS) | tr ' ' '|' | sed 's/-/[-_]/g'))==" | xargs $(BIN)/pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
		--platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 -d .wheels
	$(if $(CIFAR),cp $(CIFAR) .wheels/)

# CIFAR=path IMAGENETTE=path make bench
bench: .venv/developing
	$(BIN)/python benchmarks/loader.py --cifar $(CIFAR) --imagenette $(IMAGENETTE) | tee results/loader.md
	$(BIN)/python benchmarks/bench.py --cifar $(CIFAR) --imagenette $(IMAGENETTE) --out results
	$(BIN)/python benchmarks/bench.py --parts share | tee results/share_cost.md
	$(BIN)/python benchmarks/scaling.py | tee results/scaling.md
	$(BIN)/python benchmarks/precision.py --data $(CIFAR)
	$(BIN)/python benchmarks/block_cost.py --turns 5 --steps 3 | tee results/block_cost.md
	$(BIN)/python benchmarks/conv_cost.py --turns 9 | tee results/conv_cost.md
	$(BIN)/python benchmarks/int8_cost.py | tee results/int8_cost.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/deploy_cost.py | tee results/deploy_cost.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/latency.py | tee results/latency.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/slim.py --cifar $(CIFAR) | tee results/slim.md
	$(BIN)/python benchmarks/kills.py | tee results/kills.md

.venv/installed: EXTRA = onnx
.venv/developing: EXTRA = dev
.venv/installed .venv/developing: settings.ini pyproject.toml setup.py
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile -e '.[$(EXTRA)]'
	touch .venv/installed $@

clean:
	rm -rf .venv build dist _proc _docs demo *.egg-info
