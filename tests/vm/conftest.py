"""One pair of hosts for all tests in this folder; a test that fails shows how its timeline ends."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path

import pytest
import trio

from .image import PLAIN, Variant
from .lab import RECORDS, Lab, Say
from .lab import lab as make_lab

_SHOWN_LINES = 60


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vm)
    # The one with hosts of its own comes last: the others share a pair.
    items.sort(key=lambda item: item.path.name == "test_selinux.py")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    timeline = RECORDS / item.name / "timeline.txt"
    if report.failed and "lab" in getattr(item, "fixturenames", ()) and timeline.exists():
        lines = timeline.read_text().splitlines()[-_SHOWN_LINES:]
        report.sections.append((f"the end of {timeline}", "\n".join(lines)))
    return report


class Labs:
    """Makes a lab, and ends the one before: two pairs at once are too much for one machine."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._last = contextlib.ExitStack()

    def __enter__(self) -> Labs:
        return self

    def __exit__(self, *error: object) -> None:
        self._last.close()

    def set_up(self, name: str = "lab", variant: Variant = PLAIN) -> Lab:
        """A pair of hosts, installed and configured by README."""
        self._last.close()
        made = self._last.enter_context(make_lab(name, variant, self._say))

        async def set_up() -> None:
            async with made.connected():
                await made.set_up()

        trio.run(set_up)
        return made


@pytest.fixture(scope="session")
def say(request: pytest.FixtureRequest) -> Say:
    """Print to the terminal, also while output is captured: what is slow says what it does."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    terminal = request.config.pluginmanager.getplugin("terminalreporter")
    began = time.monotonic()

    def line(text: str) -> None:
        with capture.global_and_fixture_disabled():
            terminal.ensure_newline()
            terminal.write_line(f"    lab {time.monotonic() - began:6.1f} s  {text}")

    return line


@pytest.fixture(scope="session")
def labs(say: Say) -> Iterator[Labs]:
    """Where labs come from, one at a time."""
    with Labs(say) as source:
        yield source


@pytest.fixture(scope="session")
def standing_lab(labs: Labs) -> Lab:
    """Two hosts, installed and configured by README; nothing of Curling runs yet."""
    return labs.set_up()


@pytest.fixture
async def lab(standing_lab: Lab, request: pytest.FixtureRequest) -> AsyncIterator[Lab]:
    """The pair as the test before left it, with lines to the hosts and a timeline of the test's own."""
    with standing_lab.scenario(request.node.name):
        async with standing_lab.connected():
            yield standing_lab
