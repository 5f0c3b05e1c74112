# Each target first sees to what it needs (`make setup`). On Debian 12 or 13, as root: hosts made of network
# namespaces and root folders of other Debian releases cannot be had without.
#
#   make demo                 two hosts, one dies, the VM goes on
#   make demo QEMU=/path      the same with another QEMU, or "trixie" or "unstable": those of these releases
#   make test                 all tests but those of the lab
#   make lab                  the tests of two virtual hosts with systemd and KVM, half an hour
#   make test TESTS=tests/unit
#   make bench                the measurements, into build/bench.json
#   make lint                 style, types, layers

PYTHON := .venv/bin/python
QEMU :=
# Not tests/vm yet: it doubles the time.
TESTS := tests/unit tests/integration

.PHONY: setup demo test lab bench lint clean

setup:
	@tests/lab/setup.sh

demo: setup
	$(PYTHON) -m tests.lab.demo $(if $(QEMU),--qemu '$(QEMU)')

test: setup
	$(PYTHON) -m pytest $(TESTS)

lab: setup
	$(PYTHON) -m pytest tests/vm

bench: setup
	$(PYTHON) -m bench $(if $(QEMU),--qemu '$(QEMU)')

lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy -p curling_fd -p tests.lab -p tests.vm -p bench

# Leaves .venv and the cache (~/.cache/curling): both are quick to check and slow to make.
clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
