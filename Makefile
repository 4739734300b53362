# make demo   locks scikit-learn's digits, and trains on them
# make test   runs the tests
# make lint   runs the linter
# make bench  measures how fast the attack and the training are, against the authors' way
# Each first makes a virtual environment in VENV, and installs requirements.txt, pytest and ruff there, once.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed-$(shell cksum < requirements.txt | cut -d ' ' -f 1)

.PHONY: demo test lint bench
demo: $(INSTALLED)
	rm -rf logs/checkpoints/digits/preresnet8
	$(BIN)/python -m models.base --dataset digits --adv-train 0 --arch preresnet8 \
		--out-dir ./logs/checkpoints/digits --exp-name preresnet8
	$(BIN)/python lock.py --dataset digits --arch preresnet8 --lock-data ./data/digits --overwrite \
		--resume-path ./logs/checkpoints/digits/preresnet8/checkpoint.pt.best \
		--lock-method basic --eps 2.5 --attack-lr 0.5 --attack-steps 20
	$(BIN)/python train.py --work-path ./experiments/digits/preresnet8 --overwrite
	@echo
	@echo "Look at the curves: $(BIN)/tensorboard --logdir experiments/digits"

test: $(INSTALLED)
	$(BIN)/python -m pytest -q

bench: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.speed

lint: $(INSTALLED)
	$(BIN)/ruff check .

$(INSTALLED):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt pytest ruff
	touch $@
