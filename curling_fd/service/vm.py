"""One VM of this host, with everything that can be asked of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from curling_fd.errors import CurlingError
from curling_fd.failover.states import State
from curling_fd.link.transport import FrameLink, Received
from curling_fd.service.config import VmConfig
from curling_fd.service.follower import Follower
from curling_fd.service.host import Host
from curling_fd.service.network import VmNetwork
from curling_fd.service.options import SessionOptions, tuned
from curling_fd.service.protector import Protector
from curling_fd.service.record import VmRecord, text
from curling_fd.service.restart import BackupLeft, Estate, PrimaryLeft


class Vm:
    """A VM: protected from here, or backed up here. Its verbs are those of `curlingctl`."""

    def __init__(self, config: VmConfig, host: Host) -> None:
        self.record = VmRecord(config, host)
        self._network = VmNetwork(self.record)
        self._protector = Protector(self.record, self._network)
        self._follower = Follower(self.record, self._protector, self._network)

    @property
    def name(self) -> str:
        return self.record.name

    def show(self) -> dict[str, Any]:
        """The VM as the control interface shows it."""
        return self.record.show()

    @property
    def stuck(self) -> bool:
        """See `Protector.stuck`: no more life for systemd's watchdog."""
        return self._protector.stuck

    def start(self, estate: Estate | None = None) -> None:
        """The daemon starts: go on with what the one before us has left, or take up what was wanted."""
        self._network.resume()
        if estate is not None and self._take_up(estate):
            return
        if not self.record.taken_over:  # a standby that died with the daemon before us, if anything
            self._network.withdraw_soon()
        if self.record.wanted_at_start and self.record.state is not State.FENCED:
            self._protector.start()
        else:
            self.record.host.nursery.start_soon(self._protector.tidy)

    def _take_up(self, estate: Estate) -> bool:
        record = self.record
        primary, backup = estate.read(PrimaryLeft), estate.read(BackupLeft)
        fits = record.state in (State.IDLE, State.ACTIVE)
        if fits and primary is not None and primary.generation == record.generation and record.wanted:
            self._protector.take_up(estate, primary)
            return True
        if record.state is State.IDLE and backup is not None and backup.generation == record.generation:
            try:
                self._follower.take_up(estate, backup)
                return True
            except CurlingError as error:
                record.note("refused", text(error), level=logging.WARNING)
        estate.close()
        return False

    async def protect(self) -> None:
        await self._protector.protect()

    async def unprotect(self) -> None:
        await self._protector.unprotect()

    async def switch(self) -> None:
        await self._protector.switch()

    async def pause(self) -> None:
        await self._protector.pause()

    async def resume(self) -> None:
        await self._protector.resume()

    async def tune(self, wanted: Mapping[str, str]) -> None:
        """Change keys of the VM's file in TUNABLE, until the daemon ends.

        Raises:
            ConfigError: to what they cannot be.
            OutputError: what holds the VM's packets has no room for another output_limit; nothing is changed.
        """
        record = self.record
        config = tuned(record.config, wanted)
        if record.hold is not None:
            record.hold.set_limit(config.output_limit)
        record.config = config
        if self._protector.session is not None:
            options = SessionOptions.of(record.config, record.host.config, record.generation)
            await self._protector.session.tune(options)

    async def failover(self, force: bool) -> None:
        await self._follower.failover(force)

    async def follow(self, link: FrameLink, hello: Received) -> None:
        """Be the backup for the primary that said `hello`."""
        await self._follower.follow(link, hello)

    async def stop(self) -> None:
        """The daemon stops: every guest that runs here goes on running."""
        await self._protector.stop()
        await self._follower.stop()
