"""What a test does to the cables between hosts, and the process they live in; see `cable`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio
from attrs import define

from .payload import ROOT
from .timeline import Timeline


@define(eq=False)
class Cables:
    """The ports, by their names; `heal` undoes everything."""

    _socket: Path
    _timeline: Callable[[], Timeline]

    async def set(self, port: str, **behaviour: Any) -> dict[str, dict[str, Any]]:
        """Change a port; the statistics of all ports, from after the change."""
        answer = await self._ask({"port": port, **behaviour})
        words = ", ".join(f"{key} {value}" for key, value in behaviour.items())
        self._timeline().note("cable", f"{port}: {words}", statistics=answer[port])
        return answer

    async def cut(self, *ports: str) -> None:
        """Nothing passes any more, and nobody is told."""
        for port in ports:
            await self.set(port, up=False)

    async def heal(self, *ports: str) -> None:
        """Undo `cut`, delays and limits."""
        for port in ports:
            await self.set(port, up=True, delay=0.0, rate=None)

    async def statistics(self) -> dict[str, dict[str, Any]]:
        """Of all ports; see `cable`."""
        return await self._ask({})

    async def _ask(self, request: dict[str, Any]) -> dict[str, dict[str, Any]]:
        async with await trio.open_unix_socket(str(self._socket)) as stream:
            await stream.send_all(json.dumps(request).encode() + b"\n")
            received = b""
            while not received.endswith(b"\n"):
                received += await stream.receive_some()
            return dict(json.loads(received))


@contextmanager
def switch(sockets: Path, records: Path, ports: list[str]) -> Iterator[None]:
    """The process of the cables for the length of a block; its arguments are those of `cable`."""
    command = ["setpriv", "--pdeathsig", "KILL", "--", sys.executable, "-m", "tests.vm.cable"]
    process = subprocess.Popen(
        [*command, str(sockets), str(records), *ports], cwd=ROOT, stdout=subprocess.PIPE
    )
    try:
        # It closes its output when every port is there.
        assert process.stdout is not None
        with process.stdout as output:
            output.read()
        if process.poll() is not None:
            raise RuntimeError(f"the switch ended with {process.returncode}")
        yield
    finally:
        process.terminate()
        process.wait()
