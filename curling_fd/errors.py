"""Every exception Curling raises on purpose, as one tree, each carrying its facts as attributes.

    CurlingError
    |-- ConfigError               a file or a value an administrator wrote is wrong
    |-- CannotListen              the daemon's address for other hosts is not to be had now
    |-- RequestRefused            a command cannot be done in the state things are in
    |   |-- NoSuchVm, AmbiguousVm, AlreadyProtected, NotProtected, WrongRole
    |   |-- PrimaryAlive          failover asked for while the primary is alive and well
    |   |-- NotPermitted          the caller lacks the right
    |   `-- DaemonUnreachable     no daemon behind the control socket
    |-- QmpError                  QEMU's monitor
    |   |-- QmpUnreachable, QmpBusy, QmpNotQmp
    |   |-- QmpCommandFailed      QEMU answered with an error
    |   |-- QmpDisconnected       QEMU went away
    |   `-- QmpTimeout
    |-- RemoteProtocolError       the other side broke the rules; our side is fine
    |   |-- StreamError           QEMU's migration stream
    |   |-- ColoError             QEMU's checkpoint messages
    |   |-- FrameError            the link between daemons
    |   |-- VarlinkError          the control socket
    |   `-- NbdError              a disk's connection to or from QEMU
    |-- NbdRequestFailed          QEMU could not read or write a disk for us
    |-- PrecheckFailed            found out before the guest was touched
    |   |-- MigrationBlocked, WritableDisk, MachineMismatch, HostsDisagree, NotEnoughMemory
    |   |-- StandbyFailed, CannotDerive, EngineUnavailable, GuestNotRunning, InsecurePeer
    |   |-- CannotHold            packets of a network card cannot be held back
    |   |-- DiskUnfit             a disk that cannot be replicated
    |   `-- CopyUnfit             what is to be the backup's copy of a disk
    |       |-- CopyMissing, CopyWrongSize, CopyWrongFormat, CopyBacked
    |       |-- CopyInUse         another process has it
    |       `-- CopyReadOnly, CopyUnusable
    |-- LinkError                 between the two daemons
    |   |-- PeerUnreachable, PeerIncompatible, PeerRefused
    |   |-- LinkLost              it worked and then stopped working
    |   |   `-- LinkClosed        and the host at the other end lives
    |   `-- StaleGeneration       the VM has been taken over since
    |-- CaptureError              a checkpoint could not be taken
    |   |-- CheckpointTooLarge, CheckpointTimeout, EngineFailed
    |-- DiskError                 the disks could not be kept the same; the guest's own are fine
    |   |-- DiskLogFull           it writes faster than that can be taken away
    |   |-- DiskLogFailed         QEMU did not deliver what it began
    |   `-- DiskCopyFailed        the backup's copy could not be read or written
    |-- OutputError               the guest's packets could not be held, or let out
    |   |-- ModuleMissing         the kernel lacks what holds them
    |   `-- PortTaken             another program steers the port's packets
    |-- ArbiterError
    |   |-- ArbiterLost           somebody else may run the VM
    |   `-- ArbiterUnavailable    the arbiter did not answer: nobody may
    |-- NetworkError              the network of this host
    |   |-- NetlinkError          the kernel refused something about it
    |   |-- NetworkConflict       something in it is not as the VM needs it, or is somebody else's
    |   `-- AddressConflict       somebody else on the network has an address that this host was to take
    `-- SessionEnd                protection ended though nothing went wrong with it
        |-- GuestEnded            powered off, panicked, ended by its administrator
        |-- QemuDied              QEMU is gone without a word; the backup may have the VM
        `-- Unprotected           an operator ended it

Those of disks are defined in `curling_fd.disk.errors`, and belong to this tree like the rest. The sentences
people read are made from these in `curling_fd.sentences`, nowhere else.
"""

from __future__ import annotations

from typing import Any

from attrs import define

# Whoever raises or catches an error has it from here.
from curling_fd.disk.errors import *  # noqa: F403
from curling_fd.error_roots import *  # noqa: F403
from curling_fd.error_roots import CurlingError, PrecheckFailed, RemoteProtocolError


