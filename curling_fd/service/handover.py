"""Giving the VM of this host to its backup: in a planned switch, or because its QEMU is gone.

Between the word to the backup and its answer the VM may run there. So nothing starts it here before the
answer is known (I3), not even the death of this daemon.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress

import trio

from curling_fd.capture.engine import Engine
from curling_fd.errors import (
    ArbiterError,
    CurlingError,
    FrameError,
    LinkError,
    LinkLost,
    PeerRefused,
    QmpError,
    StaleGeneration,
)
from curling_fd.failover.states import Event, State
from curling_fd.qmp.client import QmpClient
from curling_fd.service.greeting import dial, greet
from curling_fd.service.primary import PrimarySession
from curling_fd.service.record import VmRecord, text

#: Seconds between two questions to an arbiter, or a peer, that did not answer.
_ASK_AGAIN = 1.0

#: Seconds a QEMU that was told to quit may take before it is killed.
_QUIT_TIMEOUT = 10.0


class Handover:
    """Hands the VM of `record` over.

    Args:
        failed: told of an error before the state shows it.

    Attributes:
        under_way: the guest is kept stopped, for the backup may run it.
        given_up: the operator says that the VM is to run here.
    """

    def __init__(self, record: VmRecord, failed: Callable[[CurlingError], None]) -> None:
        self.under_way = False
        self.given_up = False
        self._record = record
        self._failed = failed

    async def hand_over(self, session: PrimarySession, engine: Engine, qmp: QmpClient, reason: str) -> None:
        """The guest is stopped and its last checkpoint committed: let the backup run it.

        Until the answer is known nothing starts it here: not leaving the engine, not a guard, not the next
        daemon, which finds the VM fenced.
        """
        record = self._record
        engine.keep_stopped()
        record.remember(fenced="it was being handed over, and no answer came")
        self.under_way = True
        try:
            generation = await session.hand_over(reason)
        except PeerRefused as error:
            self._failed(error)
            await self._take_back(engine)
            record.advance(Event.NOT_TAKEN, text(error))
            raise
        except (LinkError, FrameError) as error:
            self._failed(error)
            record.advance(Event.LINK_LOST, f"the handover is in doubt: {text(error)}")
            taken = await self._resolve_doubt()
            if taken is None:
                await self._take_back(engine)
                record.advance(Event.WON, "the backup did not take the VM")
                raise
            generation = taken
        with suppress(QmpError):
            if record.hold is not None:
                await record.hold.let_go_stopped()
        await quit_qemu(qmp)
        record.remember(generation=generation, wanted=False, qmp=None, fenced=None, elsewhere=True)
        self.under_way = False
        if record.state is State.HOLDING:
            record.advance(Event.LOST, "the backup runs the VM")
        else:
            record.advance(Event.TAKEN, "the VM runs on the other host")

    async def _take_back(self, engine: Engine) -> None:
        self.under_way = False
        self._record.remember(fenced=None)
        await engine.resume()

    async def _resolve_doubt(self) -> int | None:
        """Find out whether the backup took the VM: its generation there, or None if it runs here again.

        The guest stays stopped meanwhile: this is the one place where I3 comes before I5. An operator who
        knows better says `unprotect`.
        """
        record, config = self._record, self._record.config
        assert config.peer is not None
        while not self.given_up:
            try:
                link = await dial(config.peer, record.host.config.insecure)
                try:
                    await record.claim(await greet(link, record.host.name, record.name, record.generation))
                    return None
                finally:
                    link.close()
            except StaleGeneration as error:
                return error.theirs
            except (LinkError, FrameError):
                if await self._won_in_doubt():
                    return None
            except ArbiterError as error:
                record.note("holding", text(error))
            await trio.sleep(_ASK_AGAIN)
        return None

    async def _won_in_doubt(self) -> bool:
        """The backup does not answer: does the arbiter give us the VM? If not, the backup decides."""
        record = self._record
        if not record.arbiter.automatic:
            return False
        try:
            await record.swap(incumbent=True)
        except ArbiterError as error:
            record.note("holding", text(error))
            return False
        return True

    async def give_up_dead(self, session: PrimarySession) -> None:
        """QEMU is gone: the backup may have the VM, from its last commit."""
        record = self._record
        if record.state is not State.PROTECTED:
            return
        record.advance(Event.SWITCH, "its QEMU died on this host")
        try:
            generation = await session.hand_over("its QEMU died on the primary")
        except LinkLost as error:
            record.advance(Event.LINK_LOST, text(error))
            return
        except LinkError as error:
            record.advance(Event.NOT_TAKEN, text(error))
            return
        record.remember(generation=generation, wanted=False, qmp=None, elsewhere=True)
        record.advance(Event.TAKEN, "its QEMU died here; the other host runs the VM")


async def quit_qemu(qmp: QmpClient) -> None:
    """End a QEMU whose VM runs elsewhere, before anything could start its guest again."""
    try:
        pidfd = os.pidfd_open(qmp.pid)
    except OSError:
        pidfd = -1
    try:
        try:
            await qmp.execute("quit")
        except QmpError:
            pass
        with trio.move_on_after(_QUIT_TIMEOUT):
            await qmp.disconnected.wait()
        if not qmp.disconnected.is_set() and pidfd >= 0:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        if pidfd >= 0:
            os.close(pidfd)
