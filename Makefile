# Shortcuts for a checkout with an activated environment (README: the test command makes one).
.PHONY: test kernels lint format types aot bench demo ci

test:
	python -m pytest -n 2 --dist worksteal

kernels:
	python -m pytest tests/interpreter

lint:
	ruff check . && ruff format --check . && codespell

format:
	ruff check --fix . && ruff format .

types:
	mypy

aot:
	python -m bench aot

bench:
	python -m bench run --device cpu --out bench/results/cpu && python -m bench report --readme

demo:
	peft-fast demo

ci:
	bash .ci/run
