# Two commands: `make demo` sets everything up and runs the main job on a shipped model; `make test` sets everything
# up and runs the tests.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO ?= demo

.PHONY: demo test test-gpu lint types format notebooks browser app clean

demo: $(READY)
	@mkdir -p $(DEMO)
	$(BIN)/ssmlens models
	$(BIN)/ssmlens verify --model mamba1-english
	$(BIN)/ssmlens report --out $(DEMO)/report.html
	@echo
	@echo "The report:       $(abspath $(DEMO))/report.html  (open it in any browser; it needs no network)"
	@echo "The live page:    $(BIN)/ssmlens app"
	@echo "Your own text:    $(BIN)/ssmlens report --model mamba2-english --text \"...\" --out mine.html"

test: $(READY) browser
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/pytest -q -n $(JOBS) --dist loadgroup $(ARGS)

# The tests that need a CUDA device, compiled and run there.
test-gpu: $(READY)
	$(BIN)/pytest -q -m gpu $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory types

# The checkout keeps kernels/, analyses/ and apps/ beside ssmlens/; mypy needs them where they are imported from.
types: $(READY)
	@rm -rf build/types && mkdir -p build/types
	@cp -r ssmlens build/types/ssmlens
	@for part in kernels analyses apps; do cp -r $$part build/types/ssmlens/$$part; done
	cd build/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p ssmlens

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Runs every notebook's source and writes the .ipynb beside it, with what its cells show.
notebooks: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python notebooks/_build.py $(ARGS)

app: $(READY)
	$(BIN)/ssmlens app

# The browser tests drive Debian's Chromium. Without it they are skipped at a desk and fail in CI.
browser:
	@if ! command -v chromium >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
			chromium chromium-driver fonts-dejavu >/dev/null; \
	fi

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build $(DEMO) *.egg-info
