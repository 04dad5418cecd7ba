# Everything runs in .venv, which each target creates and reuses. Needs Python 3.11 or later, with pip.
PYTHON ?= python3
VENV := .venv
VLLM := .venv-vllm
OPENRLHF := .venv-openrlhf
INSPECT := .venv-inspect
RUN := $(VENV)/bin
# The tiny models run best on one thread; several, on a machine with other work, only wait for each other.
demo test bench studies: export OMP_NUM_THREADS ?= 1

.PHONY: help demo test browser vllm openrlhf inspect check bench studies tiny-models clean

help:
	@echo "make demo         two tiny language models solve problems in turns"
	@echo "make test         all tests but those of make vllm, openrlhf and inspect, with coverage"
	@echo "make browser      Debian's chromium, without which the tests of the report's page are skipped"
	@echo "make vllm         the tests and the benchmark on real vLLM, on the CPU, in .venv-vllm (9 minutes, 1.9 GB)"
	@echo "make openrlhf     the tests on real OpenRLHF, Ray, DeepSpeed and vLLM, on the CPU, in .venv-openrlhf (half an hour, 2.2 GB)"
	@echo "make inspect      Inspect's own loader reads what turnwise exports for it, in .venv-inspect (280 MB)"
	@echo "make check        formatting, lint, types, layers"
	@echo "make bench        what a turn, a token, a trained token and a rollout cost, beside other libraries"
	@echo "make studies      both papers on a laptop: every training run behind docs/results (two to three hours)"
	@echo "make tiny-models  train the shipped models anew, into runs/tiny (some fifty minutes)"

demo: $(VENV)/local
	$(RUN)/python examples/longshort_math.py

test: $(VENV)/dev $(VENV)/openrlhf
	$(RUN)/pytest -n 2 --cov --cov-report=term:skip-covered --cov-fail-under=90

browser:
	command -v chromium chromedriver || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver; }

vllm: export OMP_NUM_THREADS ?= 1
vllm: export HF_HUB_OFFLINE := 1
vllm: export VLLM_NO_USAGE_STATS := 1
vllm: export VLLM_LOGGING_LEVEL ?= ERROR
# Each engine's process imports vLLM anew: 17 s of CPU time where byte code is kept, 40 s where it is not.
vllm: export PYTHONDONTWRITEBYTECODE :=

# The coverage is of this process: what runs in vLLM's own is tested, and not counted.
vllm: $(VLLM)/installed
	$(VLLM)/bin/python -m pytest tests/vllm --cov-config=/dev/null --cov-fail-under=85 \
	  $(foreach file,agent engine process server,--cov=turnwise.agents.vllm_$(file))
	$(VLLM)/bin/python benchmarks/engine.py --only engines

openrlhf: export OMP_NUM_THREADS ?= 1
openrlhf: export HF_HUB_OFFLINE := 1
# Else Ray would have its processes wait for all others of the machine.
openrlhf: export RAY_worker_niceness := 0
# Each rank is a process that imports OpenRLHF anew.
openrlhf: export PYTHONDONTWRITEBYTECODE :=

openrlhf: $(OPENRLHF)/installed
	$(OPENRLHF)/bin/python -m pytest tests/openrlhf

inspect: $(INSPECT)/installed
	$(INSPECT)/bin/python -m pytest --noconftest tests/analysis/test_inspect_log.py

check: $(VENV)/dev
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy
	$(RUN)/lint-imports

bench: $(VENV)/bench
	$(RUN)/python benchmarks/turns.py
	$(RUN)/python benchmarks/engine.py
	$(RUN)/python benchmarks/train_step.py
	$(RUN)/python benchmarks/cold_start.py

studies: $(VENV)/cold-start
	$(RUN)/python benchmarks/cold_start_study.py
	$(RUN)/python benchmarks/thinkless_study.py
	$(RUN)/python benchmarks/longshort_study.py

tiny-models: $(VENV)/local
	$(RUN)/python -m turnwise.rl.tiny_models runs/tiny

clean:
	rm -rf $(VENV) $(VLLM) $(OPENRLHF) $(INSPECT) build dist

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("turnwise needs Python 3.11 or later; run make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# Its dependencies need CUDA to install; the test of its data sets needs none of them.
$(VENV)/openrlhf: $(VENV)/dev
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps openrlhf
	@touch $@

# One stamp for each extra that was installed as pyproject.toml and constraints.txt stand.
$(VENV)/%: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@

# Environments of their own, with exact versions throughout: what these need is more than turnwise may ask for.
$(VLLM)/installed: constraints-vllm.txt
$(OPENRLHF)/installed: constraints-openrlhf.txt constraints-vllm.txt
$(INSPECT)/installed: constraints-inspect.txt

$(VLLM)/installed $(OPENRLHF)/installed $(INSPECT)/installed:
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -r $<
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@
