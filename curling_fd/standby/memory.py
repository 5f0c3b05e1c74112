"""The guest's memory on the standby's command line: every block on a file the standby inherits.

Sources: qemu `backends/hostmem.c` and `hostmem-file.c`, `hw/core/machine.c` (create_default_memdev),
`hw/i386/pc.c`. A block goes by the id of its backend, or by `/objects/ID` for file backends of machine
types before 4.0. Plain -m makes a backend with the machine's own id (`pc.ram`), and `-machine
memory-backend=ID` names one instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attrs import frozen

from curling_fd.errors import CannotDerive
from curling_fd.standby.keyval import Keyval, Properties
from curling_fd.standby.options import CommandLine, Option, cannot

BACKEND_KEPT = frozenset(["id", "qom-type", "size", "dump", "merge", "align"])
"""What of a memory backend does not speak about where its pages are."""

RAM_ALIGN = 2 * 1024 * 1024
"""Bytes by which QEMU aligns anonymous memory (QEMU_VMALLOC_ALIGN).

A file is aligned by its page size, so a DIMM on one could get another address than it has on the primary.
"""


@frozen
class RamBlock:
    """A block of the guest's memory: its name in the first pass, its bytes, and its file.

    `fd` is the number the standby inherits the file under. Borrowed. If it is not `shared`, what the standby
    writes stays its own, and the file is as it was.
    """

    name: str
    size: int
    fd: int
    shared: bool = True


def guest_memory(line: CommandLine, blocks: Mapping[str, int]) -> tuple[str, ...]:
    """Which of `blocks` (name to bytes, as the first pass lists them) are the guest's memory.

    These can be backed by the RAM image. The others (ROMs, video memory) belong to devices, in the stream.
    """
    backends = _backends(line)
    found = {name for name in blocks if backend_id(name) in backends}
    if not _has_chosen_memory(line):
        # The machine's own block is pc.ram, mach-virt.ram, ...; device memory has a path or other ending.
        own = [name for name in blocks if name.endswith(".ram") and "/" not in name and name not in found]
        found.update(sorted(own, key=lambda name: -blocks[name])[:1])
    return tuple(name for name in blocks if name in found)


def backend_id(block_name: str) -> str:
    """The id of the backend whose block has this name."""
    return block_name.removeprefix("/objects/")


def is_backend(option: Option) -> bool:
    """Whether this option makes a memory backend."""
    return option.name == "object" and option.get("qom-type").startswith("memory-backend-")


class StandbyMemory:
    """Puts the blocks of `ram` into a command line.

    Raises:
        CannotDerive: `ram` is not what the command line makes.
    """

    def __init__(self, line: CommandLine, ram: Sequence[RamBlock]) -> None:
        self._blocks = {backend_id(block.name): block for block in ram}
        self._main: RamBlock | None = None
        backends = _backends(line)
        unnamed = [block for ident, block in self._blocks.items() if ident not in backends]
        if not _has_chosen_memory(line):
            if not unnamed:
                raise CannotDerive("-m", "the first pass named no memory block for it")
            self._main = unnamed.pop(0)
        if unnamed:
            names = ", ".join(block.name for block in unnamed)
            raise CannotDerive(names, "memory that was added to the VM after its start")

    def machine(self, line: CommandLine, resolved: str | None) -> Keyval:
        """All -machine and -M of `line` as one: QEMU merges them, and the last word on a property wins."""
        merged: dict[str, str] = {}
        for option in line.named("machine", "M"):
            merged |= dict(Keyval.parse(option.word or "", "type").walk())
        kind = resolved or merged.get("type")
        merged.pop("type", None)
        if self._main is not None:
            merged["memory-backend"] = backend_id(self._main.name)
        items: list[tuple[str | None, str]] = [(None, kind)] if kind else []
        return Keyval((*items, *merged.items()), "type")

    def added(self) -> list[Option]:
        """The backend plain -m lacks."""
        if self._main is None:
            return []
        backend = Keyval(((None, "memory-backend-file"), ("id", backend_id(self._main.name))), "qom-type")
        return [Option("object", _on_file(backend, self._main).render())]

    def replaced(self, option: Option, old: Properties) -> Properties:
        """A backend of the primary's command line with the standby's file in its place."""
        block = self._blocks.get(old.get("id") or "")
        if block is None:
            raise cannot(option, "the first pass has no memory block of this name")
        new = old.drop(*(key for key in old.names() if key not in BACKEND_KEPT))
        if old.get("qom-type") == "memory-backend-ram":
            new = new.set("align", RAM_ALIGN)
        return _on_file(new.set("qom-type", "memory-backend-file"), block)


def _on_file(backend: Properties, block: RamBlock) -> Properties:
    values = {
        "size": block.size,
        "mem-path": f"/proc/self/fd/{block.fd}",
        "share": block.shared,
        "x-use-canonical-path-for-ramblock-id": block.name.startswith("/objects/"),
    }
    for key, value in values.items():
        backend = backend.set(key, value)
    return backend


def _backends(line: CommandLine) -> set[str]:
    return {option.get("id") for option in line.options if is_backend(option)}


def _has_chosen_memory(line: CommandLine) -> bool:
    """Whether the command line names the backends of the machine's memory, as a whole or by NUMA node."""
    machines = [Keyval.parse(option.word or "", "type") for option in line.named("machine", "M")]
    return any(machine.get("memory-backend") for machine in machines) or any(
        option.get("memdev") for option in line.named("numa")
    )
