"""What a session on the primary is told when it begins."""

from __future__ import annotations

from collections.abc import Callable

from attrs import frozen

from curling_fd.service.config import DaemonConfig, VmConfig
from curling_fd.service.pace import Pace


@frozen
class SessionOptions:
    """Settings of one session; times in seconds, sizes in bytes."""

    generation: int
    pace: Pace
    buffers: int
    max_checkpoint: int
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
            heartbeat_interval=daemon.heartbeat_interval,
            failure_timeout=daemon.failure_timeout,
        )


@frozen
class Callbacks:
    """What the session's owner wants to know as it happens.

    Attributes:
        progress: bytes of the first pass sent so far.
        committed: the backup holds a first whole checkpoint: the VM is protected.
        paused: the operator paused (True) or resumed (False) the guest.
        ended: the guest has ended; the session is about to.
    """

    progress: Callable[[int], None]
    committed: Callable[[], None]
    paused: Callable[[bool], None]
    ended: Callable[[], None]
