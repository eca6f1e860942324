# make demo   sets everything up and distils the miniature; make test   sets everything up and runs the tests.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= output/wan-tiny
# Waiting OpenMP threads sleep instead of spinning: on a busy machine spinning can cost a factor of 25.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test test-slow test-gpu lint format docs torture bench bench-gpu bench-wan-tiny wan-tiny clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "dmdtrain needs Python 3.11 or 3.12: make PYTHON=/path/to/python $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/dmdtrain fit configs/wan_tiny.yaml --output-dir $(DEMO)
	@scripts/demo_finish.sh $(BIN)/dmdtrain $(DEMO)

# A process for each core; the tests of one file stay together, for they share models and caches.
test: setup
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m slow

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

# Kills 200 tiny runs at random instants, resumes them, and compares bit for bit: about a quarter of an hour on one core.
torture: setup
	$(BIN)/python scripts/torture.py --runs 200

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages that are made from the code; a test fails while they are stale.
docs: setup
	@mkdir -p docs
	$(BIN)/dmdtrain config schema > docs/config.schema.json.partial
	mv docs/config.schema.json.partial docs/config.schema.json
	$(BIN)/dmdtrain config docs > docs/configuration.md.partial
	mv docs/configuration.md.partial docs/configuration.md

# Full DMD steps of a tiny Wan on any machine; against a hand-written script; replay against one graph.
bench: setup
	$(BIN)/python benchmarks/dmd_step.py --size tiny --compare train.gradient_checkpointing=false
	$(BIN)/python benchmarks/minimal.py
	$(BIN)/python benchmarks/block.py --out output/block.json
	$(BIN)/python benchmarks/replay.py --out output/replay.json

# Full DMD steps of the real shapes at 480p with 21 latent frames; records go to benchmarks/records and its table.
STEP := $(BIN)/python benchmarks/dmd_step.py --out benchmarks/records
HOST := --set train.checkpoints_on=host
CAUSAL := --set rollout.causal=true
bench-gpu: setup
	for precision in bf16 int8 nf4; do for causal in true false; do \
		$(STEP) --size 1.3b --set model.precision=$$precision --set rollout.causal=$$causal --profile || exit 1; done; done
	$(STEP) --size 14b --set model.precision=bf16 $(HOST)
	$(STEP) --size 14b --set model.precision=int8 $(HOST) --profile
	$(STEP) --size 14b --set model.precision=int8 $(HOST) $(CAUSAL) --set rollout.kv_cache=host
	$(STEP) --size 14b --set model.precision=nf4 $(HOST) --set model.offload_blocks=true --set ema.keep_on=host \
		--set optimizer.name=paged_adamw8bit
	$(STEP) --size 14b --set model.precision=nf4 $(HOST) $(CAUSAL) --set rollout.kv_cache=host
	for change in train.compile=true model.int8_matmul=true fake_score.reuse_rollout=true model.attention=native \
		train.checkpoints_on=host train.batched_guidance=false model.offload_blocks=true ; do \
		$(STEP) --size 1.3b --set model.precision=int8 --compare $$change || exit 1; done
	for change in rollout.kv_cache=int8 rollout.kv_cache=host train.checkpoint_replay=false train.compile=true; do \
		$(STEP) --size 1.3b --set model.precision=int8 $(CAUSAL) --compare $$change || exit 1; done
	$(STEP) --size 1.3b --set model.precision=int8 --set train.compile=true --compare model.int8_matmul=true
	$(STEP) --size 1.3b --set data.resolution=832x448 --set rollout.num_training_frames=16 \
		--set dmd.generator_update_interval=5 --set train.compile=true
	$(BIN)/python benchmarks/block.py --size 1.3b --tokens 32768 --out output/block.json
	$(BIN)/python benchmarks/table.py

# Scores the demo's student; run `make demo` first.
bench-wan-tiny: setup
	$(BIN)/python benchmarks/wan_tiny.py --ckpt "$$(ls -d $(DEMO)/checkpoints/step-* | sort | tail -n 1)" --out $(DEMO)/benchmark.json

wan-tiny: setup
	$(BIN)/python scripts/make_wan_tiny.py

clean:
	rm -rf build output
