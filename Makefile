.DEFAULT_GOAL := help
.PHONY: help lab test torture bench published address results-mlps results-cnns runs clean-runs lint clean

PYTHON ?= python3
BIN := .venv/bin
PAPERMILL := $(BIN)/python tools/execute.py

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "make %-10s %s\n", $$1, $$2}'

.venv/lab: pyproject.toml constraints.txt
	@test -d .venv || echo "setting up .venv: a few minutes, 6.6 GB with the CUDA builds of PyTorch"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@mkdir -p .venv/etc/ipython  # or each kernel prints a warning about TCP
	@echo "c.IPKernelApp.log_level = 40" > .venv/etc/ipython/ipython_kernel_config.py
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lab]'
	@touch $@

.venv/test: .venv/lab
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lab,test]'
	@touch $@

lab: .venv/lab ## run both notebooks on the built-in digits, no data to download; writes out/
	@$(PAPERMILL) Lab1_MLPs.ipynb out/Lab1_MLPs.ipynb
	@$(PAPERMILL) Lab1_CNNs.ipynb out/Lab1_CNNs.ipynb
	@echo "executed notebooks: $$(ls out/*.ipynb | tr '\n' ' ')"
	@echo "tables and figures: out/digits/results, out/digits/images"

# one worker a processor; each takes whole files, in their order, so that a file's fixtures are made once
test: .venv/test lint ## check the style, run the tests and the notebooks
	@$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: .venv/test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

.venv/bench: .venv/lab
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lab,bench]'
	@touch $@

bench: .venv/bench ## compare the speed with other methods of training; writes results/benchmark-* (about 12 minutes)
	@$(BIN)/python -m benchmarks $(BENCH)

torture: .venv/test ## kill runs, break their writes, compare the results; writes results/reliability.md (some minutes)
	@$(BIN)/python tests/torture.py --out results/reliability.md

published: .venv/lab ## list the published runs; JOBS=2 trains what is missing (about two days on 2 cores)
	@$(BIN)/python tools/published.py $(if $(JOBS),--jobs $(JOBS),--list)

# the parameters of the published runs, which tools/published.py trains
MNIST := -p dataset mnist -p epochs 60 -p batch_size 256 -p seeds 5 -p depth_seeds 5 -p precision fp32
CIFAR := -p dataset data/cifar10-jpeg -p epochs 60 -p batch_size 128 -p seeds 5 -p width 16 -p precision bf16 \
	-p cosine_epochs 30 -p cosine_learning_rate 0.01 -p grid_images 5000 -p grid_seeds 3 \
	-y '{grid_temperatures: [2, 4, 8], grid_alphas: [0.5, 0.7, 0.9]}'
RESULTS := -p output_dir runs -p figures_dir images -p results_dir results

results-mlps: .venv/lab ## execute the MLP notebook from the published runs on MNIST
	@$(PAPERMILL) Lab1_MLPs.ipynb results/Lab1_MLPs.ipynb $(MNIST) $(RESULTS)
	@$(BIN)/python tools/report.py

results-cnns: .venv/lab ## execute the CNN notebook from the published runs on CIFAR-10
	@$(PAPERMILL) Lab1_CNNs.ipynb results/Lab1_CNNs.ipynb $(CIFAR) $(RESULTS)
	@$(BIN)/python tools/report.py

ADDRESS := $(shell sed -n 's|^Repository = "https://github.com/\([^"]*\)".*|\1|p' pyproject.toml)

address: ## write the repository's public address where it is needed: REPOSITORY=https://github.com/owner/name
	@expr "$(REPOSITORY:.git=/)" : 'https://github\.com/[A-Za-z0-9-]\{1,\}/[A-Za-z0-9._-]\{1,\}$$' >/dev/null || \
		{ echo "write make address REPOSITORY=https://github.com/owner/name, without .git" >&2; exit 2; }
	@for file in pyproject.toml CITATION.cff README.md *.ipynb results/*.ipynb; do \
		sed -i.bak "s|$(ADDRESS)|$(REPOSITORY:https://github.com/%=%)|g" $$file && rm $$file.bak || exit 1; done

RUNS ?= runs

runs: .venv/lab ## list the runs of the store and the published ones; RUNS=out/runs: those of make lab
	@$(BIN)/python -m lablib.runs list "$(RUNS)"

clean-runs: .venv/lab ## delete interrupted and damaged runs, after asking
	@$(BIN)/python -m lablib.runs clean "$(RUNS)"

clean: ## delete out/, what make lab wrote; runs/ and results/ stay
	rm -rf out
