"""The first frames of a link, on the primary: who we are, and which VM it is about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import trio

from curling_fd import __version__
from curling_fd.capture.probe import Choice
from curling_fd.disk.epoch import HARD
from curling_fd.errors import FrameError, InsecurePeer, LinkLost, PeerUnreachable
from curling_fd.link.frames import PROTOCOL, Kind
from curling_fd.link.transport import FrameLink, Received, connect
from curling_fd.service.config import Address, VmConfig
from curling_fd.service.examine import Examined
from curling_fd.service.farewell import raise_refusal

#: Seconds the peer may take to answer a greeting.
GREETING_TIMEOUT = 5.0

#: Seconds without an answer after which a host counts as not reachable; a kernel that lives answers at once.
_REACH_TIMEOUT = 0.3

#: Seconds the peer may take to find out how it is: its QEMU and its arbiter have half of that each.
PROBE_TIMEOUT = 12.0

#: Seconds the backup may take to start a standby QEMU and see it answer.
PREPARE_TIMEOUT = 30.0


def check_secure(sock: trio.socket.SocketType, insecure: bool) -> None:
    """Refuse a connection that leaves the host, until TLS exists.

    Raises:
        InsecurePeer: the peer is not on loopback and the configuration does not say `insecure = true`.
    """
    try:
        peer = sock.getpeername()[0]
    except OSError:  # reset before we looked
        raise LinkLost("the peer closed the link") from None
    if not insecure and not (peer.startswith(("127.", "::ffff:127.")) or peer == "::1"):
        raise InsecurePeer(peer)


async def dial(address: Address, insecure: bool) -> FrameLink:
    """Connect to the daemon at `address`.

    Raises:
        PeerUnreachable, InsecurePeer: it cannot or must not be.
    """
    sock = await connect((address.host, address.port))
    try:
        check_secure(sock, insecure)
        return FrameLink(sock)
    except BaseException:
        sock.close()
        raise


async def answers(address: Address | None) -> bool:
    """Does anything at `address` answer, be it with a refusal?"""
    if address is None:
        return False
    with trio.move_on_after(_REACH_TIMEOUT):
        try:
            sock = await connect((address.host, address.port))
        except PeerUnreachable as error:
            return "refused" in error.problem.lower()
        sock.close()
        return True
    return False


async def greet(link: FrameLink, host: str, vm: str, generation: int) -> int:
    """Say hello; returns the highest generation of the VM the peer knows of.

    Raises:
        StaleGeneration: the peer runs the VM, by a right newer than ours.
        PeerRefused: it does not want to be the backup.
        PeerIncompatible, LinkError: we cannot talk.
    """
    content = {"protocol": PROTOCOL, "software": __version__, "host": host, "vm": vm}
    await link.send(Kind.HELLO, generation, content=content)
    answer = await _answer(link, Kind.WELCOME, GREETING_TIMEOUT, generation)
    return answer.header.generation


async def probe(link: FrameLink, host: str, vm: str, question: Mapping[str, Any]) -> Received:
    """Ask the peer how it is, for `vm`; nothing begins by it. Returns its FACTS frame, unread.

    Raises:
        PeerRefused: it does not know the VM.
        PeerIncompatible, LinkError, FrameError: we cannot talk.
    """
    content = {"protocol": PROTOCOL, "software": __version__, "host": host, "vm": vm, **question}
    await link.send(Kind.PROBE, 0, content=content)
    return await _answer(link, Kind.FACTS, PROBE_TIMEOUT, 0)


async def define(
    link: FrameLink,
    generation: int,
    examined: Examined,
    config: VmConfig,
    token: str | None,
    basis: str,
) -> tuple[bool, ...]:
    """Describe the VM and wait until a standby for it waits.

    Args:
        basis: of the log of its disks.

    Returns:
        For each disk, whether the backup has a copy that is known by that basis.

    Raises:
        PeerRefused: the backup cannot make one; it says why.
    """
    content: dict[str, Any] = {
        "argv": list(examined.argv),
        "machine": examined.machine,
        "version": list(examined.choice.version),
        "memory": [[block.name, block.size] for block in examined.memory],
        "max_checkpoint": config.max_checkpoint,
        "token": token,
        "engine": _described(examined.choice),
        "ports": [port.encode() for port in examined.cards.ports],
        "disks": [disk.encode() for disk in examined.disks],
        "disk_basis": basis,
        "max_disk_log": HARD * config.disk_log_limit,
        "taps": {str(number): name for number, name in examined.cards.taps.items()},
    }
    await link.send(Kind.DEFINE, generation, content=content)
    answer = await _answer(link, Kind.PREPARED, PREPARE_TIMEOUT, generation)
    alike = answer.content.get("alike")
    if not isinstance(alike, list) or len(alike) != len(examined.disks):
        raise FrameError("an answer to the description of a VM that does not fit its disks")
    return tuple(entry is True for entry in alike)


def _described(choice: Choice) -> dict[str, Any]:
    return {"name": choice.engine, "reason": choice.reason, "accelerator": choice.accelerator}


async def _answer(link: FrameLink, kind: Kind, timeout: float, generation: int) -> Received:
    with trio.move_on_after(timeout):
        while True:
            received = await link.receive()
            if received.header.kind is kind:
                return received
            if received.header.kind is Kind.REFUSE:
                raise_refusal(received, generation)
            if received.header.kind is not Kind.HEARTBEAT:
                raise FrameError(f"a {received.header.kind.name} frame where {kind.name} was due")
    raise LinkLost(f"the peer did not answer within {timeout:g} s")
