"""Plugs in a real kernel: what is held, let out and thrown away, packet by packet."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.lab import tap

from .lab import Lab, Say
from .lab import lab as make_lab

_PROBE = Path(__file__).with_name("plug_probe.py")
_FOLDER = "/root/plug"
_SCENARIOS = re.findall(r"^@scenario\nasync def (\w+)", _PROBE.read_text(), re.M)


@pytest.fixture(scope="module")
def standing_lab(say: Say) -> Iterator[Lab]:
    """One host is enough."""
    with make_lab("plug", say=say) as made:

        async def set_up() -> None:
            async with made.connected():
                await made.power_on(made.alpha)
                for path in (_PROBE, Path(tap.__file__)):
                    await made.alpha.agent.write(f"{_FOLDER}/{path.name}", path.read_bytes())

        trio.run(set_up)
        yield made


@pytest.mark.parametrize("scenario", _SCENARIOS)
async def test_plug(lab: Lab, scenario: str) -> None:
    probe = f"unshare --net /opt/curling/bin/python {_PROBE.name} {scenario}"
    await lab.alpha.agent.run(probe, cwd=_FOLDER, within=900)
