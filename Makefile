# Every target does its own set-up in .venv
PYTHON ?= python3
BIN = .venv/bin
NOTEBOOKS = $(sort $(wildcard nbs/*.ipynb nbs/*/*.ipynb))
.PHONY: demo test sync readme outputs docs bench tables clean

demo: .venv/installed
	$(BIN)/kdfast demo

test: .venv/developing sync
	$(BIN)/chkstyle kdfast nbs
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# The committed library is what the notebooks export
sync: .venv/developing
	rm -rf .venv/before && cp -r kdfast .venv/before
	$(BIN)/nbdev-export
	diff -r -x __pycache__ .venv/before kdfast

# README.md and its pictures, from nbs/index.ipynb
OUT = .
readme: .venv/developing
	$(BIN)/python tools/site.py --readme $(OUT)

# The outputs that the notebooks keep
outputs: .venv/developing
	PYTHONWARNINGS=ignore $(BIN)/jupyter nbconvert --to notebook --execute --inplace $(NOTEBOOKS)
	$(BIN)/nbdev-clean

# The pages as a site in _docs, to be browsed without Quarto, and nbs/llms.txt
docs: .venv/developing
	$(BIN)/python -W ignore tools/site.py

# The tables in results/tables, from results/records.jsonl
tables: .venv/developing
	$(BIN)/kdfast table sanity,best-teacher,substitutions,stagewise,compression,teachers,budget-1mb --schedule cpu --report --out results

# CIFAR=path IMAGENETTE=path make bench
bench: .venv/developing
	$(BIN)/python benchmarks/loader.py --cifar $(CIFAR) --imagenette $(IMAGENETTE) | tee results/loader.md
	$(BIN)/python benchmarks/bench.py --cifar $(CIFAR) --imagenette $(IMAGENETTE) --out results
	$(BIN)/python benchmarks/scaling.py | tee results/scaling.md
	$(BIN)/python benchmarks/precision.py --data $(CIFAR)
	$(BIN)/python benchmarks/block_cost.py --turns 5 --steps 3 | tee results/block_cost.md
	$(BIN)/python benchmarks/conv_cost.py --turns 9 | tee results/conv_cost.md
	$(BIN)/python benchmarks/int8_cost.py | tee results/int8_cost.md
	$(BIN)/python benchmarks/kills.py | tee results/kills.md

.venv/installed: settings.ini pyproject.toml setup.py
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -e .
	touch $@

.venv/developing: .venv/installed
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist _proc _docs demo *.egg-info