@define(auto_exc=True, slots=False, str=False, eq=False)
class ConfigError(CurlingError):
    """`problem` in the file at `path`, at `key` when it is about one."""

    path: str
    problem: str
    key: str | None = None
    nearest: str | None = None


@define(auto_exc=True, slots=False, str=False, eq=False)
class CannotListen(CurlingError):
    """The address for other hosts is another program's, or not this host's; maybe only for now."""

    address: str
    problem: str


class RequestRefused(CurlingError):
    """A command that cannot be done now; nothing was changed."""


@define(auto_exc=True, slots=False, str=False, eq=False)
class NoSuchVm(RequestRefused):
    name: str
    nearest: str | None = None


@define(auto_exc=True, slots=False, str=False, eq=False)
class AmbiguousVm(RequestRefused):
    name: str
    matches: tuple[str, ...]


@define(auto_exc=True, slots=False, str=False, eq=False)
class AlreadyProtected(RequestRefused):
    name: str
    state: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class NotProtected(RequestRefused):
    name: str
    state: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class WrongRole(RequestRefused):
    """`verb` needs another role than the one this host has for the VM."""

    name: str
    verb: str
    role: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class PrimaryAlive(RequestRefused):
    """`silent_ms`: milliseconds since the primary was last heard."""

    name: str
    silent_ms: float


@define(auto_exc=True, slots=False, str=False, eq=False)
class NotPermitted(RequestRefused):
    verb: str
    group: str
    uid: int


@define(auto_exc=True, slots=False, str=False, eq=False)
class DaemonUnreachable(RequestRefused):
    path: str
    problem: str


class QmpError(CurlingError):
    """Something about QEMU's monitor."""


@define(auto_exc=True, slots=False, str=False, eq=False)
class QmpUnreachable(QmpError):
    path: str
    problem: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class QmpBusy(QmpError):
    """The socket took our connection and sent no greeting: another client holds the monitor."""

    path: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class QmpNotQmp(QmpError):
    """What answered at `path` does not speak QMP; `got` is how it began."""

    path: str
    got: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class QmpCommandFailed(QmpError):
    command: str
    kind: str
    description: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class QmpDisconnected(QmpError):
    """QEMU went away; `command` is the one that was waiting, if any."""

    command: str | None = None


@define(auto_exc=True, slots=False, str=False, eq=False)
class QmpTimeout(QmpError):
    command: str
    seconds: float


@define(auto_exc=True, slots=False, str=False, eq=False)
class StreamError(RemoteProtocolError):
    """QEMU's migration stream is not what the format says, `offset` bytes into it."""

    offset: int
    problem: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class ColoError(RemoteProtocolError):
    problem: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class FrameError(RemoteProtocolError):
    problem: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class VarlinkError(RemoteProtocolError):
    problem: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class MigrationBlocked(PrecheckFailed):
    reasons: tuple[str, ...]


@define(auto_exc=True, slots=False, str=False, eq=False)
class WritableDisk(PrecheckFailed):
    devices: tuple[str, ...]


@define(auto_exc=True, slots=False, str=False, eq=False)
class CannotHold(PrecheckFailed):
    """`nic` is the network card, or what is behind it, as QEMU calls it."""

    nic: str
    why: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class MachineMismatch(PrecheckFailed):
    """`what` (machine type, QEMU version, ...) is `primary` there and `backup` here."""

    what: str
    primary: str
    backup: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class HostsDisagree(PrecheckFailed):
    """The two hosts are configured differently where they must not be."""

    problem: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class NotEnoughMemory(PrecheckFailed):
    """Bytes needed and bytes available on the backup."""

    needed: int
    available: int


@define(auto_exc=True, slots=False, str=False, eq=False)
class StandbyFailed(PrecheckFailed):
    """The standby QEMU did not start or did not stay; `stderr` is what it printed."""

    problem: str
    stderr: str = ""


