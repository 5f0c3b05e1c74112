"""One session of protection, on the primary: first pass, checkpoints, end.

Tasks of a session: `_capture_all` takes checkpoints, `Flights` sends them, `_receive` takes the answers,
two tasks keep and watch the link's pulse, `_watch` follows QEMU's events. The first to fail ends the
session; leaving the engine's block then lets the guest run on (I5).

A session can rest while one of the two daemons is restarted: nothing is under way with QEMU or on the
link, and the guest runs on. Ours asks the backup for it and ends with `Finish.RESTART`, for the next daemon
to go on; the backup's asks us, and we go on when it is heard again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import trio

from curling_fd.capture.engine import Engine
from curling_fd.capture.reader import Captured
from curling_fd.disk.holdings import ClosedLog
from curling_fd.errors import (
    CheckpointTimeout,
    EngineFailed,
    FrameError,
    GuestEnded,
    LinkError,
    LinkLost,
    QemuDied,
    QmpError,
    StaleGeneration,
    Unprotected,
)
from curling_fd.link.frames import Kind
from curling_fd.link.pulse import REST_LIMIT, Pulse, rest_seconds
from curling_fd.link.transport import FrameLink
from curling_fd.output.hold import OutputHold
from curling_fd.qmp.client import EventStream, QmpClient
from curling_fd.qmp.protocol import Event
from curling_fd.service.disk_shipper import DiskShipper
from curling_fd.service.farewell import refusal
from curling_fd.service.flights import Flights
from curling_fd.service.gate import OutputGate
from curling_fd.service.last_words import explain
from curling_fd.service.mirror import DiskMirror
from curling_fd.service.options import Callbacks, Finish, SessionOptions
from curling_fd.service.pace import Boundary
from curling_fd.service.pass_shipper import PassShipper
from curling_fd.service.statistics import Counters
from curling_fd.service.stops import StopWatcher, Window, how_it_ended, now_us
from curling_fd.system.buffers import Buffer, BufferPool, PoolStatistics
from curling_fd.system.nursery import open_nursery

#: Seconds within which QEMU, asked to let the guest go on, says that it does.
_START_LIMIT = 10.0

#: Seconds the backup may take to load a handed-over VM and run it.
HANDOVER_TIMEOUT = 15.0


class PrimarySession:
    """Protects one VM over one link. Borrows monitor, event stream, engine and link.

    Args:
        inherited: sequence of the checkpoint with which the daemon before us has left the session; 0 if
            this is a new one, which begins with a first pass.
        mirror: of the disks that are replicated, if any; borrowed.
        alike: see `DiskShipper`.

    Attributes:
        peer_rests: the backup's daemon is restarted, too.
    """

    def __init__(
        self,
        qmp: QmpClient,
        events: EventStream,
        engine: Engine,
        link: FrameLink,
        output: OutputHold,
        counters: Counters,
        options: SessionOptions,
        callbacks: Callbacks,
        inherited: int = 0,
        mirror: DiskMirror | None = None,
        alike: Sequence[bool] = (),
    ) -> None:
        self.stops = StopWatcher(counters)
        self._qmp = qmp
        self._events = events
        self._engine = engine
        self._link = link
        self._output = output
        self._gate = OutputGate(output, options.output_limit, options.stop_limit)
        self._counters = counters
        self._options = options
        self._callbacks = callbacks
        self._pass: PassShipper | None = None
        self._pool = BufferPool("curling-capture", options.buffers, options.max_checkpoint)
        self._mirror = mirror
        self._disks = (
            DiskShipper(
                link,
                options.generation,
                mirror,
                alike,
                most=options.buffers,
                rate=options.disk_copy_rate,
                progress=callbacks.copied,
                stir=self._stir,
            )
            if mirror is not None
            else None
        )
        self._disk_log: ClosedLog | None = None  # of the checkpoint that is being taken
        self._flights = Flights(link, options.generation, self._pool, mirror.log if mirror else None)
        self._pulse = Pulse(link, options.generation, options.heartbeat_interval, options.failure_timeout)
        self.peer_rests = self._rest_asked = False
        self._sequence = self._committed = inherited
        self._capturing = trio.Lock()
        self._stirred = trio.Event()  # replaced at each stir: something the capture waits for changed
        self._switching = self._restarting = False
        self._at_rest = trio.Event()  # the backup is silent until we, or the next daemon, say something
        self._notes, self._notes_due = trio.open_memory_channel[Mapping[str, Any]](math.inf)
        self._capture_began: float | None = None
        self._end = trio.Event()
        self._end_reason = ""
        self._guest_end: str | None = None

    def pool_statistics(self) -> PoolStatistics:
        return self._pool.statistics()

    async def run(self) -> Finish:
        """Protect the VM, until `switch` or `restart` is carried out.

        Raises:
            SessionEnd: what became of the VM, or that the operator ended it.
            CurlingError: what became of the protection.
        """
        finish: Finish | None = None
        try:
            async with open_nursery() as nursery:
                nursery.start_soon(self._receive, nursery)
                nursery.start_soon(self._pulse.keep)
                nursery.start_soon(self._pulse.watch)
                nursery.start_soon(self._watch)
                nursery.start_soon(self._notice_end)
                nursery.start_soon(self._callbacks.disks_changed)
                nursery.start_soon(self._output.watch, self._stir)
                nursery.start_soon(self._send_notes, self._notes_due)
                if self._sequence:
                    self.note({"paused": self.stops.paused})
                else:
                    await self._first_pass()
                nursery.start_soon(self._flights.ship)
                finish = await self._capture_all()
                nursery.cancel_scope.cancel()
            assert finish is not None
            return finish
        except (EngineFailed, QmpError) as error:
            await explain(self._qmp, self._events, error, self._guest_end)
            raise
        finally:
            self._end_pass()
            self._pool.close()
            if self._disks is not None:
                self._disks.close(self._disk_log, keep=finish is Finish.RESTART)
            self._flights.close()

    def capturing_for(self) -> float:
        """Seconds since the checkpoint that is being taken was begun; 0 between checkpoints."""
        return trio.current_time() - self._capture_began if self._capture_began is not None else 0.0

    def switch(self) -> None:
        """Make the next checkpoint the last: the guest stays stopped after it."""
        self._switching = True
        self._stir()

    def expect_peer(self) -> None:
        """The backup's daemon was restarted at the same time as ours: give it its time."""
        self._pulse.expect(REST_LIMIT)

    def restart(self) -> None:
        """Leave the session to the next daemon; `run` returns when all is at rest."""
        self._restarting = True
        self._stir()

    @property
    def committed(self) -> int:
        """Sequence of the newest checkpoint that is committed."""
        return self._committed

    def end(self, why: str) -> None:
        """End the session, a checkpoint that is being taken being finished; `run` raises Unprotected."""
        self._end_reason = why
        self._end.set()

    async def tune(self, options: SessionOptions) -> None:
        """Go on with another pace, and another limit of what is held."""
        self._options = options
        self._gate.limit = options.output_limit
        self._stir()
        await self._engine.ask_every(options.pace.shortest)

    async def pause(self) -> None:
        """Stop the guest between two checkpoints, so that QEMU's checkpoint loop cannot start it again."""
        await self._order("stop", paused=True)

    async def resume(self) -> None:
        """Let a paused guest run."""
        await self._order("cont", paused=False)

    async def hand_over(self, reason: str) -> int:
        """Tell the backup to run the VM from the last commit; returns the VM's new generation there.

        To be called after `run`, when the guest is stopped or its QEMU gone.

        Raises:
            PeerRefused: the backup cannot; the VM stays here.
            LinkError: no answer: the backup may run it or not.
        """
        content = {"reason": reason, "paused": self.stops.paused}
        await self._link.send(Kind.HANDOVER, self._generation, self._committed, content)
        with trio.move_on_after(HANDOVER_TIMEOUT):
            while True:
                received = await self._link.receive()
                if received.header.kind is Kind.TAKEN:
                    return received.header.generation
                if received.header.kind is Kind.REFUSE:
                    raise refusal(received, self._generation)
        raise LinkLost(f"no answer to the handover within {HANDOVER_TIMEOUT:g} s")

    @property
    def _generation(self) -> int:
        return self._options.generation

    @property
    def _window(self) -> Window:
        return Window.LOOP if self._engine.name == "incremental" else Window(self._engine.name)

    def _stir(self) -> None:
        self._stirred.set()
        self._stirred = trio.Event()

    async def _first_pass(self) -> None:
        if self._disks is not None:
            await self._disks.copy(self._qmp)
        started = trio.current_time()
        whole = Window.PRECOPY if self._window is Window.LOOP else self._window
        self.stops.window_opens(whole, now_us(), counting=False)
        self._pass = PassShipper(self._link, self._generation, self._callbacks.progress)
        async with open_nursery() as nursery:
            if self._disks is not None:
                nursery.start_soon(self._disks.follow)
            await self._engine.first_pass(self._pass)
            await self._guest_started()
            nursery.cancel_scope.cancel()
        if self._disks is not None:
            await self._disks.settle()
        self._counters.first_pass_ms = (trio.current_time() - started) * 1000

    def _end_pass(self) -> None:
        if self._pass is not None:
            self._pass.close()
            self._pass = None

    async def _capture_all(self) -> Finish:
        now = trio.current_time()
        boundary = Boundary(now - self._options.pace.longest, now)
        while True:
            await self._engine.ready()
            captured: Captured | None = None
            while captured is None:
                await self._until_due(boundary)
                if self._restarting:
                    await self._come_to_rest()
                    return Finish.RESTART
                await self._gate.turn()
                buffer = await self._pool.acquire()
                try:
                    async with self._capturing:
                        last = self._switching
                        # Else paused, or asked for a rest, while we waited.
                        if last or not (self.stops.paused or self._pulse.resting):
                            stopped = trio.current_time()
                            captured = await self._capture(buffer, resume=not last)
                            boundary = Boundary(stopped, stopped + captured.seconds)
                finally:
                    if captured is None:
                        self._pool.release(buffer)
            self._counters.captured(captured.pages, captured.ram + captured.device)
            disk_log, self._disk_log = self._disk_log, None
            await self._flights.add(self._sequence, captured, disk_log)
            if last:
                await self._all_committed()
                return Finish.SWITCH

    async def _all_committed(self) -> None:
        while self._committed < self._sequence:
            await self._stirred.wait()

    async def _come_to_rest(self) -> None:
        """Have nothing under way: no checkpoint, no operator's order, and no frame in either direction."""
        await self._capturing.acquire()
        await self._all_committed()
        self.peer_rests |= self._pulse.resting  # it answers when it is back
        await self._pulse.rest(REST_LIMIT)
        self._rest_asked = True
        await self._link.send(Kind.REST, self._generation, content={"seconds": REST_LIMIT})
        if not self.peer_rests:
            await self._at_rest.wait()

    async def _let_rest(self, seconds: float) -> None:
        """The backup's daemon is restarted: be silent until it is heard again. The guest runs on."""
        await self._pulse.rest(seconds)
        self._let_writes_pass()
        async with self._capturing:
            pass  # one that is being taken is shipped as well
        await self._all_committed()
        await self._link.send(Kind.RESTING, self._generation)

    async def _capture(self, buffer: Buffer, *, resume: bool) -> Captured:
        """Take the next checkpoint; the guest runs again when this returns, unless `resume` is False."""
        sequence = self._sequence + 1
        self._capture_began = trio.current_time()
        self.stops.look_at_clock()
        self.stops.window_opens(self._window, now_us())
        self._let_writes_pass()
        try:
            captured = await self._engine.checkpoint(
                buffer, partial(self._at_boundary, sequence), resume=resume
            )
            if resume:
                await self._guest_started()
                if self.stops.started_before(captured.released_us):
                    # By a `cont` on another monitor: the checkpoint is of no single moment.
                    raise EngineFailed(self._engine.name, "the guest was started during a checkpoint")
        finally:
            self._capture_began = None
        self._sequence = sequence
        return captured

    def _let_writes_pass(self) -> None:
        """The guest is about to be stopped, its disks drained: no write may wait for a checkpoint."""
        if self._disks is not None:
            self._disks.log.open_gate()

    def _at_boundary(self, sequence: int) -> Callable[[], None] | None:
        """What the guest has sent and written so far is of epoch `sequence`. Called in a thread."""
        if self._disks is not None:
            self._disk_log = self._disks.log.close()
        return self._gate.barrier(sequence)

    async def _guest_started(self) -> None:
        """Wait until QEMU has said that the guest goes on after a checkpoint, paused before or not.

        Raises:
            CheckpointTimeout: it did not say so.
        """
        if self._window is Window.SNAPSHOT:
            # It has said so, if it started the guest: newer ones leave a paused guest as it is.
            self.stops.window_closes(now_us())
            return
        with trio.move_on_after(_START_LIMIT):
            while self.stops.started_us is None:
                await self._stirred.wait()
        if self.stops.started_us is None:
            raise CheckpointTimeout(_START_LIMIT, "the guest to go on")

    async def _order(self, command: str, *, paused: bool) -> None:
        """Carry out what an operator orders, between two checkpoints: within one QEMU would forget it."""
        async with self._capturing:
            self._let_writes_pass()
            await self._qmp.execute(command)
            changed = self.stops.order(paused)
        if changed:
            with suppress(LinkError):  # the session notices
                self._tell_paused()

    async def _keep_paused(self) -> None:
        """Pause the guest again if the checkpoint that was under way when it was paused has started it."""
        async with self._capturing:
            running = await self._qmp.status() == "running"
            # An event that waits to be looked at may be the operator's RESUME.
            if running and self.stops.paused and not self._events.statistics().current_buffer_used:
                await self._qmp.execute("stop")

    def _tell_paused(self) -> None:
        self._stir()
        self._engine.hold(self.stops.paused)
        self._callbacks.paused(self.stops.paused)
        self.note({"paused": self.stops.paused})

    def note(self, content: Mapping[str, Any]) -> None:
        """Tell the backup something beside the checkpoints."""
        self._notes.send_nowait(content)

    async def _send_notes(self, notes: trio.MemoryReceiveChannel[Mapping[str, Any]]) -> None:
        """In a task of its own: a long frame may be in the way."""
        async for content in notes:
            if not self._restarting:  # else the next daemon tells it
                await self._link.send(Kind.NOTE, self._generation, content=dict(content))

    async def _until_due(self, boundary: Boundary) -> None:
        """Wait until a checkpoint is due, the guest not being paused; or a switch is wanted."""
        while not self._restarting and (not self._switching or self._pulse.resting):
            if self._pulse.resting:
                await self._stirred.wait()
                continue
            if self.stops.paused:
                stirred = self._stirred
                await self._keep_paused()
                await stirred.wait()
                continue
            due = self._options.pace.due(boundary, output_waiting=self._output.waiting())
            urgent = self._disks is not None and self._disks.urgent
            if urgent or trio.current_time() >= due:
                return
            with trio.move_on_at(due):
                await self._stirred.wait()

    async def _notice_end(self) -> None:
        await self._end.wait()
        raise Unprotected(self._end_reason)

    async def _receive(self, nursery: trio.Nursery) -> None:
        while True:
            received = await self._link.receive()
            header = received.header
            if self._pulse.resting and header.kind is not Kind.ACK and not self._restarting:
                self._pulse.wake()
                self._stir()
            if header.generation != self._generation and header.kind is not Kind.REFUSE:
                raise FrameError(f"a {header.kind.name} frame of generation {header.generation}")
            match header.kind:
                case Kind.HEARTBEAT:
                    pass
                case Kind.BULK_ACK if self._pass is not None:
                    self._pass.acknowledged(header.sequence)
                case Kind.DISK_ACK if self._disks is not None:
                    self._disks.acknowledged(header.sequence)
                case Kind.WANT if self._disks is not None:
                    self._disks.answered(received)
                case Kind.ACK:
                    await self._acknowledged(header.sequence)
                case Kind.REST:
                    if self._restarting:  # nobody waits for the other
                        self.peer_rests = True
                        self._at_rest.set()
                        if self._rest_asked:
                            return
                    else:
                        nursery.start_soon(self._let_rest, rest_seconds(received))
                case Kind.RESTING:
                    self._at_rest.set()
                    if self._restarting:
                        return  # the next frame is for the next daemon
                case Kind.REFUSE:
                    error = refusal(received, self._generation)
                    if isinstance(error, StaleGeneration):
                        self._let_writes_pass()
                        with suppress(QmpError):  # before all else: the backup is about to run it
                            await self._qmp.execute("stop")
                    raise error
                case _:
                    raise FrameError(f"a {header.kind.name} frame, which a backup does not send now")

    async def _acknowledged(self, sequence: int) -> None:
        self._flights.acknowledged(sequence)
        await self._gate.release(sequence)
        self._committed = sequence
        self._counters.commit(sequence)
        if sequence == 1:
            self._end_pass()
            self._callbacks.committed()
        self._stir()

    async def _watch(self) -> None:
        async for event in self._events:
            if event.name != "JOB_STATUS_CHANGE":  # the mirrors' at every checkpoint
                await self._on_event(event)
        raise QemuDied()

    async def _on_event(self, event: Event) -> None:
        ended = how_it_ended(event)
        if ended is not None:
            self._guest_end = ended
            self._callbacks.ended()
            raise GuestEnded(ended)
        if self._mirror is not None:
            self._mirror.heed(event)
        self.stops.look_at_clock()
        run_state = await self._qmp.status() if self.stops.must_look(event) else None
        changed = self.stops.feed(event, run_state)
        self._stir()
        if changed:
            self._tell_paused()
