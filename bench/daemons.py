"""Two curlingd on loopback, and what is measured with them: stops, CPU, memory, failover, rate."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import trio
from attrs import define, field, frozen

from bench.figures import percentile
from bench.stops import PAUSE_US, Bench, Load, Visit, lose, primary, record
from curling_fd.errors import QmpError
from curling_fd.qmp.client import EventStream, open_qmp
from curling_fd.qmp.protocol import Event
from tests.lab.cluster import Node, start_all
from tests.lab.roots import Executable

_TICK = os.sysconf("SC_CLK_TCK")

#: A size that holds the largest load; the daemon's own default is 1 GiB.
MAX_CHECKPOINT = "256MiB"


VM = "bench"


@asynccontextmanager
async def two_daemons(bench: Bench, **keys: Any) -> AsyncIterator[tuple[Node, Node]]:
    """A primary's and a backup's daemon on loopback for `bench.vm`; `keys` go into the VM's file on both."""
    with tempfile.TemporaryDirectory(prefix="curling-bench-") as folder:
        nodes = [
            Node(name, Path(folder) / name, "127.0.0.1", port, settings={"insecure": False})
            for name, port in zip(("alpha", "beta"), _free_ports(2), strict=True)
        ]
        alpha, beta = nodes
        for node in nodes:
            node.directory.mkdir()
            node.configure()
        common = {"engine": "incremental", "max_checkpoint": MAX_CHECKPOINT, **keys}
        alpha.configure_vm(VM, qmp=str(bench.vm.qmp), peer=beta.link, **common)
        beta.configure_vm(VM, peer=alpha.link, **common)
        try:
            await start_all(*nodes)
            yield alpha, beta
        finally:
            for node in nodes:
                if node.process is not None and node.process.poll() is None:
                    node.process.kill()
                    node.process.wait()


class Curling:
    """The product: two daemons, a waiting standby, every checkpoint shipped, checked, committed."""

    name = "curling"

    async def visit(self, bench: Bench, load: Load, count: int) -> Visit:
        async with two_daemons(bench, **epoch_keys(load.epoch)) as (alpha, beta):
            with explained(alpha, beta):
                return await self._visit(bench, alpha, beta, count)

    async def _visit(self, bench: Bench, alpha: Node, beta: Node, count: int) -> Visit:
        with bench.qmp.events() as events:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: alpha.call("Protect", name=VM))
                await record(events, 0)
                before = await _usage(alpha, beta)
                stops = await record(events, count, warm_up=0)
                after = await _usage(alpha, beta)
        shown = (await alpha.show(VM))["statistics"]
        held = memory(alpha), memory(beta)
        await alpha.call("Unprotect", name=VM)
        await lose(bench.qmp)
        gigabytes = (after["bytes"] - before["bytes"]) / 1e9
        details = {
            "lag_ms": shown["lag_ms"],
            "first_pass_ms": shown["first_pass_ms"],
            "primary_cpu_s_per_gb": (after["alpha"] - before["alpha"]) / gigabytes,
            "backup_cpu_s_per_gb": (after["beta"] - before["beta"]) / gigabytes,
            "rate": shown["checkpoints_per_s"],
            "primary_peak": held[0].peak,
            "primary_memfds": held[0].memfds,
            "backup_peak": held[1].peak,
            "backup_memfds": held[1].memfds,
        }
        return Visit(stops, [float(shown["pages_p50"])], details)


def epoch_keys(epoch: float) -> dict[str, str]:
    """The VM's keys for an epoch of so many seconds."""
    return {"longest_epoch": f"{epoch * 1000:g}ms", "shortest_epoch": f"{min(epoch, 0.01) * 1000:g}ms"}


@contextmanager
def explained(*nodes: Node) -> Iterator[None]:
    """Add the daemons' logs to what goes wrong inside."""
    try:
        yield
    except Exception as error:
        logs = "\n".join(f"{node.name}:\n{node.log_text()}" for node in nodes)
        raise RuntimeError(f"{error}\n{logs}") from error


async def _usage(alpha: Node, beta: Node) -> dict[str, float]:
    shown = await alpha.show(VM)
    bytes_total = float(shown["statistics"]["bytes_total"])
    return {"bytes": bytes_total, "alpha": cpu_seconds(alpha), "beta": cpu_seconds(beta)}


