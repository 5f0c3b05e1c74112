"""What a session on the primary is told when it begins, and what it may say at its end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from enum import Enum

import attrs
from attrs import frozen

from curling_fd.capture.engine import EngineOptions, PassLimit
from curling_fd.disk.copy import CopyProgress
from curling_fd.errors import ConfigError
from curling_fd.output.hold import OutputHold
from curling_fd.service.config import DaemonConfig, VmConfig
from curling_fd.service.pace import Pace

TUNABLE = ("longest_epoch", "shortest_epoch", "output_limit")
"""Keys of a VM's file that can be changed while it is protected."""


@frozen
class SessionOptions:
    """Settings of one session; times in seconds, sizes in bytes."""

    generation: int
    pace: Pace
    buffers: int
    max_checkpoint: int
    output_limit: int
    disk_copy_rate: int | None
    stop_limit: float
    heartbeat_interval: float
    failure_timeout: float

    @classmethod
    def of(cls, config: VmConfig, daemon: DaemonConfig, generation: int) -> SessionOptions:
        """What the two files say."""
        return cls(
            generation=generation,
            pace=Pace(config.shortest_epoch, config.longest_epoch),
            buffers=config.buffers,
            max_checkpoint=config.max_checkpoint,
            output_limit=config.output_limit,
            disk_copy_rate=config.disk_copy_rate,
            stop_limit=daemon.stop_limit,
            heartbeat_interval=daemon.heartbeat_interval,
            failure_timeout=daemon.failure_timeout,
        )


def engine_options(
    config: VmConfig,
    daemon: DaemonConfig,
    hold: OutputHold,
    pass_limit: PassLimit | None,
    will: bytes = b"",
) -> EngineOptions:
    """What the engine of a session is to be opened with, its packets being held by `hold`.

    Args:
        will: what QEMU is to be told first when this daemon is gone.
    """
    return EngineOptions(
        request_delay_ms=max(1, int(config.shortest_epoch * 1000)),
        stop_limit=daemon.stop_limit,
        pass_limit=pass_limit,
        will=will + hold.last_will,
    )


def tuned(config: VmConfig, wanted: Mapping[str, str]) -> VmConfig:
    """`config` with other values for some keys of TUNABLE, written as in the VM's file.

    Raises:
        ConfigError: a value cannot be.
    """
    known = {
        field.name: field.metadata["key"].kind for field in attrs.fields(VmConfig) if field.name in TUNABLE
    }
    values = {}
    for key, value in wanted.items():
        try:
            values[key] = known[key].read(value)
        except ValueError as error:
            raise ConfigError(f"vms/{config.name}.toml", str(error), key) from None
    changed = attrs.evolve(config, **values)
    if changed.shortest_epoch > changed.longest_epoch:
        raise ConfigError(f"vms/{config.name}.toml", "it is more than longest_epoch", "shortest_epoch")
    return changed


@frozen
class Callbacks:
    """What the session's owner wants to know as it happens.

    Attributes:
        disks_changed: returns never, and raises when the VM has other disks than when the session began.
        progress: bytes of the first pass sent so far.
        copied: how far the copy of the disks is.
        committed: the backup holds a first whole checkpoint: the VM is protected.
        paused: the operator paused (True) or resumed (False) the guest.
        ended: the guest has ended; the session is about to.
    """

    disks_changed: Callable[[], Awaitable[None]]
    progress: Callable[[int], None]
    copied: Callable[[CopyProgress], None]
    committed: Callable[[], None]
    paused: Callable[[bool], None]
    ended: Callable[[], None]


class Finish(Enum):
    """Why a session is over without a failure."""

    SWITCH = "the last checkpoint of a switch is committed, and the guest stopped"
    RESTART = "the next daemon can go on with it"
