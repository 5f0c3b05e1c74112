"""The network of a VM on a host that it may come to, from the wait for it until it leaves.

    connect     before the standby's QEMU starts: its taps, in their bridges, down
    prepare     before the guest runs: nobody else has the host's addresses; taps up, the bridge's table,
                addresses, routes
    announce    once the guest runs: tell the network, several times
    withdraw    when the standby is given up, or the guest has left: undo all of it, newest first

Each of the first two leaves the host as it was when it fails. What was done is in `ledger`, for whoever
remembers it.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import TypeVar

import trio

from curling_fd.errors import CurlingError, NetlinkError
from curling_fd.netlink.links import link
from curling_fd.netlink.socket import RouteSocket
from curling_fd.network import addresses, taps
from curling_fd.network.announce import Placed, frames, place, repeat
from curling_fd.network.conflict import detect
from curling_fd.network.inject import Injector
from curling_fd.network.learn import Binding
from curling_fd.network.packet_socket import PacketSocket
from curling_fd.network.packets import is_mac
from curling_fd.network.plan import Plan
from curling_fd.network.port import Port
from curling_fd.network.ports import make_port, open_port
from curling_fd.network.steps import Ledger

T = TypeVar("T")
Bindings = Mapping[str, Sequence[Binding]]
"""What was learned of the guest, by the name of the port."""


class FailoverNetwork:
    """The network of one VM on this host.

    Args:
        vm: its name.
        plan: what its file says.
        ports: of the primary, under the names they are to have here.
        ledger: what an earlier daemon has done already.
    """

    def __init__(self, vm: str, plan: Plan, ports: Iterable[Port], ledger: Ledger | None = None) -> None:
        self.ports = plan.localized(ports)
        self.ledger = Ledger() if ledger is None else ledger
        self._vm = vm
        self._plan = plan
        self._connected = bool(self.ledger.steps)

    async def connect(self) -> None:
        """Make the ports, down. Does nothing when they are there.

        Raises:
            NetlinkError, NetworkConflict: the host is as it was.
        """
        if not self._connected:
            await self._or_undo(self._connect)
            self._connected = True

    async def prepare(self, learned: Bindings) -> None:
        """Have everything ready for the guest to run. May be called again.

        Raises:
            AddressConflict: somebody else on the network has one of the host's addresses.
            NetlinkError, NetworkConflict: something on this host cannot be.
            Whichever it is, the host is as it was.
        """

        async def prepare() -> None:
            await self.connect()
            with RouteSocket() as route:
                missing = addresses.missing_addresses(route, self._plan.host_addresses, self.ledger)
            await detect(missing, self._plan.patience)
            placed = self._place(learned)
            await self._in_thread(partial(self._prepare, placed=placed))

        await self._or_undo(prepare)
        self.ledger.settle()

    async def announce(self, learned: Bindings, problem: Callable[[CurlingError], None]) -> None:
        """Tell the network where the guest is, and the host's addresses, as often as the plan says.

        Args:
            learned: as for prepare.
            problem: told what could not be announced; the rest is.
        """
        placed = self._place(learned)
        sends: list[tuple[Callable[[bytes], None], list[bytes]]] = []
        with ExitStack() as stack:
            try:
                for port in self.ports:
                    said = list(frames(port.macs, placed.by_port[port.name]))
                    if said and self._plan.schedule:
                        try:
                            injector = await self._injector(port)
                        except CurlingError as error:
                            problem(error)
                        else:
                            stack.callback(injector.close)
                            sends.append((injector.send, said))
                for opened, said in self._own_frames(problem).values():
                    stack.callback(opened.close)
                    sends.append((opened.send, said))
                failed: set[int] = set()

                def say() -> None:
                    for number, (send, said) in enumerate(sends):
                        if number in failed:
                            continue
                        try:
                            for frame in said:
                                send(frame)
                        except CurlingError as error:
                            failed.add(number)
                            problem(error)

                await repeat(self._plan.schedule, say)
            finally:
                # The kernel takes its time to remove a tap.
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(stack.pop_all().close)

    async def withdraw(self) -> list[NetlinkError]:
        """Undo all that was done for the VM; returns what could not be. May be called again."""
        self._connected = False
        return await self._undo()

    def homeless(self, learned: Bindings) -> tuple[str, ...]:
        """Addresses of the VM's file that cannot be announced: it has several NICs, and they name no MAC."""
        return tuple(str(address) for address in self._place(learned).homeless)

    # In threads: the kernel may wait for its own lock, and deleting an interface takes milliseconds.

    async def _connect(self) -> None:
        with ExitStack() as stack:
            # A descriptor belongs to the name space of the thread that opens it.
            descriptors = []
            for _ in self.ports:
                descriptors.append(taps.open_tun())
                stack.callback(os.close, descriptors[-1])

            def make(route: RouteSocket) -> None:
                for port, descriptor in zip(self.ports, descriptors, strict=True):
                    make_port(route, descriptor, port, self._vm, self.ledger)

            await self._in_thread(make)

    def _prepare(self, route: RouteSocket, placed: Placed) -> None:
        for port in self.ports:
            open_port(route, port, placed.by_port[port.name], self.ledger)
        addresses.add_addresses(route, self._plan.host_addresses, self.ledger)
        addresses.add_routes(route, self._plan.routes, self.ledger)

    async def _injector(self, port: Port) -> Injector:
        with RouteSocket() as route:
            index = link(route, port.name).index
        descriptor = taps.open_tun()
        # Cut short before the thread has begun, nobody would close it.
        with trio.CancelScope(shield=True):
            made = await self._in_thread(lambda route: Injector(route, descriptor, index))
        return made

    async def _undo(self, down_to: int = 0) -> list[NetlinkError]:
        problems: list[NetlinkError] = []
        with trio.CancelScope(shield=True):
            problems = await self._in_thread(partial(self.ledger.undo, down_to=down_to))
        return problems

    async def _or_undo(self, do: Callable[[], Awaitable[None]]) -> None:
        before = len(self.ledger.steps)
        was_connected = self._connected
        try:
            await do()
        except BaseException:
            self._connected = was_connected
            await self._undo(before)
            raise

    async def _in_thread(self, do: Callable[[RouteSocket], T]) -> T:
        with RouteSocket() as route:
            return await trio.to_thread.run_sync(do, route)

    def _place(self, learned: Bindings) -> Placed:
        return place(self.ports, self._plan.addresses, learned)

    def _own_frames(
        self, problem: Callable[[CurlingError], None]
    ) -> dict[str, tuple[PacketSocket, list[bytes]]]:
        """What the host says of its own addresses, by the interface that has them."""
        found: dict[str, tuple[PacketSocket, list[bytes]]] = {}
        if not self._plan.schedule:
            return found
        for one in self._plan.host_addresses:
            try:
                if one.interface not in found:
                    found[one.interface] = PacketSocket(one.interface), []
                opened, said = found[one.interface]
            except CurlingError as error:
                problem(error)
                continue
            mac = opened.mac()
            # lo and tunnels have none, and nobody behind them who could be told.
            if is_mac(mac):
                router = not isinstance(one.address, IPv4Address) and _is_router(one.interface)
                said += list(frames((), [Binding(mac, one.address, None, router)]))[1:]
        return found


def _is_router(interface: str) -> bool:
    """Whether the host forwards IPv6 there: its advertisements must say so (RFC 4861 6.2.5)."""
    try:
        return Path(f"/proc/sys/net/ipv6/conf/{interface}/forwarding").read_text().strip() != "0"
    except OSError:
        return False
