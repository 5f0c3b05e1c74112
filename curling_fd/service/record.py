"""One VM as its host knows it: its state, what is remembered of it, and what is shown of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import trio
from attrs import evolve

from curling_fd.capture.probe import Choice
from curling_fd.errors import CurlingError
from curling_fd.failover.arbiter import Arbiter, FileArbiter, ManualArbiter
from curling_fd.failover.states import Event, State, after, role
from curling_fd.output.hold import OutputHold
from curling_fd.sentences import sentence
from curling_fd.service.config import VmConfig
from curling_fd.service.host import Host
from curling_fd.service.progress import Progress
from curling_fd.service.statistics import Counters

#: Events an operator must hear of.
_LOUD = {
    Event.LINK_LOST: logging.WARNING,
    Event.CAPTURE_FAILED: logging.WARNING,
    Event.LOST: logging.ERROR,
    Event.STALE: logging.ERROR,
    Event.STANDBY_DIED: logging.ERROR,
    Event.WON: logging.WARNING,
    Event.ORDERED: logging.WARNING,
    Event.HANDED_OVER: logging.WARNING,
}


class VmRecord:
    """The state of one VM on this host. All changes go through `advance`, and so through the table.

    Attributes:
        generation: the highest this host knows of.
        wanted: protection was asked for and is taken up again after failures and restarts.
        qmp: path of the VM's monitor on this host, if it can run here.
        reason: why the state is what it is, when there is something to say.
        disks: what tells of the replicated disks, as the control interface's type `Disk`.
    """

    def __init__(self, config: VmConfig, host: Host) -> None:
        self.config = config
        self.host = host
        self.name = config.name
        remembered = host.store.load(config.name)
        self._remembered = remembered
        self.state = State.FENCED if remembered.fenced else State.ACTIVE if remembered.qmp else State.IDLE
        self.reason: str | None = remembered.fenced
        self.counters = Counters()
        self.choice: Choice | None = None
        self.ram_bytes = 0
        self.paused = False
        self.hold: OutputHold | None = None
        self.disks: list[Callable[[], list[dict[str, Any]]]] = []
        self.progress: Progress | None = None
        self.changed = trio.lowlevel.ParkingLot()
        self.arbiter: Arbiter = (
            FileArbiter(config.arbiter_directory, host.name)
            if config.arbiter == "file" and config.arbiter_directory
            else ManualArbiter()
        )

    @property
    def generation(self) -> int:
        return self._remembered.generation

    @property
    def wanted(self) -> bool:
        return self._remembered.wanted

    @property
    def wanted_at_start(self) -> bool:
        """Protection is to begin when the daemon starts."""
        return self.wanted or (self.config.autostart and not self._remembered.elsewhere)

    @property
    def qmp(self) -> str | None:
        return self._remembered.qmp or self.config.qmp

    @property
    def taken_over(self) -> bool:
        """The VM runs here since a takeover, or did."""
        return self._remembered.qmp is not None

    def remember(self, **changes: Any) -> None:
        """Change what is remembered; on disk when this returns."""
        self._remembered = evolve(self._remembered, **changes)
        self.host.store.save(self.name, self._remembered)

    async def swap(self, *, incumbent: bool, after: int | None = None) -> None:
        """Have the arbiter raise the generation for this host, and remember it.

        Args:
            incumbent: the VM runs here already.
            after: the generation to follow, if it is not the one we know.

        Raises:
            ArbiterError: it does not, or nobody knows.
        """
        current = self.generation if after is None else after
        self.remember(generation=await self.arbiter.swap(self.name, current, incumbent=incumbent))

    async def claim(self, known: int) -> None:
        """Bring our generation up to `known`, the peer's, and to what the arbiter has granted: by right."""
        generation = max(known, self.generation)
        if self.arbiter.automatic:
            highest = await self.arbiter.generation(self.name)
            generation = max(highest, generation)
            if generation > self.generation or not highest:
                await self.swap(incumbent=True, after=generation)
                return
        if generation != self.generation:
            self.remember(generation=generation)

    def advance(self, event: Event, reason: str | None = None, **fields: Any) -> None:
        """Go to the state that follows on `event`, and say so.

        Raises:
            ValueError: the table has no such transition: a bug.
        """
        before, self.state = self.state, after(self.state, event)
        self.reason = reason
        self.progress = None
        message = f"{before} -> {self.state}" + (f": {reason}" if reason else "")
        level = _LOUD.get(event, logging.INFO)
        self.note(event, message, level=level, before=before.value, **fields)

    def take_up(self, state: State, choice: Choice, ram_bytes: int, paused: bool) -> None:
        """Begin where the daemon before us left the VM."""
        self.state, self.choice, self.ram_bytes, self.paused = state, choice, ram_bytes, paused
        self.note("taken-up", f"{state}, as the daemon before left it")

    def rest(self, reason: str | None) -> None:
        """Protection is over by an operator's word: back to where it began."""
        self.advance(Event.UNPROTECT, reason)
        if self._remembered.qmp:  # a VM that was taken over runs here, under a monitor of ours
            self.state = State.ACTIVE

    def note(self, event: str, message: str, *, level: int = logging.INFO, **fields: Any) -> None:
        """Record something, with the state the VM is in."""
        self.host.journal.add(
            self.name,
            event,
            message,
            level=level,
            state=self.state.value,
            generation=self.generation,
            peer=str(self.config.peer) if self.config.peer else None,
            **fields,
        )
        self.stir()

    def stir(self) -> None:
        """Something shown changed."""
        self.changed.unpark_all()

    async def left(self, state: State) -> None:
        """Wait until the VM is in another state than `state`."""
        while self.state is state:
            await self.changed.park()

    def show(self) -> dict[str, Any]:
        """The VM as the control interface's type `Vm`."""
        choice, progress = self.choice, self.progress
        statistics = self.counters.statistics()
        return {
            "name": self.name,
            "role": role(self.state),
            "state": self.state.value,
            "reason": self.reason,
            "engine": choice.engine if choice else None,
            "engine_reason": choice.reason if choice else None,
            "accelerator": choice.accelerator if choice else None,
            "qemu_version": ".".join(map(str, choice.version)) if choice else None,
            "output": self.hold.name if self.hold else None,
            "held_packets": self.hold.statistics().packets if self.hold else 0,
            "held_bytes": self.hold.statistics().bytes if self.hold else 0,
            "longest_epoch_ms": self.config.longest_epoch * 1000,
            "shortest_epoch_ms": self.config.shortest_epoch * 1000,
            "peer": str(self.config.peer) if self.config.peer else None,
            "generation": self.generation,
            "arbiter": self.config.arbiter,
            "ram_bytes": self.ram_bytes,
            "disks": [disk for source in self.disks for disk in source()],
            "paused": self.paused,
            "progress": progress.show() if progress else None,
            "statistics": {name: getattr(statistics, name) for name in type(statistics).__annotations__},
        }


def text(error: CurlingError) -> str:
    """What happened, in one sentence."""
    return sentence(error).text
