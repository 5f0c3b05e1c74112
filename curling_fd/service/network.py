"""The network of a VM at a failover: what the primary tells of it, and what the backup does with that.

The primary describes the taps of the VM when protection begins, and says which addresses the guest has as it
sees them. The backup makes the taps before it starts the standby, and keeps them down; before the guest runs
it puts them into operation, with what the VM's file wants beside, and once it runs tells the network where
the guest is now. All of it is undone when the standby is given up, or when the VM has left. What was done is
written down in runtime_directory, for the next daemon.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import trio
from attrs import field, frozen

from curling_fd.errors import (
    AddressConflict,
    CurlingError,
    FrameError,
    NetlinkError,
    NetworkConflict,
    OutputError,
)
from curling_fd.netlink.socket import RouteSocket
from curling_fd.network import steps
from curling_fd.network.failover import Bindings, FailoverNetwork
from curling_fd.network.learn import Learned, decode
from curling_fd.network.port import Port
from curling_fd.network.ports import read_port
from curling_fd.network.snoop import snoop
from curling_fd.network.steps import Ledger
from curling_fd.output.nics import Nic, parse_nics
from curling_fd.output.taps import taps_of
from curling_fd.qmp.client import QmpClient
from curling_fd.service.record import VmRecord, text
from curling_fd.system.nursery import open_nursery

#: Seconds between two looks whether the guest has other addresses.
_LOOK = 0.2


@frozen
class Cards:
    """The network cards of a VM.

    Attributes:
        nics: as QEMU tells of them.
        ports: what their taps are on this host.
        taps: QEMU's descriptors of the taps.
        unseen: why the taps could not be looked at, if so.
    """

    nics: tuple[Nic, ...] = ()
    ports: tuple[Port, ...] = ()
    taps: Mapping[int, str] = field(factory=dict)
    unseen: OutputError | None = None


async def cards_of(qmp: QmpClient) -> Cards:
    """Look at the VM behind `qmp` (borrowed)."""
    answer = await qmp.execute("human-monitor-command", {"command-line": "info network"})
    nics = parse_nics(str(answer))
    try:
        taps = taps_of(qmp.pid)
    except OutputError as error:  # then they are left alone
        return Cards(nics, unseen=error)
    macs: dict[str, list[str]] = {}
    for nic in nics:
        name = nic.tap or (taps.get(nic.fd) if nic.fd is not None else None)
        if name is not None and nic.mac:
            macs.setdefault(name, []).append(nic.mac)
    found = []
    with RouteSocket() as route:
        for name in sorted(set(taps.values())):
            with contextlib.suppress(NetlinkError, NetworkConflict):  # macvtap, or in another name space
                found.append(read_port(route, name, tuple(macs.get(name, ()))))
    return Cards(nics, tuple(found), taps)


def decode_taps(value: object) -> dict[int, str]:
    """The descriptors of a primary's QEMU that are taps.

    Raises:
        FrameError: they are not described so.
    """
    if not isinstance(value, dict) or not all(
        number.isdecimal() and isinstance(name, str) and "\0" not in name for number, name in value.items()
    ):
        raise FrameError("the primary's list of its QEMU's taps is wrong")
    return {int(number): name for number, name in value.items()}


def decode_ports(value: object) -> tuple[Port, ...]:
    """The ports that a primary describes.

    Raises:
        FrameError: it does not.
    """
    try:
        if not isinstance(value, list):
            raise ValueError("no list")
        return tuple(Port.decode(each) for each in value)
    except ValueError as error:
        raise FrameError(f"the primary's description of its taps is wrong: {error}") from None


def decode_learned(value: object) -> Bindings:
    """The addresses that a primary has seen, by port.

    Raises:
        FrameError: it has not.
    """
    try:
        if not isinstance(value, dict):
            raise ValueError("no table")
        return {str(port): decode(bindings) for port, bindings in value.items()}
    except ValueError as error:
        raise FrameError(f"the addresses the primary has learned are wrong: {error}") from None


@asynccontextmanager
async def learning(ports: Sequence[Port], tell: Callable[[Mapping[str, Any]], None]) -> AsyncIterator[None]:
    """For the length of a block `tell` the backup which addresses the guest has, as they are seen."""
    learned = {port.name: Learned() for port in ports}

    async def listen(port: str) -> None:
        with contextlib.suppress(NetlinkError):  # the tap has gone, and somebody else says so
            await snoop(port, learned[port])

    async def report() -> None:
        told = 0
        while True:
            await trio.sleep(_LOOK)
            changes = sum(each.changes for each in learned.values())
            if changes != told:
                told = changes
                tell({"learned": {port: each.encode() for port, each in learned.items()}})

    async with open_nursery() as nursery:
        for port in learned:
            nursery.start_soon(listen, port)
        if learned:
            nursery.start_soon(report)
        yield
        nursery.cancel_scope.cancel()


class VmNetwork:
    """The network of the VM of `record` on this host, from the wait for the VM until it leaves."""

    def __init__(self, record: VmRecord) -> None:
        self._record = record
        self._lock = trio.Lock()
        self._network: FailoverNetwork | None = None
        self._ports: tuple[Port, ...] = ()
        self._learned: Mapping[str, Any] = {}

    async def connect(self, ports: tuple[Port, ...]) -> None:
        """Make the taps of a standby, down; what was done for one before is undone.

        Raises:
            NetworkError: the host is as it was.
        """
        await self.withdraw()
        async with self._lock:
            self._ports, self._learned = ports, {}
            network = self._made(Ledger(save=self._save))
            await network.connect()
            self._network = network

    def resume(self) -> None:
        """Go on with what the daemon before us has done."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(self._file.read_text())
            self._ports = tuple(Port.decode(each) for each in kept["ports"])
            self._learned = kept["learned"]
            self._network = self._made(Ledger(steps.decode(kept["steps"]), self._save))

    def learn(self, learned: Mapping[str, Any]) -> None:
        """The primary has seen that the guest has these addresses.

        Raises:
            FrameError: they are none.
        """
        decode_learned(learned)
        self._learned = learned
        if self._network is not None:
            self._save(self._network.ledger.encode())

    async def prepare(self) -> None:
        """Have the network ready for the guest. It is to run here whatever stands in the way of that."""
        if self._network is None:
            return
        async with self._lock:
            try:
                await self._network.prepare(decode_learned(self._learned))
            except AddressConflict as error:
                self._problem(error)
                await self._prepare_without_addresses()
            except CurlingError as error:
                self._problem(error)

    def announce(self) -> None:
        """The guest runs here: tell the network, in the background."""
        network = self._network
        if network is not None:
            learned = decode_learned(self._learned)
            for address in network.homeless(learned):
                self._record.note("network", f"{address} is not announced: the file names no MAC for it")
            self._record.host.nursery.start_soon(network.announce, learned, self._problem)

    async def withdraw(self) -> None:
        """Undo all that was done for the VM. May be called again."""
        async with self._lock:
            network, self._network = self._network, None
            if network is not None:
                for problem in await network.withdraw():
                    self._problem(problem)
                with contextlib.suppress(OSError):
                    self._file.unlink()

    def withdraw_soon(self) -> None:
        """`withdraw` in the background."""
        self._record.host.nursery.start_soon(self.withdraw)

    async def _prepare_without_addresses(self) -> None:
        """Somebody else has one of the host's addresses: the guest runs without them."""
        assert self._network is not None
        plan = attrs.evolve(self._record.config.network.plan(), host_addresses=())
        self._network = FailoverNetwork(self._record.name, plan, self._ports, self._network.ledger)
        try:
            await self._network.prepare(decode_learned(self._learned))
        except CurlingError as error:
            self._problem(error)

    def _made(self, ledger: Ledger) -> FailoverNetwork:
        return FailoverNetwork(self._record.name, self._record.config.network.plan(), self._ports, ledger)

    def _problem(self, error: CurlingError) -> None:
        self._record.note("network", text(error))

    def _save(self, ledger: list[dict[str, Any]]) -> None:
        kept = {"ports": [port.encode() for port in self._ports], "learned": self._learned, "steps": ledger}
        with contextlib.suppress(OSError):  # full: then a crash leaves what was done
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps(kept))

    @property
    def _file(self) -> Path:
        return Path(self._record.host.config.runtime_directory) / f"{self._record.name}.network.json"
