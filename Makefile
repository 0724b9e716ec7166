# Works with GNU make 3.81, which macOS ships.
# PYTHON=/path/to/python3.12 names the interpreter of .venv; otherwise the first suitable one is taken.
BIN := .venv/bin

# Run by each candidate: whether it exists is not enough, a version manager's shim may refuse to run.
SUITABLE := import sys, importlib.util as u; \
	(3, 11) <= sys.version_info[:2] <= (3, 13) or sys.exit("is Python %d.%d" % sys.version_info[:2]); \
	u.find_spec("ensurepip") or sys.exit("lacks ensurepip; on Debian and Ubuntu: apt-get install python3-venv")

# Bytes that a browser may send at once: beyond the usual 10 MB an upload would end the connection without a
# word, and the explorers' own limit of 20 MB could not be said.
MESSAGES := {'websocket_max_message_size': 268435456}

.PHONY: help demo test lab app notebooks bench format lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

demo: .venv/.installed ## prune and retrain the embedded model, in the terminal
	$(BIN)/perpkit demo

test: lint ## lint, then all tests, the slow ones and those in a browser included
	tools/install_chromium.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lab: .venv/.installed ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks --ServerApp.tornado_settings="$(MESSAGES)"

app: .venv/.installed ## open the explorers alone, without code, in a browser
	$(BIN)/voila notebooks/explorer.ipynb --Voila.tornado_settings="$(MESSAGES)"

notebooks: .venv/.installed ## execute all notebooks and store their outputs
	$(BIN)/python tools/execute_notebooks.py

bench: .venv/.installed ## run all benchmarks
	@failed=; \
	for script in benchmarks/[a-z]*.py; do \
		echo "== $$script"; \
		$(BIN)/python "$$script" || failed="$$failed $$script"; \
	done; \
	[ -z "$$failed" ] || { echo "failed:$$failed" >&2; exit 1; }

format: .venv/.installed ## format code and notebooks, mend what can be mended
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

lint: .venv/.installed ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean: ## remove builds and caches, but neither .venv nor the results in out/
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

.venv/.installed: pyproject.toml constraints.txt
	@if $(BIN)/python -c '' 2>/dev/null; then exit 0; fi; \
	tried=; \
	for candidate in $(or $(PYTHON),python3 python3.11 python3.12 python3.13); do \
		if said=$$("$$candidate" -c '$(SUITABLE)' 2>&1); then \
			echo "creating .venv with $$candidate"; \
			exec "$$candidate" -m venv --clear .venv; \
		fi; \
		tried="$$tried  $$candidate: $$(echo "$$said" | sed -n 1p)\n"; \
	done; \
	printf "perpkit needs Python 3.11, 3.12 or 3.13 with its venv module. Tried:\n%b" "$$tried" >&2; \
	echo "Install one (Debian, Ubuntu: apt-get install python3 python3-venv; macOS: brew install python@3.12)" >&2; \
	echo "or name one: make PYTHON=/path/to/python3.12. With conda, environment.yml does the same." >&2; \
	exit 1
	@echo "setting up .venv (first time: about 3 minutes, 2–3 GB of downloads)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
