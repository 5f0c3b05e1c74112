"""The configuration: TOML files to frozen objects, and the reference of every key.

    /etc/curling/curlingd.toml          the daemon; may be absent at this default place
    /etc/curling/curlingd.toml.d/*.toml drop-ins, in the order of their names; what a later one sets counts
    /etc/curling/vms/NAME.toml          one file for each VM

Nothing is guessed: an unknown key, a wrong type or a value out of range is a `ConfigError` that names file,
key and, for a misspelt key, the nearest right one. Durations are seconds here, sizes bytes.
"""

from __future__ import annotations

import difflib
import os
import socket
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen

from curling_fd.errors import ConfigError
from curling_fd.service.config_keys import (
    NAME,
    AbsolutePath,
    Address,
    Choice,
    Duration,
    Flag,
    HostPort,
    Key,
    ListOf,
    Name,
    Number,
    Rate,
    Size,
    TextTable,
    Word,
    key,
)
from curling_fd.service.config_network import NetworkConfig
from curling_fd.units import format_duration

__all__ = [
    "DEFAULT_PATH",
    "Address",
    "Config",
    "DaemonConfig",
    "NetworkConfig",
    "StandbyConfig",
    "VmConfig",
    "examine",
    "load",
    "reference",
]

DEFAULT_PATH = "/etc/curling/curlingd.toml"

_HEARTBEATS_PER_TIMEOUT = 4
"""A failure_timeout must span this many heartbeats: one lost or late packet is not a lost host."""


def _host_name() -> str:
    return Name().read(socket.gethostname())


@frozen
class DaemonConfig:
    """curlingd.toml and its drop-ins."""

    host_name: str = key(
        Name(),
        _host_name,
        "What this host calls itself towards peers and arbiters. Each host needs its own.",
        shown="the host's name",
    )
    listen: Address = key(  # noqa: RUF009 - an Address is frozen
        HostPort(), "127.0.0.1:9271", "Where this daemon waits for the daemons of other hosts."
    )
    control_socket: str = key(
        AbsolutePath(socket=True), "/run/curling/control.sock", "The socket curlingctl connects to."
    )
    control_group: str = key(
        Word("the name of a group"), "curling", "Members of this group, and root, may use the control socket."
    )
    state_directory: str = key(
        AbsolutePath(), "/var/lib/curling", "What must outlive a reboot: generations, and who ran a VM last."
    )
    runtime_directory: str = key(
        AbsolutePath(), "/run/curling", "What must not: sockets of the standby QEMUs."
    )
    insecure: bool = key(
        Flag(),
        False,
        "Allow links that leave this host without encryption. Guest memory crosses them readable to "
        "anybody on the way, and whoever reaches the port can offer VMs: only for a network of which both "
        "ends and all between are trusted.",
    )
    heartbeat_interval: float = key(
        Duration(0.01, 10),
        "100ms",
        "How often a quiet link says that its end is alive. At most a quarter of failure_timeout.",
    )
    failure_timeout: float = key(
        Duration(0.1, 300),
        "1s",
        "After this long without a word from it the other host is suspected to be lost. Longer than any "
        "pause the network or an overloaded host can make.",
    )
    stop_limit: float = key(
        Duration(0.1, 300),
        "2s",
        "A guest never stands still for one checkpoint longer than this: then the checkpoint is given up, "
        "and the guest runs on unprotected until the next first pass.",
    )


@frozen
class StandbyConfig:
    """The table [standby] of a VM's file: how its standby QEMU differs from the primary's."""

    qemu: str | None = key(
        AbsolutePath(),
        None,
        "The QEMU program to start on this host.",
        shown="the same path as on the primary",
    )
    extra_args: tuple[str, ...] = key(
        ListOf("arguments"), [], "Put at the end of the standby's command line."
    )
    replace: Mapping[str, str] = key(
        TextTable("old to new text"),
        {},
        "Each old text in the primary's command line becomes the new one on this host: paths of disks, "
        "names of bridges.",
    )


