"""One session of protection, on the backup: take pieces and checkpoints, keep the replica.

`_receive` reads frames while `_apply` stages and commits the one before; a checkpoint is acknowledged as soon
as it is staged, for from then on its commit cannot fail. Losing the link ends the session between two
commits, never within one.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from attrs import frozen

from curling_fd.errors import FrameError, LinkLost
from curling_fd.link.frames import Kind
from curling_fd.link.pulse import REST_LIMIT, Pulse, rest_seconds
from curling_fd.link.transport import FrameLink, Received
from curling_fd.replica.image import Replica, Staged
from curling_fd.service.copies import SessionCopies
from curling_fd.service.statistics import Counters
from curling_fd.system.buffers import Buffer, BufferPool
from curling_fd.system.nursery import open_nursery
from curling_fd.system.threads import work
from curling_fd.vmstate.records import PAGE_SIZE

#: Seconds from PREPARED to the primary's first frame: it starts a guard, and QEMU may be slow to answer.
_BEGIN_TIMEOUT = 10.0

#: Staging buffers: one is filled while the other is committed.
STAGING = 2

#: No VM has more memory than this, whatever a peer says.
_MOST_BYTES = 1 << 47


@frozen
class Dropped:
    """The primary does not need the replica any more."""

    reason: str


@frozen
class HandedOver:
    """The primary gave the VM up; run it from the last commit, unless the operator had `paused` it."""

    reason: str
    paused: bool


@frozen
class AtRest:
    """The next daemon on this host can go on. `peer_rests`: the primary's is restarted as well."""

    peer_rests: bool


