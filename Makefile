# Every target sets itself up: it needs make and Python >= 3.11, and installs into .venv in this folder.
PYTHON ?= python3
BIN := .venv/bin
RUN_DIR := runs/quickstart

# Ranks share this machine's cores: with OpenMP threads of their own they would spin against each other.
export OMP_NUM_THREADS ?= 1

.PHONY: help quickstart test test-slurm test-recbole recbole-fixtures chaos lint bench results clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: .venv/.installed ## fetch MovieLens-100k, prepare it, train on 2 ranks, print the metrics beside the baselines
	$(BIN)/python -m data_prep.fetch_ml100k --output data/raw/ml-100k
	$(BIN)/python -m data_prep --config configs/data/ml-100k.yaml
	rm -rf $(RUN_DIR)
	$(BIN)/torchrun --standalone --nproc_per_node=2 train.py run_dir=$(RUN_DIR)
	@$(BIN)/python -m gru4recf_dist.results_table $(RUN_DIR)

# What runs on any machine: two files at a time, and then the tests that watch several processes by the clock, alone.
HERE = not gpu and not slurm and not recbole
# In the order of the folders: files of seconds come last, and fill the end.
TWO_FILES = -n 2 --dist=loadfile --no-loadscope-reorder
# With ARGS="-k ..." one of the two parts may have nothing to run, which pytest answers by 5.
OR_NONE = $(if $(ARGS),|| [ $$? = 5 ])

# Only engine=spark of data_prep, and its tests, need Java.
HAS_JAVA = java -version >/dev/null 2>&1

test: .venv/.installed .venv-mitmproxy/.installed ## run the tests, without root (not those that need a GPU or a SLURM cluster)
	@$(HAS_JAVA) || [ "$$(id -u)" != 0 ] || { apt-get update -q && apt-get install -y -q --no-install-recommends default-jre-headless; } \
		|| echo 'no Java could be installed: the tests on Spark will be skipped'
	$(BIN)/python -m pytest -m "$(HERE) and not clock" $(TWO_FILES) $(ARGS) $(OR_NONE)
	$(BIN)/python -m pytest -m "$(HERE) and clock" $(ARGS) $(OR_NONE)

# The cluster's daemons start jobs as their owners, so only root can run them.
SLURM_PACKAGES = slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge
HAS_SLURM = command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v sbatch >/dev/null && command -v munged >/dev/null

test-slurm: .venv/.installed ## run the tests on a SLURM cluster of four nodes on this machine (root on Debian; else skipped)
	@{ $(HAS_SLURM); } || [ "$$(id -u)" != 0 ] || { apt-get update -q && apt-get install -y -q --no-install-recommends $(SLURM_PACKAGES); } \
		|| echo 'no SLURM could be installed: its tests will be skipped'
	$(BIN)/python -m pytest -m slurm $(ARGS)

# Makes .venv-recbole if it is not there, and prints its interpreter.
RECBOLE = $(BIN)/python -c 'from benchmarks.peers import *; print(python(".venv-recbole", requirements("recbole-requirements.txt")))'

test-recbole: .venv/.installed ## run the tests of exchange with RecBole that need RecBole itself (1.2.1, into .venv-recbole)
	@$(RECBOLE) >/dev/null
	$(BIN)/python -m pytest -m recbole $(ARGS)

recbole-fixtures: .venv/.installed ## make tests/recbole/fixtures.tar.xz anew, by RecBole itself
	"$$($(RECBOLE))" tests/recbole/make_fixtures.py

chaos: .venv/.installed ## kill processes of a training run at random, 20 times (CHAOS_EVENTS), and compare its end bit by bit
	CHAOS_EVENTS=$(or $(CHAOS_EVENTS),20) $(BIN)/python -m pytest -m chaos tests/e2e $(ARGS)

lint: .venv/.installed ## check format and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

bench: .venv/.installed ## measure against other implementations; ARGS="..." is passed on
	$(BIN)/python -m benchmarks $(ARGS)

results: .venv/.installed ## train what docs/results.md lists (hours; goes on where it was ended); ARGS="..." is passed on
	$(BIN)/python -m benchmarks.results $(ARGS)

clean: ## remove .venv, the other .venv-*, caches and build products; data/ and runs/ stay
	rm -rf .venv .venv-peers .venv-recbole .venv-torchrec .venv-mitmproxy build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian's python3 comes without ensurepip, which venv needs.
HAS_VENV = $(PYTHON) -c 'import ensurepip' 2>/dev/null

# .unfinished is there from the first moment until all is installed: what an interrupted set-up left is made anew.
.venv/.installed: pyproject.toml constraints.txt
	@if [ -e .venv/.unfinished ]; then rm -rf .venv; fi
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		$(HAS_VENV) || { [ "$$(id -u)" = 0 ] && apt-get update -q && apt-get install -y -q python3-venv; }; \
		$(HAS_VENV) || { echo 'error: $(PYTHON) cannot make virtual environments: on Debian, apt-get install python3-venv' >&2; exit 2; }; \
		mkdir -p .venv && touch .venv/.unfinished && $(PYTHON) -m venv .venv; \
	fi
	@touch .venv/.unfinished
	@echo 'installing into .venv: this takes minutes, and 2.1 GB (more with the CUDA build of torch)'
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@mv .venv/.unfinished $@

# The tests' fault proxy has a virtual environment of its own, as its pins clash with ours. The stamp is written last.
.venv-mitmproxy/.installed: tests/support/mitmproxy-requirements.txt | .venv/.installed
	rm -rf .venv-mitmproxy
	$(BIN)/python -m venv .venv-mitmproxy
	.venv-mitmproxy/bin/python -m pip install --quiet -r $<
	@touch $@
