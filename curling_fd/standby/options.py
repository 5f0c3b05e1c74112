"""QEMU's command line as a list of options, and back into words.

Which options take a word of their own is QEMU's `qemu-options.hx` (7.2 to 11, and those removed shortly
before). How the words are read is `lookup_opt` in `softmmu/vl.c`: one or two dashes, no abbreviations, and
a word without a dash is a disk image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from attrs import frozen

from curling_fd.errors import CannotDerive
from curling_fd.standby.keyval import Properties, parse_properties

FLAGS = frozenset([
    "S", "alt-grab", "async-teardown", "audio-help", "ctrl-grab", "curses", "daemonize", "enable-fips",
    "enable-kvm", "enable-sync-profile", "full-screen", "h", "help", "jitdump", "mem-prealloc", "no-acpi",
    "no-fd-bootchk", "no-frame", "no-hpet", "no-quit", "no-reboot", "no-shutdown", "no-user-config",
    "nodefaults", "nodefconfig", "nographic", "nouserconfig", "old-param", "one-insn-per-tb",
    "only-migratable", "perfmap", "portrait", "preconfig", "s", "sdl", "semihosting", "singlestep",
    "snapshot", "usb", "version", "win2k-hack", "xen-attach", "xen-domid-restrict",
])  # fmt: skip
"""Options that stand alone."""

WITH_WORD = frozenset([
    "D", "L", "M", "accel", "acpitable", "action", "add-fd", "append", "audio", "audiodev", "bios",
    "blockdev", "boot", "cdrom", "chardev", "chroot", "compat", "cpu", "d", "debugcon", "device",
    "dfilter", "display", "drive", "dtb", "dump-vmstate", "echr", "fda", "fdb", "fsdev", "fw_cfg", "g",
    "gdb", "global", "hda", "hdb", "hdc", "hdd", "icount", "incoming", "initrd", "iscsi", "k", "kernel",
    "loadvm", "m", "machine", "mem-path", "mon", "monitor", "msg", "mtdblock", "name", "net", "netdev",
    "nic", "numa", "object", "option-rom", "overcommit", "parallel", "pflash", "pidfile", "plugin",
    "prom-env", "qmp", "qmp-pretty", "qtest", "qtest-log", "readconfig", "rotate", "rtc", "run-with",
    "runas", "sandbox", "sd", "seed", "semihosting-config", "serial", "set", "shim", "smbios", "smp",
    "soundhw", "spice", "tb-size", "tpmdev", "trace", "usbdevice", "uuid", "vga", "virtfs",
    "virtioconsole", "vnc", "watchdog", "watchdog-action", "writeconfig", "xen-domid",
])  # fmt: skip
"""Options followed by a word, whatever it begins with."""

IMPLIED_KEYS = {
    "M": "type", "accel": "accel", "audiodev": "driver", "blockdev": "driver", "chardev": "backend",
    "device": "driver", "display": "type", "drive": None, "fsdev": "fsdriver", "m": "size", "machine": "type",
    "mon": "chardev", "name": "guest", "net": "type", "netdev": "type", "nic": "type", "numa": "type",
    "object": "qom-type", "run-with": None, "set": None, "smbios": None, "spice": None, "tpmdev": "type",
    "virtfs": "fsdriver", "vnc": "vnc",
}  # fmt: skip
"""Options whose word is a list of properties, each with the key its first item may leave out."""


@frozen
class Option:
    """One option.

    `name` is without dashes, and empty for a disk image that stands by itself; `word` is what follows.
    """

    name: str
    word: str | None = None

    @property
    def properties(self) -> Properties | None:
        """The word parsed, or None where it is not a list of properties.

        Raises:
            ValueError: it begins as JSON and is none.
        """
        if self.word is None or self.name not in IMPLIED_KEYS:
            return None
        return parse_properties(self.word, IMPLIED_KEYS[self.name])

    def get(self, key: str) -> str:
        """The property `key`, empty where there is none or the properties cannot be read."""
        try:
            properties = self.properties
        except ValueError:
            return ""
        return (properties.get(key) or "") if properties is not None else ""

    def words(self) -> list[str]:
        """The words of the command line."""
        return [*([f"-{self.name}"] if self.name else []), *([self.word] if self.word is not None else [])]


@frozen
class CommandLine:
    """A QEMU command line: the program and its options in order."""

    program: str
    options: tuple[Option, ...]

    def named(self, *names: str) -> list[Option]:
        """The options of these names, in order."""
        return [option for option in self.options if option.name in names]

    def words(self) -> list[str]:
        """The command line as words, the program first."""
        return [self.program, *words_of(self.options)]


def words_of(options: Iterable[Option]) -> list[str]:
    """The words of `options` one after the other."""
    return [word for option in options for word in option.words()]


def parse(argv: Sequence[str]) -> CommandLine:
    """Take a command line apart, as /proc/PID/cmdline has it: the program first. Never fails.

    An option in neither table is taken to own the next word if that has no dash. Should that be wrong, the
    words still come out in the order they went in.
    """
    options: list[Option] = []
    words = iter(argv[1:])
    held: str | None = None
    while True:
        word = held if held is not None else next(words, None)
        held = None
        if word is None:
            return CommandLine(argv[0] if argv else "", tuple(options))
        if not word.startswith("-"):
            options.append(Option("", word))
            continue
        name = word[2:] if word.startswith("--") else word[1:]
        argument: str | None = None
        if name not in FLAGS:
            argument = next(words, None)
            if name not in WITH_WORD and argument is not None and argument.startswith("-"):
                argument, held = None, argument
        options.append(Option(name, argument))


def cannot(option: Option, why: str) -> CannotDerive:
    """The refusal of `option`, which is named by its id and without its values: they may be secrets."""
    name = f"-{option.name} {option.get('id')}".rstrip() if option.name else "the disk image by itself"
    return CannotDerive(name, why)
