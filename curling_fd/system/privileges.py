"""The capabilities curlingd and the QEMUs it starts need; all others are given up.

Source: capabilities(7). A program started by root gets the bounding set, so that set is for both, and it
is the list of CapabilityBoundingSet= in systemd/curlingd.service too (a test compares them). What only a
QEMU needs is in our permitted set, where it must be to be passed on, and not in the effective one, except
while it is `raised`.

Left out on purpose: CAP_SYS_ADMIN (network namespaces are entered before curlingd starts), CAP_IPC_LOCK
(LimitMEMLOCK= serves `-overcommit mem-lock=on`), CAP_SYS_MODULE (the kernel loads qdiscs and link types
itself).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import prctl
from attrs import frozen

_logger = logging.getLogger("curling")

NEEDED = {
    "CAP_CHOWN": "give the control socket to its group",
    "CAP_DAC_OVERRIDE": "reach the monitors and disks of other users' VMs",
    "CAP_KILL": "end a standby that runs as another user (-runas)",
    "CAP_NET_ADMIN": "set up taps, bridges and queues, and large socket buffers",
    "CAP_NET_RAW": "announce a VM's addresses after a failover",
    "CAP_SYS_RESOURCE": "use pipes above fs.pipe-max-size",
}
"""What curlingd does itself, and the capability for it."""

PASSED_ON = {
    "CAP_SETGID": "start a VM that changes to another user (-runas)",
    "CAP_SETUID": "start a VM that changes to another user (-runas)",
    "CAP_SYS_PTRACE": "start a VM that can later be protected by the snapshot engine, or free its guest",
}
"""What a QEMU needs that curlingd starts.

The last is for userfaultfd on memory KVM uses: where vm.unprivileged_userfaultfd is 0, QEMU 7.2 refuses
`background-snapshot` without it. We raise it to free a guest from a snapshot that broke off: `userfault`.
"""


@frozen
class Privileges:
    """What a process may do after `drop`: capabilities it has, wanted ones it lacks, others it gave up."""

    kept: tuple[str, ...]
    missing: tuple[str, ...]
    dropped: tuple[str, ...]

    def __str__(self) -> str:
        """One line for the journal."""
        if not self.kept and not self.dropped:
            return "no capabilities: only VMs of this user are in reach, and nothing of the host's network"
        said = f"capabilities: kept {', '.join(self.kept) or 'none'}, gave up {len(self.dropped)} others"
        wanted = NEEDED | PASSED_ON
        return said + "".join(f"; cannot {wanted[name]} ({name} is missing)" for name in self.missing)


def drop() -> Privileges:
    """Give up every capability that is in neither table, for good, and let no program we start gain any.

    Call it while there is one thread: capabilities belong to threads. A process without any is left as it is.
    """
    before = _permitted()
    if before:
        last = _last_capability()
        numbers = {name: number for number, name in _names().items() if number <= last}
        wanted = NEEDED.keys() | PASSED_ON.keys()
        if "CAP_SETPCAP" in before:
            for name in numbers.keys() - wanted:
                prctl.capbset_drop(numbers[name])
        # Effective before permitted: the one may not exceed the other.
        for flag, kept in (
            (prctl.CAP_INHERITABLE, set()),
            (prctl.CAP_EFFECTIVE, NEEDED.keys()),
            (prctl.CAP_PERMITTED, wanted),
        ):
            prctl.set_caps(([number for name, number in numbers.items() if name not in kept], flag, False))
        # A QEMU started as root has what we permit all the same; set-user-id programs gain nothing.
        prctl.set_no_new_privs(1)
    after = _permitted()
    missing = [name for name in (*NEEDED, *PASSED_ON) if name not in after]
    result = Privileges(tuple(sorted(after)), tuple(missing), tuple(sorted(before - after)))
    _logger.info("%s", result)
    return result


@contextmanager
def raised(name: str) -> Iterator[None]:
    """Have a capability of PASSED_ON in effect for a block, in this thread, unless we lack it."""
    numbers = [number for number, known in _names().items() if known == name and name in _permitted()]
    if numbers:
        prctl.set_caps((numbers, prctl.CAP_EFFECTIVE, True))
    try:
        yield
    finally:
        if numbers:
            prctl.set_caps((numbers, prctl.CAP_EFFECTIVE, False))


def _permitted() -> set[str]:
    """The names of this thread's permitted capabilities; those newer than our libraries are numbers."""
    status = Path("/proc/thread-self/status").read_text(encoding="ascii")
    found = re.search(r"^CapPrm:\s*([0-9a-f]+)$", status, re.MULTILINE)
    bits = int(found[1], 16) if found else 0
    names = _names()
    return {names.get(bit, f"CAP_{bit}") for bit in range(bits.bit_length()) if bits >> bit & 1}


def _names() -> dict[int, str]:
    names = [f"CAP_{name.upper()}" for name in prctl.ALL_CAP_NAMES]
    return {getattr(prctl, name): name for name in names}


def _last_capability() -> int:
    """The highest number this kernel knows; it refuses others."""
    return int(Path("/proc/sys/kernel/cap_last_cap").read_text(encoding="ascii"))
