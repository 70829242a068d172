# Each target creates what it needs, .venv included. `make` lists the targets.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test check format bench parity peers load gpu sanitize docs clean

help:    ## list the targets
	@sed -n 's/^\([a-z]*\): *## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

demo:    ## chat with a small language model on this machine
	@scripts/demo

test:    ## run the tests
	@scripts/test

check:   ## check lint, types, import rules and generated docs
	@scripts/check

format:  ## format the code
	@scripts/format

bench:   ## compare with llama.cpp, transformers and others in one table of this CPU, which takes hours
	@scripts/bench $(ARGS)

parity:  ## compare with llama.cpp, which takes minutes to compile, and with TRL
	@scripts/parity

peers:   ## run other projects' test suites and clients against pentad serve
	@scripts/peers

load:    ## let 200 clients use a server for five minutes
	@scripts/load

gpu:     ## run the tests and benchmarks that need a GPU, with the installed packages
	@scripts/gpu

sanitize: ## check the kernels with sanitizers, and the NEON kernels in an emulator
	@scripts/sanitize

docs:    ## generate docs/cli.md and the pictures
	@scripts/docs

clean:   ## remove everything that these targets created, .venv included
	rm -rf .venv build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	cd pentad/kernels && rm -rf _kernels.so CMake[CFI]* cmake_install.cmake build.ninja .[a-z]* Makefile install_manifest*
	find . -name __pycache__ -prune -exec rm -rf {} +
