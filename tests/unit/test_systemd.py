"""What systemd says to a service, and what it is told."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from curling_fd.errors import ConfigError
from curling_fd.system.systemd import ServiceManager
from tests.lab.manager import ServiceManager as StoringManager

PID = 4711


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        sock.listen()
        yield sock


def passed(sock: socket.socket, names: str = "control", count: str = "1", pid: int = PID) -> ServiceManager:
    """A service that finds `sock` where its passed sockets begin."""
    environ = {"LISTEN_FDS": count, "LISTEN_FDNAMES": names, "LISTEN_PID": str(pid)}
    return ServiceManager(environ, PID, first_fd=sock.fileno())


def test_without_systemd_nothing_happens() -> None:
    manager = ServiceManager({}, PID)
    assert manager.activated("control") is None
    assert not manager.is_activated("control")
    assert manager.watchdog is None
    manager.notify("READY=1")


def test_a_passed_socket_is_found_by_its_name(listening: socket.socket) -> None:
    os.set_inheritable(listening.fileno(), True)
    manager = passed(listening)
    assert not os.get_inheritable(listening.fileno())
    assert manager.is_activated("control")
    for _ in range(2):
        sock = manager.activated("control")
        assert sock is not None
        with sock:
            assert sock.getsockname() == listening.getsockname()
            assert not os.get_inheritable(sock.fileno())
    assert manager.activated("other") is None


def test_the_second_of_two_sockets_is_found(listening: socket.socket) -> None:
    """They follow one another; the first is standard error here, which nobody asks for."""
    second = os.dup2(listening.fileno(), 3 + 200, inheritable=True)
    first = os.dup2(2, 2 + 200, inheritable=True)
    manager = ServiceManager(
        {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "other:control", "LISTEN_PID": str(PID)}, PID, first_fd=first
    )
    sock = manager.activated("control")
    assert sock is not None
    with sock:
        assert sock.getsockname() == listening.getsockname()
    os.close(first)
    os.close(second)


def test_sockets_for_another_process_are_not_ours(listening: socket.socket) -> None:
    assert passed(listening, pid=PID + 1).activated("control") is None


@pytest.mark.parametrize("count", ["", "none", "-1"])
def test_a_count_that_is_no_number_means_none(listening: socket.socket, count: str) -> None:
    assert passed(listening, count=count).activated("control") is None


def test_a_socket_without_a_name_is_unknown(listening: socket.socket) -> None:
    assert passed(listening, names="").is_activated("unknown")
    environ = {"LISTEN_FDS": "1", "LISTEN_PID": str(PID), "LISTEN_FDNAMES": "a:b"}
    assert ServiceManager(environ, PID, first_fd=listening.fileno()).is_activated("a")


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_socket_that_does_not_listen_is_a_mistake_in_the_unit(kind: int) -> None:
    with socket.socket(socket.AF_UNIX, kind) as sock, pytest.raises(ConfigError) as caught:
        passed(sock).activated("control")
    assert caught.value.key == "ListenStream"


def test_a_network_socket_is_a_mistake_in_the_unit() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock, pytest.raises(ConfigError):
        passed(sock).activated("control")


def test_programs_started_later_do_not_see_the_variables() -> None:
    environ = {
        "LISTEN_FDS": "0", "LISTEN_FDNAMES": "", "LISTEN_PID": "1", "NOTIFY_SOCKET": "/x",
        "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "HOME": "/root",
    }  # fmt: skip
    ServiceManager(environ, PID)
    assert environ == {"HOME": "/root"}


@pytest.mark.parametrize("abstract", [False, True])
def test_the_manager_is_told_in_one_message(tmp_path: Path, abstract: bool) -> None:
    name = f"@curling-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name[1:] if abstract else name)
        manager = ServiceManager({"NOTIFY_SOCKET": name}, PID)
        manager.notify("READY=1", "STATUS=2 protected")
        manager.notify("STATUS=one\nMAINPID=1")
        assert sock.recv(1000) == b"READY=1\nSTATUS=2 protected"
        assert sock.recv(1000) == b"STATUS=one MAINPID=1"


def test_a_manager_that_is_busy_or_gone_does_not_stop_us(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    manager = ServiceManager({"NOTIFY_SOCKET": path}, PID)
    manager.notify("READY=1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        for _ in range(10_000):
            manager.notify("WATCHDOG=1")


@pytest.mark.parametrize(
    ("microseconds", "pid", "seconds"),
    [
        ("10000000", "", 10.0),
        ("500000", str(PID), 0.5),
        ("500000", str(PID + 1), None),
        ("0", "", None),
        ("soon", "", None),
        ("", "", None),
    ],
)
def test_the_watchdog_is_ours_if_it_names_us_or_nobody(
    microseconds: str, pid: str, seconds: float | None
) -> None:
    environ = {"WATCHDOG_USEC": microseconds, "WATCHDOG_PID": pid}
    assert ServiceManager(environ, PID).watchdog == seconds


# The store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StoringManager]:
    kept = StoringManager(tmp_path / "notify")
    yield kept
    kept.close()


def service_of(kept: StoringManager, **environ: str) -> ServiceManager:
    return ServiceManager({"NOTIFY_SOCKET": str(kept.path), **environ}, PID)


def test_what_is_kept_is_a_duplicate_and_stays_until_it_is_forgotten(store: StoringManager) -> None:
    manager = service_of(store)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        manager.keep("db1/link", theirs.fileno())
        manager.keep("db1/other", theirs.fileno())
        assert manager.settled()
        assert store.store.keys() == {"db1/link", "db1/other"}
        assert "FDPOLL=0" in store.heard[0]
        theirs.close()
        manager.forget(["db1/link"])
        assert manager.settled()
        assert store.store.keys() == {"db1/other"}
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            ours.recv(1)
        manager.forget(["db1/other", "db1/unknown"])
        assert manager.settled()
        assert ours.recv(1) == b"", "nobody holds the other end any more"


def test_what_was_kept_is_found_by_name_and_is_close_on_exec(listening: socket.socket) -> None:
    first = os.dup2(listening.fileno(), 300, inheritable=True)
    kept = os.dup2(listening.fileno(), 301, inheritable=True)
    manager = ServiceManager(
        {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "control:db1/link", "LISTEN_PID": str(PID)}, PID, first_fd=first
    )
    assert manager.kept() == {"db1/link": kept}
    assert manager.kept() == {}
    assert manager.is_activated("control")
    assert not os.get_inheritable(kept)
    for fd in (first, kept):
        os.close(fd)


def test_without_a_manager_nothing_is_kept_and_nothing_waits() -> None:
    manager = ServiceManager({}, PID)
    assert not manager.keeps
    assert not manager.settled()
    with pytest.raises(OSError, match="Invalid argument"):
        manager.keep("db1/link", 0)


def test_a_manager_that_is_gone_does_not_make_us_wait(store: StoringManager) -> None:
    manager = service_of(store)
    store.close()
    assert not manager.settled()
