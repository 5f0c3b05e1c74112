"""Hosts made of network namespaces: each with its own address, joined by a link that can be cut.

They share the file system and the process table of this machine; a Host has a folder of its own, and knows
which processes are its own by the network namespace they are in. Needs root.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from .debs import run

_NAMESPACES = Path("/run/netns")
_INTERFACE = "eth0"
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_serial = itertools.count()


@frozen
class Host:
    """A network namespace with `address` on its end of the link, and `directory` for its files."""

    name: str
    namespace: str
    address: str
    directory: Path

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a process on this host: a child of ours, leading a process group of its own.

        Takes the options of subprocess.Popen.
        """
        with self.entered():
            return subprocess.Popen(list(argv), process_group=0, **options)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Sockets that this thread makes, and processes it starts, in here belong to the host."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            there = os.open(_NAMESPACES / self.namespace, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _set_namespace(there)
            finally:
                os.close(there)
            try:
                yield
            finally:
                _set_namespace(home)
        finally:
            os.close(home)

    def cut(self) -> None:
        """Take this host's end of the link down: nothing passes, and nobody is told by a packet."""
        self._ip("link", "set", _INTERFACE, "down")

    def heal(self) -> None:
        """Undo cut."""
        self._ip("link", "set", _INTERFACE, "up")

    def pids(self) -> set[int]:
        """The processes of this host; not those that have ended and wait to be reaped."""
        return _pids_in(self.namespace)

    def kill_all(self, number: signal.Signals = signal.SIGKILL) -> set[int]:
        """Send a signal to every process of this host, as the loss of the host would; who got it."""
        return _signal_all(self.namespace, number)

    def _ip(self, *arguments: str) -> None:
        with self.entered():
            run(["ip", *arguments])


@contextlib.contextmanager
def two_hosts(names: tuple[str, str] = ("alpha", "beta")) -> Iterator[tuple[Host, Host]]:
    """Two hosts, 10.77.0.1 and 10.77.0.2. At the end their processes, namespaces and folders are removed."""
    remove_leftovers()
    folder = scratch_folder()
    hosts: list[Host] = []
    try:
        for number, name in enumerate(names, 1):
            host = Host(
                name=name,
                namespace=f"curling-{os.getpid()}-{next(_serial)}-{name}",
                address=f"10.77.0.{number}",
                directory=folder / name,
            )
            hosts.append(host)
            host.directory.mkdir()
            run(["ip", "netns", "add", host.namespace])
        one, two = hosts
        ends = ["name", _INTERFACE, "netns", one.namespace, "type", "veth"]
        run(["ip", "link", "add", *ends, "peer", "name", _INTERFACE, "netns", two.namespace])
        for host in hosts:
            host._ip("address", "add", f"{host.address}/24", "dev", _INTERFACE)
            host._ip("link", "set", "lo", "up")
            host.heal()
        yield one, two
    finally:
        for host in hosts:
            _remove_namespace(host.namespace)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def lone_host(name: str = "lone") -> Iterator[Host]:
    """A host without a link, for what happens inside one. It is removed at the end, interfaces and all."""
    remove_leftovers()
    folder = scratch_folder()
    host = Host(name, f"curling-{os.getpid()}-{next(_serial)}-{name}", "", folder)
    try:
        run(["ip", "netns", "add", host.namespace])
        host._ip("link", "set", "lo", "up")
        yield host
    finally:
        _remove_namespace(host.namespace)
        shutil.rmtree(folder, ignore_errors=True)


def scratch_folder() -> Path:
    """A new folder for this process; whoever asks for it removes it."""
    return Path(tempfile.mkdtemp(prefix=f"curling-lab-{os.getpid()}-"))


@contextlib.contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the program the way Ctrl-C does, so that it cleans up after itself."""

    def interrupt(number: int, frame: object) -> None:
        # By way of the signal: Trio has a handler for this one that knows where it is safe to stop.
        signal.raise_signal(signal.SIGINT)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _set_namespace(fd: int) -> None:
    # os.setns is in Python from 3.12 on.
    if _libc.setns(fd, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


def _pids_in(namespace: str) -> set[int]:
    inode = (_NAMESPACES / namespace).stat().st_ino
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if (entry / "ns/net").stat().st_ino == inode:
                    found.add(int(entry.name))
    return found


def _signal_all(namespace: str, number: signal.Signals) -> set[int]:
    """Until nobody is left who has not got it: a process may have forked while the others got theirs."""
    reached: set[int] = set()
    while fresh := _pids_in(namespace) - reached:
        for pid in fresh:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        reached |= fresh
    return reached


def _remove_namespace(namespace: str) -> None:
    if (_NAMESPACES / namespace).exists():
        _signal_all(namespace, signal.SIGKILL)
        run(["ip", "netns", "delete", namespace])


def remove_leftovers() -> None:
    """Namespaces and folders of an earlier run that was killed before it could remove them."""

    def gone(owner: str) -> bool:
        return owner.isdigit() and not Path(f"/proc/{owner}").exists()

    for path in _NAMESPACES.glob("curling-*-*-*"):
        if gone(path.name.split("-")[1]):
            _remove_namespace(path.name)
    for path in Path(tempfile.gettempdir()).glob("curling-lab-*-*"):
        if gone(path.name.split("-")[2]):
            shutil.rmtree(path, ignore_errors=True)
