"""Which way a VM's packets are held, and what becomes of them when a session is over.

A hold is attached when a session begins, and closed from its first checkpoint on. It outlives the session: a
primary that has lost its backup does not know yet whether the backup may run the VM. As the state of the VM
tells:

    unprotected, idle, ended   the VM is ours alone: let out what is held
    fenced                     another host has the right: throw it away
    anything else              undecided: it stays held

It outlives the daemon too. The next one finds what the one before has left, and holds on to it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress

from curling_fd.errors import ArbiterError, CannotHold, OutputError, QmpDisconnected, QmpError, QmpUnreachable
from curling_fd.failover.states import State
from curling_fd.output.filter import FilterHold, left_in
from curling_fd.output.hold import NoHold, OutputHold
from curling_fd.output.nics import Nic
from curling_fd.output.taps import TapHold
from curling_fd.qmp.client import QmpClient, open_qmp
from curling_fd.service.network import Cards
from curling_fd.service.record import VmRecord, text

#: What is behind cards whose packets nothing of ours can hold, and why.
_ELSEWHERE = {
    "vhost-user": "they go past QEMU and the kernel, to a program of its own",
    "vhost-vdpa": "they go past QEMU and the kernel, to a device",
    "user": "QEMU itself ends its connections, so that none of them could survive its host",
}

_OURS_ALONE = frozenset({State.UNPROTECTED, State.IDLE, State.ENDED})


class Output:
    """Holds the packets of the VM of `record`, over all its sessions."""

    def __init__(self, record: VmRecord) -> None:
        self._record = record

    @property
    def hold(self) -> OutputHold:
        """The one that is attached."""
        return self._record.hold or NoHold()

    async def attach(self, qmp: QmpClient, cards: Cards) -> None:
        """Get a hold for a session on `qmp` (borrowed). What an earlier session still holds may leave now.

        Args:
            cards: of the VM, as examination found them.

        Raises:
            CannotHold: some card's packets cannot be held.
            OutputError: they could not be; everything is as it was.
        """
        await self._let_out()
        self._record.hold = await self._attached(qmp, cards)

    async def adopt(self, qmp: QmpClient) -> None:
        """Hold on to what a daemon before us has left at this VM."""
        record = self._record
        if record.hold is not None:
            return
        record.hold = await self._left_plugged()
        if record.hold is None and (netdevs := await left_in(qmp)):
            assert record.qmp is not None
            record.hold = FilterHold(qmp, record.qmp, netdevs, adopted=True)

    async def tidy(self) -> None:
        """The daemon starts, and nobody wants the VM protected: see to what the one before has left."""
        record = self._record
        record.hold = await self._left_plugged()
        if record.hold is None and record.qmp is not None:
            with suppress(QmpError):
                async with open_qmp(record.qmp) as qmp:
                    await self.adopt(qmp)
        await self.settle(sure=True)

    async def settle(self, *, sure: bool) -> None:
        """Do what the state of the VM asks for.

        Args:
            sure: no backup has a replica of a daemon before us, which it could run.
        """
        record = self._record
        if record.hold is None:
            return
        if record.state is State.FENCED:
            await self.drop()
        elif record.state in _OURS_ALONE and (
            sure or record.state is not State.UNPROTECTED or await self._right()
        ):
            await self._let_out()

    async def _right(self) -> bool:
        """The arbiter lets this host run the VM. Else the next attempt to protect is told so as well."""
        try:
            await self._record.swap(incumbent=True)
        except ArbiterError:
            return False
        return True

    async def drop(self) -> None:
        """Another host may run the VM: throw away what is held, and what the guest still sends."""
        if self._record.hold is not None:
            await self._try(self._record.hold.drop)

    async def discard(self) -> None:
        """The VM has gone from here: nothing that is held may leave, and nothing of ours stays."""
        await self.drop()
        await self._let_out()

    async def _let_out(self) -> None:
        if self._record.hold is not None and await self._try(self._record.hold.detach):
            self._record.hold = None

    async def _try(self, action: Callable[[], Awaitable[None]]) -> bool:
        """False if it could not be done; said once for each reason."""
        try:
            await action()
        except OutputError as error:
            if isinstance(error.__cause__, QmpUnreachable | QmpDisconnected):
                return True  # QEMU is gone, and with it what it held
            self._record.note("output", text(error))
            return False
        return True

    async def _attached(self, qmp: QmpClient, cards: Cards) -> OutputHold:
        wanted = self._record.config.output
        if wanted == "none":
            return NoHold()
        nics = [nic for nic in cards.nics if nic.netdev is not None]
        for nic in nics:
            _check(nic)
        if not nics:
            return NoHold()
        try:
            if wanted != "filter":
                return await self._plugged(nics, cards)
        except (OutputError, CannotHold) as error:
            if wanted == "plug":
                raise
            why = error
        try:
            assert self._record.qmp is not None
            hold = FilterHold(qmp, self._record.qmp, [nic.netdev for nic in nics if nic.netdev])
            await hold.attach()
            return hold
        except CannotHold as error:
            if wanted == "filter":
                raise
            raise CannotHold(error.nic, f"by QEMU, {error.why}; by the kernel, {text(why)}") from None

    async def _plugged(self, nics: list[Nic], cards: Cards) -> OutputHold:
        for nic in nics:
            if nic.kind != "tap":
                raise CannotHold(nic.name, f"it is on a {nic.kind} network, and plugs are for taps")
        config = self._record.config
        if cards.unseen is not None:
            raise cards.unseen
        taps = sorted(set(cards.taps.values()))
        if not taps:
            raise CannotHold(nics[0].name, "the tap of its QEMU is not in the daemon's network namespace")
        hold = TapHold(taps, limit=config.output_limit, vm=config.name)
        await hold.attach()
        return hold

    async def _left_plugged(self) -> OutputHold | None:
        config = self._record.config
        return TapHold.left(config.name, limit=config.output_limit)


def _check(nic: Nic) -> None:
    """Raise CannotHold for a card that no backend is for."""
    if nic.kind in _ELSEWHERE:
        raise CannotHold(nic.name, f"it is on a {nic.kind} network ({_ELSEWHERE[nic.kind]})")
