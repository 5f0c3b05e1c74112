"""Holding packets in the kernel: what a tap receives from the guest waits in a queue of kind `plug`.

A plug counts the packets of the epoch that runs and of the one before. BUFFER ends an epoch; RELEASE_ONE
lets out the one before. A second BUFFER forgets the count of the first, so one barrier at a time may wait for
its release. RELEASE_INDEFINITE opens it until the next BUFFER. All of it is in the kernel: what is held stays
held when this daemon dies.

Source: net/sched/sch_plug.c of the kernel. Works with any network card that is on a tap, vhost or not.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Self

import trio

from curling_fd.errors import NetlinkError, OutputError
from curling_fd.netlink.socket import RouteSocket
from curling_fd.netlink.traffic import PlugAction, Qdisc, root_qdisc
from curling_fd.output.hold import HoldStatistics
from curling_fd.output.placement import (
    Leftover,
    Placement,
    examine,
    in_transit,
    lead_in,
    lead_out,
    let_out,
    make,
    plug_packet,
    remove,
    settle,
    throw_away,
)

#: Seconds that `detach` waits for what was held to be on its way; kernels need milliseconds.
DRAIN_TIMEOUT = 5.0
_DRAIN_LOOK = 0.001

#: Seconds that the first barrier lets a packet that is just passing get through, and how often.
_PASSING = 0.002
_PASSING_LOOK = 0.0001
_CLOSINGS = 3


class PlugHold:
    """Holds what is received on `ports`, taps of one VM.

    Args:
        ports: names of interfaces in the name space of the thread that calls `attach`.
        limit: bytes that are held for each port; what comes on top is lost.
        vm: is told by the alias of what is put into place.
    """

    def __init__(self, ports: Sequence[str], *, limit: int, vm: str) -> None:
        if not ports or len(set(ports)) != len(ports):
            raise ValueError(f"ports that differ are needed, not {ports!r}")
        self._ports = tuple(ports)
        self._limit = limit
        self._vm = vm
        self._placements: list[Placement] = []
        # One for what must be quick, one for what takes long.
        self._commands: RouteSocket | None = None
        self._route: RouteSocket | None = None
        # Over the state below: a barrier comes from another thread.
        self._lock = threading.Lock()
        self._packets: dict[PlugAction, list[tuple[bytes, str]]] = {}
        self._open: set[Placement] = set()
        self._unreleased: int | None = None
        self._dropped = False

    @classmethod
    def adopt(cls, leftover: Leftover, *, limit: int, unreleased: int | None = None) -> Self:
        """Take over what another daemon left, as it is: what it holds stays held.

        Args:
            limit: as it was given to the other.
            unreleased: the barrier that was not released yet, where that is known. Where it is not, packets
                from before the next barrier leave late, not early.
        """
        hold = cls([each.port or each.interface for each in leftover.placements], limit=limit, vm=leftover.vm)
        hold._dropped = leftover.dropped
        hold._unreleased = unreleased
        hold._placements = list(leftover.placements)
        hold._connect()
        hold._encode()
        return hold

    async def attach(self) -> None:
        """Put plugs into place, open.

        Raises:
            ModuleMissing, PortTaken, OutputError: everything is as it was.
        """
        if self._placements:
            raise RuntimeError("attached already")
        self._connect()
        try:
            # Loading a module takes its time.
            await trio.to_thread.run_sync(self._place)
        except BaseException:
            with trio.CancelScope(shield=True), contextlib.suppress(OutputError):
                await self._take_down()
            raise
        self._open = set(self._placements)
        self._encode()

    def barrier(self, sequence: int) -> None:
        """What was received so far is of epoch `sequence`: one system call, the first time a few.

        Raises:
            OutputError: the kernel refused.
            RuntimeError: the one before was not released.
        """
        with self._lock:
            if self._dropped:
                return
            if self._unreleased is not None:
                raise RuntimeError(f"barrier {sequence}: that of {self._unreleased} waits for its release")
            self._unreleased = sequence
            if not self._open:
                self._command(PlugAction.BUFFER)
            for placement in tuple(self._open):
                self._shut(placement)
                self._open.remove(placement)

    async def release(self, sequence: int) -> None:
        """Let out the epoch of the barrier `sequence`; nothing if that was done.

        Raises:
            OutputError: the kernel refused.
        """
        with self._lock:
            if self._dropped or self._unreleased is None or sequence < self._unreleased:
                return
            self._command(PlugAction.RELEASE_ONE)
            self._unreleased = None
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def drop(self) -> None:
        """Throw away what is held, and all that comes until `detach`.

        Raises:
            OutputError: the kernel refused; what is held stays held.
        """
        with self._lock:
            self._dropped = True
        with trio.CancelScope(shield=True):
            problems = await trio.to_thread.run_sync(self._on_each, throw_away)
        if problems:
            raise problems[0]

    async def detach(self) -> None:
        """Let out what is held, in order, then take everything away.

        Raises:
            OutputError: something could not be taken away; the rest is.
        """
        with trio.CancelScope(shield=True):
            await self._take_down()

    def close(self) -> None:
        """Let go without changing anything: what is held stays held. For a daemon that ends."""
        for each in (self._commands, self._route):
            if each is not None:
                each.close()
        self._commands = self._route = None
        self._placements = []

    def set_limit(self, limit: int) -> None:
        """From now on hold `limit` bytes for each port.

        Raises:
            OutputError: the kernel refused.
        """
        with self._lock:
            before, self._limit = self._limit, limit
            self._encode()
            try:
                self._command(PlugAction.LIMIT)
            except OutputError:
                self._limit = before
                self._encode()
                raise

    def statistics(self) -> HoldStatistics:
        """What is held now, on all ports; a port whose plug is gone counts as empty."""
        found = list(self._qdiscs())
        return HoldStatistics(
            sum(each.packets for each in found),
            sum(each.bytes for each in found),
            sum(each.dropped for each in found),
        )

    def _connect(self) -> None:
        try:
            self._commands, self._route = RouteSocket(), RouteSocket()
        except OSError as error:
            self.close()
            raise OutputError(self._ports[0], f"no netlink socket: {error.strerror}") from error

    def _place(self) -> None:
        route = self._connected()
        indexes = [examine(route, port) for port in self._ports]
        for port, index in zip(self._ports, indexes, strict=True):
            self._placements.append(make(route, self._vm, port, index, self._limit))
        for number, placement in enumerate(self._placements):
            self._placements[number] = lead_in(route, placement)

    async def _take_down(self) -> None:
        """In an order that lets no packet overtake one that was held, and loses none."""
        if self._route is None:
            return
        problems: list[OutputError] = []
        if not self._dropped:
            problems += self._on_each(let_out)
            await self._drained()
        # From here on packets go their own way, and none is left that could be overtaken.
        problems += await trio.to_thread.run_sync(self._on_each, lead_out)
        if not self._dropped:
            # One may have been on its way to the plug.
            await trio.to_thread.run_sync(settle)
            await self._drained()
        problems += await trio.to_thread.run_sync(self._on_each, remove)
        self.close()
        self._open.clear()
        self._unreleased, self._dropped = None, False
        if problems:
            raise problems[0]

    async def _drained(self) -> None:
        """Wait until nothing is on its way, or comes so fast that there is always something."""
        route = self._connected()
        looks = int(DRAIN_TIMEOUT / _DRAIN_LOOK)
        with contextlib.suppress(NetlinkError):
            for _ in range(looks):
                if not any(in_transit(route, each) for each in self._placements):
                    return
                await trio.sleep(_DRAIN_LOOK)

    def _shut(self, placement: Placement) -> None:
        """The first barrier. What came while the plug was open is not counted, so none may be in there."""
        what = f"the plug on {placement.interface}"
        route = self._connected()
        with _about(placement):
            for closing in range(_CLOSINGS):
                give_up = time.monotonic() + _PASSING
                while root_qdisc(route, placement.index, what=what).packets and time.monotonic() < give_up:
                    time.sleep(_PASSING_LOOK)
                route.send(plug_packet(placement, PlugAction.BUFFER), what=what)
                if closing == _CLOSINGS - 1 or not root_qdisc(route, placement.index, what=what).packets:
                    return
                route.send(plug_packet(placement, PlugAction.RELEASE_INDEFINITE), what=what)

    def _encode(self) -> None:
        for action in PlugAction:
            self._packets[action] = [
                (plug_packet(each, action, self._limit), f"the plug on {each.interface}")
                for each in self._placements
            ]

    def _command(self, action: PlugAction) -> None:
        """Tell all plugs at once."""
        if self._commands is None:
            raise OutputError(self._ports[0], "nothing is attached")
        with _about(self._placements[0]):
            refusals = self._commands.send_each(self._packets[action])
        for placement, refusal in zip(self._placements, refusals, strict=True):
            if refusal is not None:
                with _about(placement):
                    raise refusal

    def _on_each(self, action: Callable[[RouteSocket, Placement], None]) -> list[OutputError]:
        """What went wrong, after all have had their turn."""
        problems = []
        for placement in self._placements:
            try:
                with _about(placement):
                    action(self._connected(), placement)
            except OutputError as error:
                problems.append(error)
        return problems

    def _qdiscs(self) -> Iterator[Qdisc]:
        for each in self._placements:
            with contextlib.suppress(NetlinkError):
                yield root_qdisc(self._connected(), each.index, what=f"the plug on {each.interface}")

    def _connected(self) -> RouteSocket:
        assert self._route is not None
        return self._route


@contextlib.contextmanager
def _about(placement: Placement) -> Iterator[None]:
    try:
        yield
    except NetlinkError as error:
        raise OutputError(placement.port or placement.interface, f"{error.what}: {error.words}") from error
