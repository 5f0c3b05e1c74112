"""Two hosts with a curlingd each: what the demo, the tests and the benchmarks start from."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import trio
from attrs import define, field

from curling_fd.varlink.client import Client

from .hosts import Host
from .manager import ServiceManager

PORT = 9271
_START_TIMEOUT = 60.0
_POLL_SECONDS = 0.005


@define(eq=False)
class Node:
    """A curlingd on a host, with its files below `directory`.

    Args:
        host: whose network it uses; None for this machine's own.
        address: where its link listens.
        settings: keys of curlingd.toml beyond the ones every node gets.
        manager: who starts the daemon and keeps descriptors for it, if anybody does.
    """

    name: str
    directory: Path
    address: str
    port: int = PORT
    host: Host | None = None
    settings: Mapping[str, Any] = field(factory=dict)
    environment: Mapping[str, str] = field(factory=dict)
    manager: ServiceManager | None = None
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self.directory / "control.sock"

    @property
    def config(self) -> Path:
        return self.directory / "etc" / "curlingd.toml"

    @property
    def log(self) -> Path:
        return self.directory / "curlingd.log"

    @property
    def link(self) -> str:
        return f"{self.address}:{self.port}"

    def runtime(self, vm: str) -> Path:
        """The directory of the standby of `vm` on this node, and of the VM once it runs here."""
        return self.directory / "run" / vm

    def configure(self) -> None:
        """Write curlingd.toml."""
        (self.config.parent / "vms").mkdir(parents=True, exist_ok=True)
        settings: dict[str, Any] = {
            "host_name": self.name,
            "listen": self.link,
            "control_socket": str(self.socket),
            "state_directory": str(self.directory / "state"),
            "runtime_directory": str(self.directory / "run"),
            "insecure": True,
        }
        self.config.write_text(_toml({**settings, **self.settings}))

    def configure_vm(self, name: str, **keys: Any) -> None:
        """Write the file of the VM `name`."""
        (self.config.parent / "vms" / f"{name}.toml").write_text(_toml(keys))

    def start(self) -> None:
        """Start the daemon; `ready` waits for it."""
        argv = [sys.executable, "-m", "curling_fd.service.daemon", "--config", str(self.config)]
        start = self.manager.popen if self.manager else subprocess.Popen
        environment = {**os.environ, **self.environment}
        with self.log.open("ab") as log, self.host.entered() if self.host else nullcontext():
            self.process = start(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, process_group=0
            )

    async def ready(self) -> None:
        """Wait until the daemon answers."""
        assert self.process is not None
        with trio.move_on_after(_START_TIMEOUT):
            while self.process.poll() is None:
                try:
                    await self.call("List")
                    return
                except Exception:
                    await trio.sleep(_POLL_SECONDS)
        raise RuntimeError(f"curlingd on {self.name} does not answer:\n{self.log_text()}")

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the control interface."""
        async with await Client.connect(str(self.socket)) as client:
            return await client.call(method, parameters)

    async def show(self, vm: str) -> dict[str, Any]:
        return dict((await self.call("Show", name=vm))["vm"])

    async def wait_state(self, vm: str, *states: str, within: float = 30) -> dict[str, Any]:
        """Wait until `vm` is in one of `states` here; returns what `Show` says then."""
        shown: dict[str, Any] = {}
        with trio.move_on_after(within):
            while True:
                shown = await self.show(vm)
                if shown["state"] in states:
                    return shown
                await trio.sleep(_POLL_SECONDS)
        raise TimeoutError(
            f"{vm} on {self.name} is {shown.get('state')} ({shown.get('reason')}), not "
            f"{' or '.join(states)}, after {within} s:\n{self.log_text()}"
        )

    async def wait_committed(self, vm: str, count: int, *, within: float = 60) -> dict[str, Any]:
        """Wait until checkpoint `count` of the running session is committed."""
        shown: dict[str, Any] = {}
        with trio.move_on_after(within):
            while True:
                shown = await self.show(vm)
                if shown["state"] in ("protected", "standby") and shown["statistics"]["committed"] >= count:
                    return shown
                await trio.sleep(_POLL_SECONDS)
        raise TimeoutError(f"{vm} on {self.name} after {within} s: {shown}\n{self.log_text()}")

    def ctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run curlingctl against this node."""
        argv = [sys.executable, "-m", "curling_fd.ctl.main", "--socket", str(self.socket), *arguments]
        return subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def stop(self) -> int:
        """SIGTERM, and wait for the end; returns the exit status."""
        assert self.process is not None
        self.process.terminate()
        return await trio.to_thread.run_sync(self.process.wait)

    def close(self) -> None:
        """Kill the daemon, and every VM that it runs or has run."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.manager is not None:
            self.manager.close()
        ours = os.fsencode(self.directory)
        for command in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # it has ended meanwhile
                words = command.read_bytes()
                if b"qemu" in words.partition(b"\0")[0] and ours in words:
                    os.kill(int(command.parent.name), signal.SIGKILL)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


@asynccontextmanager
async def cluster(hosts: tuple[Host, Host], **settings: Any) -> AsyncIterator[tuple[Node, Node]]:
    """A started node on each of `hosts`. VMs are configured by the caller, who then restarts nothing: files
    of VMs are read at start, so they are written by `configure_vm` before `start_all`."""
    nodes = tuple(
        Node(host.name, host.directory / "curling", host.address, host=host, settings=settings)
        for host in hosts
    )
    for node in nodes:
        node.directory.mkdir()
        node.configure()
    try:
        yield nodes[0], nodes[1]
    finally:
        for node in nodes:
            node.close()


async def start_all(*nodes: Node) -> None:
    """Start the daemons and wait until they answer."""
    for node in nodes:
        node.start()
    for node in nodes:
        await node.ready()


def _toml(keys: Mapping[str, Any]) -> str:
    return "\n".join(_lines(keys, "")) + "\n"


def _lines(keys: Mapping[str, Any], prefix: str) -> list[str]:
    tables = {name: value for name, value in keys.items() if isinstance(value, Mapping)}
    lines = [f"{_value(name)} = {_value(value)}" for name, value in keys.items() if name not in tables]
    for name, table in tables.items():
        lines += [f"[{prefix}{name}]", *_lines(table, f"{prefix}{name}.")]
    return lines


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'
