"""The backup's side of a VM: take a primary's offer, follow it, and take the VM over when it is right.

Losing the primary gives no right to run its VM. With an arbiter that can say no, silence leads to a question
to it; a link that was closed by the other side's kernel does not even do that, for then the host over there
is alive and its guest may well run: a daemon that died comes back, and finds us waiting.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import trio

from curling_fd.errors import (
    ArbiterLost,
    ConfigError,
    CurlingError,
    DiskError,
    HostsDisagree,
    LinkClosed,
    LinkError,
    LinkLost,
    NotProtected,
    PrimaryAlive,
    RemoteProtocolError,
    StaleGeneration,
    StandbyFailed,
    WrongRole,
)
from curling_fd.failover.states import REPLICA_VALID, RUNS, Event, State, allowed, role
from curling_fd.link.frames import Kind
from curling_fd.link.transport import FrameLink, Received
from curling_fd.sentences import sentence
from curling_fd.service.backup import BackupSession, Dropped, HandedOver
from curling_fd.service.copies import Closing
from curling_fd.service.fence import discard_fenced, guest_runs_here
from curling_fd.service.greeting import answers
from curling_fd.service.network import VmNetwork
from curling_fd.service.preparing import prepare
from curling_fd.service.protector import REST_WAIT, Protector
from curling_fd.service.record import VmRecord, text
from curling_fd.service.restart import BackupLeft, Estate, Kept, inherit_replica, leave_replica
from curling_fd.service.statistics import Counters
from curling_fd.service.takeover import activate
from curling_fd.system import systemd

#: Seconds between two looks at a host whose daemon is gone, or two questions to an arbiter.
_LOOK_AGAIN = 1.0


class Follower:
    """Is the backup of the VM of `record`."""

    def __init__(self, record: VmRecord, protector: Protector, network: VmNetwork) -> None:
        self._record = record
        self._protector = protector
        self._network = network
        self._kept: Kept | None = None
        self._silent = False  # the primary fell silent, and did not hang up
        self._session: BackupSession | None = None
        self._link: FrameLink | None = None
        self._suspicion: trio.CancelScope | None = None
        self._claiming = False  # from the question for the right to the end of the takeover
        self._heard = 0.0  # when the primary was heard last
        self._closing = Closing(record.host.nursery)
        record.disks.append(self._show_disks)
        self._done = trio.Event()
        self._done.set()

    def _show_disks(self) -> list[dict[str, Any]]:
        return self._kept.copies.show() if self._kept is not None and self._kept.copies is not None else []

    # A primary's connection.

    async def follow(self, link: FrameLink, hello: Received) -> None:
        """Serve a primary that said `hello` on `link` (borrowed) until the session is over."""
        try:
            await self._make_way(hello)
            await self._on(link, self._follow(link, hello))
        except CurlingError as error:
            await self._refused(link, error)

    def take_up(self, estate: Estate, left: BackupLeft) -> None:
        """Go on with what the daemon before us has left, in the background.

        Raises:
            StandbyFailed: the standby is gone, and the replica with it.
            CopyUnfit: so is a copy of a disk.
        """
        record = self._record
        try:
            self._kept = inherit_replica(record, estate, left)
            record.counters.inherit(left.totals)
            link = estate.fds.pop("link", None)
        finally:
            estate.close()
        state = State.SUSPECT if link is None else State.STANDBY
        record.take_up(state, left.choice, left.ram_bytes, left.paused)
        if link is None:
            self._heard = trio.current_time()
            self._suspected(left.silent)
        else:
            sock = trio.socket.from_stdlib_socket(socket.socket(fileno=link))
            record.host.nursery.start_soon(self._go_on, FrameLink(sock), self._kept)

    async def _go_on(self, link: FrameLink, kept: Kept) -> None:
        try:
            await self._on(link, self._serve(link, kept))
        except CurlingError as error:
            await self._refused(link, error)
        finally:
            link.close()

    async def _on(self, link: FrameLink, work: Coroutine[Any, Any, None]) -> None:
        self._link = link
        self._done = trio.Event()
        try:
            await work
        finally:
            self._link = None
            self._done.set()

    async def _refused(self, link: FrameLink, error: CurlingError) -> None:
        await self.refuse(link, error)
        self._record.note("refused", f"the primary was refused: {text(error)}")

    async def refuse(self, link: FrameLink, error: CurlingError) -> None:
        """Tell the primary why not, as far as it still listens."""
        words = sentence(error)
        content = {"kind": type(error).__name__, "text": words.text, "remedy": words.remedy}
        try:
            with trio.move_on_after(1.0):
                await link.send(Kind.REFUSE, self._record.generation, content=content)
        except CurlingError:
            pass

    async def _make_way(self, hello: Received) -> None:
        """Get into a state in which an offer can be taken.

        Raises:
            StaleGeneration, WrongRole, HostsDisagree: it cannot.
        """
        record = self._record
        if self._claiming:
            raise WrongRole(record.name, "being its backup", role(record.state))
        theirs, host = hello.header.generation, hello.content.get("host")
        if host == record.host.name:
            raise HostsDisagree(f"both are called {host}")
        if self._session is not None:
            # The primary came back before we noticed that it had gone.
            self._session.interrupt("the primary connected anew")
            await self._done.wait()
            if self._claiming:
                raise WrongRole(record.name, "being its backup", role(record.state))
        if record.state is State.SWITCHING and theirs > record.generation:
            # Whom we handed it over to is back before we have dealt with the answer.
            await record.left(State.SWITCHING)
        running_here = record.state in RUNS or record.state is State.SWITCHING
        if running_here and theirs <= record.generation:
            if theirs < record.generation:
                raise StaleGeneration(ours=record.generation, theirs=theirs)
            raise WrongRole(record.name, "being its backup", role(record.state))
        if running_here and record.arbiter.automatic:
            granted = await record.arbiter.generation(record.name)
            if granted <= record.generation:
                raise HostsDisagree(f"{host} claims generation {theirs}, the arbiter granted {granted}")
        if running_here:
            await self._protector.yield_to(theirs, str(host))
        if record.state is State.FENCED:
            await discard_fenced(record)
        self._suspect_no_more()
        if allowed(record.state, Event.OFFERED) and await guest_runs_here(record):
            raise HostsDisagree(f"the VM runs on {record.host.name} too, beside its protected copy on {host}")
        if not allowed(record.state, Event.OFFERED):
            raise WrongRole(record.name, "being its backup", role(record.state))

    async def _follow(self, link: FrameLink, hello: Received) -> None:
        record = self._record
        self._drop()
        record.advance(Event.OFFERED, f"by {hello.content.get('host')}")
        record.counters = Counters()
        record.paused = False
        kept: Kept | None = None
        try:
            await link.send(Kind.WELCOME, record.generation, content={"host": record.host.name})
            await self._closing.done()
            kept = await prepare(record, self._network, link, self._closing)
            record.remember(generation=max(kept.generation, record.generation))
            alike = list(kept.copies.alike) if kept.copies is not None else []
            await link.send(Kind.PREPARED, kept.generation, content={"alike": alike})
            record.advance(Event.PREPARED)
        except BaseException as error:
            if kept is not None:
                self._close(kept)
            self._network.withdraw_soon()
            event = Event.LINK_LOST if isinstance(error, LinkError) else Event.REFUSED
            if allowed(record.state, event):
                record.advance(event, text(error) if isinstance(error, CurlingError) else None)
            raise
        self._kept = kept
        await self._serve(link, kept)

    async def _serve(self, link: FrameLink, kept: Kept) -> None:
        """Keep the replica up as long as the session lasts."""
        record = self._record
        daemon = record.host.config
        session = self._session = BackupSession(
            link,
            kept.replica,
            record.counters,
            generation=kept.generation,
            max_raw=kept.max_raw,
            heartbeat_interval=daemon.heartbeat_interval,
            failure_timeout=daemon.failure_timeout,
            rehearse=partial(kept.standby.rehearse, kept.replica),
            standby_failed=lambda: kept.standby.process.wait_failed(),
            committed=lambda: record.advance(Event.COMMITTED),
            learned=self._network.learn,
            copies=kept.copies,
            paused=kept.paused,
            peer_rests=kept.peer_rests,
        )
        try:
            outcome = await session.run()
        except (LinkError, RemoteProtocolError) as error:
            self._lost(error)
            if isinstance(error, RemoteProtocolError):
                raise
        except (StandbyFailed, DiskError) as error:
            record.advance(Event.STANDBY_DIED, text(error))
            self._drop()
            raise
        except Exception as error:  # a bug, or this host is out of something: over all the same
            self._lost(LinkLost(f"an unexpected error: {type(error).__name__}"))
            raise
        else:
            if isinstance(outcome, Dropped):
                record.advance(Event.DROPPED, outcome.reason)
                self._drop()
            elif isinstance(outcome, HandedOver):
                kept.paused = outcome.paused
                await self._take_handed_over(link, outcome)
            else:
                kept.paused, kept.peer_rests = session.paused, outcome.peer_rests
                await leave_replica(record, kept, link, silent=False)
        finally:
            kept.paused = kept.paused or session.paused
            self._session = None

    # The primary is gone.

    def _lost(self, error: CurlingError) -> None:
        record = self._record
        self._heard = self._link.statistics.heard if self._link else trio.current_time()
        record.advance(Event.LINK_LOST, text(error))
        if record.state is not State.SUSPECT:
            self._drop()
        else:
            self._suspected(not isinstance(error, LinkClosed))

    def _suspected(self, silent: bool) -> None:
        record, self._silent = self._record, silent
        if not silent:
            # Nobody there may be left to obey the arbiter, and the guest runs on: only silence leads to it.
            record.reason = "the primary's daemon is gone, not its host: a takeover needs an operator"
            record.note("waiting", record.reason)
        elif record.arbiter.automatic:
            self._suspicion = trio.CancelScope()
            record.host.nursery.start_soon(self._suspect, self._suspicion)

    async def _suspect(self, scope: trio.CancelScope) -> None:
        """Take the VM over once its host is not reachable and the arbiter lets us."""
        record = self._record
        with scope:
            while record.state is State.SUSPECT:
                if await answers(record.config.peer):
                    reason = "the primary's host is alive though its daemon is gone: not taking over"
                    if record.reason != reason:
                        record.reason = reason
                        record.note("waiting", reason)
                else:
                    # Shielded: a claim that is cut short may have been made all the same.
                    with trio.CancelScope(shield=True), self._alone():
                        try:
                            await self._claim()
                        except ArbiterLost as error:
                            record.advance(Event.LOST, text(error))
                            self._drop()
                            return
                        except CurlingError as error:
                            record.reason = text(error)
                            record.note("waiting", text(error))
                        else:
                            self._suspicion = None
                            record.counters.detection_ms = self._silent_ms()
                            with suppress(CurlingError):  # it is in the journal
                                await self._take_over(Event.WON, "the primary is lost")
                                self._protect_again()
                            return
                await trio.sleep(_LOOK_AGAIN)

    def _silent_ms(self) -> float:
        """Milliseconds since the primary was heard last."""
        return round((trio.current_time() - self._heard) * 1000, 1)

    # Taking over.

    async def failover(self, force: bool) -> None:
        """Take the VM over on an operator's word; returns when it runs here.

        Raises:
            PrimaryAlive: the primary, or at least its host, is alive, and `force` is not given.
            NotProtected, WrongRole: there is no committed checkpoint to run from.
            ArbiterError: the arbiter does not let us; `force` does not change that.
        """
        record = self._record
        if role(record.state) != "backup":
            raise WrongRole(record.name, "failover", role(record.state))
        if record.state not in REPLICA_VALID or self._kept is None or self._claiming:
            raise NotProtected(record.name, record.state.value)
        session, link = self._session, self._link
        if link is not None:
            self._heard = link.statistics.heard
        if not force and (session is not None or await answers(record.config.peer)):
            raise PrimaryAlive(record.name, self._silent_ms())
        with trio.CancelScope(shield=True), self._alone():
            self._suspect_no_more()
            await self._claim()
            if session is not None and link is not None:
                await self.refuse(link, StaleGeneration(record.generation, record.generation - 1))
                with trio.move_on_after(record.host.config.failure_timeout):
                    await self._done.wait()  # it stops its guest, and hangs up
                session.interrupt("failover by an operator")
                await self._done.wait()
                self._suspect_no_more()
            await self._take_over(Event.ORDERED, "by an operator")
            self._protect_again()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside the block nobody else claims the VM, and no primary gets us to drop the replica."""
        self._claiming = True
        try:
            yield
        finally:
            self._claiming = False
            self._record.stir()

    async def _take_handed_over(self, link: FrameLink, outcome: HandedOver) -> None:
        record = self._record
        if self._claiming:
            return  # an operator has forced it meanwhile, and takes it over when this session is done
        with trio.CancelScope(shield=True), self._alone():
            try:
                await self._claim()
            except CurlingError as error:
                record.advance(Event.DROPPED, f"we could not get the right to take the VM: {text(error)}")
                self._drop()
                raise
            await self._take_over(Event.HANDED_OVER, outcome.reason)
            try:
                await link.send(Kind.TAKEN, record.generation)
            except LinkError:
                pass  # the primary asks again, and is told that it is stale
            self._protect_again()

    async def _claim(self) -> None:
        """Raise the generation: from here on this host has the right to run the VM."""
        record = self._record
        if record.arbiter.automatic:
            await record.swap(incumbent=False)
        else:
            record.remember(generation=record.generation + 1)

    async def _take_over(self, event: Event, reason: str) -> None:
        """Run the VM here; the right to do so has been won.

        Raises:
            StandbyFailed: QEMU did not take it.
        """
        record, kept = self._record, self._kept
        if kept is None or not allowed(record.state, event):
            raise NotProtected(record.name, record.state.value)
        decided = trio.current_time()
        record.advance(event, reason)
        await self._network.prepare()
        try:
            await kept.give_disks_away()
            await activate(kept.standby.qmp_path, kept.replica, paused=kept.paused)
        except StandbyFailed as error:
            failed = StandbyFailed(error.problem, kept.standby.process.stderr_tail())
            record.advance(Event.STANDBY_DIED, text(failed))
            self._drop()
            raise failed from None
        self._network.announce()
        record.counters.failover_ms = round((trio.current_time() - decided) * 1000, 1)
        record.paused = kept.paused
        # From here on the VM outlives this daemon, which will find it by what it remembers.
        kept.standby.release()
        self._kept = None
        kept.close()
        try:
            record.remember(
                qmp=str(kept.standby.qmp_path),
                wanted=record.config.peer is not None,
                fenced=None,
                elsewhere=False,
            )
        except ConfigError as error:  # it runs all the same
            record.note("not-remembered", text(error), level=logging.ERROR)
        record.advance(Event.RUNNING, reason, failover_ms=record.counters.failover_ms)

    def _protect_again(self) -> None:
        """The VM runs here now: protect it from here."""
        if self._record.wanted:
            self._protector.start(sure=True)

    def _suspect_no_more(self) -> None:
        if self._suspicion is not None:
            self._suspicion.cancel()
            self._suspicion = None

    def _drop(self) -> None:
        """The replica is of no use any more."""
        if self._let_go():
            self._network.withdraw_soon()

    def _let_go(self) -> bool:
        kept, self._kept = self._kept, None
        return kept is not None and self._close(kept)

    def _close(self, kept: Kept) -> bool:
        copies, kept.copies = kept.copies, None
        if copies is not None:
            self._closing.begin(copies)
        return kept.close()

    async def stop(self) -> None:
        """The daemon ends: leave the replica to the next, or drop it; a VM that runs here runs on."""
        record, session = self._record, self._session
        keeps = systemd.manager().keeps
        if session is not None:
            if keeps and session.can_rest and record.state is State.STANDBY:
                with trio.move_on_after(REST_WAIT), suppress(LinkError):
                    await session.restart()
                    await self._done.wait()
            if self._session is not None:
                session.interrupt("the daemon on the backup stops")
                await self._done.wait()
        self._suspect_no_more()
        while self._claiming:  # a takeover is finished: nobody else may run the VM now
            await record.changed.park()
        if keeps and record.state is State.SUSPECT and self._kept is not None:
            await leave_replica(record, self._kept, None, silent=self._silent)
        if self._let_go():
            await self._network.withdraw()
        await self._closing.done()