@define(auto_exc=True, slots=False, str=False, eq=False)
class EngineUnavailable(PrecheckFailed):
    engine: str
    why: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class CannotDerive(PrecheckFailed):
    """No standby can be made from the primary's command line because of `option`."""

    option: str
    why: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class GuestNotRunning(PrecheckFailed):
    """`status` is QEMU's run state."""

    status: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class InsecurePeer(PrecheckFailed):
    address: str


class LinkError(CurlingError):
    """Something about the connection between the two daemons."""


@define(auto_exc=True, slots=False, str=False, eq=False)
class PeerUnreachable(LinkError):
    address: str
    problem: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class PeerIncompatible(LinkError):
    """Link protocol versions, ours and theirs."""

    ours: int
    theirs: int


@define(auto_exc=True, slots=False, str=False, eq=False)
class PeerRefused(LinkError):
    """The peer said no: `kind` is the class of its error, `text` and `remedy` its words."""

    kind: str
    text: str
    remedy: str = ""


@define(auto_exc=True, slots=False, str=False, eq=False)
class LinkLost(LinkError):
    why: str


class LinkClosed(LinkLost):
    """The other side's kernel closed it: the host there lives, and its daemon may not."""


@define(auto_exc=True, slots=False, str=False, eq=False)
class StaleGeneration(LinkError):
    """The VM was taken over: the peer is at generation `theirs`, we are at `ours`."""

    ours: int
    theirs: int


class CaptureError(CurlingError):
    """A checkpoint could not be taken. The guest runs on, unprotected until the next resync."""


@define(auto_exc=True, slots=False, str=False, eq=False)
class CheckpointTooLarge(CaptureError):
    """A checkpoint needed more than `limit` bytes of buffer."""

    limit: int


@define(auto_exc=True, slots=False, str=False, eq=False)
class CheckpointTimeout(CaptureError):
    seconds: float
    waiting_for: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class EngineFailed(CaptureError):
    engine: str
    why: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class OutputError(CurlingError):
    """`what` is the interface or the object that `why` is about."""

    what: str
    why: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class ModuleMissing(OutputError):
    """The kernel's `module` is not to be had."""

    module: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class PortTaken(OutputError):
    """The port `what` has a qdisc for what it receives that is not ours; `why` says what is in it."""

    qdisc: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class ArbiterError(CurlingError):
    """Something about who may run the VM."""


@define(auto_exc=True, slots=False, str=False, eq=False)
class ArbiterLost(ArbiterError):
    """`generation` is held by `winner`."""

    generation: int
    winner: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class ArbiterUnavailable(ArbiterError):
    why: str


class NetworkError(CurlingError):
    """Something about the network of this host."""


@define(auto_exc=True, slots=False, str=False, eq=False)
class NetlinkError(NetworkError):
    """The kernel refused `what` with `errno` and said `words`."""

    what: str
    errno: int
    words: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class NetworkConflict(NetworkError):
    """`what` (an interface, an address, a route) cannot be as the VM needs it: `problem`. `remedy` helps."""

    what: str
    problem: str
    remedy: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class AddressConflict(NetworkError):
    """`mac` answered on `interface` that it has `address`."""

    address: str
    interface: str
    mac: str


class SessionEnd(CurlingError):
    """Why a session of protection is over, when neither link nor capture failed."""


@define(auto_exc=True, slots=False, str=False, eq=False)
class GuestEnded(SessionEnd):
    """`how`: `powered off`, `panicked`, ..."""

    how: str


@define(auto_exc=True, slots=False, str=False, eq=False)
class QemuDied(SessionEnd):
    """The VM runs nowhere; its last committed checkpoint is on the backup."""


@define(auto_exc=True, slots=False, str=False, eq=False)
class Unprotected(SessionEnd):
    why: str


def facts(error: CurlingError) -> dict[str, Any]:
    """The attributes of `error` as a plain dict, for the journal and the control API."""
    names = [field.name for field in getattr(type(error), "__attrs_attrs__", ())]
    return {name: getattr(error, name) for name in names}
