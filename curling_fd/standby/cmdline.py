"""The standby's command line, made from the primary's own.

The standby must be the same machine with the same devices, and must share nothing with the primary that two
QEMUs cannot share. Every option is handled by what it is for:

    the machine itself (-cpu, -smp, -device, -kernel, -drive ...)     kept; `replace` may change paths
    its memory                                                        on the files of the RAM image
    what QEMU makes on its host (monitor sockets, logs, VNC sockets)  renamed into the standby's own directory
    how that one QEMU was started (-daemonize, -pidfile, -S, -gdb)    left out
    what cannot be known from here (-readconfig, descriptors that     refused, by name
    were handed over, servers QEMU connected to)

A command line made here can be the primary's in turn, after a failover, and comes out the same again.

Source: qemu `qemu-options.hx` and `softmmu/vl.c`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from curling_fd.standby.hostside import HostSide
from curling_fd.standby.keyval import Keyval, Properties
from curling_fd.standby.memory import RamBlock, StandbyMemory, guest_memory, is_backend
from curling_fd.standby.options import CommandLine, Option, cannot, parse, words_of
from curling_fd.standby.paths import Paths, TooLong

__all__ = [
    "QMP_ID", "CommandLine", "Option", "RamBlock", "device_ids", "guest_memory", "parse", "standby_argv",
]  # fmt: skip

QMP_ID = "curling-qmp"
"""The chardev of the QMP socket every standby has for its daemon."""

LEFT_OUT = frozenset([
    # Said by us instead, or about the primary's own start.
    "incoming", "S", "loadvm", "daemonize", "pidfile", "mem-path", "mem-prealloc", "writeconfig",
    # Debugging of that one process.
    "s", "gdb", "qtest", "qtest-log", "trace",
    # About a window; see HostSide.display.
    "sdl", "curses", "full-screen", "no-frame", "no-quit", "alt-grab", "ctrl-grab",
    # What still uses the descriptors afterwards is refused.
    "add-fd",
])  # fmt: skip

REFUSED = {
    "readconfig": "the devices in its file are not part of the command line",
    "run-with": "it changes who QEMU runs as and what it can reach",
    "preconfig": "the machine was configured by commands that are not part of the command line",
}

SET_GROUPS = frozenset(["boot-opts", "device", "drive", "global", "rtc", "smp-opts"])
"""Groups -set may change without our having to look: none of them has paths or descriptors we change."""

PASSED_FD_PATH = re.compile(r"/dev/fdset/|/dev/fd/|/proc/self/fd/")


def standby_argv(
    argv: Sequence[str],
    *,
    binary: str,
    ram: Sequence[RamBlock],
    qmp_path: str,
    directory: str,
    machine: str | None = None,
    replace: Mapping[str, str] | None = None,
    extra: Sequence[str] = (),
    taps: Mapping[int, str] | None = None,
) -> list[str]:
    """Make the standby's command line.

    Args:
        argv: the primary's, as /proc/PID/cmdline has it.
        binary: the QEMU to start here.
        ram: the guest's memory blocks (see `guest_memory`), each with the fd the standby inherits. Borrowed.
        qmp_path: where the standby makes its QMP socket for its daemon.
        directory: where everything else goes that the standby makes.
        machine: the primary's machine type as QEMU resolved it; `pc` alone means another one in each version.
        replace: texts in the primary's command line, and what stands there instead.
        extra: words to add, unless the command line has them already.
        taps: descriptors of taps that the primary's QEMU was started with, and the interfaces' names.

    Raises:
        CannotDerive: an option stands in the way.
    """
    line = parse(argv)
    paths = Paths(directory, replace or {}, frozenset([qmp_path.rpartition("/")[2]]))
    memory = StandbyMemory(line, ram)
    derivation = _Derivation(line, memory, HostSide(paths, taps), paths)
    options = [Option("machine", memory.machine(line, machine).map(lambda _, v: paths.read(v)).render())]
    options += derivation.options()
    if not any(option.name in ("display", "nographic") for option in options):
        options.append(Option("display", "none"))
    words = words_of([*options, *memory.added()])
    if not _contains(words, extra):
        words += extra
    qmp = Keyval((("id", QMP_ID), ("path", qmp_path), ("server", "on"), ("wait", "off")))
    words += ["-chardev", f"socket,{qmp.render()}", "-mon", f"chardev={QMP_ID},mode=control"]
    # -S too: once its state is loaded the standby runs when it is told to, and not by itself.
    return [binary, *words, "-incoming", "defer", "-S"]


def device_ids(argv: Sequence[str]) -> frozenset[str]:
    """The ids of all -device on a command line.

    A VM whose /machine/peripheral has others was changed since its start, and a standby would not be the same
    machine.
    """
    return frozenset(option.get("id") for option in parse(argv).named("device")) - {""}


class _Derivation:
    def __init__(self, line: CommandLine, memory: StandbyMemory, host: HostSide, paths: Paths) -> None:
        self._line = line
        self._memory = memory
        self._paths = paths
        self._host = host

    def options(self) -> list[Option]:
        """The standby's options but for -machine and what no primary has."""
        options = []
        for option in self._line.options:
            try:
                new = self._option(option)
            except TooLong as error:
                raise cannot(option, f"{error} is too long for a socket") from None
            except ValueError as error:
                raise cannot(option, f"its properties cannot be read: {error}") from None
            if new is None:
                continue
            passed = new.word is not None and new.name != "append" and PASSED_FD_PATH.search(new.word)
            if passed and not is_backend(new):
                raise cannot(option, "it uses a descriptor its QEMU was started with")
            options.append(new)
        return options

    def _option(self, option: Option) -> Option | None:
        """What stands in the standby's command line for `option`; None for nothing."""
        name, word = option.name, option.word
        if name in LEFT_OUT or name in ("machine", "M"):
            return None
        if name in REFUSED:
            raise cannot(option, REFUSED[name])
        if word is None:
            return option
        if name in ("serial", "parallel", "debugcon", "monitor", "qmp", "qmp-pretty"):
            return Option(name, self._host.chardev_string(option, word))
        if name == "D":
            return Option(name, self._paths.file(word, "qemu.log"))
        old = option.properties
        if old is None:
            return Option(name, self._paths.read(word))
        new = self._properties(option, old)
        if new is None or new == old:
            # What is not changed keeps its spelling.
            return None if new is None else option
        return Option(name, new.render())

    def _properties(self, option: Option, old: Properties) -> Properties | None:
        host = self._host
        match option.name:
            case "object":
                return self._object(option, old)
            case "chardev":
                return None if old.get("id") == QMP_ID else host.chardev(option, old, old.get("backend"))
            case "mon":
                return None if old.get("chardev") == QMP_ID else old
            case "netdev" | "nic" | "net":
                return host.netdev(option, old)
            case "vnc":
                return host.vnc(option, old)
            case "display":
                return host.display(option, old)
            case "spice":
                return host.spice(option, old)
            case "audiodev":
                return host.audiodev(option, old)
            case "fsdev" | "virtfs":
                return host.fsdev(option, old)
            case "set" if (option.word or "").partition(".")[0] not in SET_GROUPS:
                raise cannot(option, "it changes another option; write the value there instead")
            case _:
                return host.plain(option, old)

    def _object(self, option: Option, old: Properties) -> Properties | None:
        if is_backend(option):
            return self._memory.replaced(option, old)
        kind, ident = old.get("qom-type"), old.get("id") or ""
        if kind == "filter-dump":
            return self._host.filter_dump(option, old)
        if kind == "secret" and old.get("file") is not None:
            # A key for other secrets, in a file of the primary's host. Where none uses it, none is missed.
            others = (other.word or "" for other in self._line.options if other is not option)
            if not any(ident in word for word in others):
                return None
        return self._host.plain(option, old)


def _contains(words: Sequence[str], part: Sequence[str]) -> bool:
    return any(list(words[i : i + len(part)]) == list(part) for i in range(len(words) - len(part) + 1))