@frozen
class VmConfig:
    """The file of one VM. `name` is the file's, not a key."""

    name: str
    qmp: str | None = key(
        AbsolutePath(socket=True),
        None,
        "The QMP socket of the VM on this host, one that nothing else uses "
        "(`-qmp unix:PATH,server=on,wait=off`). Needed to protect the VM from this host; without it the host "
        "can only be the VM's backup.",
    )
    peer: Address | None = key(  # noqa: RUF009
        HostPort(), None, "The curlingd of the other host (its `listen`). Needed with qmp."
    )
    engine: str = key(
        Choice(("auto", "incremental", "snapshot", "precopy")),
        "auto",
        "How checkpoints are taken. auto probes and picks; `curlingctl show` tells what and why.",
    )
    arbiter: str = key(
        Choice(("manual", "file")),
        "manual",
        "Who decides which host may run the VM. manual: an operator, with `curlingctl failover`. file: "
        "whoever raises the generation first in arbiter_directory; only then a failover happens by itself.",
    )
    arbiter_directory: str | None = key(
        AbsolutePath(), None, 'A directory on storage that both hosts share. Needed with arbiter = "file".'
    )
    longest_epoch: float = key(
        Duration(0.001, 60),
        "100ms",
        "The guest never runs longer than this without a checkpoint being asked for.",
    )
    shortest_epoch: float = key(
        Duration(0, 60),
        "2ms",
        "When the guest has packets waiting, its checkpoint is asked for this long after the last one; but "
        "it always runs at least as long as it last stood still. Longer means more work done by a busy "
        "guest, and later answers.",
    )
    max_checkpoint: int = key(
        Size(1 << 20, 1 << 42),
        "1GiB",
        "The most memory one checkpoint may take up, on each host. It bounds the buffers, not the VM's "
        "memory.",
    )
    buffers: int = key(
        Number(2, 8), 2, "Checkpoints that may be on the way at once. Each takes up to max_checkpoint."
    )
    output: str = key(
        Choice(("auto", "plug", "filter", "none")),
        "auto",
        "How the guest's packets are held back until the checkpoint they belong to is safe. plug: in the "
        "kernel, by sch_plug behind each tap, vhost or not. filter: in QEMU, for network cards without "
        "vhost. auto: plug where the kernel has it. none: they leave at once, and clients may see what a "
        "failover undoes.",
    )
    output_limit: int = key(
        Size(1 << 16, 1 << 30),
        "16MiB",
        "A guest that has sent this much since its last checkpoint waits until the checkpoint is safe.",
    )
    resync_bandwidth: int | None = key(
        Rate(1 << 20, 1 << 40),
        None,
        "How fast a first pass may be, so that the resync after an outage leaves the guest, and others on "
        "the network, something. Checkpoints are not held back. A guest that writes faster than this would "
        "never be protected: after twice its memory the limit doubles, and again after each further time its "
        "memory. Not for the engine snapshot, whose guest waits for the pages it writes to be sent.",
        shown="no limit: until the pass is over the VM is unprotected",
    )
    shared_disks: tuple[str, ...] = key(
        ListOf("QEMU device or node names"),
        [],
        "Disks on storage that both hosts see, with the same content: they are left alone. The guest must "
        "only read them: what it writes there cannot be taken back at a failover.",
    )
    scratch_disks: tuple[str, ...] = key(
        ListOf("QEMU device or node names"),
        [],
        "Writable disks whose content may be lost in a failover, like swap or caches. All other disks that "
        "the guest can write are replicated to the backup's own copies.",
    )
    disk_log_limit: int = key(
        Size(1 << 20, 1 << 36),
        "64MiB",
        "A guest that has written this much to its replicated disks since its last checkpoint waits until "
        "the next one is taken. What is written after that, while it is being stopped, fits up to four "
        "times this; so much memory each checkpoint on its way may take for it, on either host.",
    )
    disk_copy_rate: int | None = key(
        Rate(1 << 20, 1 << 40),
        None,
        "How fast the first copy of the replicated disks may be, and the copy of what has changed after an "
        "outage: the reading of the disk, be it sent or only compared. What the guest writes meanwhile is "
        "sent at once, always.",
        shown="no limit: until the copy is done the VM is unprotected",
    )
    autostart: bool = key(Flag(), False, "Protect the VM by itself when the daemon starts.")
    standby: StandbyConfig = attrs.field(factory=StandbyConfig, metadata={"table": StandbyConfig})
    network: NetworkConfig = attrs.field(factory=NetworkConfig, metadata={"table": NetworkConfig})


_TABLES: dict[str, type[Any]] = {
    field.name: field.metadata["table"] for field in attrs.fields(VmConfig) if "table" in field.metadata
}
"""The tables of a VM's file."""


@frozen
class Config:
    """Everything, checked. `vms` by name, sorted."""

    daemon: DaemonConfig
    vms: Mapping[str, VmConfig]


def load(path: str | os.PathLike[str] | None = None) -> Config:
    """Read the configuration.

    Args:
        path: of curlingd.toml, whose neighbours are read too; None for the default, where it may be absent.

    Raises:
        ConfigError: the first thing that is wrong.
    """
    config, problems = examine(path)
    if problems:
        raise problems[0]
    assert config is not None
    return config