class BackupSession:
    """Follows one primary over one link. Borrows link and replica.

    A session on a replica that is a checkpoint already goes on where the daemon before us left it.

    Args:
        max_raw: the largest frame the primary may send, in bytes.
        rehearse: called when the first checkpoint is in the replica and not acknowledged yet; returns when a
            standby has shown that it can load it.
        standby_failed: returns never, and raises when the standby is gone; watched once it has rehearsed.
        committed: called after the first acknowledgement.
        learned: told the guest's addresses, as the primary has sent them.
        copies: of the disks, if any are replicated; borrowed.

    Attributes:
        paused: the operator has paused the guest on the primary.
    """

    def __init__(
        self,
        link: FrameLink,
        replica: Replica,
        counters: Counters,
        *,
        generation: int,
        max_raw: int,
        heartbeat_interval: float,
        failure_timeout: float,
        rehearse: Callable[[], Awaitable[None]],
        standby_failed: Callable[[], Awaitable[None]],
        committed: Callable[[], None],
        learned: Callable[[Any], None],
        copies: SessionCopies | None = None,
        paused: bool = False,
        peer_rests: bool = False,
    ) -> None:
        self.paused = paused
        self._disks = copies
        self._copies = copies.copies if copies is not None else None
        self._link = link
        self._replica = replica
        self._counters = counters
        self._generation = generation
        self._pulse = Pulse(link, generation, heartbeat_interval, failure_timeout)
        if peer_rests:
            self._pulse.expect(REST_LIMIT)
        self._restarting = False
        self._rehearse = rehearse
        self._standby_failed = standby_failed
        self._committed = committed
        self._learned = learned
        self._first_committed = trio.Event()
        self._begun = trio.Event()
        if replica.committed:
            self._first_committed.set()
            self._begun.set()
        self._pool = BufferPool("curling-staging", STAGING, max_raw)
        self._interrupted = trio.Event()
        self._resting = trio.CancelScope()
        self._why = ""
        self._expected = {Kind.BULK: 0, Kind.DISK: 0}
        self._sequence = replica.committed
        link.max_raw = max_raw
        link.acquire = self._pool.acquire
        link.release = self._pool.release

    async def run(self) -> Dropped | HandedOver | AtRest:
        """Follow the primary until it says that it is over.

        Raises:
            LinkError: the link broke, or the primary fell silent.
            RemoteProtocolError: the primary sent what it must not.
            StandbyFailed: the waiting QEMU exited.
        """
        outcome: Dropped | HandedOver | AtRest | None = None
        try:
            async with open_nursery() as nursery:
                send, receive = trio.open_memory_channel[Received](0)
                nursery.start_soon(self._pulse.keep)
                nursery.start_soon(self._watch_pulse)
                nursery.start_soon(self._watch_standby)
                nursery.start_soon(self._notice_interruption)
                if self._copies is not None:
                    nursery.start_soon(self._copies.keep_synced)
                async with trio.open_nursery() as applying:
                    applying.start_soon(self._apply_all, receive)
                    async with send:
                        outcome = await self._receive(send)
                nursery.cancel_scope.cancel()
        finally:
            self._pool.close()
        assert outcome is not None
        return outcome

    async def restart(self) -> None:
        """Leave the session to the next daemon: `run` returns AtRest once nothing is under way."""
        restarts_too = self._pulse.resting  # and its next daemon is told when it is there
        self._restarting = True
        await self._pulse.rest(REST_LIMIT)
        await self._link.send(Kind.REST, self._generation, content={"seconds": REST_LIMIT})
        if restarts_too:
            self._resting.cancel()

    @property
    def can_rest(self) -> bool:
        """Whether there is something that the next daemon can go on with."""
        return self._first_committed.is_set()

    def interrupt(self, why: str) -> None:
        """Let go of the primary: `run` raises LinkLost. A checkpoint that is whole is committed first."""
        self._why = why
        self._interrupted.set()

    async def _notice_interruption(self) -> None:
        await self._interrupted.wait()
        raise LinkLost(self._why)

    async def _receive(self, channel: trio.MemorySendChannel[Received]) -> Dropped | HandedOver | AtRest:
        with self._resting:
            return await self._receive_all(channel)
        return AtRest(peer_rests=True)

    async def _receive_all(self, channel: trio.MemorySendChannel[Received]) -> Dropped | HandedOver | AtRest:
        while True:
            received = await self._link.receive()
            self._begun.set()
            if not self._restarting:
                self._pulse.wake()
            header, content = received.header, received.content
            if received.buffer is not None:
                try:
                    self._check_order(received)
                    await channel.send(received)
                except BaseException:
                    self._pool.release(received.buffer)
                    raise
                continue
            if header.generation != self._generation:
                raise FrameError(f"a {header.kind.name} frame of generation {header.generation}")
            match header.kind:
                case Kind.HEARTBEAT:
                    pass
                case Kind.REST | Kind.RESTING if self._restarting:
                    # The next frame is for the next daemon.
                    return AtRest(peer_rests=header.kind is Kind.REST)
                case Kind.REST:
                    await self._pulse.rest(rest_seconds(received))
                    await self._link.send(Kind.RESTING, self._generation)
                case Kind.RESTING:
                    pass  # to the daemon before us, which did not wait for it
                case Kind.OFFER:
                    await channel.send(received)  # answered when what came before it is applied
                case Kind.NOTE:
                    self.paused = bool(content.get("paused", self.paused))
                    if "learned" in content:
                        self._learned(content["learned"])
                case Kind.END:
                    return Dropped(str(content.get("reason", "no reason given")))
                case Kind.HANDOVER:
                    if not 0 < header.sequence <= self._sequence:
                        raise FrameError(f"a handover of checkpoint {header.sequence}, which never came")
                    return HandedOver(str(content.get("reason", "")), bool(content.get("paused")))
                case _:
                    raise FrameError(f"a {header.kind.name} frame, which a primary does not send now")

    def _check_order(self, received: Received) -> None:
        """Every piece and every checkpoint exactly once, in order, of this generation."""
        header = received.header
        if header.generation != self._generation:
            raise FrameError(f"a {header.kind.name} frame of generation {header.generation}")
        if header.kind in self._expected:
            self._expected[header.kind] += 1
            expected = self._expected[header.kind]
        else:
            self._sequence += 1
            expected = self._sequence
        if header.sequence != expected:
            raise FrameError(f"{header.kind.name} {header.sequence} where {expected} was due")

    async def _apply_all(self, channel: trio.MemoryReceiveChannel[Received]) -> None:
        async for received in channel:
            buffer = received.buffer
            if buffer is None:
                await self._compare(received)
                continue
            try:
                if received.header.kind is Kind.BULK:
                    await self._take_piece(received, buffer)
                elif received.header.kind is Kind.DISK:
                    await self._take_disk(received, buffer)
                else:
                    await self._commit(received, buffer)
            finally:
                self._pool.release(buffer)

    async def _take_piece(self, received: Received, buffer: Buffer) -> None:
        await trio.to_thread.run_sync(self._replica.bulk, buffer.view, received.header.length)
        self._counters.bytes_total += received.header.length
        await self._link.send(Kind.BULK_ACK, self._generation, received.header.sequence)

    async def _take_disk(self, received: Received, buffer: Buffer) -> None:
        """A part of the first copy of the disks, or what was written meanwhile."""
        header = received.header
        if self._copies is None or self._disks is None or self._sequence:
            raise FrameError("a piece of a disk, which was not due")
        self._disks.begun = True
        await work(header.length, self._copies.check, buffer.view, 0, header.length)
        try:
            await trio.to_thread.run_sync(self._copies.apply, buffer.view, 0, header.length)
        except BaseException:
            self._disks.spoiled = True
            raise
        self._counters.bytes_total += header.length
        await self._link.send(Kind.DISK_ACK, self._generation, header.sequence)

    async def _compare(self, received: Received) -> None:
        """Say which of the blocks that are offered the copy lacks."""
        if self._copies is None or self._sequence:
            raise FrameError("an offer of blocks of a disk, which was not due")
        answer = await trio.to_thread.run_sync(self._copies.answer, received.payload)
        await self._link.send_payload(Kind.WANT, self._generation, received.header.sequence, answer)

    def _stage(self, sequence: int, view: memoryview, length: int) -> Staged:
        staged = self._replica.stage(sequence, view, length)
        start, end = staged.disk
        if self._copies is not None:
            self._copies.check(view, start, end)
        elif start != end:
            raise FrameError("a checkpoint with a disk log, and no disk is replicated")
        return staged

    def _make(self, staged: Staged) -> None:
        """Have memory and disks be the checkpoint `staged`.

        Raises:
            DiskCopyFailed: a disk could not be: there is no replica any more.
        """
        self._replica.commit(staged)
        if self._copies is not None and self._disks is not None:
            self._disks.begun = True
            try:
                self._copies.apply(staged.view, *staged.disk)
            except BaseException:
                self._disks.spoiled = True
                raise
            self._disks.sequence = staged.sequence

    async def _commit(self, received: Received, buffer: Buffer) -> None:
        header = received.header
        length = header.length
        staged = await work(length, self._stage, header.sequence, buffer.view, length)
        if header.sequence == 1:
            await trio.to_thread.run_sync(self._make, staged)
            await self._rehearse()
            await self._link.send(Kind.ACK, self._generation, 1)
            self._first_committed.set()
            self._committed()
        else:
            # Shielded: what is acknowledged is committed, even if the link breaks at this very moment.
            with trio.CancelScope(shield=True):
                try:
                    await self._link.send(Kind.ACK, self._generation, header.sequence)
                finally:
                    await self._work(length, staged)
        self._counters.captured(sum(run.count for run in staged.runs), length)
        self._counters.commit(header.sequence)

    async def _work(self, length: int, staged: Staged) -> None:
        if self._copies is not None and staged.disk[0] != staged.disk[1]:
            await trio.to_thread.run_sync(self._make, staged)  # a disk can be slow
        else:
            await work(length, self._make, staged)

    async def _watch_pulse(self) -> None:
        """Watch the primary from its first frame on: before it, the primary prepares its QEMU."""
        with trio.move_on_after(_BEGIN_TIMEOUT):
            await self._begun.wait()
        await self._pulse.watch()

    async def _watch_standby(self) -> None:
        await self._first_committed.wait()
        await self._standby_failed()


