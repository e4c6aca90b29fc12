# The whole study by name. `make extract probe figures` on a fresh machine goes from nothing to the first curve.
# Variables: PRESET=pocket|paper  STORE=folder  DATA=folder or hub id  PROBES=folder  FIGURES=folder  PYTHON=3.12
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= >=3.11
VENV := .venv
RUN := $(VENV)/bin/python
PRESET ?= auto
STORE ?=
DATA ?=
PROBES ?= runs/probes
FIGURES ?= figures
ANALYSIS ?= runs/analysis
STORE_READ := $(or $(STORE),data/store.zarr)

.PHONY: help setup test test-slow extract review verify repair inspect du probe controls referee figures attend report \
	causes edits gap lora editor bench lint pocket clean

help: ## Show what can be made
	@grep -hE '^[a-z -]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-26s %s\n", $$1, $$2}'

setup: $(VENV)/.ready ## Make .venv with everything pinned (gets uv if it is missing)

# Without a uv that runs, one is put into a folder of its own; nothing outside this folder is touched.
UV := $(if $(shell uv --version 2>/dev/null),uv,.uv/bin/uv)

.uv/bin/uv:
	python3 -m venv .uv && .uv/bin/python -m pip install --quiet uv

$(VENV)/.ready: pyproject.toml constraints.txt | $(filter .uv/bin/uv,$(UV))
	$(UV) venv --quiet --allow-existing --python '$(PYTHON)' $(VENV)
	$(UV) pip install --quiet --python $(VENV) --constraint constraints.txt --group dev --editable .
	@touch $@

extract: setup ## Pictures and instructions -> a verified store of hidden states (PRESET, DATA, STORE, ARGS)
	$(RUN) -m extract --preset $(PRESET) $(if $(DATA),--data $(DATA)) $(if $(STORE),--store $(STORE)) $(ARGS)

review: setup ## Verify boxes by hand on a local page (STORE, DATA, ARGS)
	$(RUN) -m extract.review --store $(STORE_READ) --data $(or $(DATA),data/scenes) $(ARGS)

verify repair inspect du: setup ## Check, mend or look at the store (STORE, ARGS)
	$(RUN) -m store $@ $(STORE_READ) $(ARGS)

# What the first figure needs; all that a referee asks for takes several times as long.
FIRST := --parts layers prompt joint floors control-task matched

probe: setup ## Train a probe per layer, with floors and a control task, in one sweep over the store
	$(RUN) -m probes sweep --store $(STORE_READ) --out $(PROBES) $(or $(ARGS),$(FIRST))

FRESH := --preset pocket --data data/fresh --limit 1200 --held-out 0.999 --no-vlm-boxes

controls: setup ## The control stores of the pocket data, and fresh scenes that no probe has seen
	$(RUN) -m extract --preset pocket --control random-weights
	$(RUN) -m extract --preset pocket --control shuffled-images
	$(RUN) -m extract.scenes --out data/fresh --samples 2600 --seed 77 --difficulty hard
	$(RUN) -m extract $(FRESH) --store data/fresh.zarr
	$(RUN) -m extract $(FRESH) --store data/paraphrased.zarr --prompt 1
	$(RUN) -m extract $(FRESH) --store data/fresh-random-weights.zarr --control random-weights
	$(RUN) -m extract $(FRESH) --store data/fresh-shuffled-images.zarr --control shuffled-images
	$(RUN) -m extract.scenes --out data/medium --samples 1600 --seed 78 --difficulty medium
	$(RUN) -m extract --preset pocket --data data/medium --store data/medium.zarr --limit 600 --no-vlm-boxes

referee: controls ## Everything of science's list: every control, then the finished probes on fresh scenes
	$(RUN) -m probes sweep --store $(STORE_READ) --out $(PROBES) --random-weights data/store-random-weights.zarr \
		--shuffled-images data/store-shuffled-images.zarr $(ARGS)
	$(RUN) -m probes evaluate --out $(PROBES) --on fresh=data/fresh.zarr fresh=data/fresh-random-weights.zarr \
		fresh=data/fresh-shuffled-images.zarr paraphrased=data/paraphrased.zarr medium=data/medium.zarr

figures: setup ## Draw the localization curves
	$(RUN) -m analysis curves --probes $(PROBES) --out $(FIGURES)

# One proxy's attention to every token, of the other seeds and the permuted twins their mass by layer.
JOINT = $(wildcard $(PROBES)/proxies/joint-*-text-seed*)
TWINS = $(wildcard $(PROBES)/proxies/permuted-*+*-text-seed*)
OTHERS = $(strip $(filter-out $(firstword $(sort $(JOINT))),$(JOINT)) $(TWINS))
RANDOM = $(wildcard data/store-random-weights.zarr)

