# Every target installs its dependencies into .venv first.
PYTHON ?= python3
BIN := .venv/bin
TINY := recipes/configs/tiny

.PHONY: help quickstart quickstart-mlm quickstart-span chain test test-fast lint bench demo-data clean

help:
	@echo "make quickstart       pretrain a causal language model on Shakespeare, on this machine's CPU (about five minutes)"
	@echo "make quickstart-mlm   the same for a masked language model"
	@echo "make quickstart-span  the same for an encoder-decoder with span corruption (T5)"
	@echo "make chain            tokenizer, pretraining, supervised fine-tuning and preference tuning"
	@echo "make test             lint and all tests"
	@echo "make test-fast        the tests that take less than about ten seconds each"
	@echo "make lint             style and formatting (ruff), types (mypy)"
	@echo "make bench            speed, memory and start-up compared with stock Trainer (three hours on two idle cores)"
	@echo "make demo-data        download all demo texts and models"
	@echo "make clean            remove outputs, prepared data and caches"

.venv/installed: requirements.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (once)"
	@$(BIN)/pip install --quiet --disable-pip-version-check "pip>=23.1"  # builds in isolation, which seqeval needs
	@$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

data/demo/shakespeare: | .venv/installed
	@$(BIN)/python scripts/get_demo_data.py shakespeare

outputs/tiny/tokenizer: ALGORITHM := bpe --vocab_size 2048
outputs/tiny/tokenizer-wordpiece: ALGORITHM := wordpiece --vocab_size 1024
outputs/tiny/tokenizer-unigram: ALGORITHM := unigram --vocab_size 1024
outputs/tiny/tokenizer outputs/tiny/tokenizer-wordpiece outputs/tiny/tokenizer-unigram: | data/demo/shakespeare
	@$(BIN)/python scripts/train_tokenizer.py --output_dir $@ --algorithm $(ALGORITHM) \
		--data data/demo/shakespeare/train.parquet --eval_data data/demo/shakespeare/validation.parquet

quickstart: .venv/installed outputs/tiny/tokenizer
	@$(BIN)/python recipes/pretrain_clm.py --config $(TINY)/pretrain_clm.yaml

quickstart-mlm: .venv/installed outputs/tiny/tokenizer-wordpiece
	@$(BIN)/python recipes/pretrain_mlm.py --config $(TINY)/pretrain_mlm.yaml

quickstart-span: .venv/installed outputs/tiny/tokenizer-unigram
	@$(BIN)/python recipes/pretrain_span.py --config $(TINY)/pretrain_span.yaml

data/demo/play_instructions data/demo/play_preferences: | .venv/installed
	@$(BIN)/python scripts/get_demo_data.py $(@F)

chain: .venv/installed | data/demo/shakespeare data/demo/play_instructions data/demo/play_preferences
	@$(BIN)/python scripts/run_chain.py recipes/chains/tiny.yaml

test: .venv/installed lint
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: .venv/installed
	@$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

lint: .venv/installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: quickstart outputs/tiny/tokenizer-wordpiece
	@$(BIN)/python -m benchmarks.speed
	@$(BIN)/python -m benchmarks.to_loss
	@$(BIN)/python -m benchmarks.equal_time
	@$(BIN)/python -m benchmarks.overheads
	@$(BIN)/python -m benchmarks.preparing

demo-data: .venv/installed
	@$(BIN)/python scripts/get_demo_data.py all

clean:
	rm -rf outputs data/prepared .cache
