"""The primary's side of a VM: try to protect it, and after every failure try again.

One attempt is one session: examine the VM, greet the peer, make the first pass, take checkpoints. What ends a
session decides what follows; the table in `failover.states` says which state that is.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import closing
from functools import partial

import trio

from curling_fd.capture.choice import open_engine
from curling_fd.capture.engine import Inherited
from curling_fd.capture.probe import Choice
from curling_fd.capture.recover import recover, standing_still
from curling_fd.errors import (
    AlreadyProtected,
    ArbiterLost,
    ArbiterUnavailable,
    CaptureError,
    CheckpointTooLarge,
    ColoError,
    ConfigError,
    CurlingError,
    FrameError,
    GuestEnded,
    LinkError,
    NotProtected,
    PeerRefused,
    QemuDied,
    QmpUnreachable,
    StaleGeneration,
    StreamError,
    Unprotected,
    WrongRole,
)
from curling_fd.failover.states import Event, State, allowed, role
from curling_fd.link.transport import FrameLink
from curling_fd.qmp.client import EventStream, QmpClient, inherit_qmp, open_qmp
from curling_fd.service.disks import VmDisks
from curling_fd.service.encounter import greeted
from curling_fd.service.examine import disks_changed, examine
from curling_fd.service.farewell import ours, say_end, withdraw
from curling_fd.service.fence import stop_here
from curling_fd.service.handover import Handover
from curling_fd.service.mirror import DiskMirror
from curling_fd.service.network import Cards, VmNetwork, cards_of, learning
from curling_fd.service.options import Callbacks, Finish, SessionOptions, engine_options
from curling_fd.service.output import Output
from curling_fd.service.pass_report import PassReport
from curling_fd.service.primary import PrimarySession
from curling_fd.service.record import VmRecord, text
from curling_fd.service.restart import Estate, PrimaryLeft, leave_session
from curling_fd.service.statistics import Counters
from curling_fd.system import systemd

#: Seconds between attempts: from the first to the last of these.
_RETRY = (0.5, 10.0)

#: Seconds for a session to come to rest before a restart: for what is on its way to be acknowledged.
REST_WAIT = 5.0

#: Seconds between two questions to an arbiter, or a peer, that did not answer.
_ASK_AGAIN = 1.0

#: Seconds beyond stop_limit after which a checkpoint that is still being taken means that this daemon is
#: broken: the slowest engine gives QEMU 10 s of silence, and 10 s more to finish.
_STUCK = 30.0

#: States in which the VM runs here without a session, and may be paused and resumed.
_ALONE = (State.ACTIVE, State.UNPROTECTED, State.CONNECTING)

#: Checkpoints in a session after which an engine that fails is tried again before it is passed over.
_PROVEN = 100


class Protector:
    """Protects the VM of `record` whenever that is wanted."""

    def __init__(self, record: VmRecord, network: VmNetwork) -> None:
        self._record = record
        self._network = network
        self.session: PrimarySession | None = None
        self._loop: trio.CancelScope | None = None
        self._idle = trio.Event()
        self._idle.set()
        self._unusable: dict[str, str] = {}
        self._outcome: CurlingError | None = None
        self._by_order = False
        self._attempted = False
        self._sure = False  # no backup of an earlier session may take the VM over
        self._output = Output(record)
        self._disks = VmDisks(record)
        self._handover = Handover(record, self._failed)

    @property
    def running(self) -> bool:
        return not self._idle.is_set()

    @property
    def stuck(self) -> bool:
        """A checkpoint has been under way for so long that its own limits must have failed."""
        limit = _STUCK + self._record.host.config.stop_limit
        return self.session is not None and self.session.capturing_for() > limit

    async def protect(self) -> None:
        """Start protecting; returns when the backup holds the first whole checkpoint.

        Raises:
            CurlingError: why it cannot be; nothing was changed.
        """
        record = self._record
        if record.qmp is None or record.config.peer is None:
            key = "qmp" if record.qmp is None else "peer"
            raise ConfigError(f"vms/{record.name}.toml", "protecting needs it", key)
        if self.running:
            raise AlreadyProtected(record.name, record.state.value)
        if not allowed(record.state, Event.PROTECT):
            raise WrongRole(record.name, "protect", record.state.value)
        self.start(first=True)
        while self.running and record.state is not State.PROTECTED:
            await record.changed.park()
        if record.state is not State.PROTECTED:
            raise self._outcome or NotProtected(record.name, record.state.value)

    def start(self, *, first: bool = False, sure: bool = False) -> None:
        """Begin to protect in the background.

        Args:
            first: give up on the first failure and say why.
            sure: the right to run the VM has just been won: no backup of an earlier session has it.
        """
        self._sure = self._sure or sure
        self._idle = trio.Event()
        self._outcome = None
        self._by_order = self._handover.given_up = False
        self._record.host.nursery.start_soon(self._run, first)

    async def tidy(self) -> None:
        """The daemon starts, and does not protect the VM: see to the packets that the one before us held."""
        await self._output.tidy()

    async def unprotect(self) -> None:
        """Stop protecting; the guest runs on alone when this returns."""
        record = self._record
        if not record.wanted and not self.running:
            raise NotProtected(record.name, record.state.value)
        record.remember(wanted=False)
        self._by_order = self._handover.given_up = True
        if self.session is not None:
            self.session.end("by an operator")
        elif self._loop is not None:
            self._loop.cancel()
        await self._idle.wait()

    async def switch(self) -> None:
        """Move the VM to the backup; returns when it runs there.

        Raises:
            NotProtected: there is no whole checkpoint to continue from.
            CurlingError: the backup could not; the VM runs on here.
        """
        record = self._record
        session = self._protected_session()
        self._outcome = None
        record.advance(Event.SWITCH, "by an operator")
        session.switch()
        await record.left(State.SWITCHING)
        # Where it succeeded this host may be on the way to be the backup already.
        if self._outcome is not None or role(record.state) == "primary":
            raise self._outcome or NotProtected(record.name, record.state.value)

    async def pause(self) -> None:
        """Stop the guest until `resume`, in a moment in which QEMU does not forget it."""
        if self.session is None and self._record.state in _ALONE:
            await self._tell_qemu("stop", paused=True)
        else:
            await self._protected_session().pause()

    async def resume(self) -> None:
        """Let a paused guest run."""
        if self.session is None and self._record.state in _ALONE:
            await self._tell_qemu("cont", paused=False)
        else:
            await self._protected_session().resume()

    async def _tell_qemu(self, command: str, *, paused: bool) -> None:
        assert self._record.qmp is not None
        async with open_qmp(self._record.qmp) as qmp:
            await qmp.execute(command)
        self._paused(paused)

    def take_up(self, estate: Estate, left: PrimaryLeft) -> None:
        """Go on with what the daemon before us has left, in the background."""
        record = self._record
        record.take_up(State.PROTECTED, left.choice, left.ram_bytes, left.paused)
        self._idle = trio.Event()
        record.host.nursery.start_soon(self._run, False, (estate, left))

    async def stop(self) -> None:
        """The daemon ends: leave the session to the next, or else leave the guest running and remember that
        protection is wanted.
        """
        if self.session is not None and self._record.state is State.PROTECTED and systemd.manager().keeps:
            self.session.restart()
            with trio.move_on_after(REST_WAIT):
                await self._idle.wait()
                return
        if self.session is not None:
            self.session.end("the daemon on the primary stops")
        elif self._loop is not None:
            self._loop.cancel()
        with trio.move_on_after(self._record.host.config.stop_limit * 2):
            await self._idle.wait()

    async def yield_to(self, generation: int, host: str) -> None:
        """`host` runs the VM by a newer right: stop it here."""
        if self._loop is not None:
            self._loop.cancel()
            await self._idle.wait()
        record = self._record
        record.remember(generation=generation)
        await self._fence(Event.STALE, f"{host} runs the VM, at generation {generation}", generation)

    def _protected_session(self) -> PrimarySession:
        if self.session is None or self._record.state is not State.PROTECTED:
            raise NotProtected(self._record.name, self._record.state.value)
        return self.session

    # The loop of attempts.

    async def _run(self, first: bool, inherited: tuple[Estate, PrimaryLeft] | None = None) -> None:
        record = self._record
        delay = _RETRY[0]
        try:
            with trio.CancelScope() as self._loop:
                while True:
                    if inherited is None:
                        record.advance(Event.PROTECT)
                    committed = record.counters.committed
                    try:
                        if inherited is not None:
                            taken, inherited = inherited, None
                            await self._go_on(*taken)
                        else:
                            await self._attempt()
                        return
                    except Exception as raised:
                        self._outcome = error = ours(raised)
                        again = await self._settle(error)
                        await self._output.settle(sure=self._sure)
                        if not again:
                            return
                        if self._by_order or (first and not record.wanted and not self._has_fallback()):
                            return
                    progressed = record.counters.committed != committed
                    delay = _RETRY[0] if progressed else min(delay * 2, _RETRY[1])
                    await trio.sleep(delay)
        finally:
            self._loop = None
            self.session = None
            if first and not record.wanted and record.state is State.UNPROTECTED:
                record.rest(text(self._outcome) if self._outcome else None)
            elif self._by_order and allowed(record.state, Event.UNPROTECT):
                record.rest("unprotected by an operator")
            with trio.CancelScope(shield=True):
                await self._disks.end()
                await self._output.settle(sure=True)
            self._by_order = self._handover.given_up = False
            self._idle.set()
            record.stir()

    def _has_fallback(self) -> bool:
        """Whether the engine of the last attempt failed, and `auto` has another one to try."""
        choice, auto = self._record.choice, self._record.config.engine == "auto"
        return auto and choice is not None and choice.engine in self._unusable and choice.engine != "precopy"

    async def _settle(self, error: CurlingError) -> bool:
        """Go to the state that `error` leads to; True if another attempt makes sense."""
        record = self._record
        match error:
            case Unprotected():
                # The backup may not have heard of it: it loses its claim before the guest goes on alone.
                record.advance(Event.UNPROTECT, text(error))
                await self._win_alone()
                return False
            case QmpUnreachable() if record.taken_over:
                # It ran here since a takeover, and its monitor is gone: this host was booted anew, say.
                record.remember(wanted=False, qmp=None)
                record.advance(Event.GUEST_ENDED, text(error))
                return False
            case GuestEnded():
                record.remember(wanted=False, qmp=None)
                record.advance(Event.GUEST_ENDED, error.how)
                return False
            case QemuDied():
                if record.state is not State.IDLE:  # else the backup has taken it
                    record.remember(wanted=False, qmp=None)
                    record.advance(Event.GUEST_ENDED, text(error))
                return False
            case StaleGeneration():
                await self._fence(Event.STALE, text(error), error.theirs)
                return False
            case ArbiterLost():
                event = Event.LOST if record.state is State.HOLDING else Event.STALE
                await self._fence(event, text(error), error.generation)
                return False
            case LinkError() | FrameError() if not isinstance(error, PeerRefused):
                event = Event.LINK_LOST
            case CaptureError() | StreamError() | ColoError():
                proven = record.counters.committed >= _PROVEN
                if record.choice and not proven and not isinstance(error, CheckpointTooLarge):
                    self._unusable[record.choice.engine] = text(error)
                event = Event.CAPTURE_FAILED
            case _:
                event = Event.REFUSED
        if record.state is State.UNPROTECTED:
            return True  # a handover that failed has led here already
        if record.arbiter.automatic and record.state in (State.PROTECTED, State.SWITCHING):
            event = Event.LINK_LOST  # the backup has a replica: without its consent only the arbiter's counts
        if not allowed(record.state, event):
            event = Event.REFUSED
        if allowed(record.state, event):  # else a handover that failed has settled it already
            record.advance(event, text(error))
        if record.state is State.HOLDING:
            return await self._win_alone()
        return True

    async def _win_alone(self) -> bool:
        """Go on without a backup that may have a checkpoint, if the arbiter says so. True if it did."""
        record = self._record
        while True:
            try:
                await record.swap(incumbent=True)
            except ArbiterLost as error:
                await self._fence(Event.LOST, text(error), error.generation)
                return False
            except ArbiterUnavailable as error:
                if record.reason != text(error):
                    record.reason = text(error)
                    record.note("holding", text(error))
                await trio.sleep(_ASK_AGAIN)
                continue
            record.advance(Event.WON, record.reason)
            return True

    async def _fence(self, event: Event, reason: str, generation: int) -> None:
        """Another host has the right to run the VM: stop it here, at once."""
        record = self._record
        if allowed(record.state, event):
            record.advance(event, reason, theirs=generation)
        await self._output.drop()
        await stop_here(record, reason, outright=self._handover.under_way)
        await self._output.discard()
        self._handover.under_way = False

    # One attempt.

    async def _attempt(self) -> None:
        record, config = self._record, self._record.config
        assert record.qmp is not None and config.peer is not None
        async with open_qmp(record.qmp) as qmp:
            # Only the daemon before us can have left something; any other migration is an administrator's.
            await recover(qmp, ours=record.wanted and not self._attempted)
            self._attempted = True
            await self._output.adopt(qmp)
            record.paused = await qmp.status() == "paused"
            with qmp.events() as events:
                examined = await examine(
                    qmp,
                    config.engine,
                    shared=config.shared_disks,
                    scratch=config.scratch_disks,
                    unusable=self._unusable,
                )
                record.choice = examined.choice
                record.ram_bytes = sum(block.size for block in examined.memory)
                basis = self._disks.basis(qmp.pid, examined.disks)
                async with greeted(record, examined, basis, self._sure, self._is_sure) as (link, alike):
                    record.advance(Event.PREPARED)
                    mirror = await self._disks.mirror(qmp, examined.disks)
                    await self._session_on(
                        qmp, events, examined.choice, examined.cards, link, mirror=mirror, alike=alike
                    )

    async def _go_on(self, estate: Estate, left: PrimaryLeft) -> None:
        """Go on with the session that the daemon before us has left."""
        try:
            sock = trio.socket.from_stdlib_socket(socket.socket(fileno=estate.one("link")))
            with closing(FrameLink(sock)) as link:
                async with inherit_qmp(estate.one("qmp"), left.monitor) as qmp:
                    with qmp.events() as events:
                        qmp.replay(left.events)
                        await self._output.adopt(qmp)
                        self._record.counters.inherit(left.totals)
                        cards = await cards_of(qmp)
                        mirror = self._disks.inherit(left.mirror, estate.take("disks."))
                        await self._session_on(
                            qmp, events, left.choice, cards, link, (estate, left), mirror=mirror
                        )
        finally:
            estate.close()

    async def _session_on(
        self,
        qmp: QmpClient,
        events: EventStream,
        choice: Choice,
        cards: Cards,
        link: FrameLink,
        inherited: tuple[Estate, PrimaryLeft] | None = None,
        mirror: DiskMirror | None = None,
        alike: Sequence[bool] = (),
    ) -> None:
        record, config = self._record, self._record.config
        report = PassReport(record)
        engine_left = None
        if inherited is not None:
            estate, left = inherited
            engine_left = Inherited(left.engine, estate.take())
        else:
            record.counters = Counters(record.counters)
            await self._output.attach(qmp, cards)
        will = mirror.last_will if mirror is not None else b""
        options = engine_options(config, record.host.config, self._output.hold, report.limit(), will)
        async with (
            standing_still(qmp, lambda: record.paused),
            open_engine(qmp, choice, options, engine_left) as engine,
        ):
            engine.hold(record.paused)
            heard = trio.Event()
            committed, ended = partial(self._committed, report), partial(withdraw, record, heard)
            disks = mirror.disks if mirror is not None else ()
            changed = partial(disks_changed, qmp, disks, config.shared_disks, config.scratch_disks)
            callbacks = Callbacks(changed, report.sent, report.copied, committed, self._paused, ended)
            session = PrimarySession(
                qmp,
                events,
                engine,
                link,
                self._output.hold,
                record.counters,
                SessionOptions.of(config, record.host.config, record.generation),
                callbacks,
                inherited[1].sequence if inherited else 0,
                mirror,
                alike,
            )
            if inherited is not None:
                session.stops.paused = inherited[1].paused
                if inherited[1].peer_rests:
                    session.expect_peer()
            self.session = session
            try:
                async with learning(cards.ports, session.note):
                    finish = await session.run()
                if finish is Finish.RESTART:
                    await leave_session(record, session, engine, qmp, events, link, mirror)
                    self._disks.forget()
                    return
                await self._handover.hand_over(session, engine, qmp, "a planned switch")
                await self._left_for_good()
            except (GuestEnded, Unprotected) as end:
                await say_end(link, record.generation, text(end), heard)
                raise
            except QemuDied:
                await self._handover.give_up_dead(session)
                await self._left_for_good()
                raise
            finally:
                self.session = None

    def _is_sure(self) -> None:
        self._sure = True

    async def _left_for_good(self) -> None:
        """The VM has gone from here."""
        await self._disks.end()
        await self._output.discard()
        await self._network.withdraw()

    def _committed(self, report: PassReport) -> None:
        self._record.remember(wanted=True)
        if self._record.choice is not None:
            self._unusable.pop(self._record.choice.engine, None)
        if self._record.state is State.SYNCING:
            report.over()
            self._record.advance(Event.COMMITTED)

    def _failed(self, error: CurlingError) -> None:
        self._outcome = error

    def _paused(self, paused: bool) -> None:
        self._record.paused = paused
        self._record.note("paused" if paused else "resumed", "by an operator")