attend: setup ## Write the joint proxies' attention into the store
	$(if $(JOINT),,$(error $(PROBES) has no joint proxy: `make probe` trains them))
	$(RUN) -m probes attend --store $(STORE_READ) --proxy $(firstword $(sort $(JOINT)))
	$(if $(OTHERS),$(RUN) -m probes attend --store $(STORE_READ) --keep mass --proxy $(OTHERS))

report: attend ## Ask the store everything: answers, figures and one page, runs/analysis/report.html (STORE, PROBES, ARGS)
	$(RUN) -m analysis report --store $(STORE_READ) --probes $(PROBES) --out $(ANALYSIS) \
		$(if $(DATA),--data $(DATA)) $(if $(and $(RANDOM),$(if $(STORE),,yes)),--random-weights $(RANDOM)) $(ARGS)

causes: attend ## Train proxies again without what attention chose, and say whether they need it (about five minutes)
	$(RUN) -m analysis causes --store $(STORE_READ) --probes $(PROBES) --out $(ANALYSIS) --retrain $(ARGS)

edits: setup ## Edit 200 held-out hard scenes by every conditioning and box: runs/edit/report.html (ARGS)
	$(RUN) -m edit evaluate --middle 10 $(ARGS)

gap: setup ## The VLM's own answer against where the editor edits, on the same scenes (ARGS)
	$(RUN) -m edit gap $(ARGS)

# What the pocket editor is taught on, first and then, and its LoRA; hard scenes are new to all of them.
ASKED := --tasks swap removal attribute_modification --no-gradient-checkpointing
EDITING := --store data/editing.zarr --data data/editing $(ASKED)
NAMED := --store data/named.zarr --data data/named $(ASKED)
BASE := --train all --batch-size 32 --optimizer muon --learning-rate 2e-3 --warmup 200 --change-weight 4 --average 0.999
LORA := --steps 2000 --batch-size 16 --learning-rate 1e-3 --change-weight 4 --limit 8192
TAUGHT := --preset pocket --layers final --attention none --no-vlm-boxes --prompt random --shuffle --held-out 0.02 --limit 40000
EDITED = runs/editor

data/editing.zarr: | setup
	$(RUN) -m extract.scenes --out data/editing/easy --samples 12288 --seed 502 --difficulty easy
	$(RUN) -m extract.scenes --out data/editing/medium --samples 32768 --seed 503 --difficulty medium
	$(RUN) -m extract $(TAUGHT) --data data/editing --store $@

data/named.zarr: | setup
	$(RUN) -m extract.scenes --out data/named --samples 32768 --seed 504 --difficulty named
	$(RUN) -m extract $(TAUGHT) --data data/named --store $@

lora: data/editing.zarr ## Teach the pocket editor again to obey boxes: runs/lora (ARGS)
	$(RUN) -m edit train $(EDITING) $(LORA) $(ARGS)

editor: data/editing.zarr data/named.zarr ## Train the pocket editor, its LoRA and its proxy again from scratch (about four hours on two cores)
	$(RUN) -m edit.pocket vae
	$(RUN) -m edit.pocket build
	$(RUN) -m edit train $(BASE) $(EDITING) --editor $(EDITED)/start --out $(EDITED)/first --steps 5400 --seed 30002
	$(RUN) -m edit.pocket build --transformer $(EDITED)/first/transformer --out $(EDITED)/taught
	$(RUN) -m edit train $(BASE) $(NAMED) --editor $(EDITED)/taught --out $(EDITED)/base --bystanders 0.5 --steps 7000 --seed 30003
	$(RUN) -m edit.pocket build --transformer $(EDITED)/base/transformer --out $(EDITED)/plain
	$(RUN) -m probes train --store data/editing.zarr --layers final --seeds 0 --width 64 --steps 12000 --watch 64 --out $(EDITED)/proxies
	$(RUN) -m edit train $(EDITING) --editor $(EDITED)/plain --out $(EDITED)/lora $(LORA)
	$(RUN) -m edit.pocket build --transformer $(EDITED)/base/transformer --lora $(EDITED)/lora \
		--proxy $(EDITED)/proxies/proxies/layer-final-seed0 --out $(EDITED)/pocket

test: setup ## Run the tests (offline, under 20 minutes on two cores)
	HF_HUB_OFFLINE=1 $(RUN) -m pytest -q -n auto --dist worksteal

test-slow: setup ## Run the minutes-long tests as well
	HF_HUB_OFFLINE=1 $(RUN) -m pytest -q -m slow

bench: setup ## Print the table of ratios against named baselines
	$(RUN) -m bench

lint: setup ## Format and check
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .

pocket: setup ## Train the pocket model again from scratch (about two hours on one core)
	$(RUN) -m extract.pocket train

clean: ## Remove what was computed (data, runs, figures); the environment stays
	rm -rf data runs figures