def examine(path: str | os.PathLike[str] | None = None) -> tuple[Config | None, list[ConfigError]]:
    """Read the configuration and return it, or None and everything that is wrong with it."""
    loader = _Loader()
    main = Path(DEFAULT_PATH if path is None else path)
    daemon = loader.daemon(main, may_be_absent=path is None)
    vms = loader.vms(main.parent / "vms", daemon)
    if loader.problems:
        return None, loader.problems
    return Config(daemon, vms), []


class _Loader:
    def __init__(self) -> None:
        self.problems: list[ConfigError] = []

    def daemon(self, main: Path, may_be_absent: bool) -> DaemonConfig:
        values: dict[str, Any] = {}
        origin: dict[str, Path] = {}
        drop_ins = self._files(main.parent / f"{main.name}.d")
        for path in [main, *drop_ins]:
            read = self._keys(DaemonConfig, self._toml(path, may_be_absent and path is main), path)
            values.update(read)
            origin.update(dict.fromkeys(read, path))
        try:
            config = DaemonConfig(**values)
        except ValueError as error:  # only a default that is taken from the host can be wrong here
            self._wrong(main, "host_name", f"not set, and the host's own name cannot serve: {error}")
            config = DaemonConfig(**values, host_name="unnamed")
        limit = config.failure_timeout / _HEARTBEATS_PER_TIMEOUT
        if config.heartbeat_interval > limit:
            wrong = "heartbeat_interval" if "heartbeat_interval" in origin else "failure_timeout"
            self._wrong(
                origin.get(wrong, main),
                wrong,
                f"heartbeat_interval ({format_duration(config.heartbeat_interval)}) is more than a quarter "
                f"of failure_timeout ({format_duration(config.failure_timeout)})",
            )
        return config

    def vms(self, directory: Path, daemon: DaemonConfig) -> dict[str, VmConfig]:
        found: dict[str, VmConfig] = {}
        for path in self._files(directory):
            before = len(self.problems)
            if not NAME.fullmatch(path.stem):
                self._wrong(path, None, f"{path.stem!r} is no name for a VM: {Name().describe()}")
            values = self._keys(VmConfig, self._toml(path), path)
            if len(self.problems) > before:
                continue
            vm = VmConfig(name=path.stem, **values)
            for wrong, problem in _contradictions(vm, daemon, found):
                self._wrong(path, wrong, problem)
            found[vm.name] = vm
        return found

    def _files(self, directory: Path) -> list[Path]:
        try:
            return sorted(
                path for path in directory.iterdir() if path.suffix == ".toml" and path.name[0] != "."
            )
        except FileNotFoundError:
            return []
        except OSError as error:
            self._wrong(directory, None, f"cannot be read: {error.strerror or error}")
            return []

    def _toml(self, path: Path, may_be_absent: bool = False) -> dict[str, Any]:
        try:
            return tomllib.loads(path.read_bytes().decode())
        except OSError as error:
            if not (may_be_absent and isinstance(error, FileNotFoundError)):
                self._wrong(path, None, f"cannot be read: {error.strerror or error}")
        except UnicodeDecodeError as error:
            self._wrong(path, None, f"is not UTF-8 (at byte {error.start})")
        except tomllib.TOMLDecodeError as error:
            self._wrong(path, None, f"is not TOML: {error}")
        except RecursionError:
            self._wrong(path, None, "is not TOML: nested too deeply")
        return {}

    def _keys(
        self, kind: type[Any], table: Mapping[str, Any], path: Path, prefix: str = ""
    ) -> dict[str, Any]:
        """Read what `table` sets of the keys of `kind`; what is wrong with it is noted and left out."""
        fields = {field.name: field.metadata for field in attrs.fields(kind) if field.metadata}
        values: dict[str, Any] = {}
        for name, value in table.items():
            full = prefix + name
            if name not in fields:
                nearest, problem = _nearest(kind, full)
                self.problems.append(ConfigError(str(path), problem, full, nearest))
            elif inner := fields[name].get("table"):
                if isinstance(value, dict):
                    values[name] = inner(**self._keys(inner, value, path, f"{full}."))
                else:
                    self._wrong(path, full, f"is a table: write [{full}] above its keys")
            else:
                try:
                    values[name] = fields[name]["key"].kind.read(value)
                except ValueError as error:
                    self._wrong(path, full, str(error))
        return values

    def _wrong(self, path: Path, wrong: str | None, problem: str) -> None:
        self.problems.append(ConfigError(str(path), problem, wrong))


