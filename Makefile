PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test test-portable lint docs papers dist-check wild chaos bench controller verdicts clean

demo: $(STAMP)  ## train a small network on real digits and draw its sharpness
	$(BIN)/python -m examples.quickstart

test: $(STAMP)  ## the whole suite
	$(BIN)/python -m pytest

# What rounding decides passes on one processor and fails on another. So the numerical part runs as on processors without
# AVX-512, and without AVX: PyTorch's kernels, oneDNN, MKL and OpenBLAS (NumPy, SciPy) each have a switch of their own.
# MKL_ENABLE_INSTRUCTIONS counts on Intel's processors; on AMD's, MKL goes the way of AVX2 by itself.
NUMERICAL := tests/curvature tests/callbacks/test_spectrum_on_network.py tests/distributed/test_operator.py \
	tests/distributed/test_solvers.py
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 OPENBLAS_CORETYPE=Haswell
NO_AVX := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE OPENBLAS_CORETYPE=Nehalem

test-portable: $(STAMP)  ## the numerical part, as on other processors
	$(AVX2) $(BIN)/python -m pytest $(NUMERICAL)
	$(NO_AVX) $(BIN)/python -m pytest $(NUMERICAL)

lint: $(STAMP)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.docs-installed  ## the site, in `site`
	$(BIN)/mkdocs build --strict

papers: $(STAMP)  ## the figures and tables of three papers, run again; SCALE=medium for what takes hours to decide, full for their own setting, ROOT for the data
	$(BIN)/python -W ignore -m examples.papers --scale $(or $(SCALE),small) --root $(or $(ROOT),data)

dist-check: $(STAMP)  ## build sdist and wheel, and try them; DOWNLOAD=1 installs the dependencies as for a user
	$(BIN)/python tests/dist_check.py $(if $(DOWNLOAD),--download)

wild: .wild/.installed  ## other people's LightningModules, trained without and with the reading callbacks
	.wild/bin/python -W ignore -m benchmarks.wild

chaos: $(STAMP)  ## kills, full disks, no memory, broken loggers, states and ranks: the training goes on; 20 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.chaos

bench: .bench/.installed  ## what it costs beside other packages, in one table and one picture; ROOT for CIFAR-10
	.bench/bin/python -W ignore -m benchmarks --write --root $(or $(ROOT),data)

controller: .bench/.installed  ## the controller beside rates that were tuned in hindsight; what was trained is kept
	.bench/bin/python -W ignore -m benchmarks.controller

verdicts: $(STAMP)  ## is it true what is said of the learning rate; ROOT for the data, FRESH=1 to begin anew
	$(BIN)/python -W ignore -m benchmarks.verdicts --root $(or $(ROOT),data) $(if $(FRESH),--fresh)

# The environment is made once and made again when what it holds has changed.
$(STAMP): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $(STAMP)

.venv/.docs-installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

# Other people's packages get an environment of their own that sees what .venv holds and cannot change it.
define make_venv_that_sees_ours
rm -rf $(1)
$(BIN)/python -m venv $(1)
$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $(1)/seen.pth
mv $(1)/seen.pth "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
endef

# torch and Lightning stay those of .venv; pytorch-tabular asks for an older torchmetrics than that, and mlcolvar for the
# first version of pydantic, which nobody else bears and it does not import: both do without.
.wild/.installed: benchmarks/wild/requirements.txt | $(STAMP)
	$(call make_venv_that_sees_ours,.wild)
	$(BIN)/python -m pip list --format=freeze | grep -E '^(torch|torchvision|lightning|pytorch-lightning|torchmetrics)==' \
		> .wild/constraints.txt
	.wild/bin/python -m pip install --quiet --constraint .wild/constraints.txt --requirement $<
	.wild/bin/python -m pip install --quiet --no-deps pytorch-tabular==1.2.0 mlcolvar==1.3.1
	touch $@

# The packages beside which ours is set, likewise. cockpit imports pkg_resources, which setuptools had up to 80.
.bench/.installed: setup.cfg | $(STAMP)
	$(call make_venv_that_sees_ours,.bench)
	$(BIN)/python -m pip list --format=freeze | grep -E '^(torch|torchvision|lightning|pytorch-lightning|numpy|scipy)==' \
		> .bench/constraints.txt
	$(BIN)/python -c 'import configparser; c = configparser.ConfigParser(); c.read("setup.cfg"); \
		print(c["options.extras_require"]["bench"])' > .bench/requirements.txt
	.bench/bin/python -m pip install --quiet --constraint .bench/constraints.txt --requirement .bench/requirements.txt
	touch $@

clean:
	rm -rf .venv .wild .bench build dist site *.egg-info logs lightning_logs