def cpu_seconds(node: Node) -> float:
    """CPU time of a daemon so far, all threads."""
    assert node.process is not None
    fields = Path(f"/proc/{node.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


@define
class Failovers:
    """A guest, its backup, and the loss of its host, over and over. Times are milliseconds.

    Attributes:
        memory: the guest's RAM, as for -m.
        used: pages of it that the guest's program has filled.
        reported: from the decision to the running guest, as the daemon reports it.
        ordered: from our call of Failover to QEMU's own RESUME.
        first_pass: of each session before.
    """

    memory: str
    used: int
    reported: list[float] = field(factory=list)
    ordered: list[float] = field(factory=list)
    first_pass: list[float] = field(factory=list)

    async def once_more(self, qemu: Executable) -> None:
        """Boot, protect, lose the host, fail over."""
        keys = epoch_keys(0.05)
        async with (
            primary(qemu, self.memory, self.used) as bench,
            two_daemons(bench, **keys) as (alpha, beta),
        ):
            await bench.vm.send("d 200")
            with explained(alpha, beta):
                await alpha.call("Protect", name=VM)
                shown = await alpha.wait_committed(VM, 10)
                self.first_pass.append(shown["statistics"]["first_pass_ms"])
                alpha.kill()
                bench.vm.kill()
                await beta.wait_state(VM, "suspect")
                async with open_qmp(beta.runtime(VM) / "operator.sock") as standby:
                    with standby.events() as events:
                        start = time.time()
                        # By force, for the dead host's address is this machine's, which answers.
                        vm = (await beta.call("Failover", name=VM, force=True))["vm"]
                        resumed = await _resumed(events)
                    self.ordered.append((resumed / 1e6 - start) * 1000)
                    self.reported.append(float(vm["statistics"]["failover_ms"]))
                    beta.kill()
                    with suppress(QmpError):
                        await standby.execute("quit")
                    await standby.disconnected.wait()

    def row(self) -> dict[str, Any]:
        """For the results."""
        return {
            "ram": self.memory,
            "used_mib": self.used * 4 // 1024,
            "failover_ms": self.reported,
            "ordered_ms": self.ordered,
            "first_pass_ms": self.first_pass,
        }


async def _resumed(events: EventStream) -> int:
    async for event in events:
        if event.name == "RESUME":
            return event.timestamp_us
    raise RuntimeError("the standby went away")


async def idle_rate(bench: Bench, seconds: float) -> dict[str, float]:
    """Checkpoints a second of a guest that does next to nothing, as fast as they can be had."""
    await bench.vm.send("d 1")
    await bench.vm.send("s 1000000")
    try:
        async with two_daemons(bench, longest_epoch="1ms", shortest_epoch="1ms") as (alpha, beta):
            with explained(alpha, beta), bench.qmp.events() as events:
                await alpha.call("Protect", name=VM)
                await alpha.wait_committed(VM, 50)
                _waiting(events)
                before, start = await _usage(alpha, beta), time.perf_counter()
                count = (await alpha.show(VM))["statistics"]["committed"]
                await trio.sleep(seconds)
                shown = (await alpha.show(VM))["statistics"]
                elapsed = time.perf_counter() - start
                after = await _usage(alpha, beta)
                stops = [event for event in _waiting(events) if event.name in ("STOP", "RESUME")]
                await alpha.call("Unprotect", name=VM)
                await lose(bench.qmp)
    finally:
        await bench.vm.send(f"s {PAUSE_US}")
    lengths = [
        (after.timestamp_us - before.timestamp_us) / 1000
        for before, after in pairwise(stops)
        if before.name == "STOP" and after.name == "RESUME"
    ]
    return {
        "checkpoints_per_s": (shown["committed"] - count) / elapsed,
        "stop_ms_p50": percentile(lengths, 50),
        "stop_ms_p99": percentile(lengths, 99),
        "pages_p50": shown["pages_p50"],
        "primary_cpus": (after["alpha"] - before["alpha"]) / elapsed,
        "backup_cpus": (after["beta"] - before["beta"]) / elapsed,
    }


@frozen
class Memory:
    """Bytes of a daemon: `peak` resident so far, mapped memfds with it, and `memfds` allocated now."""

    peak: int
    memfds: int


def memory(node: Node) -> Memory:
    """What a daemon holds."""
    assert node.process is not None
    pid = node.process.pid
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
    )
    sizes: dict[int, int] = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if os.readlink(entry).startswith("/memfd:"):
                found = entry.stat()
                sizes[found.st_ino] = found.st_blocks * 512
        except OSError:
            continue
    return Memory(int(status["VmHWM"].split()[0]) * 1024, sum(sizes.values()))


def _waiting(events: EventStream) -> list[Event]:
    found: list[Event] = []
    while events.statistics().current_buffer_used:
        found.append(events.receive_nowait())
    return found
