"""What was done to the host's network for a VM, one step at a time, and how each is undone.

Steps are remembered beside the VM, so that a daemon that was started anew can undo what another has done;
they are written as JSON. To undo a step is to bring back what was there before, and no more: what is gone
already, or is somebody else's by now, is left.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import attrs
from attrs import define, field, frozen

from curling_fd.errors import NetlinkError
from curling_fd.netlink.links import find_link
from curling_fd.netlink.socket import RTM_DELLINK, RouteSocket
from curling_fd.network import fdb, kernel
from curling_fd.network.words import read_host_address, read_route

GONE = frozenset({errno.ENODEV, errno.ENOENT, errno.ESRCH, errno.EADDRNOTAVAIL})
"""What the kernel says about something that is not there any more."""


class Step(Protocol):
    """Something that was done."""

    kind: ClassVar[str]

    def undo(self, route: RouteSocket) -> None:
        """Undo it.

        Raises:
            NetlinkError: it is still there and cannot be undone.
        """


@frozen
class MadeTap:
    """A tap; `index` tells it from one of the same name that somebody made later."""

    kind: ClassVar[str] = "tap"
    name: str
    index: int

    def undo(self, route: RouteSocket) -> None:
        if _same(route, self.name, self.index):
            route.request(kernel.interface(self.index), RTM_DELLINK, what=f"to delete {self.name}")


@frozen
class Joined:
    """An interface that was there was put into a bridge."""

    kind: ClassVar[str] = "joined"
    name: str
    index: int

    def undo(self, route: RouteSocket) -> None:
        if _same(route, self.name, self.index):
            kernel.set_link(route, self.index, self.name, master=0)


@frozen
class TakenDown:
    """An interface that was up was taken down."""

    kind: ClassVar[str] = "down"
    name: str
    index: int

    def undo(self, route: RouteSocket) -> None:
        if _same(route, self.name, self.index):
            kernel.set_link(route, self.index, self.name, up=True)


@frozen
class BroughtUp:
    """An interface that was down was brought up."""

    kind: ClassVar[str] = "up"
    name: str
    index: int

    def undo(self, route: RouteSocket) -> None:
        if _same(route, self.name, self.index):
            kernel.set_link(route, self.index, self.name, up=False)


@frozen
class Pointed:
    """A bridge sends frames for `mac` to `name`; before it did to the port of index `before`, in `state`."""

    kind: ClassVar[str] = "mac"
    name: str
    index: int
    mac: str
    vlan: int | None
    before: int | None = None
    state: int = fdb.NUD_REACHABLE

    def undo(self, route: RouteSocket) -> None:
        if _same(route, self.name, self.index):
            fdb.forget(route, fdb.Entry(self.mac, self.vlan, self.index), self.name)
        if self.before is not None:
            # A port that does not pass frames any more has lost what led to it: EPERM.
            with _gone(errno.EPERM, errno.EINVAL):
                entry = fdb.Entry(self.mac, self.vlan, self.before, self.state)
                fdb.point(route, entry, f"interface {self.before}", unless_known=True)

    def settled(self) -> Pointed:
        """Once the guest runs here, what the bridge had learned before is out of date."""
        learned = not self.state & fdb.NUD_NOARP
        return attrs.evolve(self, before=None) if learned else self


@frozen
class AddedAddress:
    """An address of the host, in the words of the configuration."""

    kind: ClassVar[str] = "address"
    address: str
    index: int

    def undo(self, route: RouteSocket) -> None:
        with _gone():
            kernel.delete_address(route, read_host_address(self.address), self.index)


@frozen
class AddedRoute:
    """A route of the host, in the words of the configuration."""

    kind: ClassVar[str] = "route"
    route: str

    def undo(self, route: RouteSocket) -> None:
        with _gone():
            kernel.delete_route(route, read_route(self.route))


KINDS: dict[str, type[Step]] = {
    kind.kind: kind for kind in (MadeTap, Joined, TakenDown, BroughtUp, Pointed, AddedAddress, AddedRoute)
}


def _nothing(steps: list[dict[str, Any]]) -> None:
    pass


@define
class Ledger:
    """The steps in the order in which they were done.

    Args:
        steps: done before.
        save: told the steps, as JSON, whenever they have changed.
    """

    steps: list[Step] = field(factory=list)
    save: Callable[[list[dict[str, Any]]], None] = _nothing

    def __contains__(self, step: object) -> bool:
        return step in self.steps

    def done(self, step: Step) -> None:
        """Note a step that has been done."""
        if step not in self.steps:
            self.steps.append(step)
            self.save(self.encode())

    def settle(self) -> None:
        """The guest runs here: what was so only until then is not brought back later."""
        self.steps[:] = [step.settled() if isinstance(step, Pointed) else step for step in self.steps]
        self.save(self.encode())

    def undo(self, route: RouteSocket, down_to: int = 0) -> list[NetlinkError]:
        """Undo the newest steps first, until `down_to` are left; returns what could not be undone.

        A step that fails does not keep those before it from being undone. It is forgotten like the others:
        to try again would fail again.
        """
        problems: list[NetlinkError] = []
        while len(self.steps) > down_to:
            step = self.steps.pop()
            try:
                with _gone():
                    step.undo(route)
            except NetlinkError as error:
                problems.append(error)
        self.save(self.encode())
        return problems

    def encode(self) -> list[dict[str, Any]]:
        """Write the steps for JSON."""
        return [{"step": step.kind, **attrs.asdict(step)} for step in self.steps]  # type: ignore[arg-type]


def decode(values: Iterable[Mapping[str, Any]]) -> list[Step]:
    """Read what `Ledger.encode` wrote.

    Raises:
        ValueError: it is not that.
    """
    steps: list[Step] = []
    for value in values:
        try:
            facts = dict(value)
            steps.append(KINDS[facts.pop("step")](**facts))
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{str(value)[:80]} is not a step") from None
    return steps


def _same(route: RouteSocket, name: str, index: int) -> bool:
    """Whether the interface of that index is there, whatever its name is by now, and not another's.

    Indexes are used again only after a reboot, or by who asks for one.
    """
    found = find_link(route, index)
    return found is not None and (found.name == name or found.alias.startswith(kernel.ALIAS))


@contextmanager
def _gone(*more: int) -> Iterator[None]:
    try:
        yield
    except NetlinkError as error:
        if error.errno not in GONE and error.errno not in more:
            raise
