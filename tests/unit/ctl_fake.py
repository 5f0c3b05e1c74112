"""A curlingd of cardboard for the tests of curlingctl: the real control interface, canned VMs behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import trio
from attrs import define, field

from curling_fd.errors import (
    AlreadyProtected,
    AmbiguousVm,
    CurlingError,
    NoSuchVm,
    NotProtected,
    PrimaryAlive,
    WrongRole,
)
from curling_fd.service.interface import IDENTITY, NEEDS_MORE, control_interface
from curling_fd.varlink.server import Request, Service

STATISTICS = {
    "checkpoints": 18233,
    "committed": 18232,
    "checkpoints_per_s": 21.3,
    "stop_ms_last": 1.2,
    "stop_ms_p50": 1.04,
    "stop_ms_p99": 3.4,
    "pages_last": 1230,
    "pages_p50": 228,
    "bytes_last": 1 << 20,
    "bytes_total": 3 << 30,
    "lag_ms": 23.0,
    "first_pass_ms": 1300.0,
    "detection_ms": None,
    "failover_ms": None,
}


def vm(name: str, **fields: Any) -> dict[str, Any]:
    """A VM nobody protects, with `fields` changed."""
    return {
        "name": name,
        "role": "none",
        "state": "idle",
        "reason": None,
        "engine": None,
        "engine_reason": None,
        "output": None,
        "longest_epoch_ms": 100.0,
        "shortest_epoch_ms": 2.0,
        "held_packets": 0,
        "held_bytes": 0,
        "accelerator": None,
        "qemu_version": None,
        "peer": "host-b:9271",
        "generation": 0,
        "arbiter": "manual",
        "ram_bytes": 4 << 30,
        "disks": [],
        "paused": False,
        "progress": None,
        "statistics": None,
        **fields,
    }


def canned() -> dict[str, dict[str, Any]]:
    """One protected VM, one idle, two others that begin alike, one this host is the backup of."""
    engine = {
        "engine": "incremental",
        "engine_reason": "x-colo works",
        "output": "plug",
        "longest_epoch_ms": 100.0,
        "shortest_epoch_ms": 2.0,
        "held_packets": 3,
        "held_bytes": 4200,
        "accelerator": "kvm",
        "qemu_version": "11.1.3",
    }
    vms = [
        vm("db1", role="primary", state="protected", generation=4, statistics=STATISTICS, **engine),
        vm("idle"),
        vm(
            "mail1",
            role="primary",
            state="unprotected",
            reason="the link to the other host was lost",
            **engine,
        ),
        vm("mail2"),
        vm("web", role="backup", state="suspect", generation=7, statistics=STATISTICS, peer="host-c:9271"),
    ]
    return {entry["name"]: entry for entry in vms}


def event(sequence: int, **fields: Any) -> dict[str, Any]:
    """An event."""
    return {
        "sequence": sequence,
        "time": 1_700_000_000.0 + sequence,
        "vm": "db1",
        "event": "committed",
        "message": f"number {sequence}",
        "fields": {"n": sequence},
        **fields,
    }


CHECKS = [
    {
        "check": "peer",
        "vm": "db1",
        "status": "failed",
        "message": "no answer",
        "remedy": "Start curlingd there.",
    },
    {"check": "memory", "vm": None, "status": "ok", "message": "8 GiB free", "remedy": ""},
    {"check": "arbiter", "vm": "web", "status": "warning", "message": "manual", "remedy": "Set arbiter."},
]


@define
class FakeDaemon:
    """The state of the daemon; tests change it and look at `calls`."""

    path: str
    vms: dict[str, dict[str, Any]] = field(factory=canned)
    events: list[dict[str, Any]] = field(factory=lambda: [event(1), event(2), event(3)])
    checks: list[dict[str, Any]] = field(factory=lambda: list(CHECKS))
    calls: list[tuple[str, dict[str, Any]]] = field(factory=list)
    raises: CurlingError | None = None
    hangs: bool = False
    called: trio.Event = field(factory=trio.Event)
    cancelled: trio.Event = field(factory=trio.Event)

    def service(self) -> Service:
        """The service to serve; its replies are held to the interface."""
        methods = {name: getattr(self, f"_{name.lower()}") for name in control_interface().methods}
        return Service(control_interface(), methods, IDENTITY, needs_more=NEEDS_MORE, check_replies=True)

    async def _note(self, request: Request) -> None:
        self.calls.append((request.method, dict(request.parameters)))
        self.called.set()
        if self.raises is not None:
            raise self.raises
        if self.hangs:
            try:
                await trio.sleep_forever()
            finally:
                self.cancelled.set()

    def _find(self, request: Request) -> dict[str, Any]:
        name = request.parameters["name"]
        matches = [entry for entry in self.vms if entry == name] or [
            entry for entry in self.vms if entry.startswith(name)
        ]
        if len(matches) > 1:
            raise AmbiguousVm(name, tuple(matches))
        if not matches:
            raise NoSuchVm(name, "db1")
        return self.vms[matches[0]]

    async def _list(self, request: Request) -> Mapping[str, Any]:
        await self._note(request)
        return {"vms": list(self.vms.values())}

    async def _show(self, request: Request) -> Mapping[str, Any]:
        await self._note(request)
        return {"vm": self._find(request)}

    async def _protect(self, request: Request) -> Mapping[str, Any]:
        await self._note(request)
        found = self._find(request)
        if found["state"] == "protected":
            raise AlreadyProtected(found["name"], found["state"])
        await self._progress(request, found, "syncing", "first pass")
        found |= {"role": "primary", "state": "protected", "progress": None, "statistics": STATISTICS}
        return {"vm": found}

    async def _progress(self, request: Request, found: dict[str, Any], state: str, phase: str) -> None:
        for percent in (0, 4, 25, 50, 100):
            made = {"phase": phase, "done_bytes": percent << 20, "total_bytes": 100 << 20}
            await request.reply_more({"vm": {**found, "state": state, "progress": made}})

    async def _unprotect(self, request: Request) -> Mapping[str, Any]:
        await self._note(request)
        found = self._find(request)
        if found["state"] == "idle":
            raise NotProtected(found["name"], found["state"])
        found |= {"role": "none", "state": "idle", "statistics": None}
        return {"vm": found}

    async def _failover(self, request: Request) -> Mapping[str, Any]:
        await self._note(request)
        found = self._find(request)
        if found["role"] != "backup":
            raise WrongRole(found["name"], "failover", found["role"])
        if found["state"] == "standby" and not request.parameters["force"]:
            raise PrimaryAlive(found["name"], 34.0)
        numbers = {**STATISTICS, "detection_ms": 1012.0, "failover_ms": 43.0}
        found |= {"role": "primary", "state": "active", "statistics": numbers}
        return {"vm": found}

    async def _switch(self, request: Request) -> Mapping[str, Any]:
        await self._note(request)
        found = self._find(request)
        await self._progress(request, found, "switching", "last checkpoint")
        found |= {"role": "backup", "state": "filling"}
        return {"vm": found}

    async def _pause(self, request: Request) -> Mapping[str, Any]:
        await self._note(request)
        found = self._find(request)
        found["paused"] = True
        return {"vm": found}

    async def _resume(self, request: Request) -> Mapping[str, Any]:
        await self._note(request)
        found = self._find(request)
        found["paused"] = False
        return {"vm": found}

    async def _tune(self, request: Request) -> Mapping[str, Any]:
        await self._note(request)
        return {"vm": self._find(request)}

    async def _watch(self, request: Request) -> Mapping[str, Any]:
        self.calls.append((request.method, dict(request.parameters)))
        vms = [self._find(request)] if request.parameters.get("name") else list(self.vms.values())
        try:
            for _ in range(3):
                await request.reply_more({"vms": vms})
            await trio.sleep_forever()
        finally:
            self.cancelled.set()
        raise AssertionError("unreachable")

    async def _events(self, request: Request) -> Mapping[str, Any]:
        await self._note(request)
        since = request.parameters.get("since")
        try:
            for entry in self.events:
                if since is not None and entry["sequence"] > since:
                    await request.reply_more({"event": entry})
            await trio.sleep_forever()
        finally:
            self.cancelled.set()
        raise AssertionError("unreachable")

    async def _doctor(self, request: Request) -> Mapping[str, Any]:
        await self._note(request)
        return {"checks": self.checks}
