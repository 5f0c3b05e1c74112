"""The backend `filter`: packets are held inside QEMU, by two of its filter-buffers for each network card.

    guest -> card -> A -> B -> netdev -> wire

A takes in what the guest sends, and nothing comes out of it by itself (`interval` is as long as it can be).
At a boundary A is switched off and on again, which makes it hand all it has to B: the packets of the epoch
that ends. When that is committed B is switched off and on, and they leave. The guest stands still while A is
switched, and QEMU runs commands in order, so no packet of the next epoch is among them.

Filters are for netdevs without vhost. They outlive the daemon, for they are QEMU's. They tell nobody how much
they hold: what went in is known from a filter-mirror in front of A, which sends a copy of each packet to a
UDP socket of ours. UDP, for then QEMU never waits for us: what does not fit into the socket is lost. A socket
that nobody has any more would make QEMU complain of each packet, so mirrors are there only while we `watch`,
and `last_will` is what has to be told QEMU when the daemon is gone.

Sources: qemu `net/filter.c` (the order of filters), `net/filter-buffer.c`, `net/filter-mirror.c`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import trio

from curling_fd.errors import CannotHold, OutputError, QmpCommandFailed, QmpError
from curling_fd.output.hold import HoldStatistics
from curling_fd.qmp.client import QmpClient, open_qmp
from curling_fd.qmp.protocol import encode_command

#: Microseconds between two times that a filter-buffer lets go by itself: the most it takes.
_NEVER = (1 << 32) - 1

#: Prefix of the ids of all our objects.
PREFIX = "curling-"

#: QEMU resets a machine within this, seconds.
_RESET_SECONDS = 2.0

#: Bytes that a filter-mirror sends before each packet: its length, big-endian.
_LENGTH = 4

#: More than any packet has, bytes.
_MOST = 1 << 17

Command = tuple[str, dict[str, Any]]


class FilterHold:
    """Holds what goes out through `netdevs` of a QEMU.

    Args:
        qmp: its monitor, borrowed for a session. Afterwards a connection to `path` is made when it is needed.
        adopted: the filters are there, made by a daemon before us, and closed.
    """

    name = "filter"
    depth: int | None = 1

    def __init__(self, qmp: QmpClient, path: str, netdevs: Sequence[str], *, adopted: bool = False) -> None:
        self._qmp = qmp
        self._path = path
        self._netdevs = tuple(netdevs)
        self._adopted = self._attached = adopted
        self._closed = adopted
        self._unreleased = False
        self._sent = HoldStatistics()  # since the last barrier
        self._held = HoldStatistics()  # before it, and not released

    @property
    def last_will(self) -> bytes:
        """Commands for QEMU when nobody watches any more; their answers are for nobody."""
        return b"".join(encode_command(*command, id="curling") for command in self._mirrors("off"))

    async def attach(self) -> None:
        undo: list[Command] = []
        try:
            for netdev in self._netdevs:
                for kind in ("a", "b"):
                    await self._qmp.execute("object-add", _filter(netdev, kind))
                    undo.append(("object-del", {"id": _id(netdev, kind)}))
        except QmpCommandFailed as error:
            await self._tell(undo[::-1])
            raise CannotHold(netdev, error.description) from None
        self._attached = True

    def barrier(self, sequence: int) -> Callable[[], None] | None:
        assert self._attached and not self._unreleased, (
            f"barrier {sequence} before the one before was released"
        )
        if self._closed:
            commands = [*_switch(self._netdevs, "a", "off"), *_switch(self._netdevs, "a", "on")]
        else:
            # B first: what A lets out from now on must find it closed.
            commands = [*_switch(self._netdevs, "b", "on"), *_switch(self._netdevs, "a", "on")]
        self._closed = self._unreleased = True
        self._held, self._sent = self._sent, HoldStatistics()
        if not self._qmp.is_unread:
            trio.from_thread.run(self._tell, commands)
            return None
        # QEMU is busy with the checkpoint: it is told now, and its answers are looked at when that is done.
        with self._explained():
            answered = self._qmp.send_unread(commands)

        def finish() -> None:
            with self._explained():
                answered()

        return finish

    async def release(self, sequence: int) -> None:
        await self._tell([*_switch(self._netdevs, "b", "off"), *_switch(self._netdevs, "b", "on")])
        self._unreleased = False
        self._held = HoldStatistics()

    async def let_go_stopped(self) -> None:
        # A guest that stands still sends nothing: QEMU keeps what B let out until the guest goes on, which it
        # never will. A virtio card that is reset gives it to the netdev.
        with self._qmp.events() as events:
            await self._qmp.execute("system_reset")
            with trio.move_on_after(_RESET_SECONDS):
                async for event in events:
                    if event.name in ("RESET", "SHUTDOWN"):
                        return

    def set_limit(self, limit: int) -> None:
        pass  # QEMU's buffers take what comes

    async def drop(self) -> None:
        # A filter that goes lets out what it has. To a netdev whose link is down that is nowhere.
        down = [("set_link", {"name": netdev, "up": False}) for netdev in self._netdevs]
        await self._tell(down)

    async def detach(self) -> None:
        if not self._attached:
            return
        if self._adopted:  # from a daemon that died: it had mirrors, unless it was not that far
            for netdev in self._netdevs:
                for delete, kind in (("object-del", "m"), ("chardev-remove", "o")):
                    with suppress(OutputError):
                        await self._tell([(delete, {"id": _id(netdev, kind)})])
        # B lets its packets out before those of A come.
        await self._tell(
            [("object-del", {"id": _id(netdev, kind)}) for netdev in self._netdevs for kind in ("b", "a")]
        )
        self._attached = self._closed = self._unreleased = False
        self._held = self._sent = HoldStatistics()

    async def watch(self, on_output: Callable[[], None]) -> None:
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            await sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
            made: list[Command] = []
            try:
                for netdev in self._netdevs:
                    for add, delete in (
                        (_outlet(netdev, port), "chardev-remove"),
                        (_mirror(netdev), "object-del"),
                    ):
                        await self._qmp.execute(*add)
                        made.append((delete, {"id": add[1]["id"]}))
                await self._count(sock, on_output)
            except QmpCommandFailed as error:
                raise OutputError(netdev, error.description) from None
            finally:
                with trio.CancelScope(shield=True), suppress(QmpError):
                    for command in reversed(made):
                        await self._qmp.execute(*command)

    async def _count(self, sock: trio.socket.SocketType, on_output: Callable[[], None]) -> None:
        while True:
            packet = await sock.recv(_MOST)
            if len(packet) <= _LENGTH:
                continue
            first = not self._sent.packets
            self._sent = HoldStatistics(self._sent.packets + 1, self._sent.bytes + len(packet))
            if first:
                on_output()

    def statistics(self) -> HoldStatistics:
        if not self._closed:
            return HoldStatistics()
        return HoldStatistics(self._held.packets + self._sent.packets, self._held.bytes + self._sent.bytes)

    def waiting(self) -> bool:
        return self._sent.packets > 0

    def _mirrors(self, to: str) -> list[Command]:
        return _switch(self._netdevs, "m", to)

    async def _tell(self, commands: Sequence[Command]) -> None:
        with self._explained():
            if not self._qmp.disconnected.is_set():
                await self._qmp.execute_all(commands)
            else:
                async with open_qmp(self._path) as qmp:
                    await qmp.execute_all(commands)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except QmpError as error:
            raise OutputError(", ".join(self._netdevs), str(error)) from error


async def left_in(qmp: QmpClient) -> tuple[str, ...]:
    """The netdevs at which a daemon before us has left filters."""
    objects = await qmp.execute("qom-list", {"path": "/objects"})
    names = {str(entry["name"]) for entry in objects}
    return tuple(name.removeprefix(f"{PREFIX}b-") for name in sorted(names) if name.startswith(f"{PREFIX}b-"))


def _id(netdev: str, kind: str) -> str:
    return f"{PREFIX}{kind}-{netdev.replace('#', '_')}"


def _filter(netdev: str, kind: str) -> dict[str, Any]:
    """An open filter-buffer; B goes before A, for on this queue the chain runs from the last to the first."""
    place = {"position": f"id={_id(netdev, 'a')}", "insert": "before"} if kind == "b" else {}
    return {
        "qom-type": "filter-buffer",
        "id": _id(netdev, kind),
        "netdev": netdev,
        "queue": "rx",
        "interval": _NEVER,
        "status": "off",
        **place,
    }


def _outlet(netdev: str, port: int) -> Command:
    remote = {"type": "inet", "data": {"host": "127.0.0.1", "port": str(port)}}
    return ("chardev-add", {"id": _id(netdev, "o"), "backend": {"type": "udp", "data": {"remote": remote}}})


def _mirror(netdev: str) -> Command:
    """In front of A: at the end of the chain, which on this queue is its beginning."""
    what = {"qom-type": "filter-mirror", "id": _id(netdev, "m"), "netdev": netdev, "queue": "rx"}
    return ("object-add", {**what, "outdev": _id(netdev, "o")})


def _switch(netdevs: Iterable[str], kind: str, to: str) -> list[Command]:
    return [
        ("qom-set", {"path": f"/objects/{_id(netdev, kind)}", "property": "status", "value": to})
        for netdev in netdevs
    ]
