"""What a QEMU makes and uses on its host: sockets, logs, displays. The standby gets its own.

Sources: qemu `chardev/char.c` (qemu_chr_parse_compat for the `unix:PATH` form), `qapi/char.json`,
`qapi/net.json`, `ui/vnc.c`, `audio/audio.c`.
"""

from __future__ import annotations

from collections.abc import Mapping

from curling_fd.standby.keyval import Keyval, Properties
from curling_fd.standby.options import Option, cannot
from curling_fd.standby.paths import Paths

PASSED_FD_KEYS = frozenset(["fd", "fds", "vhostfd", "vhostfds", "sock_fd"])
"""Properties that hold the number of a descriptor QEMU was started with."""

HOST_DEVICES = frozenset(["pipe", "serial", "tty", "parallel", "parport"])
"""Chardevs on something of the host that serves one QEMU."""

HEADLESS = frozenset(["none", "egl-headless"])
HEADLESS_AUDIO = frozenset(["none", "wav", "spice"])
"""Displays and sound that need nobody's desktop."""


class HostSide:
    """The options that reach out of QEMU: each method takes their old properties and returns the new."""

    def __init__(self, paths: Paths, taps: Mapping[int, str] | None = None) -> None:
        self._paths = paths
        self._taps = taps or {}

    def plain(self, option: Option, old: Properties) -> Properties:
        """An option that only reads: paths as the administrator told.

        Raises:
            CannotDerive: it has a descriptor its QEMU was started with, which nobody can have again.
        """
        for key, value in old.walk():
            last = key.rpartition(".")[2]
            if last in PASSED_FD_KEYS or (last == "type" and value == "fd" and key != "type"):
                raise cannot(option, f"{key}={value} is a descriptor its QEMU was started with")
        return old.map(lambda _, value: self._paths.read(value))

    def chardev(self, option: Option, old: Properties, backend: str | None) -> Properties:
        """A chardev, from -chardev or from the short form of -serial and its like."""
        name = old.get("id") or option.name
        path = old.get("path")
        if backend == "socket" and is_on(old, "server"):
            if old.get("fd") is not None:
                # A listening socket that was made for its QEMU beforehand: this QEMU makes its own.
                old, path = old.drop("fd"), ""
            new = self.plain(option, old)
            if path is not None and not is_on(old, "abstract"):
                new = new.set("path", self._paths.socket(path, f"{name}.sock"))
            # The standby must start without anybody connecting to it.
            new = new.set("server", "on").set("wait", "off")
        else:
            new = self.plain(option, old)
            if path is None or (backend == "socket" and (is_on(old, "abstract") or _connects_later(old))):
                pass
            elif backend == "socket" or backend in HOST_DEVICES:
                new = new.set("path", self.server_of_one(option, path))
            elif backend in ("file", "pty"):
                new = new.set("path", self._paths.file(path, f"{name}.log"))
        logfile = old.get("logfile")
        return new if logfile is None else new.set("logfile", self._paths.file(logfile, f"{name}.log"))

    def chardev_string(self, option: Option, word: str) -> str:
        """The short form, `unix:PATH,server=on`, as -serial, -monitor and -qmp take it."""
        mux, text = ("mon:", word[4:]) if word.startswith("mon:") else ("", word)
        if text.startswith("/dev/") and text != "/dev/null":
            return mux + self.server_of_one(option, text)
        kind, colon, rest = text.partition(":")
        if kind == "unix":
            rest = self.chardev(option, Keyval.parse(rest, "path"), "socket").render()
        elif kind == "file":
            rest = self._paths.file(rest, f"{option.name}.log")
        elif kind == "pipe":
            rest = self.server_of_one(option, rest)
        elif kind in ("tcp", "telnet", "tn3270", "websocket"):
            address, _, flags = rest.partition(",")
            properties = Keyval.parse(flags)
            if is_on(properties, "server"):
                properties = properties.set("wait", "off")
            rest = ",".join(filter(None, [self._paths.read(address), properties.render()]))
        else:
            return mux + self._paths.read(text)
        return f"{mux}{kind}{colon}{rest}"

    def netdev(self, option: Option, old: Properties) -> Properties:
        """A netdev; those on UNIX sockets (stream, dgram) listen in the standby's directory.

        The standby opens its taps itself, by the names they have on the primary. No script is run for them:
        they are made, put into bridges and up by the daemon.
        """
        if old.get("type") == "tap":
            old = self._tap(old)
        new = self.plain(option, old)
        name = f"{old.get('id') or option.name}.sock"
        for end, listens in (("addr", is_on(old, "server")), ("local", True), ("remote", False)):
            path = old.get(f"{end}.path")
            if path is None or is_on(old, f"{end}.abstract"):
                continue
            if listens:
                new = new.set(f"{end}.path", self._paths.socket(path, name))
            elif not _connects_later(old):
                new = new.set(f"{end}.path", self.server_of_one(option, path))
        return new

    def _tap(self, old: Properties) -> Properties:
        numbers = [word for key in ("fd", "fds") for word in (old.get(key) or "").split(":") if word]
        names = {self._taps.get(int(number)) if number.isdecimal() else None for number in numbers}
        name = names.pop() if len(names) == 1 else None
        if name is not None:
            old = old.drop("fd", "fds", "vhostfd", "vhostfds").set("ifname", name)
            if len(numbers) > 1:
                old = old.set("queues", str(len(numbers)))
        if old.get("ifname") is not None:
            old = old.set("script", "no").set("downscript", "no")
        return old

    def filter_dump(self, option: Option, old: Properties) -> Properties:
        """A filter-dump object, which writes a file."""
        path = self._paths.file(old.get("file") or "", f"{old.get('id')}.pcap")
        return self.plain(option, old).set("file", path)

    def fsdev(self, option: Option, old: Properties) -> Properties:
        """A shared folder; the proxy kind connects to a server."""
        new, path = self.plain(option, old), old.get("socket")
        return new if path is None else new.set("socket", self.server_of_one(option, path))

    def spice(self, option: Option, old: Properties) -> Properties:
        """SPICE, on a UNIX socket or on ports."""
        new = self.plain(option, old)
        if is_on(old, "unix"):
            return new.set("addr", self._paths.socket(old.get("addr") or "", "spice.sock"))
        return new

    def vnc(self, option: Option, old: Properties) -> Properties:
        """VNC, on a UNIX socket or on ports."""
        new, address = self.plain(option, old), old.get("vnc") or ""
        if not address.startswith("unix:"):
            return new
        return new.set("vnc", f"unix:{self._paths.socket(address[5:], 'vnc.sock')}")

    def display(self, option: Option, old: Properties) -> Properties:
        """A display that needs somebody's desktop becomes none; the guest sees no difference."""
        if old.get("vnc") is not None:
            return self.vnc(option, old)
        return self.plain(option, old) if old.get("type") in HEADLESS else Keyval(((None, "none"),), "type")

    def audiodev(self, option: Option, old: Properties) -> Properties:
        """Sound that needs somebody's desktop goes nowhere; the guest sees no difference."""
        new = self.plain(option, old)
        if old.get("driver") not in HEADLESS_AUDIO:
            return new.drop(*(key for key in new.names() if key not in ("driver", "id"))).set(
                "driver", "none"
            )
        path = old.get("path")
        return new if path is None else new.set("path", self._paths.file(path, f"{old.get('id')}.wav"))

    def server_of_one(self, option: Option, path: str) -> str:
        """The path of something that serves one QEMU, as the administrator told.

        Raises:
            CannotDerive: nothing was told.
        """
        told = self._paths.told(path)
        if told is None:
            raise cannot(option, f"{path} serves the primary's QEMU; name the standby's in standby.replace")
        return told


def is_on(properties: Properties, key: str) -> bool:
    """Whether a switch is on, in any of QEMU's spellings."""
    return properties.get(key) in ("on", "yes", "true", "y")


def _connects_later(properties: Properties) -> bool:
    """Whether a client keeps trying in the background: what it seeks is a service every host has."""
    return any(properties.get(key) not in (None, "0") for key in ("reconnect", "reconnect-ms"))
