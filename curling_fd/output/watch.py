"""Sees what the guest sends, when it sends it: also what is being held, and before anybody else.

A packet socket on a tap is given what the kernel receives there before the plug's redirection takes it, and
not a second time when it is let out. So it tells that output waits. Of each packet it takes one byte, looks
once for each epoch, and leaves the rest to fill a tiny buffer, after which each packet of a flood costs the
kernel a comparison.

Sources: packet(7); net/packet/af_packet.c and net/core/dev.c (__netif_receive_skb_core) of the kernel.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Never, Self

import trio
from attrs import frozen

from curling_fd.errors import NetlinkError, OutputError
from curling_fd.netlink.links import Link, find_link, link, link_of
from curling_fd.netlink.socket import RTM_DELLINK, RTMGRP_LINK, RouteSocket
from curling_fd.netlink.wire import Message
from curling_fd.network.bpf import ONE_BYTE
from curling_fd.network.packet_socket import attach_program

_ETH_P_ALL = 3
_SOL_PACKET = 263
_PACKET_IGNORE_OUTGOING = 23

#: More than the smallest receive buffer has room for.
_STALE = 16

#: struct ifinfomsg: the family is its first byte, the index is at 4; both behind the header.
_FAMILY_AT, _INDEX_AT = 16, 20


@frozen
class PortChange:
    """A port is not what it was: its name, up or down, its bridge; `after` is None when it is gone."""

    port: str
    before: Link
    after: Link | None


class OutputWatch:
    """Owns the sockets; they are closed with it.

    Args:
        ports: names of interfaces in the name space of the calling thread.

    Raises:
        OutputError: a port is not there, or the right to look at it (CAP_NET_RAW) is.
    """

    def __init__(self, ports: Sequence[str]) -> None:
        self._ports = tuple(ports)
        self._links: dict[str, Link] = {}
        self._armed = trio.Event()
        self._output: list[socket.socket] = []
        self._netlink: list[RouteSocket] = []
        about = ", ".join(ports)
        try:
            # The one that listens is first, so that no change is missed in between.
            self._netlink += [RouteSocket(groups=RTMGRP_LINK)]
            self._netlink += [RouteSocket()]
            for about in self._ports:
                self._links[about] = link(self._netlink[1], about)
                self._output.append(_listener(about))
        except (NetlinkError, OSError) as error:
            self.close()
            words = error.words if isinstance(error, NetlinkError) else error.strerror
            raise OutputError(about, f"it cannot be watched: {words}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """May be called again; not while `run` does."""
        for listener in self._output:
            listener.close()
        for route in self._netlink:
            route.close()

    def barrier(self) -> None:
        """What was sent so far is no news any more. From any thread; a few system calls for each port."""
        for each in self._output:
            for _ in range(_STALE):
                if not _take(each):
                    break

    def arm(self) -> None:
        """Tell of the first packet since the last `barrier`, at once if it is there. In the event loop."""
        self._armed.set()

    async def run(self, *, on_output: Callable[[], None], on_change: Callable[[PortChange], None]) -> Never:
        """Watch until cancelled.

        Args:
            on_output: the guest has sent something; once after each `arm`.
            on_change: a port has changed.
        """
        async with trio.open_nursery() as nursery:
            for output in self._output:
                nursery.start_soon(self._watch_output, output, on_output)
            nursery.start_soon(self._watch_ports, on_change)
            await trio.sleep_forever()
        raise AssertionError("unreachable")

    async def _watch_output(self, output: socket.socket, tell: Callable[[], None]) -> None:
        while True:
            armed = self._armed
            await armed.wait()
            await trio.lowlevel.wait_readable(output)
            # Another port was first, or a barrier came before we had our turn.
            if armed is self._armed and _take(output, socket.MSG_PEEK):
                self._armed = trio.Event()
                tell()

    async def _watch_ports(self, tell: Callable[[PortChange], None]) -> None:
        events, route = self._netlink
        by_index = {each.index: port for port, each in self._links.items()}

        def wanted(message: Message) -> bool:
            # A bridge tells of its ports in a family of its own.
            index = struct.unpack_from("=i", message.data, _INDEX_AT)[0]
            return index in by_index and message.data[_FAMILY_AT] == socket.AF_UNSPEC

        while True:
            await trio.lowlevel.wait_readable(events.fileno())
            try:
                news = [
                    (each["index"], None if each["header"]["type"] == RTM_DELLINK else link_of(each))
                    for each in events.announcements(wanted)
                ]
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                news = [(index, find_link(route, index)) for index in by_index]
            for index, after in news:
                port = by_index[index]
                before = self._links.get(port)
                if before is None or before == after:
                    continue
                if after is None:
                    del self._links[port]
                else:
                    self._links[port] = after
                tell(PortChange(port, before, after))


def _listener(port: str) -> socket.socket:
    """A packet socket for what a port receives; the caller owns it."""
    # With protocol 0 it hears nothing until it is bound.
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)  # the smallest there is
        made.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        attach_program(made, ONE_BYTE)
        made.bind((port, _ETH_P_ALL))
    except BaseException:
        made.close()
        raise
    return made


def _take(listener: socket.socket, flags: int = 0) -> bool:
    """Whether there was something; it is taken away unless `flags` has MSG_PEEK."""
    try:
        listener.recv(1, flags)
    except BlockingIOError:
        return False
    except OSError as error:
        # The port went down or away, said once. What becomes of it is told by its changes.
        if error.errno != errno.ENETDOWN:
            raise
        return False
    return True
