"""The backend `plug` for a session: the kernel's plugs on a VM's taps, and a watch on what it sends."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from curling_fd.errors import OutputError
from curling_fd.netlink.socket import RouteSocket
from curling_fd.output.hold import HoldStatistics
from curling_fd.output.placement import leftovers
from curling_fd.output.plug import PlugHold
from curling_fd.output.watch import OutputWatch, PortChange
from curling_fd.system.privileges import raised

_TUN = "/dev/net/tun"

#: A plug throws away what it has no room for; the session keeps the guest from ever sending so much. The
#: kernel counts bytes of a queue in 32 bits.
_ROOM, _MOST = 8, (1 << 32) - 1


class TapHold:
    """Holds what a guest sends through `ports`, the taps of `vm`.

    Args:
        limit: bytes after which the session makes the guest wait.
    """

    name = "plug"
    depth: int | None = 1
    last_will = b""

    def __init__(self, ports: Sequence[str], *, limit: int, vm: str) -> None:
        self._ports = tuple(ports)
        self._plug = PlugHold(ports, limit=room(limit), vm=vm)
        self._watch: OutputWatch | None = None
        self._waiting = False

    @classmethod
    def left(cls, vm: str, *, limit: int) -> TapHold | None:
        """What a daemon before us has left for `vm`, as it is; None if it left nothing."""
        with RouteSocket() as route:
            found = leftovers(route, [vm])
        if not found:
            return None
        ports = [each.port for each in found[0].placements if each.port]
        hold = cls(ports or ["gone"], limit=limit, vm=vm)
        hold._plug = PlugHold.adopt(found[0], limit=room(limit))
        with suppress(OutputError):  # a plug that somebody took away: the next barrier says so
            hold.set_limit(limit)  # the daemon before may have been told another one
        return hold

    async def attach(self) -> None:
        await self._plug.attach()

    def barrier(self, sequence: int) -> None:
        self._plug.barrier(sequence)
        if self._watch is not None:
            self._watch.barrier()
        self._waiting = False

    async def release(self, sequence: int) -> None:
        await self._plug.release(sequence)
        if self._watch is not None:
            self._watch.arm()

    async def let_go_stopped(self) -> None:
        pass  # the kernel does not care whether the guest runs

    def set_limit(self, limit: int) -> None:
        self._plug.set_limit(room(limit))

    async def drop(self) -> None:
        await self._plug.drop()

    async def detach(self) -> None:
        await self._plug.detach()

    async def watch(self, on_output: Callable[[], None]) -> None:
        def tell() -> None:
            self._waiting = True
            on_output()

        with OutputWatch(self._ports) as self._watch:
            self._watch.arm()
            try:
                await self._watch.run(on_output=tell, on_change=_check)
            finally:
                self._watch = None

    def statistics(self) -> HoldStatistics:
        return self._plug.statistics()

    def waiting(self) -> bool:
        return self._waiting


def room(limit: int) -> int:
    """Bytes that each plug has room for, so that none is full when the guest is made to wait at `limit`."""
    return min(limit * _ROOM, _MOST)


def taps_of(pid: int) -> dict[int, str]:
    """The taps that a process has open: its descriptors, and the interfaces' names.

    Raises:
        OutputError: it may not be asked.

    Source: tun_chr_show_fdinfo in the kernel's drivers/net/tun.c.
    """
    found: dict[int, str] = {}
    try:
        with raised("CAP_SYS_PTRACE"):
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(FileNotFoundError):  # closed meanwhile
                    if os.readlink(fd) == _TUN:
                        for name in _names(Path(f"/proc/{pid}/fdinfo/{fd.name}").read_text()):
                            found[int(fd.name)] = name
    except OSError as error:
        raise OutputError(f"process {pid}", f"its taps cannot be seen: {error.strerror}") from error
    return found


def _names(fdinfo: str) -> Iterator[str]:
    for line in fdinfo.splitlines():
        if line.startswith("iff:") and (name := line.removeprefix("iff:").strip()):
            yield name


def _check(change: PortChange) -> None:
    """Raise OutputError for a change after which the port's packets are not held as they were."""
    if change.after is None:
        raise OutputError(change.port, "the interface was deleted while its packets were held")
    if change.after.name != change.port:
        raise OutputError(
            change.port, f"the interface was renamed to {change.after.name} while it was in use"
        )
