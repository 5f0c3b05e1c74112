"""Arbiters: who says which host may run a VM (I3).

An arbiter keeps a VM's generation and swaps it from N to N+1 for exactly one host. `manual` has no such
memory: it lets the incumbent go on and never lets a backup take over by itself. `file` keeps one file per
generation in a directory that both hosts see; `link(2)` makes the swap atomic, also over NFS.
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import trio

from curling_fd.errors import ArbiterLost, ArbiterUnavailable

T = TypeVar("T")

#: A directory on shared storage that does not answer within this many seconds gives no right to anybody.
FILE_TIMEOUT = 5.0


class Arbiter(Protocol):
    """What decides who may run a VM."""

    #: A backup may take over on this arbiter's word alone.
    automatic: bool

    async def generation(self, vm: str) -> int:
        """The highest generation granted so far; 0 when none was."""
        ...

    async def swap(self, vm: str, current: int, *, incumbent: bool) -> int:
        """Claim `vm` after generation `current`; returns the generation now held by this host.

        Args:
            incumbent: this host runs the VM already and only wants to go on alone.

        Raises:
            ArbiterLost: another host claimed it first.
            ArbiterUnavailable: no answer, so no right.
        """
        ...


class ManualArbiter:
    """The operator decides: `curlingctl failover`. The incumbent goes on."""

    automatic = False

    async def generation(self, vm: str) -> int:
        return 0

    async def swap(self, vm: str, current: int, *, incumbent: bool) -> int:
        if incumbent:
            return current
        raise ArbiterUnavailable("the arbiter is `manual`: a failover needs an operator's word")


class FileArbiter:
    """Claims as files `VM.generation.N` in `directory`; the first to link one has that generation."""

    automatic = True

    def __init__(self, directory: str | os.PathLike[str], host: str) -> None:
        self._directory = Path(directory)
        self._host = host
        # Of its own: threads that hang on the directory must not use up those the checkpoints are taken in.
        self._limiter = trio.CapacityLimiter(2)

    async def generation(self, vm: str) -> int:
        return await self._in_time(self._highest, vm)

    async def swap(self, vm: str, current: int, *, incumbent: bool) -> int:
        return await self._in_time(self._claim, vm, current + 1)

    async def leave_token(self, vm: str) -> str:
        """Write a token that the peer must see, and return its name: proof that the directory is shared."""
        name = f".{vm}.token.{uuid.uuid4().hex}"
        await self._in_time(lambda: (self._directory / name).touch())
        return name

    async def sees_token(self, name: str) -> bool:
        """Is the peer's token here?"""
        return ".token." in name and await self._in_time(lambda: (self._directory / Path(name).name).exists())

    async def remove_token(self, name: str) -> None:
        await self._in_time(lambda: (self._directory / Path(name).name).unlink(missing_ok=True))

    async def _in_time(self, function: Callable[..., T], *args: Any) -> T:
        """Run blocking `function` in a thread; a hung file system costs the thread, not the daemon."""
        try:
            with trio.fail_after(FILE_TIMEOUT):
                return await trio.to_thread.run_sync(
                    function, *args, abandon_on_cancel=True, limiter=self._limiter
                )
        except trio.TooSlowError:
            raise ArbiterUnavailable(f"{self._directory} did not answer in {FILE_TIMEOUT:g} s") from None
        except OSError as error:
            raise ArbiterUnavailable(f"{self._directory}: {error.strerror or error}") from None

    def _highest(self, vm: str) -> int:
        pattern = re.compile(re.escape(vm) + r"\.generation\.(\d+)")
        numbers = [int(m[1]) for name in os.listdir(self._directory) if (m := pattern.fullmatch(name))]
        return max(numbers, default=0)

    def _claim(self, vm: str, wanted: int) -> int:
        highest = self._highest(vm)
        if highest > wanted:
            raise ArbiterLost(highest, self._holder(vm, highest))
        claim = self._directory / f"{vm}.generation.{wanted}"
        draft = self._directory / f".{vm}.claim.{uuid.uuid4().hex}"
        try:
            with open(draft, "x", encoding="utf-8") as file:
                json.dump({"host": self._host, "time": time.time()}, file)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(draft, claim)
            except FileExistsError:
                # A link whose answer was lost on NFS is made again and finds itself there.
                if os.stat(draft).st_nlink < 2 and self._holder(vm, wanted) != self._host:
                    raise ArbiterLost(wanted, self._holder(vm, wanted)) from None
        finally:
            draft.unlink(missing_ok=True)
        _sync(self._directory)
        # Who slept between the look and the link may have linked a number that others had used and removed.
        highest = self._highest(vm)
        if highest > wanted:
            raise ArbiterLost(highest, self._holder(vm, highest))
        for old in range(max(1, wanted - 8), wanted - 1):  # the last two are kept to be read by people
            (self._directory / f"{vm}.generation.{old}").unlink(missing_ok=True)
        return wanted

    def _holder(self, vm: str, generation: int) -> str:
        try:
            text = (self._directory / f"{vm}.generation.{generation}").read_text(encoding="utf-8")
            return str(json.loads(text)["host"])
        except (OSError, ValueError, KeyError, TypeError):
            return "another host"


def _sync(directory: Path) -> None:
    """A claim that a crash of the storage undid could be made again by the other host."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such thing for directories
            raise
    finally:
        os.close(fd)
