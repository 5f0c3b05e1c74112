"""A socket that asks the kernel's network subsystem (NETLINK_ROUTE) and hears what it announces.

The kernel answers a request inside `send`: the answer is there when it returns, so nothing here waits for
one, and a request may be made from the event loop. Those that make the kernel wait itself (loading a module,
deleting an interface: milliseconds) belong in a thread. pyroute2 has the message classes; its own sockets
bring an event loop along and are not used.

Source: Documentation/userspace-api/netlink/intro.rst of the kernel; netlink(7), rtnetlink(7).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self, TypeVar

from pyroute2.netlink import nlmsg
from pyroute2.netlink.rtnl.fibmsg import fibmsg
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from curling_fd.errors import NetlinkError
from curling_fd.netlink import wire
from curling_fd.netlink.wire import NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_NEWQDISC, RTM_DELQDISC, RTM_GETQDISC = 36, 37, 38
RTM_NEWTFILTER, RTM_DELTFILTER, RTM_GETTFILTER = 44, 45, 46

RTMGRP_LINK = 1

_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11
_NETLINK_GET_STRICT_CHK = 12

#: The kernel fills up to 32 KiB at once with a dump.
_RECEIVE = 1 << 16

#: A dump that changes under our eyes each time is given up after this many.
_DUMPS = 16

#: Kinds come in fours: new, delete, get, set. The class is that of the first.
_CLASSES: dict[int, type[nlmsg]] = {
    RTM_NEWLINK: ifinfmsg,
    RTM_NEWADDR: ifaddrmsg,
    RTM_NEWROUTE: rtmsg,
    RTM_NEWNEIGH: ndmsg,
    32: fibmsg,
    RTM_NEWQDISC: tcmsg,
    40: tcmsg,
    RTM_NEWTFILTER: tcmsg,
}

M = TypeVar("M", bound=nlmsg)


def encode(message: nlmsg, kind: int, flags: int = 0) -> bytes:
    """A request's bytes; NLM_F_REQUEST and NLM_F_ACK are added to `flags`."""
    message.reset()
    message["header"]["type"] = kind
    message["header"]["flags"] = flags | NLM_F_REQUEST | NLM_F_ACK
    message.encode()
    return bytes(message.data)


def decode(message: wire.Message) -> nlmsg:
    """The message as pyroute2's class for its kind, decoded."""
    decoded = _CLASSES[message.kind & ~3](message.data)
    decoded.decode()
    return decoded


