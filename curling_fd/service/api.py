"""The control interface: every method of io.curling.Control on the daemon's VMs."""

from __future__ import annotations

import difflib
import grp
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio
from attrs import asdict

from curling_fd.errors import AmbiguousVm, NoSuchVm, NotPermitted
from curling_fd.service.doctor import examine_host
from curling_fd.service.host import Host
from curling_fd.service.interface import IDENTITY, NEEDS_MORE, control_interface
from curling_fd.service.options import TUNABLE
from curling_fd.service.vm import Vm
from curling_fd.varlink.peer import Peer
from curling_fd.varlink.server import Request, Service

#: Shortest interval of `Watch`, in seconds.
_WATCH_FASTEST = 0.05

#: Progress of a first pass is told at most this often, in seconds.
_PROGRESS_INTERVAL = 0.1


class Api:
    """Answers calls of root, of our own user, and of members of the control group (I7)."""

    def __init__(self, host: Host, vms: Mapping[str, Vm]) -> None:
        self._host = host
        self._vms = vms

    def service(self) -> Service:
        """What `serve_connection` needs."""
        return Service(
            interface=control_interface(),
            methods={
                "List": self._list,
                "Show": self._show,
                "Protect": self._protect,
                "Unprotect": self._unprotect,
                "Failover": self._failover,
                "Switch": self._switch,
                "Pause": self._pause,
                "Resume": self._resume,
                "Tune": self._tune,
                "Watch": self._watch,
                "Events": self._events,
                "Doctor": self._doctor,
            },
            identity=IDENTITY,
            needs_more=NEEDS_MORE,
            authorize=self._authorize,
        )

    def _authorize(self, peer: Peer, verb: str) -> None:
        group = self._host.config.control_group
        if peer.uid in (0, os.getuid()):
            return
        try:
            gid = grp.getgrnam(group).gr_gid
        except KeyError:
            gid = -1
        if gid not in peer.gids:
            raise NotPermitted(verb, group, peer.uid)

    def _find(self, name: str) -> Vm:
        """The VM called `name`, or whose name begins so if only one does."""
        if name in self._vms:
            return self._vms[name]
        matches = [known for known in sorted(self._vms) if known.startswith(name)]
        if name and len(matches) == 1:
            return self._vms[matches[0]]
        if name and matches:
            raise AmbiguousVm(name, tuple(matches))
        nearest = difflib.get_close_matches(name, self._vms, n=1)
        raise NoSuchVm(name, nearest[0] if nearest else None)

    async def _list(self, request: Request) -> dict[str, Any]:
        return {"vms": [vm.show() for _, vm in sorted(self._vms.items())]}

    async def _show(self, request: Request) -> dict[str, Any]:
        return {"vm": self._find(request.parameters["name"]).show()}

    async def _protect(self, request: Request) -> dict[str, Any]:
        vm = self._find(request.parameters["name"])
        return await _with_progress(request, vm, vm.protect)

    async def _switch(self, request: Request) -> dict[str, Any]:
        vm = self._find(request.parameters["name"])
        return await _with_progress(request, vm, vm.switch)

    async def _unprotect(self, request: Request) -> dict[str, Any]:
        vm = self._find(request.parameters["name"])
        await vm.unprotect()
        return {"vm": vm.show()}

    async def _failover(self, request: Request) -> dict[str, Any]:
        vm = self._find(request.parameters["name"])
        await vm.failover(request.parameters["force"])
        return {"vm": vm.show()}

    async def _pause(self, request: Request) -> dict[str, Any]:
        vm = self._find(request.parameters["name"])
        await vm.pause()
        return {"vm": vm.show()}

    async def _resume(self, request: Request) -> dict[str, Any]:
        vm = self._find(request.parameters["name"])
        await vm.resume()
        return {"vm": vm.show()}

    async def _tune(self, request: Request) -> dict[str, Any]:
        vm = self._find(request.parameters["name"])
        await vm.tune({key: value for key in TUNABLE if (value := request.parameters.get(key)) is not None})
        return {"vm": vm.show()}

    async def _watch(self, request: Request) -> dict[str, Any]:
        name = request.parameters.get("name")
        interval = max(_WATCH_FASTEST, request.parameters["interval_ms"] / 1000)
        while True:
            vms = [self._find(name)] if name else [vm for _, vm in sorted(self._vms.items())]
            await request.reply_more({"vms": [vm.show() for vm in vms]})
            await trio.sleep(interval)

    async def _events(self, request: Request) -> dict[str, Any]:
        async for event in self._host.journal.follow(request.parameters.get("since")):
            await request.reply_more({"event": asdict(event)})
        raise AssertionError("the journal does not end")

    async def _doctor(self, request: Request) -> dict[str, Any]:
        name = request.parameters.get("name")
        vms = [self._find(name)] if name else [vm for _, vm in sorted(self._vms.items())]
        return {"checks": [asdict(check) for check in await examine_host(self._host, vms)]}


async def _with_progress(request: Request, vm: Vm, verb: Callable[[], Awaitable[None]]) -> dict[str, Any]:
    """Run `verb`, telling a client that asked for `more` how far it is."""
    async with trio.open_nursery() as nursery:

        async def tell() -> None:
            while True:
                await request.reply_more({"vm": vm.show()})
                await trio.sleep(_PROGRESS_INTERVAL)

        if request.more:
            nursery.start_soon(tell)
        await verb()
        nursery.cancel_scope.cancel()
    return {"vm": vm.show()}