def definition_problem(content: dict[str, Any]) -> str | None:
    """What is wrong with the content of a DEFINE frame, or None."""
    wanted = {"argv": list, "machine": str, "version": list, "memory": list}
    for key, kind in wanted.items():
        if not isinstance(content.get(key), kind):
            return f"its `{key}` is missing or of another type"
    if not content["argv"] or not all(_is_word(word) for word in content["argv"]):
        return "its command line is not one"
    if not isinstance(content.get("disks"), list) or not _is_word(content.get("disk_basis")):
        return "its `disks` or their basis are missing or of another type"
    if not _is_word(content["machine"]) or not all(isinstance(part, int) for part in content["version"]):
        return "its machine type or version is not one"
    if not isinstance(content.get("engine", {}), dict):
        return "its `engine` is of another type"
    for entry in content["memory"]:
        if not (
            isinstance(entry, list)
            and len(entry) == 2
            and _is_word(entry[0])
            and isinstance(entry[1], int)
            and 0 < entry[1] <= _MOST_BYTES
            and entry[1] % PAGE_SIZE == 0
        ):
            return "its list of memory is not one"
    for key in ("max_checkpoint", "max_disk_log"):
        limit = content.get(key)
        if not isinstance(limit, int) or not 0 < limit <= _MOST_BYTES:
            return f"its `{key}` is not a size"
    return None


def _is_word(value: object) -> bool:
    """A text that can be a word of a command line: without NUL, and encodable."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True
