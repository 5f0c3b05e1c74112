"""What one host tells another that asks how it is: PROBE and FACTS, for `curlingctl doctor` on either host.

A probe begins no session and changes nothing. Everything in FACTS is believed only as far as its form goes:
the peer may be of another version, or not be a curlingd at all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import trio
from attrs import field, frozen

from curling_fd import __version__
from curling_fd.disk.inventory import Disk
from curling_fd.disk.inventory import decode as decode_disks
from curling_fd.disk.precheck import check_copy
from curling_fd.errors import ArbiterError, CopyUnfit, FrameError, QmpError, StandbyFailed
from curling_fd.failover.arbiter import FileArbiter
from curling_fd.failover.states import State, role
from curling_fd.link.frames import Kind
from curling_fd.link.transport import FrameLink, Received
from curling_fd.qmp.client import open_qmp
from curling_fd.sentences import sentence
from curling_fd.service.copies import specs
from curling_fd.service.greeting import probe
from curling_fd.service.hostcheck import Check, check_host
from curling_fd.service.record import VmRecord
from curling_fd.service.standby import find_program
from curling_fd.standby.program import query
from curling_fd.system.memory import available
from curling_fd.system.platform import devices

T = TypeVar("T")

#: The program that is looked for where nobody names one.
USUAL = "qemu-system-x86_64"

#: Findings of a peer about itself, and letters of a text of its, that are taken.
_MOST_CHECKS = 32
_LONGEST = 1000

#: Seconds a QEMU may take to greet.
_MONITOR_PATIENCE = 2.0

#: States in which a session, or an attempt at one, has the VM's monitor.
_IN_SESSION = frozenset({State.CONNECTING, State.SYNCING, State.PROTECTED, State.SWITCHING})

#: Probes that are answered at a time; more wait, as long as the one who asks does.
_answering = trio.CapacityLimiter(2)

Version = tuple[int, int, int]


@frozen
class Question:
    """What of a VM the other host needs to know to say whether it could run it; None: not known here."""

    binary: str | None = None
    machine: str | None = None
    token: str | None = None
    disks: tuple[Disk, ...] = ()


@frozen
class Facts:
    """What a host says of itself and a VM.

    Attributes:
        host, software: its name, and the version of its curlingd.
        state: of the VM there.
        arbiter: of the VM there, `manual` or `file`.
        sees_token: whether the token we left is in its arbiter's directory; None: it was not looked.
        running: version of the QEMU that runs the VM there, if its curlingd knows.
        binary, version: of the QEMU it would start as the VM's standby.
        machine_known: whether that QEMU has the VM's machine type; None: it was not asked.
        problem: why there is no such QEMU, if so.
        memory: bytes it can still give.
        devices: names from `system.platform.DEVICES` that it has.
        checks: what it finds about itself.
        copies: what is wrong with its copies of the VM's disks.
        clock_ahead: seconds its clock is ahead of ours, give or take `clock_margin`.
    """

    host: str
    software: str
    state: str
    arbiter: str
    sees_token: bool | None
    running: Version | None
    binary: str | None
    version: Version | None
    machine_known: bool | None
    problem: str | None
    memory: int
    devices: frozenset[str]
    checks: tuple[Check, ...] = field(factory=tuple)
    copies: tuple[Check, ...] = field(factory=tuple)
    clock_ahead: float = 0.0
    clock_margin: float = 0.0


async def ask(link: FrameLink, record: VmRecord, question: Question) -> Facts:
    """Ask the daemon behind `link` (borrowed) about itself and the VM of `record`.

    Raises:
        PeerRefused, PeerIncompatible: it does not know the VM, or speaks another version.
        LinkError, FrameError: there is no curlingd that answers.
    """
    content = {
        "binary": question.binary,
        "machine": question.machine,
        "token": question.token,
        "disks": [disk.encode() for disk in question.disks],
    }
    began = time.time()
    received = await probe(link, record.host.name, record.name, content)
    return decode(received.content, began, time.time())


async def answer(link: FrameLink, record: VmRecord, asked: Received) -> None:
    """Answer the probe `asked` that came on `link` (borrowed).

    Raises:
        FrameError: it is not one.
    """
    arrived = time.time()
    names = ("binary", "machine", "token")
    binary, machine, token = (_optional(asked.content, name, _text) for name in names)
    question = Question(binary, machine, token, decode_disks(asked.content.get("disks", [])))
    async with _answering:
        content = await collect(record, question)
    content["clock"] = [arrived, time.time()]
    await link.send(Kind.FACTS, record.generation, content=content)


async def collect(record: VmRecord, question: Question) -> dict[str, Any]:
    """The content of FACTS but for the clock."""
    found = await trio.to_thread.run_sync(_look, record, question)
    sees_token: bool | None = None
    if isinstance(record.arbiter, FileArbiter) and question.token is not None:
        try:
            sees_token = await record.arbiter.sees_token(question.token)
        except ArbiterError:
            sees_token = False
    return found | {
        "host": record.host.name,
        "software": __version__,
        "state": record.state.value,
        "arbiter": record.config.arbiter,
        "sees_token": sees_token,
        "running": await _running(record),
    }


async def _running(record: VmRecord) -> list[int] | None:
    """The version of the QEMU that runs the VM here."""
    if record.state in _IN_SESSION:
        return list(record.choice.version) if record.choice else None
    if record.qmp is None or role(record.state) == "backup":
        return None
    # An attempt to protect that begins meanwhile waits for the monitor until we have left it.
    with trio.move_on_after(_MONITOR_PATIENCE):
        try:
            async with open_qmp(record.qmp) as qmp:
                return list(qmp.greeting.version)
        except QmpError:
            pass  # the VM does not run
    return None


def _look(record: VmRecord, question: Question) -> dict[str, Any]:
    """What takes system calls and processes to find out."""
    found: dict[str, Any] = {"binary": None, "version": None, "machine_known": None, "problem": None}
    try:
        program = query(record.config.standby.qemu or find_program(question.binary or USUAL))
        found |= {"binary": program.path, "version": list(program.version)}
        if question.machine is not None:
            found["machine_known"] = question.machine in program.machines
    except StandbyFailed as error:
        found["problem"] = error.problem
    return found | {
        "memory": available(),
        "devices": sorted(devices()),
        "checks": [_encoded(check) for check in check_host(record.host.config)],
        "copies": [_encoded(check) for check in _look_at_copies(record, question.disks)],
    }


def _look_at_copies(record: VmRecord, disks: Sequence[Disk]) -> Iterator[Check]:
    """Of which disk what is here cannot be the copy."""
    if role(record.state) == "backup":
        return  # they are in our own hands
    for spec in specs(record.config, disks):
        try:
            check_copy(spec)
        except CopyUnfit as error:
            words = sentence(error)
            yield Check(f"disk {spec.disk}", None, "failed", words.text, words.remedy)


def _encoded(check: Check) -> dict[str, str]:
    return {
        "check": check.check,
        "status": check.status,
        "message": check.message,
        "remedy": check.remedy,
    }


# What a peer says.


def decode(content: Mapping[str, Any], began: float, ended: float) -> Facts:
    """Read the content of FACTS.

    Args:
        began: when we asked, ended: when the answer was here; seconds of our wall clock.

    Raises:
        FrameError: it is not what FACTS holds.
    """
    clock = _needed(content, "clock", _clock)
    # As NTP does it: what the peer took to find its answer does not count.
    ahead = ((clock[0] - began) + (clock[1] - ended)) / 2
    margin = max(0.0, ((ended - began) - (clock[1] - clock[0])) / 2)
    return Facts(
        host=_needed(content, "host", _text),
        software=_needed(content, "software", _text),
        state=_needed(content, "state", _text),
        arbiter=_needed(content, "arbiter", _text),
        sees_token=_optional(content, "sees_token", _flag),
        running=_optional(content, "running", _version),
        binary=_optional(content, "binary", _text),
        version=_optional(content, "version", _version),
        machine_known=_optional(content, "machine_known", _flag),
        problem=_optional(content, "problem", _text),
        memory=_needed(content, "memory", _whole),
        devices=frozenset(_needed(content, "devices", _texts)),
        checks=_needed(content, "checks", _checks),
        copies=_needed(content, "copies", _checks),
        clock_ahead=ahead,
        clock_margin=margin,
    )


def _needed(content: Mapping[str, Any], name: str, read: Callable[[Any], T]) -> T:
    try:
        return read(content.get(name))
    except (ValueError, TypeError):
        raise FrameError(f"an answer to a probe whose `{name}` is missing or of another form") from None


def _optional(content: Mapping[str, Any], name: str, read: Callable[[Any], T]) -> T | None:
    return None if content.get(name) is None else _needed(content, name, read)


def _text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError
    value.encode()  # a lone surrogate is no text
    return value[:_LONGEST]


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise ValueError
    return value


def _version(value: Any) -> Version:
    if not isinstance(value, list):
        raise ValueError
    major, minor, micro = (_whole(part) for part in value)
    return major, minor, micro


def _clock(value: Any) -> tuple[float, float]:
    if not isinstance(value, list):
        raise ValueError
    arrived, left = value
    for moment in (arrived, left):
        if isinstance(moment, bool) or not isinstance(moment, int | float) or not math.isfinite(moment):
            raise ValueError
        if not 0 <= moment < 1e12:
            raise ValueError
    return float(arrived), float(left)


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise ValueError
    return [_text(part) for part in value[:_MOST_CHECKS]]


def _checks(value: Any) -> tuple[Check, ...]:
    if not isinstance(value, list):
        raise ValueError
    return tuple(_check(part) for part in value[:_MOST_CHECKS])


def _check(value: Any) -> Check:
    if not isinstance(value, dict) or value.get("status") not in ("ok", "warning", "failed"):
        raise ValueError
    return Check(
        _text(value.get("check")),
        None,
        value["status"],
        _text(value.get("message")),
        _text(value.get("remedy")),
    )
