# What a change is checked with; .ci/run calls these. JOBS=n for another number of processes.
JOBS ?= 2

.PHONY: help test tiny kernels lint examples conformance bench wheel dist clean mutations docs numbers
help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

test:  ## every test
	pytest -n $(JOBS)

tiny:  ## the whole product in ten seconds
	pytest tests/test_tiny.py

kernels:  ## what optimisers make of every Metal kernel, the bytes each moves, and the model of time against an H100
	python -m tests.kernels.kernel_code
	python -m tests.kernels.traffic
	python -m tests.kernels.time_model --check

lint:  ## ruff, mypy and clang-format, as pre-commit runs them
	ruff check .
	ruff format --check .
	mypy
	git ls-files '*.cpp' '*.h' '*.metal' '*.mm' | xargs clang-format --dry-run --Werror

examples:  ## the examples but finetune_encoder.py, which the README runs; two of them on the emulated Apple GPU
	python examples/without_peft.py
	python examples/memory_of_training.py
	python -m tests.emulator.mps_on_linux examples/finetune_mps.py --steps 2 --batch-size 4 --held-out 4
	python -m tests.emulator.mps_on_linux examples/finetune_4bit.py --tiny --steps 1 --batch-size 1 --length 16 --held-out 1

conformance:  ## PEFT's own tests over patched layers, on the CPU and the emulated mps (needs the extra of that name)
	python -m tests.conformance -n $(JOBS)
	python -m tests.conformance -n $(JOBS) --device mps

bench:  ## the LoRA tax on this machine
	python -m torch_fused_lora bench

wheel:  ## the wheel for a Mac, cross-built and linked against PyTorch's own (needs ld64.lld-19)
	python -m tests.emulator.macos_wheel

dist: clean  ## what is published, into dist/: sdist, the wheel built from it, the wheel for a Mac
	python -m build
	$(MAKE) wheel
	twine check --strict dist/*

clean:  ## without what was built
	rm -rf build dist

mutations:  ## break every kernel in one place at a time: do the tests notice?
	python -m tests.mutation -j $(JOBS)

numbers:  ## bring docs/benchmarks/ into the pages and pictures
	python -m docs.write_numbers
	python -m docs.pictures

docs:  ## the pages, into docs/_build/html; warnings, broken links and stale numbers are errors (needs the extra of that name)
	python -m docs.write_numbers --check
	python -m docs.pictures --check
	sphinx-build -E -W --keep-going -q -b html docs docs/_build/html
