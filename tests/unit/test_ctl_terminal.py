"""curlingctl as a process, on a terminal or a pipe: questions, bars, tables in place, Ctrl-C, completion."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from curling_fd.ctl.actions import watching
from curling_fd.ctl.exit_codes import ExitCode
from curling_fd.varlink.listener import open_listener
from curling_fd.varlink.server import serve_connection
from tests.unit.ctl_fake import FakeDaemon

CTL = [sys.executable, "-m", "curling_fd.ctl.main"]
SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
async def daemon(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[FakeDaemon]:
    fake = FakeDaemon(str(tmp_path / "control.sock"))
    handler = partial(serve_connection, service=fake.service())
    nursery.start_soon(partial(trio.serve_listeners, handler, [open_listener(fake.path)]))
    yield fake
    nursery.cancel_scope.cancel()


class Terminal:
    """curlingctl on a terminal of its own, 130 columns wide."""

    def __init__(self, process: trio.Process, master: int) -> None:
        self.process = process
        self.raw = ""
        self._stream = trio.lowlevel.FdStream(master)

    @property
    def text(self) -> str:
        """All that was shown, without colours and movements."""
        return SEQUENCE.sub("", self.raw).replace("\r\n", "\n")

    async def _read(self) -> bool:
        try:
            data = await self._stream.receive_some()
        except trio.BrokenResourceError:  # EIO: the last process on it has ended
            return False
        self.raw += data.decode()
        return bool(data)

    async def see(self, wanted: str) -> None:
        """Wait until `wanted` was shown."""
        while wanted not in self.text:
            assert await self._read(), f"never showed {wanted!r}: {self.raw!r}"

    async def type(self, text: str) -> None:
        await self._stream.send_all(text.encode())

    async def end(self) -> int:
        """Wait for the end and return the exit code."""
        while await self._read():
            pass
        await self._stream.aclose()
        return await self.process.wait()


Start = Callable[..., Awaitable[Terminal]]


@pytest.fixture
async def start(daemon: FakeDaemon, nursery: trio.Nursery) -> Start:
    async def start(*arguments: str, **environment: str) -> Terminal:
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 130, 0, 0))
        env = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
        }
        env |= {"TERM": "xterm-256color", **environment}
        command = [*CTL, "--socket", daemon.path, *arguments]
        try:
            process = await trio.lowlevel.open_process(
                command, stdin=slave, stdout=slave, stderr=slave, env=env
            )
        finally:
            os.close(slave)
        return Terminal(process, master)

    return start


async def test_failover_asks_and_goes_ahead_when_the_name_is_typed(daemon: FakeDaemon, start: Start) -> None:
    terminal = await start("failover", "we")
    await terminal.see("Type the VM's name to go ahead: ")
    assert "Fail web over to this host." in terminal.text
    assert "Now: backup here, suspect, peer host-c:9271, newest checkpoint 23 ms old." in terminal.text
    await terminal.type("web\n")
    assert await terminal.end() == 0
    assert "web is active, primary here" in terminal.text


@pytest.mark.parametrize(
    ("command", "answer"),
    [("failover", "y\n"), ("failover", "\x04"), ("unprotect", "we\n"), ("switch", "\n")],
)
async def test_any_other_answer_changes_nothing(
    daemon: FakeDaemon, start: Start, command: str, answer: str
) -> None:
    terminal = await start(command, "web")
    await terminal.see("go ahead: ")
    await terminal.type(answer)
    assert await terminal.end() == ExitCode.FAILED
    assert "Nothing was changed" in terminal.text
    assert [method for method, _ in daemon.calls] == ["Show"]


async def test_a_question_can_be_interrupted(daemon: FakeDaemon, start: Start) -> None:
    terminal = await start("switch", "db1")
    await terminal.see("go ahead: ")
    terminal.process.send_signal(signal.SIGINT)
    assert await terminal.end() == ExitCode.INTERRUPTED
    assert "Interrupted; nothing was changed." in terminal.text
    assert [method for method, _ in daemon.calls] == ["Show"]


async def test_protect_draws_a_bar_with_size_and_rate(daemon: FakeDaemon, start: Start) -> None:
    terminal = await start("protect", "idle")
    assert await terminal.end() == 0
    assert "idle: first pass" in terminal.text
    assert re.search(r"100\.0/100\.0 MiB", terminal.text)
    assert terminal.text.rstrip().endswith("idle is protected, primary here")
    assert terminal.raw.count("\x1b[?25h") == terminal.raw.count("\x1b[?25l")


async def test_list_on_a_terminal_is_coloured_and_aligned(daemon: FakeDaemon, start: Start) -> None:
    terminal = await start("list")
    assert await terminal.end() == 0
    assert re.search(r"\x1b\[32mprotected", terminal.raw)
    assert re.search(r"\x1b\[1;31munprotected", terminal.raw)
    assert all(len(line) <= 130 for line in terminal.text.splitlines())
    assert re.search(
        r"db1 +primary +protected +incremental +host-b:9271 +21\.3 +1\.04 ms +23 ms", terminal.text
    )


async def test_colours_can_be_had_off(daemon: FakeDaemon, start: Start) -> None:
    terminal = await start("list", NO_COLOR="1")
    assert await terminal.end() == 0
    assert "\x1b[3" not in terminal.raw


async def test_show_and_doctor_on_a_terminal(daemon: FakeDaemon, start: Start) -> None:
    terminal = await start("show", "web")
    assert await terminal.end() == 0
    assert re.search(r"state +suspect", terminal.text)
    terminal = await start("doctor")
    assert await terminal.end() == ExitCode.FAILED
    assert re.search(r"failed +db1 +peer +no answer", terminal.text)


async def test_watch_redraws_in_place_and_ends_with_ctrl_c(daemon: FakeDaemon, start: Start) -> None:
    terminal = await start("watch", "--interval", "1h")
    await terminal.see("Ctrl-C ends")
    assert re.search(
        r"db1 +primary +protected +incremental +21\.3 +1\.2 / 1\.0 / 3\.4 +1,230 +23 ms", terminal.text
    )
    await terminal.see("every 60 min")
    terminal.process.send_signal(signal.SIGINT)
    assert await terminal.end() == ExitCode.INTERRUPTED
    assert "\x1b[1A" in terminal.raw
    assert terminal.raw.rindex("\x1b[?25h") > terminal.raw.rindex("\x1b[?25l")
    assert "Traceback" not in terminal.raw
    await daemon.cancelled.wait()


@pytest.mark.parametrize("command", [("events",), ("protect", "idle"), ("list", "--json")])
async def test_ctrl_c_is_clean_wherever_it_comes(
    daemon: FakeDaemon, start: Start, command: tuple[str, ...]
) -> None:
    daemon.hangs = True
    terminal = await start(*command)
    await daemon.called.wait()
    terminal.process.send_signal(signal.SIGINT)
    assert await terminal.end() == ExitCode.INTERRUPTED
    assert "Interrupted" in terminal.text
    assert ("goes on in curlingd" in terminal.text) == (command[0] == "protect")
    assert "Traceback" not in terminal.text


async def test_a_reader_that_has_seen_enough_is_no_error_worth_words(
    daemon: FakeDaemon, tmp_path: Path
) -> None:
    read, write = os.pipe()
    os.close(read)
    with (tmp_path / "err").open("wb") as err:
        process = await trio.lowlevel.open_process(
            [*CTL, "--socket", daemon.path, "watch"], stdin=subprocess.DEVNULL, stdout=write, stderr=err
        )
        os.close(write)
        assert await process.wait() == ExitCode.FAILED
    assert (tmp_path / "err").read_text() == ""


async def test_a_locale_that_cannot_write_a_name_is_no_traceback(daemon: FakeDaemon) -> None:
    daemon.vms["db1"]["reason"] = "Ω not found"
    done = await trio.run_process(
        [*CTL, "--socket", daemon.path, "list"],
        capture_stdout=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert b"\\u03a9 not found" in done.stdout


class Frozen:
    """Replies that come late: the third wait is the one that gets one."""

    def __init__(self) -> None:
        self.waits = 0

    async def __anext__(self) -> dict[str, Any]:
        self.waits += 1
        if self.waits < 3:
            await trio.sleep_forever()
        return {"vms": []}


class Shown:
    def __init__(self) -> None:
        self.silences = 0

    def silent(self) -> None:
        self.silences += 1


async def test_a_daemon_that_falls_silent_is_told_while_watching(
    autojump_clock: trio.testing.MockClock,
) -> None:
    shown = Shown()
    assert await watching._next(Frozen(), shown, 1.0) == {"vms": []}  # type: ignore[arg-type]
    assert shown.silences == 2


@pytest.fixture(scope="module")
def completion_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = tmp_path_factory.mktemp("completion") / "curlingctl.bash"
    script.write_bytes(subprocess.run([*CTL, "completion", "bash"], check=True, capture_output=True).stdout)
    return script


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("curlingctl sh", "show"),
        ("curlingctl show m", "mail1 mail2"),
        ("curlingctl failover web --con", "--confirm"),
        ("curlingctl failover web --confirm d", "db1"),
        ("curlingctl --json protect d", "db1"),
        ("curlingctl completion z", "zsh"),
    ],
)
def test_bash_completes_commands_options_and_names_of_vms(
    completion_script: Path, line: str, completed: str
) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    asked = (
        'curlingctl() { printf \'db1\\nmail1\\nmail2\\n\'; }; source "$0"; COMP_WORDS=("$@"); '
        'COMP_CWORD=$(($# - 1)); _shtab_curlingctl curlingctl "${@: -1}"; echo "${COMPREPLY[*]}"'
    )
    done = subprocess.run(
        [bash, "-c", asked, str(completion_script), *line.split()], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == completed
