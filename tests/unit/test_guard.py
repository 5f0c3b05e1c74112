"""The parts of the guard that need no process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

from curling_fd.system import guard_main
from curling_fd.system.guard import ANSWER, LOST_HEARTBEAT, Guard


def test_the_will_is_written_whole_over_many_small_writes() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        payload = b"x" * 100_000
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        assert guard_main.write_will(ours.fileno(), payload)
        received = b""
        while len(received) < len(payload):
            received += theirs.recv(1 << 16)
        assert received == payload


def test_a_connection_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_main, "WRITE_SECONDS", 0.02)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert not guard_main.write_will(ours.fileno(), b"x" * (8 << 20))


def test_a_connection_that_is_closed_is_given_up() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours:
        assert not guard_main.write_will(ours.fileno(), b"x")


@pytest.mark.parametrize(
    "chunks",
    [
        [b'{"return": {}, "id": ', ANSWER, b"}\r\n"],
        [b'{"event": 1}\r\n{"id": "curling', b'-guard"}\r\n'],
        [b'{"return": {}, "id": 7}\r\n', b'{"id": ' + ANSWER + b"}\r\n"],
    ],
)
def test_the_answer_is_found_among_other_messages(chunks: list[bytes]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for chunk in chunks:
            theirs.send(chunk)
        said = guard_main.answers_from(ours.fileno(), ANSWER, time.monotonic() + 60)
        assert ANSWER in said
        assert b"event" not in said


def test_waiting_for_the_answer_ends_with_the_connection() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours:
        assert guard_main.answers_from(ours.fileno(), ANSWER, time.monotonic() + 60) == b""


def test_waiting_for_the_answer_is_bounded() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert guard_main.answers_from(ours.fileno(), ANSWER, time.monotonic() + 0.02) == b""


def test_a_will_that_comes_too_early_is_written_again() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b'{"error": {"class": "GenericError"}, "id": ' + ANSWER + b"}\r\n")
        theirs.shutdown(socket.SHUT_WR)
        guard_main.write_until_obeyed(ours.fileno(), b"cont\n", ANSWER)
        assert theirs.recv(64) == b"cont\ncont\n"


def test_the_will_names_the_answer_it_waits_for() -> None:
    assert ANSWER in LOST_HEARTBEAT


def test_a_deadline_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="1 ms"):
        Guard.start_write(0, b"x", 0)


def test_the_guards_process_imports_next_to_nothing() -> None:
    """It stays in memory as long as a VM is protected."""
    folder = os.path.dirname(guard_main.__file__)
    code = f"import sys; sys.path[:0] = [{folder!r}]; import guard_main; print(len(sys.modules))"
    run = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, check=True)
    assert int(run.stdout) < 60
