"""Two curlingd on loopback, and what is measured with them: stops, CPU, memory, failover, rate."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import trio
from attrs import field, frozen

from bench.stops import WARM_UP, Bench, Load, Visit, lose, primary, record
from curling_fd.qmp.client import open_qmp
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
        await alpha.call("Unprotect", name=VM)
        await lose(bench.qmp)
        gigabytes = (after["bytes"] - before["bytes"]) / 1e9
        details = {
            "lag_ms": shown["lag_ms"],
            "first_pass_ms": shown["first_pass_ms"],
            "primary_cpu_s_per_gb": (after["alpha"] - before["alpha"]) / gigabytes,
            "backup_cpu_s_per_gb": (after["beta"] - before["beta"]) / gigabytes,
            "rate": shown["checkpoints_per_s"],
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
        logs = "\n".join(f"{node.name} ({node.process.poll() if node.process else None}):\n{node.log_text()}" for node in nodes)
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
