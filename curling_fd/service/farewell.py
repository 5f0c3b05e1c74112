"""How a session and its link end: what is said to the other host, and what its last word means here."""

from __future__ import annotations

import logging
from contextlib import suppress

import trio

from curling_fd.errors import (
    ArbiterError,
    ConfigError,
    CurlingError,
    EngineFailed,
    LinkClosed,
    LinkError,
    PeerIncompatible,
    PeerRefused,
    StaleGeneration,
)
from curling_fd.link.frames import PROTOCOL, Kind
from curling_fd.link.transport import FrameLink, Received
from curling_fd.service.record import VmRecord

#: Seconds for the other host to hear of an end: long enough for a network, and short beside a failure
#: timeout, after which it may ask for the right to run the VM.
_END_TIMEOUT = 0.3

_logger = logging.getLogger("curling")


def refusal(received: Received, generation: int) -> LinkError:
    """The error in a REFUSE frame that came when we were at `generation`."""
    content = received.content
    if content.get("kind") == "StaleGeneration" and received.header.generation > generation:
        return StaleGeneration(ours=generation, theirs=received.header.generation)
    return PeerRefused(
        str(content.get("kind", "")),
        str(content.get("text", "no reason given")),
        str(content.get("remedy", "")),
    )


def raise_refusal(received: Received, generation: int) -> None:
    """Raise what a REFUSE frame says."""
    content = received.content
    if content.get("kind") == "PeerIncompatible" and isinstance(content.get("protocol"), int):
        raise PeerIncompatible(ours=PROTOCOL, theirs=content["protocol"])
    raise refusal(received, generation)


async def say_end(link: FrameLink, generation: int, reason: str, heard: trio.Event) -> None:
    """Tell the backup that the replica is not needed any more; `heard` is set if it hangs up on it."""
    with trio.move_on_after(_END_TIMEOUT):
        try:
            await link.send(Kind.END, generation, content={"reason": reason})
            while True:
                await link.receive()
        except LinkClosed:
            heard.set()
        except CurlingError:
            pass  # the backup will notice; it has no right to run the VM either way


def withdraw(record: VmRecord, heard: trio.Event) -> None:
    """The guest has ended: see in the background that the backup does not start it again.

    One that has not `heard` of it in good time, behind a dead cable, takes it for lost and asks the arbiter.
    """

    async def claim() -> None:
        with trio.move_on_after(_END_TIMEOUT):
            await heard.wait()
            return
        with suppress(ArbiterError, ConfigError):
            await record.swap(incumbent=True)

    if record.arbiter.automatic:
        record.host.nursery.start_soon(claim)


def ours(error: Exception) -> CurlingError:
    """`error`, or one of ours in its place: a bug, or a host out of something, must not end the daemon."""
    if isinstance(error, CurlingError):
        return error
    _logger.error("a session of protection failed unexpectedly", exc_info=error)
    return EngineFailed("any", f"curlingd hit an error it did not expect ({type(error).__name__})")
