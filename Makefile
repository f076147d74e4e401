.DEFAULT_GOAL := help
.PHONY: help lab test torture bench full published-data full-mlps full-cnns full-regimes full-depth readme record runs clean-runs lint clean

PYTHON ?= python3
BIN := .venv/bin
PAPERMILL := $(BIN)/python tools/execute.py

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "make %-10s %s\n", $$1, $$2}'

.venv/lab: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lab]'
	@touch $@

.venv/test: .venv/lab
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lab,test]'
	@touch $@

lab: .venv/lab ## run the notebooks on the built-in digits, no network needed (about five minutes); writes out/
	@$(PAPERMILL) Lab1_MLPs.ipynb out/Lab1_MLPs.ipynb
	@$(PAPERMILL) Lab1_CNNs.ipynb out/Lab1_CNNs.ipynb
	@$(PAPERMILL) Lab1_Regimes.ipynb out/Lab1_Regimes.ipynb
	@$(PAPERMILL) Lab1_Depth.ipynb out/Lab1_Depth.ipynb
	@echo "executed notebooks: $$(ls out/*.ipynb | tr '\n' ' ')"
	@echo "tables:            $$(ls out/results/*.csv | tr '\n' ' ')"
	@echo "figures:           $$(ls out/images/* | tr '\n' ' ')"

# one worker a processor; each takes whole files, in their order, so that a file's fixtures are made once
test: .venv/test lint ## check the style, run the tests and the notebooks
	@$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: .venv/test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

.venv/bench: .venv/lab
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lab,bench]'
	@touch $@

bench: .venv/bench ## measure the speed beside other ways of training; writes results/benchmark-* (about 12 minutes)
	@$(BIN)/python -m benchmarks $(BENCH)

torture: .venv/test ## kill runs, break their writes, and compare; writes results/reliability.md (some minutes)
	@$(BIN)/python tests/torture.py --out results/reliability.md

# the data set as a name (cifar10, downloaded) or a folder; more epochs and seeds cost time in proportion
CIFAR ?= data/cifar10-jpeg
CNN_EPOCHS ?= 60
CNN_SEEDS ?= 2
CNN_WIDTH ?= 16
CNN_JOBS ?= 2
REGIME_SEEDS ?= 3
# at width 64; without ResidualCNN it takes some hours less on 2 cores
WIDE_FAMILIES ?= [SimpleCNN, ResidualCNN]
# False: only the runs that the store and results/runs.csv have
TRAIN ?= True
# another data set leaves the published results as they are
PLACE = $(if $(filter data/cifar10-jpeg,$(CIFAR)),,out/$(notdir $(CIFAR))/)
FULL_CIFAR = -p dataset $(CIFAR) -p epochs $(CNN_EPOCHS) -p batch_size 128 -p width $(CNN_WIDTH) -p jobs $(CNN_JOBS) \
	-p output_dir runs -p figures_dir $(PLACE)images -p results_dir $(PLACE)results

FULL := -p dataset mnist -p epochs 60 -p batch_size 256 -p seeds 5 -p depth_seeds 3 -p jobs 2 \
	-p output_dir runs -p figures_dir images -p results_dir results

full: published-data full-mlps full-cnns full-regimes full-depth ## all published experiments; they write results/ and images/

published-data: .venv/lab # or the lack of it is found out after the hours of MNIST
	@$(BIN)/python -c "from lablib import load_data; load_data('mnist'); load_data('$(CIFAR)', image_size=32, channels=3)"

full-mlps: .venv/lab ## the published experiment on MNIST (about two hours on 2 cores)
	@$(PAPERMILL) Lab1_MLPs.ipynb results/Lab1_MLPs.ipynb $(FULL)
	@$(MAKE) --no-print-directory record readme

full-cnns: .venv/lab ## the published experiment on CIFAR-10 (about two hours a seed on 2 cores)
	@$(PAPERMILL) Lab1_CNNs.ipynb $(PLACE)results/Lab1_CNNs.ipynb $(FULL_CIFAR) -p seeds $(CNN_SEEDS) -p grid_images 5000
	@$(MAKE) --no-print-directory record readme

full-regimes: .venv/lab ## the same networks with a cosine rate and crops, and wider ones (some nine hours; TRAIN=False: seconds)
	@$(PAPERMILL) Lab1_Regimes.ipynb $(PLACE)results/Lab1_Regimes.ipynb $(FULL_CIFAR) -p seeds $(REGIME_SEEDS) -p wide 64 \
		-p train $(TRAIN) -y 'wide_families: $(WIDE_FAMILIES)'
	@$(MAKE) --no-print-directory record readme

full-depth: .venv/lab ## nine networks in both ways; trains what results/runs.csv lacks (TRAIN=False: nothing)
	@$(PAPERMILL) Lab1_Depth.ipynb $(PLACE)results/Lab1_Depth.ipynb $(FULL_CIFAR) -p seeds $(REGIME_SEEDS) -p train $(TRAIN)
	@$(MAKE) --no-print-directory record readme

readme: .venv/lab ## write the tables of results/ into the README
	@$(BIN)/python -m lablib.readme

record: .venv/lab ## add every finished run of the store to results/runs.csv
	@$(BIN)/python -m lablib.record

RUNS ?= runs
FINISHED ?= 0

runs: .venv/lab ## list the runs of the store with their states; RUNS=out/runs: those of make lab
	@$(BIN)/python -m lablib.store --output-dir "$(RUNS)"

clean-runs: .venv/lab ## delete interrupted and damaged runs, after asking; FINISHED=1: finished ones too
	@$(BIN)/python -m lablib.store clean --output-dir "$(RUNS)" $(if $(filter 1,$(FINISHED)),--finished)

clean: ## delete out/, what make lab wrote; the published runs in runs/ stay
	rm -rf out
