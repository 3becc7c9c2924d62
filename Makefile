# The verbs of the house. Each makes $(VENV) when it is missing, and refreshes it when pyproject.toml has changed.

PYTHON ?= python3
VENV ?= .venv
# Extra place where pip looks for torch; empty means wherever pip is set up to look. The public index of CPU builds:
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Parallel test processes, each with one torch thread.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
# What make test-matrix runs, and with which versions.
IPYKERNELS ?= 6.31 7.0 7.1 newest
KERNEL_TESTS := tests/notebook/test_interrupts.py tests/notebook/test_display.py
LANGCHAIN_CORES ?= 1.2.21 newest
LANGCHAIN_TESTS := tests/integrations/test_langchain.py tests/integrations/test_langchain_messages.py
# More arguments for pytest, the bench or the demo: make test ARGS="tests/unit -x"
ARGS ?=

PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
INSTALLED_DOCS := $(VENV)/.installed-docs
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
# With a GPU any torch of the supported range will do; without one the constraint names the CPU build.
PIP_ARGS := --disable-pip-version-check $(if $(HAS_GPU),,-c requirements/cpu.txt) \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.DEFAULT_GOAL := help
.PHONY: help demo test test-matrix browser check format bench notebooks docs test-gpu clean

help: ## list these verbs
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | while IFS="$$(printf '\t')" read -r verb text; \
		do printf '  make %-10s %s\n' "$$verb" "$$text"; done

demo: $(INSTALLED) ## stream ten prompts through the model in the box
	@$(VENV)/bin/embedllm demo $(ARGS)

# Tests that measure time run alone first; a failure there ends the run, so the last line always tells the truth.
# pytest's exit code 5 means that nothing was selected.
test: $(INSTALLED) browser ## run every test that needs no GPU and no network
	@$(PY) -m pytest -m "serial and not gpu and not soak" $(ARGS) || [ $$? -eq 5 ]
	@$(PY) -m pytest -n $(WORKERS) --dist worksteal -m "not serial and not gpu and not soak" $(ARGS)

# The notebook tests drive a real browser. Where there is none and it may be installed, it is; else they are skipped.
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	run=""; [ "$$(id -u)" = 0 ] || run="sudo -n"; \
	if command -v apt-get >/dev/null && $$run true 2>/dev/null; then \
		echo "installing chromium for the notebook tests"; \
		{ $$run apt-get update && $$run env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; } \
			>/dev/null 2>&1 || echo "make: chromium could not be installed" >&2; \
	fi; \
	command -v chromium >/dev/null || echo "no Chromium here: the tests that need a browser are skipped" >&2

# $(call each_version,package,versions,tests): the tests with each of them in front of the one that is installed.
define each_version
for version in $(2); do \
	folder=$(VENV)/matrix/$(1)-$$version; wanted="$(1)==$$version.*"; [ $$version != newest ] || wanted=$(1); \
	[ -e $$folder/.installed ] || $(PY) -m pip install --disable-pip-version-check --quiet --no-deps --upgrade \
		--target $$folder "$$wanted" && touch $$folder/.installed || exit 1; \
	echo "$$(cd $$folder && ls -d $(subst -,_,$(1))-*.dist-info | sed -E 's/(.*)-(.*).dist-info/\1 \2/')"; \
	PYTHONPATH=$$folder $(PY) -m pytest -q -m "not gpu and not soak" $(3) $(ARGS) || exit 1; \
done
endef

# Stop in a notebook depends on the kernel, and the adapters on LangChain's base classes: their tests with others than
# those that are installed, as users have them.
test-matrix: $(INSTALLED) ## run what depends on them with older and newer ipykernel and langchain-core
	@$(call each_version,ipykernel,$(IPYKERNELS),$(KERNEL_TESTS))
	@$(call each_version,langchain-core,$(LANGCHAIN_CORES),$(LANGCHAIN_TESTS))

check: $(INSTALLED) ## lint, formatting, types, and the rules of the house
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(PY) -m pytest -q tests/rules -m "not serial and not slow"

format: $(INSTALLED) ## rewrite the formatting and what lint can mend
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

bench: $(INSTALLED) ## run the benchmark; ARGS="--against hf,hf-cb" adds peers
	@$(VENV)/bin/embedllm bench $(ARGS)

notebooks: $(INSTALLED) ## run the example notebooks and keep what they show
	@PYTHONPATH=. $(PY) -m tests.notebook.freeze $(ARGS)

docs: $(INSTALLED_DOCS) ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "site/index.html is written"

# A machine whose own Python already reaches the GPU through torch needs no environment and no network.
test-gpu: ## run the tests that need a CUDA device
	@reaches_gpu='import sys, pytest, torch; sys.exit(not torch.cuda.is_available())'; python=$(PYTHON); \
	if ! $$python -c "$$reaches_gpu" 2>/dev/null; then \
		$(MAKE) --no-print-directory $(INSTALLED) || exit 1; \
		python=$(PY); \
		$$python -c "$$reaches_gpu" || { echo "make test-gpu: torch sees no CUDA device here" >&2; exit 1; }; \
	fi; \
	EMBEDLLM_TEST_GPU=1 PYTHONPATH=.:kernels:integrations $$python -m pytest -m "gpu and not soak" $(ARGS)

clean: ## remove the environment, caches and builds
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Where venv cannot bring pip (Debian without python3-venv), the outer pip installs one.
$(PY):
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 \
	|| { rm -rf $(VENV); $(PYTHON) -m venv --without-pip $(VENV) \
		&& $(PYTHON) -m pip --python $(PY) install --disable-pip-version-check --quiet pip; } 2>/dev/null \
	|| { rm -rf $(VENV); echo "make: '$(PYTHON) -m venv $(VENV)' failed; on Debian or Ubuntu: apt install python3-venv" >&2; \
		exit 1; }

$(INSTALLED): pyproject.toml requirements/cpu.txt | $(PY)
	@echo "installing embedllm and its tools into $(VENV) (minutes the first time)"
	@$(PY) -m pip install --quiet $(PIP_ARGS) -e ".[dev]"
	@touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	@$(PY) -m pip install --quiet $(PIP_ARGS) -e ".[docs]"
	@touch $@