class RouteSocket:
    """Owns a netlink socket of the network name space that the calling thread is in.

    Any thread may use it: a lock makes each request one.

    Args:
        groups: multicast groups (RTMGRP_*) to hear, as a mask. A socket that has some only listens: between
            announcements nobody could tell which ones answer a request.
    """

    def __init__(self, *, groups: int = 0) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        self._groups = groups
        self._lock = threading.Lock()
        self._sequences = itertools.count(1)
        try:
            # Say in words what is wrong, without sending our request back.
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
            # What a dump's request says about which entries are wanted counts, or is refused.
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
            self._socket.bind((0, groups))
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """May be called again."""
        self._socket.close()

    def fileno(self) -> int:
        """The descriptor, still owned here, to wait for announcements with; -1 once closed."""
        return self._socket.fileno()

    def request(self, message: nlmsg, kind: int, flags: int = 0, *, what: str) -> None:
        """Have something done.

        Args:
            message: its header is written here.
            kind: RTM_*.
            flags: NLM_F_CREATE and the like.
            what: names the object, for the error: "the qdisc plug on curl0".

        Raises:
            NetlinkError: the kernel refused it.
        """
        self.send(encode(message, kind, flags), what=what)

    def send(self, packet: bytes, *, what: str) -> None:
        """Like request, for bytes that `encode` made before: what is to be quick is encoded once."""
        self._exchange(packet, what)

    def send_each(self, packets: Sequence[tuple[bytes, str]]) -> list[NetlinkError | None]:
        """Several requests, each with its `what`, in one system call, which not even SIGKILL takes apart.

        All of them are done, also those after one that is refused; what each was refused with.

        Raises:
            NetlinkError: the socket itself failed.
        """
        with self._lock:
            return [error for _, error in self._converse(packets)]

    def ask(self, message: M, kind: int, flags: int = 0, *, what: str) -> list[M]:
        """Ask for one object; the messages of the answer.

        Raises:
            NetlinkError: it is not there (ENODEV, ENOENT), or it is not to be told.
        """
        return [_as(message, answer) for answer in self._exchange(encode(message, kind, flags), what)]

    def dump(self, message: M, kind: int, *, what: str) -> list[M]:
        """All objects of a kind (RTM_GET*), or those that `message` selects where the kernel can.

        Raises:
            NetlinkError: with EINTR when they change so fast that no whole list is to be had.
        """
        packet = encode(message, kind, NLM_F_DUMP)
        for _ in range(_DUMPS):
            answers = self._exchange(packet, what)
            if not any(answer.interrupted for answer in answers):
                return [_as(message, answer) for answer in answers if answer.kind != wire.NLMSG_DONE]
        raise NetlinkError(what, errno.EINTR, "it changes too fast to be listed")

    def announcements(self, wanted: Callable[[wire.Message], bool] = lambda message: True) -> list[nlmsg]:
        """What the kernel has announced to our groups since; does not wait.

        Args:
            wanted: looks at the bytes, where decoding all would cost too much.

        Raises:
            OSError: ENOBUFS, some were lost: look at everything anew.
        """
        found: list[nlmsg] = []
        while True:
            try:
                datagram = self._socket.recv(_RECEIVE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return found
            except OSError:
                # What is still there is older than what is lost, and than what the caller will see.
                with contextlib.suppress(BlockingIOError):
                    while True:
                        self._socket.recv(_RECEIVE, socket.MSG_DONTWAIT)
                raise
            ours = (message for message in wire.messages(datagram) if message.kind & ~3 in _CLASSES)
            found += [decode(message) for message in ours if wanted(message)]

    def _exchange(self, packet: bytes, what: str) -> list[wire.Message]:
        """The messages that answer a request, without its acknowledgement; with the end of a dump."""
        with self._lock:
            ((answers, error),) = self._converse([(packet, what)])
        if error is not None:
            raise error
        return answers

    def _converse(
        self, packets: Sequence[tuple[bytes, str]]
    ) -> list[tuple[list[wire.Message], NetlinkError | None]]:
        """Each request's answers, and its error if it was refused. Holds the lock.

        Raises:
            NetlinkError: the socket itself failed.
        """
        if self._groups:
            raise RuntimeError("a socket with groups only listens")
        numbers = [next(self._sequences) & 0xFFFF_FFFF for _ in packets]
        asked = {number: what for number, (_, what) in zip(numbers, packets, strict=True)}
        answers: dict[int, list[wire.Message]] = {number: [] for number in numbers}
        ended: dict[int, NetlinkError | None] = {}
        try:
            together = [
                wire.addressed(packet, number) for number, (packet, _) in zip(numbers, packets, strict=True)
            ]
            self._socket.send(b"".join(together))
            while len(ended) < len(numbers):
                # All of it is there already; should that ever be wrong, an error is better than waiting.
                for message in wire.messages(self._socket.recv(_RECEIVE, socket.MSG_DONTWAIT)):
                    number = message.sequence
                    if number not in asked:
                        continue  # an answer to a request before, given up with an error of ours
                    said = wire.verdict(message)
                    if said is None or message.kind == wire.NLMSG_DONE:
                        answers[number].append(message)
                    if said is not None:
                        ended[number] = _refusal(asked[number], said)
        except (OSError, wire.WireError) as error:
            why = getattr(error, "errno", None) or errno.EPROTO
            words = getattr(error, "strerror", None) or str(error)
            raise NetlinkError(packets[0][1], why, words) from error
        return [(answers[number], ended[number]) for number in numbers]


def _refusal(what: str, said: wire.Verdict) -> NetlinkError | None:
    if said.number == 0:
        return None
    return NetlinkError(what, said.number, said.words or os.strerror(said.number))


def _as(message: M, answer: wire.Message) -> M:
    decoded: M = type(message)(answer.data)
    decoded.decode()
    return decoded
