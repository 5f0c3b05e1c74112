"""`curlingctl doctor`: everything that would keep protection or a failover from working, looked at now.

Host by host is in `hostcheck`, the two hosts of a VM side by side in `compare`; here is what has to be asked:
QEMU, the arbiter, and the daemon of the other host.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import trio
from attrs import evolve

from curling_fd.capture.intake import PIECE
from curling_fd.disk.epoch import HARD
from curling_fd.errors import (
    ArbiterError,
    CurlingError,
    FrameError,
    LinkLost,
    PeerUnreachable,
    StandbyFailed,
)
from curling_fd.failover.arbiter import FileArbiter
from curling_fd.failover.states import State, role
from curling_fd.link.frames import HEAD_SIZE
from curling_fd.qmp.client import open_qmp
from curling_fd.sentences import sentence
from curling_fd.service.compare import Here, compare_hosts, compare_vm, devices_used
from curling_fd.service.config import Address
from curling_fd.service.examine import Examined, examine
from curling_fd.service.facts import USUAL, Facts, Question, ask
from curling_fd.service.greeting import dial
from curling_fd.service.host import Host
from curling_fd.service.hostcheck import Check, check_host
from curling_fd.service.record import VmRecord
from curling_fd.service.standby import find_program, memory_needed
from curling_fd.service.vm import Vm
from curling_fd.standby.program import Program, query

#: Seconds a QEMU may take for all that it is asked.
_QEMU_PATIENCE = 10.0


async def examine_host(host: Host, vms: Iterable[Vm]) -> list[Check]:
    """Look at this host, at `vms`, and at the other hosts of these; changes nothing."""
    checks = await trio.to_thread.run_sync(check_host, host.config)
    peers = _Peers()
    for vm in vms:
        checks += [check async for check in _examine_vm(vm.record, peers)]
    return checks


async def _examine_vm(record: VmRecord, peers: _Peers) -> AsyncIterator[Check]:
    name, config = record.name, record.config
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
    look = _Look()
    if role(record.state) == "backup" or record.qmp is None:
        yield await look.at_standby(record)
    else:
        yield await look.at_qemu(record)
    if config.peer is not None:
        for check in await peers.examine(record, look):
            yield check


class _Look:
    """What is found of a VM on this host, to be compared with the other.

    Attributes:
        here: what `compare` needs of it.
        question: what the other host needs to answer.
    """

    def __init__(self) -> None:
        self.here = Here(runs=False)
        self.question = Question()

    async def at_standby(self, record: VmRecord) -> Check:
        """This host waits to be the backup: is there a QEMU for that?"""
        try:
            program = await trio.to_thread.run_sync(_standby_program, record)
        except StandbyFailed as error:
            return _failed("standby", record.name, error)
        self.here = Here(runs=False, version=program.version)
        version = ".".join(map(str, program.version))
        message = f"this host can be the backup, with QEMU {version} ({program.path})"
        return Check("standby", record.name, "ok", message)

    async def at_qemu(self, record: VmRecord) -> Check:
        """This host has the VM: can its QEMU be protected?"""
        assert record.qmp is not None
        name, config = record.name, record.config
        self.here = Here(runs=True)
        choice = record.choice
        if choice is not None and record.state in (State.SYNCING, State.PROTECTED, State.SWITCHING):
            self.here = Here(True, choice.version, devices=devices_used((), choice.accelerator))
            return Check("qemu", name, "ok", "protected now")
        if not Path(record.qmp).exists() and config.qmp is not None and not config.autostart:
            message = f"the VM does not run here: there is no {record.qmp}"
            return Check("qemu", name, "warning", message, "start it, if this host is to be its primary")
        try:
            with trio.fail_after(_QEMU_PATIENCE):
                async with open_qmp(record.qmp) as qmp:
                    examined = await examine(
                        qmp, config.engine, shared=config.shared_disks, scratch=config.scratch_disks
                    )
        except CurlingError as error:
            return _failed("qemu", name, error)
        except trio.TooSlowError:
            return Check("qemu", name, "failed", "QEMU does not answer", "look at the host's load")
        self._take(record, examined)
        choice = examined.choice
        status = "ok" if choice.engine == "incremental" else "warning"
        remedy = "" if status == "ok" else "checkpoints will take longer; KVM and a newer QEMU help"
        return Check("qemu", name, status, f"engine {choice.engine}: {choice.reason}", remedy)

    def _take(self, record: VmRecord, examined: Examined) -> None:
        ram = sum(block.size for block in examined.memory)
        logs = HARD * record.config.disk_log_limit if examined.disks else 0
        staging = min(HEAD_SIZE + max(record.config.max_checkpoint, PIECE), ram) + logs
        self.here = Here(
            runs=True,
            version=examined.choice.version,
            machine=examined.machine,
            needed=memory_needed(ram, staging),
            devices=devices_used(examined.argv, examined.choice.accelerator),
            disks=len(examined.disks),
        )
        self.question = Question(examined.argv[0], examined.machine, disks=examined.disks)


class _Peers:
    """The other hosts: each is told of once, and one that does not answer is not asked again."""

    def __init__(self) -> None:
        self._silent: dict[Address, CurlingError] = {}
        self._told: set[Address] = set()

    async def examine(self, record: VmRecord, look: _Look) -> list[Check]:
        """What is to be said of the other host of a VM."""
        peer, name = record.config.peer, record.name
        assert peer is not None
        try:
            if peer in self._silent:
                raise self._silent[peer]
            facts = await self._ask(record, peer, look.question)
        except PeerUnreachable as error:
            self._silent[peer] = error
            return [_failed("peer", name, error)]
        except (FrameError, LinkLost) as error:
            self._silent[peer] = error
            message = f"what answers at {peer} is no curlingd, or is broken: {sentence(error).text}"
            remedy = (
                "see with 'ss -ltnp' on the other host who has the port, and with 'journalctl -u curlingd' "
                "there whether curlingd could not get it; correct `listen` there or `peer` here"
            )
            return [Check("peer", name, "failed", message, remedy)]
        except CurlingError as error:
            return [_failed("peer", name, error)]
        if facts.host == record.host.name:
            message = f"what answers at {peer} is called {facts.host}, like this host"
            remedy = "give each host a `host_name` of its own, and name the other host as `peer`"
            return [Check("peer", name, "failed", message, remedy)]
        checks = [Check("peer", name, "ok", f"curlingd on {facts.host} answers at {peer}")]
        if peer not in self._told:
            self._told.add(peer)
            checks += compare_hosts(facts)
        return [*checks, *compare_vm(name, look.here, facts, record.config.arbiter)]

    async def _ask(self, record: VmRecord, peer: Address, question: Question) -> Facts:
        link = await dial(peer, record.host.config.insecure)
        token = None
        try:
            if isinstance(record.arbiter, FileArbiter):
                try:
                    token = await record.arbiter.leave_token(record.name)
                except ArbiterError:
                    pass  # it has been told already
            return await ask(link, record, evolve(question, token=token))
        finally:
            link.close()
            if isinstance(record.arbiter, FileArbiter) and token is not None:
                with trio.CancelScope(shield=True):
                    await _forget(record.arbiter, token)


async def _forget(arbiter: FileArbiter, token: str) -> None:
    try:
        await arbiter.remove_token(token)
    except ArbiterError:
        pass  # an empty file stays behind


def _standby_program(record: VmRecord) -> Program:
    return query(record.config.standby.qemu or find_program(USUAL))


def _failed(check: str, vm: str, error: CurlingError) -> Check:
    words = sentence(error)
    return Check(check, vm, "failed", words.text, words.remedy)
