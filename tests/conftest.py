"""Fixtures for every test, and what the markers mean."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest

from .lab.bootsector import has_kvm
from .lab.hosts import Host, lone_host, termination_as_interrupt, two_hosts
from .lab.roots import Executable, qemu_binary

# No test of ours is about time, and a run of CI is to say the same as the one before.
hypothesis.settings.register_profile("curling", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("curling")


@pytest.fixture(autouse=True, scope="session")
def _cleans_up_when_terminated() -> Iterator[None]:
    with termination_as_interrupt():
        yield


@pytest.fixture(scope="session")
def system_qemu() -> Executable:
    """This distribution's QEMU."""
    return qemu_binary("system")


@pytest.fixture(scope="session")
def trixie_qemu() -> Executable:
    """Debian 13's QEMU: 10.0."""
    return qemu_binary("trixie")


@pytest.fixture(scope="session")
def unstable_qemu() -> Executable:
    """Debian unstable's QEMU: 11 or later."""
    return qemu_binary("unstable")


@pytest.fixture
def host_pair() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other."""
    with two_hosts() as hosts:
        yield hosts


@pytest.fixture
def lone() -> Iterator[Host]:
    """A host of its own, with nothing but lo."""
    with lone_host() as host:
        yield host


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A missing tool makes a test fail; a CPU without virtualization is no tool and cannot be installed."""
    if not has_kvm():
        for item in items:
            if item.get_closest_marker("kvm"):
                item.add_marker(pytest.mark.skip(reason="this machine has no /dev/kvm"))
