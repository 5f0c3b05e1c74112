"""`curlingctl doctor`: everything that would keep protection or a failover from working, looked at now."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import trio
from attrs import frozen

from curling_fd.errors import CurlingError, StandbyFailed
from curling_fd.failover.arbiter import FileArbiter
from curling_fd.failover.states import State, role
from curling_fd.qmp.client import open_qmp
from curling_fd.sentences import sentence
from curling_fd.service.examine import examine
from curling_fd.service.greeting import dial
from curling_fd.service.host import Host
from curling_fd.service.vm import Vm

#: Free bytes the state directory must have: its files are tiny, but a generation must be writable.
_STATE_ROOM = 1 << 20


@frozen
class Check:
    """One finding. `status` is `ok`, `warning` or `failed`; `remedy` says what to do."""

    check: str
    vm: str | None
    status: str
    message: str
    remedy: str = ""


async def examine_host(host: Host, vms: Iterable[Vm]) -> list[Check]:
    """Look at this host and at `vms`; changes nothing."""
    checks = [_kvm(), _state_directory(host), _link(host)]
    for vm in vms:
        checks += [check async for check in _examine_vm(host, vm)]
    return checks


def _kvm() -> Check:
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        return Check("kvm", None, "ok", "/dev/kvm can be used")
    remedy = "load kvm_intel or kvm_amd, or switch virtualization on in the firmware; without it VMs are slow"
    return Check("kvm", None, "warning", "/dev/kvm cannot be used", remedy)


def _state_directory(host: Host) -> Check:
    directory = host.config.state_directory
    free = shutil.disk_usage(directory).free
    if free < _STATE_ROOM or not os.access(directory, os.W_OK):
        remedy = "free some space there, or set `state_directory` to another place"
        return Check("state directory", None, "failed", f"{directory} cannot be written", remedy)
    return Check("state directory", None, "ok", f"{directory} can be written")


def _link(host: Host) -> Check:
    listen = host.config.listen
    loopback = listen.host in ("localhost", "::1") or listen.host.startswith("127.")
    if host.config.insecure:
        remedy = "use it only on a network of which both ends and all between are trusted"
        return Check("link", None, "warning", f"links at {listen} are not encrypted", remedy)
    if loopback:
        remedy = "set `listen` to this host's address and, until links are encrypted, `insecure = true`"
        return Check("link", None, "warning", f"only this host itself can reach {listen}", remedy)
    remedy = "until links are encrypted, say `insecure = true`"
    return Check("link", None, "failed", f"links from other hosts to {listen} are refused", remedy)


async def _examine_vm(host: Host, vm: Vm) -> AsyncIterator[Check]:
    record, config = vm.record, vm.record.config
    name = vm.name
    if config.arbiter == "manual":
        remedy = 'set `arbiter = "file"` and a shared `arbiter_directory` for failover without an operator'
        yield Check("arbiter", name, "warning", "a failover needs `curlingctl failover`", remedy)
    elif isinstance(record.arbiter, FileArbiter):
        try:
            await record.arbiter.generation(name)
            yield Check("arbiter", name, "ok", f"{config.arbiter_directory} answers")
        except CurlingError as error:
            yield _failed("arbiter", name, error)
    if role(record.state) == "backup":
        valid = record.state is State.STANDBY
        status = "ok" if valid else "warning"
        yield Check("replica", name, status, f"the replica is {record.state.value}", "" if valid else "wait")
        return
    if config.peer is not None:
        yield await _peer(host, vm)
    if record.qmp is None:
        binary = config.standby.qemu
        if binary is not None and not os.access(binary, os.X_OK):
            yield _failed("standby", name, StandbyFailed(f"{binary} cannot be run"))
        else:
            yield Check("role", name, "ok", "this host waits to be the backup")
        return
    yield await _qemu(vm)


async def _peer(host: Host, vm: Vm) -> Check:
    peer = vm.record.config.peer
    assert peer is not None
    if vm.record.state is State.PROTECTED:
        return Check("peer", vm.name, "ok", f"{peer} is the backup")
    try:
        (await dial(peer, host.config.insecure)).close()
        return Check("peer", vm.name, "ok", f"{peer} answers")
    except CurlingError as error:
        return _failed("peer", vm.name, error)


async def _qemu(vm: Vm) -> Check:
    record, config = vm.record, vm.record.config
    assert record.qmp is not None
    if record.state in (State.SYNCING, State.PROTECTED, State.SWITCHING):
        return Check("qemu", vm.name, "ok", "protected now")
    if not Path(record.qmp).exists() and config.qmp is not None and not config.autostart:
        message = f"the VM does not run here: there is no {record.qmp}"
        return Check("qemu", vm.name, "warning", message, "start it, if this host is to be its primary")
    try:
        with trio.fail_after(10):
            async with open_qmp(record.qmp) as qmp:
                disks = (*config.shared_disks, *config.scratch_disks)
                examined = await examine(qmp, config.engine, disks)
    except CurlingError as error:
        return _failed("qemu", vm.name, error)
    except trio.TooSlowError:
        return Check("qemu", vm.name, "failed", "QEMU does not answer", "look at the host's load")
    choice = examined.choice
    status = "ok" if choice.engine == "incremental" else "warning"
    remedy = "" if status == "ok" else "checkpoints will take longer; KVM and a newer QEMU help"
    return Check("qemu", vm.name, status, f"engine {choice.engine}: {choice.reason}", remedy)


def _failed(check: str, vm: str, error: CurlingError) -> Check:
    words = sentence(error)
    return Check(check, vm, "failed", words.text, words.remedy)
