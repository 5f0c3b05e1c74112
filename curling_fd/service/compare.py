"""The two hosts of a VM side by side: what one of them lacks that the other's VM needs. No I/O."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from attrs import frozen

from curling_fd import __version__
from curling_fd.failover.states import RUNS
from curling_fd.service.facts import Facts, Version
from curling_fd.service.hostcheck import Check
from curling_fd.units import format_size

#: Seconds by which the clocks of two hosts may differ unremarked; with NTP it is a hundredth of that.
CLOCK_WARNING = 1.0

#: And by which they differ so much that a guest cannot be moved between them without noticing.
CLOCK_FAILED = 86400.0


@frozen
class Here:
    """What is known of the VM on this host.

    Attributes:
        runs: this host has the VM's QEMU; else it waits to be its backup.
        version: of that QEMU, or of the one that would be its standby.
        machine: its resolved machine type.
        needed: bytes the backup must have.
        devices: names from `system.platform.DEVICES` that its QEMU uses, `kvm` for one.
        disks: how many are replicated.
    """

    runs: bool
    version: Version | None = None
    machine: str | None = None
    needed: int = 0
    devices: frozenset[str] = frozenset()
    disks: int = 0


def devices_used(argv: Sequence[str], accelerator: str) -> frozenset[str]:
    """The devices that a QEMU of that command line opens."""
    used = {"kvm"} if accelerator == "kvm" else set()
    for option, value in pairwise(argv):
        if option in ("-netdev", "-nic", "--netdev", "--nic"):
            if value.split(",")[0] == "tap" or "type=tap" in value:
                used.add("tun")
            if "vhost=on" in value.split(","):
                used.add("vhost-net")
        elif option in ("-device", "--device") and value.startswith("vhost-vsock"):
            used.add("vhost-vsock")
    return frozenset(used)


def compare_hosts(facts: Facts) -> Iterator[Check]:
    """What the other host says of itself, and how its clock and its daemon compare with ours."""
    yield _clock(facts)
    if facts.software != __version__:
        message = f"curlingd is {facts.software} on {facts.host}, {__version__} here"
        remedy = "upgrade the older one, the backup first"
        yield Check("software", None, "warning", message, remedy)
    for check in facts.checks:
        if check.status != "ok":
            yield Check(f"{check.check} on {facts.host}", None, check.status, check.message, check.remedy)


def compare_vm(vm: str, here: Here, facts: Facts, ours: str) -> Iterator[Check]:
    """What of the VM `vm` would not work between us and the other host.

    Args:
        ours: our own arbiter, `manual` or `file`.
    """
    yield _qemu(vm, here, facts)
    lacking = sorted(here.devices - facts.devices) if here.runs else []
    if lacking:
        message = f"the VM uses {', '.join(lacking)}, which {facts.host} has not"
        remedy = "load the module of that name there (for kvm: kvm_intel or kvm_amd), or start the VM without"
        yield Check("devices", vm, "failed", message, remedy)
    if here.runs and facts.state not in _STANDING_BY and facts.memory < here.needed:
        have, need = format_size(facts.memory), format_size(here.needed)
        message = f"{facts.host} has {have} left, and the standby needs {need}"
        remedy = "free or add memory there (a limit on curlingd's unit counts too), or lower max_checkpoint"
        yield Check("memory", vm, "failed", message, remedy)
    for copy in facts.copies:
        yield Check(copy.check, vm, copy.status, copy.message, copy.remedy)
    if here.disks and not facts.copies:
        yield Check("disks", vm, "ok", f"each replicated disk has a fitting copy on {facts.host}")
    if facts.arbiter != ours:
        message = f'{facts.host} has arbiter = "{facts.arbiter}", this host "{ours}"'
        yield Check(
            "arbiter", vm, "failed", message, "set the same in the VM's file on both hosts, restart curlingd"
        )
    elif facts.sees_token is False:
        message = f"{facts.host} does not see what this host writes to arbiter_directory"
        yield Check("arbiter", vm, "failed", message, "mount the same storage there on both hosts")
    if here.runs and facts.state in _RUNNING:
        message = f"{facts.host} says that it runs the VM too: it is {facts.state} there"
        yield Check(
            "role", vm, "failed", message, "see which copy is the right one, and stop the other at once"
        )


#: The memory of a standby is taken there already.
_STANDING_BY = frozenset({"preparing", "filling", "standby", "suspect", "taking-over"})

_RUNNING = frozenset(state.value for state in RUNS) - _STANDING_BY


def _clock(facts: Facts) -> Check:
    ahead = facts.clock_ahead
    apart = max(0.0, abs(ahead) - facts.clock_margin)
    if apart <= CLOCK_WARNING:
        return Check("clocks", None, "ok", f"the clock of {facts.host} agrees with this host's")
    where = "ahead of" if ahead > 0 else "behind"
    how = f"the clock of {facts.host} is {_long(abs(ahead))} {where} this host's"
    remedy = "have both kept right ('timedatectl', systemd-timesyncd or chrony)"
    if apart <= CLOCK_FAILED:
        message = f"{how}: their journals cannot be read side by side"
        return Check("clocks", None, "warning", message, remedy)
    message = f"{how}: a guest's hardware clock would jump by that in a takeover"
    return Check("clocks", None, "failed", message, remedy)


def _qemu(vm: str, here: Here, facts: Facts) -> Check:
    """Does the QEMU of whichever host is to be the backup do for the VM?"""
    check, there = "qemu of both", facts.host
    if here.runs and facts.problem is not None:
        remedy = "install QEMU there, or set `standby.qemu` in the VM's file there"
        return Check(check, vm, "failed", f"{there}: {facts.problem}", remedy)
    if here.runs and facts.machine_known is False:
        message = f"{facts.binary} on {there} does not know the machine type {here.machine}"
        remedy = "install a QEMU there that does, or start the VM with a versioned machine type both have"
        return Check(check, vm, "failed", message, remedy)
    theirs = facts.version if here.runs else facts.running or facts.version
    if here.version is None or theirs is None:
        return Check(
            check,
            vm,
            "warning",
            "the versions of QEMU cannot be compared yet",
            "start the VM, then ask again",
        )
    told = f"{_dotted(here.version)} here, {_dotted(theirs)} on {there}"
    if here.version[:2] == theirs[:2]:
        return Check(check, vm, "ok", told)
    # Known for certain only where one of the two runs the VM.
    certain = here.runs or facts.running is not None
    primary, backup = (here.version, theirs) if here.runs else (theirs, here.version)
    remedy = "install the same version on both, or name one with `standby.qemu` in the VM's file"
    if certain and backup[:2] < primary[:2]:
        return Check(
            check, vm, "failed", f"{told}: the backup's must not be older than the primary's", remedy
        )
    message = f"{told}: a VM can move to the newer one, and not come back before it was restarted there"
    return Check(check, vm, "warning", message, remedy)


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))


def _long(seconds: float) -> str:
    """A difference of clocks, coarse: nobody needs the seconds of a year."""
    for unit, length in (("year", 365.25 * 86400), ("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            number = round(seconds / length)
            return f"{number} {unit}{'s' if number != 1 else ''}"
    return f"{seconds:.1f} seconds"
