# All targets need Python (3.11 or newer) and make, and nothing else: the first call installs the environment.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin

.PHONY: demo test conformance quality format study clean

demo: $(VENV)/.train
	mkdir -p outputs
	$(BIN)/epmvg ground examples/images/astronaut.jpg "the woman in the orange suit" "a dog" --threshold 0.3 \
		--save outputs/photo.png
	$(BIN)/epmvg train examples/configs/shapes.yaml

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Runs transformers' own tests of models, configurations and processors. RUN_SLOW=1 adds exports and torch.compile.
conformance: $(VENV)/.dev
	$(BIN)/python tests/conformance/run.py

quality: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What the teacher is worth, on the photos in DATA_DIR. It takes hours (model_cards/distillation-study/README.md says how
# many of them); stopped, it goes on where it was.
study: $(VENV)/.train
	test -d outputs/towers || $(BIN)/python examples/prepare_towers.py outputs/towers
	test -d outputs/teacher_flickr30k_towers/teacher || $(BIN)/python examples/train_teacher.py \
		examples/configs/teachers/flickr30k_towers.yaml --data_dir $(DATA_DIR)
	$(BIN)/python examples/study/photos.py --data_dir $(DATA_DIR)
	$(BIN)/python examples/study/photo_report.py outputs/photo_study model_cards/distillation-study

clean:
	rm -rf $(VENV) build dist *.egg-info outputs .conformance

# The environment is installed again when one of the files that describe it changes.
# The build of torch for NVIDIA GPUs takes 4 GB more. Without a driver for them, the pinned versions are first looked for as
# builds for the CPU (torch==X+cpu), which not every package index has; otherwise pip takes the large ones below.
$(VENV)/.venv: $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	command -v nvidia-smi > /dev/null || $(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) \
		$$(sed -n 's/^torch\(vision\)\{0,1\}==.*/&+cpu/p' $(CONSTRAINTS)) 2> /dev/null || true
	touch $@

$(VENV)/.train: $(VENV)/.venv pyproject.toml $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[train,teacher]"
	touch $@

$(VENV)/.dev: $(VENV)/.venv pyproject.toml $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]"
	touch $@
