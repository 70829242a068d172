# Each target makes what it needs, .venv included. `make` alone lists them.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test check format bench parity gpu sanitize docs clean

help:    ## this list
	@sed -n 's/^\([a-z]*\): *## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

demo:    ## talk to a small language model on this machine
	@scripts/demo

test:    ## run the tests
	@scripts/test

check:   ## lint, types, import arrows, generated docs
	@scripts/check

format:  ## put the code into its one format
	@scripts/format

bench:   ## measure pentad, llama.cpp and transformers side by side
	@scripts/bench

parity:  ## compare with llama.cpp, which is compiled first
	@scripts/parity

gpu:     ## run the tests and benchmarks that need a GPU, with the packages at hand
	@scripts/gpu

sanitize: ## check the kernels with sanitizers, and NEON in an emulator
	@scripts/sanitize

docs:    ## write the generated docs
	@scripts/docs

clean:   ## remove what these targets made, .venv included
	rm -rf .venv build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	cd pentad/kernels && rm -rf _kernels.so CMake[CFI]* cmake_install.cmake build.ninja .[a-z]* Makefile install_manifest*
	find . -name __pycache__ -prune -exec rm -rf {} +