def _contradictions(
    vm: VmConfig, daemon: DaemonConfig, others: Mapping[str, VmConfig]
) -> Iterator[tuple[str, str]]:
    """Yield the keys of `vm` that are right alone and wrong together, with what is wrong."""
    if vm.qmp is not None and vm.peer is None:
        yield "peer", "missing: with qmp this host protects the VM, so it needs the address of the other host"
    if vm.autostart and vm.qmp is None:
        yield "autostart", "needs qmp: without it this host can only be the VM's backup"
    if vm.peer == daemon.listen:
        yield "peer", f"{vm.peer} is where this daemon itself listens; name the other host"
    if vm.arbiter == "file" and vm.arbiter_directory is None:
        yield "arbiter_directory", 'missing: arbiter = "file" needs it'
    if vm.shortest_epoch > vm.longest_epoch:
        yield (
            "shortest_epoch",
            f"{format_duration(vm.shortest_epoch)} is more than longest_epoch "
            f"({format_duration(vm.longest_epoch)})",
        )
    if both := sorted({*vm.shared_disks} & {*vm.scratch_disks}):
        yield "scratch_disks", f"{', '.join(both)} is in shared_disks too"
    for other in others.values():
        if vm.qmp is not None and vm.qmp == other.qmp:
            yield "qmp", f"{vm.qmp} is the socket of {other.name} too"


def _nearest(kind: type[Any], name: str) -> tuple[str | None, str]:
    """Find the key somebody meant by `name`, and say what is wrong with `name`."""
    table, dot, last = name.rpartition(".")
    if dot and last in _names(VmConfig):
        return last, f"unknown key: it belongs above the line [{table}]"
    if kind is not DaemonConfig:
        for other, other_kind in _TABLES.items():
            if other_kind is not kind and last in _names(other_kind):
                return f"{other}.{last}", f"unknown key: it belongs below the line [{other}]"
    if kind is VmConfig and name in _names(DaemonConfig):
        return None, "unknown key: it belongs in curlingd.toml"
    if kind is DaemonConfig and name in _names(VmConfig):
        return None, "unknown key: it belongs in the file of a VM"
    candidates = _names(kind, f"{table}." if dot else "")
    return next(iter(difflib.get_close_matches(name, candidates, 1)), None), "unknown key"


def _names(kind: type[Any], prefix: str = "") -> list[str]:
    return [prefix + field.name for field in attrs.fields(kind) if field.metadata]


def reference() -> str:
    """Write the reference of all keys in Markdown, as docs/configuration.md has it."""
    parts = [_INTRODUCTION]
    for title, kind, prefix in (
        ("curlingd.toml", DaemonConfig, ""),
        ("vms/NAME.toml", VmConfig, ""),
        *((f"[{name}] in vms/NAME.toml", kind, f"{name}.") for name, kind in _TABLES.items()),
    ):
        parts.append(f"## {title}\n")
        for field in attrs.fields(kind):
            known: Key[Any] | None = field.metadata.get("key")
            if known is not None:
                parts.append(
                    f"### {prefix}{field.name}\n\n{textwrap.fill(known.doc, 110)}\n\n"
                    f"- Value: {known.kind.describe()}\n- Default: {known.default}\n"
                )
    return "\n".join(parts)


_INTRODUCTION = """\
# Configuration

<!-- Made by curling_fd.service.config.reference(): change the classes there. -->

All files are TOML.

| file | what it is |
| --- | --- |
| `/etc/curling/curlingd.toml` | the daemon; everything has a default, so it may be absent |
| `/etc/curling/curlingd.toml.d/*.toml` | drop-ins in the order of their names; what a later one sets counts |
| `/etc/curling/vms/NAME.toml` | the VM called NAME: 1 to 64 letters, digits, `.`, `_`, `-` |

`curlingctl check-config` reads them as the daemon would and tells everything that is wrong. An unknown key is
an error. Durations are text with a unit: `us`, `ms`, `s`, `min`, `h`. Sizes are text with a unit, `B`, `KiB`,
`MiB`, `GiB`, `TiB`, or a whole number of bytes.

A VM that this host protects:

```toml
# /etc/curling/vms/db1.toml
qmp = "/run/vm/db1-curling.qmp"
peer = "host-b.example.org:9271"
scratch_disks = ["swap0"]
```

The backup needs a file of the same name. It may be empty, or say what differs there and how to come back
after a failover:

```toml
# /etc/curling/vms/db1.toml
peer = "host-a.example.org:9271"

[standby]
qemu = "/usr/bin/qemu-system-x86_64"
replace = { "/srv/a/db1.iso" = "/srv/b/db1.iso" }
```
"""


if __name__ == "__main__":
    print(reference(), end="")
